"""Kinds of arguments: text to value, with an error for the person who typed it."""

from __future__ import annotations

import argparse
import math

from qemu_remus.core.commands import TIMEOUT_LIMIT


def seconds(text: str) -> float:
    """A time, more than 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return value


def waiting(text: str) -> float:
    """A time that the controller waits for."""
    value = seconds(text)
    if value > TIMEOUT_LIMIT:
        raise argparse.ArgumentTypeError(f"{text} is more than {TIMEOUT_LIMIT} seconds")
    return value


def epoch(text: str) -> int:
    """An epoch's number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("epochs are numbered from 1")
    return value
