"""``python -m qemu_remus.cli``: the same as ``qemu-remus``."""

import sys

from qemu_remus.cli import main

sys.exit(main())
