"""Remus-style high availability for the disks of a stock QEMU virtual machine."""

__version__ = "0.1.0"
