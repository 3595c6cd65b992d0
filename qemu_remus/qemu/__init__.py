"""The only package that knows QEMU: its QMP dialect, its block graph, its capabilities and its faults."""
