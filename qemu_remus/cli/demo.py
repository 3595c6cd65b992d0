"""``qemu-remus demo``: the demonstration of the source tree, integration/demo, which is not part of the package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from qemu_remus.core.errors import ConfigError


def demo(_: argparse.Namespace) -> int:
    """Run it; 0 only if all that it shows held."""
    tree = Path(__file__).parent.parent.parent
    if not (tree / "integration" / "demo" / "__main__.py").is_file():
        raise ConfigError(
            "this installation has no demonstration: it is part of the source tree only",
            hint="get the source tree and run 'make demo' there, or install it with pip install -e",
        )
    sys.path.insert(0, str(tree))
    main: Callable[[], int] = importlib.import_module("integration.demo").main
    return main()
