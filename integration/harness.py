"""What integration tests import: machines, controllers, the ledger, images, the proxy. Nothing is defined here."""

from __future__ import annotations

from integration.agent import Agent, GuestError, Job
from integration.controller import (
    Controller,
    Status,
    committed,
    free_port,
    qemu_remus,
    start_primary,
    start_secondary,
)
from integration.guest.build import GuestImage, guest_image
from integration.images import copy_image, first_difference, fsck, make_ext4, make_image
from integration.ledger import (
    SLOTS_SIZE,
    Ledger,
    Verdict,
    check_disks,
    mount,
    start_block_load,
    start_file_load,
    start_ledger,
    stop_loads,
)
from integration.machine import Disk, Interface, Machine, Style, best_accelerator, start_machine
from integration.process import Finished, Process, background, run, start_process
from integration.proxy import Proxy, start_proxy
from integration.qmp import Qmp, QmpError, open_qmp

__all__ = [
    "SLOTS_SIZE",
    "Agent",
    "Controller",
    "Disk",
    "Finished",
    "GuestError",
    "GuestImage",
    "Interface",
    "Job",
    "Ledger",
    "Machine",
    "Process",
    "Proxy",
    "Qmp",
    "QmpError",
    "Status",
    "Style",
    "Verdict",
    "background",
    "best_accelerator",
    "check_disks",
    "committed",
    "copy_image",
    "first_difference",
    "free_port",
    "fsck",
    "guest_image",
    "make_ext4",
    "make_image",
    "mount",
    "open_qmp",
    "qemu_remus",
    "run",
    "start_block_load",
    "start_file_load",
    "start_ledger",
    "start_machine",
    "start_primary",
    "start_process",
    "start_proxy",
    "start_secondary",
    "stop_loads",
]
