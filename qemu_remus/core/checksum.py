"""CRC32C over any buffer. It owns the one way in which this project computes checksums; what may not enter: layouts."""

from __future__ import annotations

from typing import Final

import google_crc32c

_PIECE: Final = 64 << 10


def crc32c(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720) of ``data``, continued from ``seed``, the CRC32C of what stands before it."""
    if isinstance(data, bytes):
        return int(google_crc32c.extend(seed, data))
    # The C function takes nothing but bytes: pieces that stay in the processor's cache are the cheapest way there.
    view = memoryview(data).cast("B")
    for start in range(0, len(view), _PIECE):
        seed = int(google_crc32c.extend(seed, view[start : start + _PIECE].tobytes()))
    return seed
