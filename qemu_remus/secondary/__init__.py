"""The secondary's controller: it keeps the copy of one VM's disks, and hands it over at a failover.

Owns the engine and its surroundings, the control socket's commands among them.  What may not enter: decisions
(:mod:`qemu_remus.core.secondary_machine`'s), bytes, and policy on disks (:mod:`qemu_remus.storage`).
"""

from qemu_remus.secondary.controller import run_secondary

__all__ = ["run_secondary"]
