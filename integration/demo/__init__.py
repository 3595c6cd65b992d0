"""``make demo``, ``qemu-remus demo``: a VM under load is killed, and goes on at the other host as if nothing had been.

Owns the story, its order and its verdict; machines, controllers and the toolstack are the harness's.  Of the
controllers it uses only what anybody can: their commands and their control sockets.
"""

from __future__ import annotations

from integration.demo.run import leftovers, main

__all__ = ["leftovers", "main"]
