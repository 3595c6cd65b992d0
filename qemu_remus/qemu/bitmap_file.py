"""Dirty bitmaps in and out of QEMU through a small qcow2 image: its format, as far as that takes.

QMP tells how many blocks of a bitmap are dirty and never which, and an NBD export, which tells, is not to be had
everywhere. But QEMU stores a *persistent* bitmap in its qcow2 image when the image's node is closed, and loads it when
that is opened. So an empty image of the disk's size, with nothing in it but a bitmap, is a map that either side can
write and the other read. The image never has any data.

Pure: bytes in, bytes out. The format: QEMU's ``docs/interop/qcow2.txt``; numbers are big-endian, and bit n of a
bitmap, little-endian within its bytes, stands for the n-th piece of ``granularity`` bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from qemu_remus.core.errors import EpochLost

CLUSTER: Final = 65536
"""Bytes in which the image is organised."""

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC: Final = b"QFI\xfb"
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")
_BITMAPS_TYPE: Final = 0x23852875
_ENTRY: Final = struct.Struct(">QIIBBHI")
_AUTOCLEAR_BITMAPS: Final = 1
_IN_USE: Final = 1
_DIRTY_TRACKING: Final = 1
_ALL_ONES: Final = 1
_OFFSET: Final = ((1 << 56) - 1) & ~511

_REFCOUNT_TABLE: Final = CLUSTER
_REFCOUNT_BLOCK: Final = 2 * CLUSTER
_L1_TABLE: Final = 3 * CLUSTER
_REFCOUNTS: Final = CLUSTER // 2
"""Clusters that one block of 16-bit reference counts covers: a file of 2 GiB."""

_LEAST_BYTES: Final = 8 * CLUSTER
"""Bytes of bitmap for which there is room in any case."""

_NOT_EMPTY: Final = re.compile(rb"\xff+|[^\x00\xff]")

_ZEROES: Final = bytes(512)

Piece = tuple[int, bytes]
"""Bytes at an offset of the image's file."""

Range = tuple[int, int]
"""Offset and length in bytes."""


def _clusters(size: int) -> int:
    return -(-size // CLUSTER)


def _l1_entries(disk_size: int) -> int:
    # One table of the second level maps as many clusters as it has entries of 8 bytes.
    return -(-disk_size // (CLUSTER * (CLUSTER // 8)))


def _bitmap_bytes(disk_size: int, granularity: int) -> int:
    return -(-disk_size // (granularity * 8))


def file_size(disk_size: int, granularity: int) -> int:
    """Bytes that the image's file must have, for any bitmap of this or a coarser granularity; sparse it may be."""
    data = _clusters(max(_bitmap_bytes(disk_size, granularity), _LEAST_BYTES))
    # The table of the bitmap, the directory, and one of each that QEMU may write before it frees the old one.
    tables = 2 * (_clusters(8 * data) + 1)
    return _L1_TABLE + (_clusters(8 * _l1_entries(disk_size)) + tables + data) * CLUSTER


@dataclass(frozen=True, slots=True)
class _Directory:
    """Where the list of bitmaps is, with one in it."""

    offset: int
    size: int


def _header(disk_size: int, directory: _Directory | None) -> bytes:
    l1 = _l1_entries(disk_size)
    header = _HEADER.pack(
        *(_MAGIC, 3, 0, 0, CLUSTER.bit_length() - 1, disk_size, 0, l1, _L1_TABLE, _REFCOUNT_TABLE, 1, 0, 0),
        *(0, 0, _AUTOCLEAR_BITMAPS if directory else 0, 4, _HEADER.size),
    )
    if directory:
        header += _EXTENSION.pack(_BITMAPS_TYPE, _BITMAPS.size)
        header += _BITMAPS.pack(1, 0, directory.size, directory.offset)
    return header + _EXTENSION.pack(0, 0)


def _image(disk_size: int, directory: _Directory | None, used: int) -> list[Piece]:
    """An image's fixed parts.

    :param used: its first clusters, which are in use.
    """
    return [
        (0, _header(disk_size, directory).ljust(CLUSTER, b"\0")),
        (_REFCOUNT_TABLE, struct.pack(">Q", _REFCOUNT_BLOCK).ljust(CLUSTER, b"\0")),
        (_REFCOUNT_BLOCK, (b"\0\1" * used).ljust(CLUSTER, b"\0")),
        (_L1_TABLE, bytes(CLUSTER * _clusters(8 * _l1_entries(disk_size)))),
    ]


def empty_image(disk_size: int) -> list[Piece]:
    """What to write for an image without a bitmap. What the file holds elsewhere does not matter."""
    return _image(disk_size, None, 3 + _clusters(8 * _l1_entries(disk_size)))


def image_with(disk_size: int, name: str, granularity: int, ranges: Iterable[Range]) -> list[Piece]:
    """What to write for an image with one bitmap in it.

    :param granularity: bytes per bit, a power of two, at least 512.
    :param ranges: what is dirty, in bytes; whatever they touch counts.
    """
    first = 3 + _clusters(8 * _l1_entries(disk_size))
    table = [0] * _clusters(_bitmap_bytes(disk_size, granularity))
    table_clusters = _clusters(8 * len(table))
    data = list(_bit_clusters(granularity, ranges))
    offset = (first + 1 + table_clusters) * CLUSTER
    pieces = []
    for index, bits in data:
        pieces.append((offset, bytes(bits)))
        table[index] = offset
        offset += CLUSTER
    encoded = name.encode()
    entry = _ENTRY.pack(
        *((first + 1) * CLUSTER, len(table), 0, _DIRTY_TRACKING, granularity.bit_length() - 1, len(encoded), 0)
    )
    entry += encoded
    entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    return [
        *_image(disk_size, _Directory(first * CLUSTER, len(entry)), offset // CLUSTER),
        (first * CLUSTER, entry.ljust(CLUSTER, b"\0")),
        ((first + 1) * CLUSTER, struct.pack(f">{len(table)}Q", *table).ljust(table_clusters * CLUSTER, b"\0")),
        *pieces,
    ]


def _bit_clusters(granularity: int, ranges: Iterable[Range]) -> Iterator[tuple[int, bytearray]]:
    """The bitmap's clusters in which a bit is set, by their number, ascending; the ranges ascend too."""
    bits = CLUSTER * 8
    number, cluster = -1, bytearray()
    for offset, length in ranges:
        bit, end = offset // granularity, -(-(offset + length) // granularity)
        while bit < end:
            if bit // bits != number:
                if cluster:
                    yield number, cluster
                number, cluster = bit // bits, bytearray(CLUSTER)
            stop = min(end, (number + 1) * bits)
            _set_bits(cluster, bit % bits, stop - number * bits)
            bit = stop
    if cluster:
        yield number, cluster


def _set_bits(cluster: bytearray, start: int, stop: int) -> None:
    first, last = start // 8, (stop - 1) // 8
    head, tail = 0xFF << start % 8 & 0xFF, 0xFF >> (7 - (stop - 1) % 8)
    if first == last:
        cluster[first] |= head & tail
        return
    cluster[first] |= head
    cluster[first + 1 : last] = b"\xff" * (last - first - 1)
    cluster[last] |= tail


@dataclass(frozen=True, slots=True)
class StoredBitmap:
    """A bitmap as QEMU has stored it, in no more memory than QEMU itself takes for it.

    :param granularity: bytes per bit.
    :param data: the pieces that are not all zeroes, by what they begin at, in bytes of the disk; None: all ones.
    """

    disk_size: int
    granularity: int
    data: tuple[tuple[int, bytes | None], ...]

    def ranges(self) -> Iterator[Range]:
        """What is dirty, in bytes: ascending, neighbours joined; the last range ends with the disk at the latest."""
        last: Range | None = None
        for offset, length in self._ranges():
            length = min(length, self.disk_size - offset)
            if last is not None and sum(last) == offset:
                last = last[0], last[1] + length
            elif length > 0:
                if last is not None:
                    yield last
                last = offset, length
        if last is not None:
            yield last

    def _ranges(self) -> Iterator[Range]:
        size = self.granularity
        for start, data in self.data:
            if data is None:
                yield start, CLUSTER * 8 * size
                continue
            for at, end in _not_empty(data):
                base, value = start + at * 8 * size, data[at]
                if value == 0xFF:
                    yield base, (end - at) * 8 * size
                else:
                    yield from ((base + bit * size, size) for bit in range(8) if value >> bit & 1)


def read_bitmap(read: Callable[[int, int], bytes], disk_size: int, name: str, granularity: int) -> StoredBitmap:
    """The bitmap that QEMU has stored.

    :param read: gives so many bytes, or fewer at its end, at an offset of the file: ``read(length, offset)``.
    :param granularity: that it must have, in bytes.
    :raise EpochLost: when the image has no such bitmap: QEMU could not store it.
    """
    try:
        return StoredBitmap(disk_size, granularity, tuple(_pieces(read, disk_size, name, granularity)))
    except (struct.error, ValueError) as error:
        raise EpochLost(
            f"QEMU has not stored the bitmap that says what has changed: {error}",
            safe="the VM runs and its changes stay recorded",
            hint="see QEMU's log; the fleece directory may be full or broken",
        ) from error


def _pieces(
    read: Callable[[int, int], bytes], disk_size: int, name: str, granularity: int
) -> Iterator[tuple[int, bytes | None]]:
    header = read(CLUSTER, 0)
    magic, _, _, _, cluster_bits, size, *_ = _HEADER.unpack_from(header)
    if magic != _MAGIC or 1 << cluster_bits != CLUSTER or size != disk_size:
        raise ValueError("the image is none of ours")
    found = _find_directory(header)
    directory = read(found.size, found.offset)
    table_offset, entries, flags, _, bits, name_size, extra = _ENTRY.unpack_from(directory)
    at = _ENTRY.size + extra
    if directory[at : at + name_size] != name.encode() or 1 << bits != granularity or flags & _IN_USE:
        raise ValueError("the bitmap in it is another")
    if entries != _clusters(_bitmap_bytes(disk_size, granularity)):
        raise ValueError("the bitmap in it is of another length")
    for index, entry in enumerate(struct.unpack(f">{entries}Q", read(8 * entries, table_offset))):
        start = index * CLUSTER * 8 * granularity
        if entry & _OFFSET:
            # The last piece may be short where it is the file's end.
            yield start, read(CLUSTER, entry & _OFFSET)
        elif entry & _ALL_ONES:
            yield start, None


def _find_directory(header: bytes) -> _Directory:
    """Where the directory is, with its one bitmap."""
    # QEMU has rewritten the header, and made it longer.
    *_, at = _HEADER.unpack_from(header)
    while at + _EXTENSION.size <= len(header):
        kind, length = _EXTENSION.unpack_from(header, at)
        at += _EXTENSION.size
        if kind == _BITMAPS_TYPE:
            count, _, size, offset = _BITMAPS.unpack_from(header, at)
            if count != 1 or size > CLUSTER:
                raise ValueError(f"{count} bitmaps in it, and {size} bytes of names")
            return _Directory(offset, size)
        if kind == 0:
            break
        at += -(-length // 8) * 8
    raise ValueError("no bitmap in it")


def _dirty_ranges(data: bytes, start: int, granularity: int) -> Iterator[Range]:
    for at, end in _not_empty(data):
        if data[at] == 0xFF:
            yield start + at * 8 * granularity, (end - at) * 8 * granularity
            continue
        value, base = data[at], start + at * 8 * granularity
        for bit in range(8):
            if value >> bit & 1:
                yield base + bit * granularity, granularity


def _not_empty(data: bytes) -> Iterator[tuple[int, int]]:
    """Spans of bytes that are all ones, and single bytes that are something else, but for zeroes."""
    for block in range(0, len(data), len(_ZEROES)):
        # A memcmp; the expression goes byte by byte, and most of a bitmap is empty.
        if not data.startswith(_ZEROES, block):
            for found in _NOT_EMPTY.finditer(data, block, block + len(_ZEROES)):
                yield found.span()
