"""An NBD client for trio that never lets QEMU owe it more replies than a socket buffer holds."""
