"""The reference toolstack: whole-VM checkpoints of a plain QEMU, memory and disks, and a VM that goes on from them.

It shows how a toolstack uses the controllers, and it is what the tests of whole-VM failover run.  It keeps a backup of
the memory and holds the guest's output; the disks it leaves to the controllers.
"""

from __future__ import annotations

from integration.toolstack.backup import BackupLink, BackupLost, BackupRefused, open_backup_link, start_backup
from integration.toolstack.failover import Survivor, choose, failover
from integration.toolstack.memory import MemoryImage
from integration.toolstack.output import OutputBuffer
from integration.toolstack.place import memory_directory
from integration.toolstack.protector import MOMENTS, Figures, Hook, Moment, Protector, Step, Toolstack

__all__ = [
    "MOMENTS",
    "BackupLink",
    "BackupLost",
    "BackupRefused",
    "Figures",
    "Hook",
    "MemoryImage",
    "Moment",
    "OutputBuffer",
    "Protector",
    "Step",
    "Survivor",
    "Toolstack",
    "choose",
    "failover",
    "memory_directory",
    "open_backup_link",
    "start_backup",
]
