"""Whether a file or device holds anything that somebody may want to keep. Nothing is written here; calls block."""

from __future__ import annotations

import errno
import os
from typing import Final

_PIECE: Final = 1 << 20
_ZEROES: Final = bytes(_PIECE)

_DEVICE_ENDS: Final = 16 << 20
_DEVICE_SAMPLE: Final = 64 << 10
_DEVICE_SAMPLES: Final = 4096


def file_holds_data(descriptor: int, size: int) -> bool:
    """Whether a file has anything but zeroes; every byte is looked at.

    :raise OSError: it cannot be read.
    """
    position = 0
    while position < size:
        try:
            position = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        hole = os.lseek(descriptor, position, os.SEEK_HOLE)
        if _range_holds_data(descriptor, position, hole):
            return True
        position = hole
    return False


def device_holds_data(descriptor: int, size: int) -> bool:
    """Whether a block device looks used. Partition tables, file systems, volume managers and RAID leave their
    marks at the ends, data anywhere.

    :raise OSError: it cannot be read.
    """
    if size <= 2 * _DEVICE_ENDS:
        return _range_holds_data(descriptor, 0, size)
    if _range_holds_data(descriptor, 0, _DEVICE_ENDS) or _range_holds_data(descriptor, size - _DEVICE_ENDS, size):
        return True
    step = max(_DEVICE_ENDS, size // _DEVICE_SAMPLES)
    step -= step % _DEVICE_SAMPLE
    return any(
        _range_holds_data(descriptor, start, start + _DEVICE_SAMPLE)
        for start in range(_DEVICE_ENDS, size - _DEVICE_ENDS, step)
    )


def _range_holds_data(descriptor: int, start: int, stop: int) -> bool:
    while start < stop:
        piece = os.pread(descriptor, min(_PIECE, stop - start), start)
        if not piece:
            return False
        if piece != (_ZEROES if len(piece) == _PIECE else _ZEROES[: len(piece)]):
            return True
        start += len(piece)
    return False
