"""The only package that touches the secondary's (and the primary's own) state on disk."""
