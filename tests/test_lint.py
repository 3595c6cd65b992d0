"""The linters, as tests: one command to remember."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "arguments",
    [
        ["ruff", "check", "--quiet", "."],
        ["ruff", "format", "--quiet", "--diff", "."],
        ["mypy", "--no-error-summary", "qemu_remus", "tests", "integration"],
    ],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_tree_passes(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=TREE, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"
