"""The primary's controller.

``run`` attaches it to QEMU, ``controller`` carries out what :mod:`qemu_remus.core.primary_machine` decides,
``link_keeper`` keeps the link to the secondary, ``work`` does what takes long.  Nothing but :func:`run_primary` is for
others.
"""

from qemu_remus.primary.run import run_primary

__all__ = ["run_primary"]
