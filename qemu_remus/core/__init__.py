"""The pure core: no trio, sockets, files, clock, randomness or logging may be imported here."""
