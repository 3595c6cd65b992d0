"""``python -m integration.demo``."""

from __future__ import annotations

import sys

from integration.demo.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
