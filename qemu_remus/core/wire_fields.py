"""The fields of control messages in bytes: numbers, names, texts, lists, each with what it may hold.

It owns their layouts and limits; which message has which of them is :mod:`qemu_remus.core.wire`'s.  Whatever does not
fit, read or written, is a ``ValueError`` or construct's own error.  What may not enter: messages, frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn
from uuid import UUID

import construct as c

from qemu_remus.core.comparison import BLOCKS_LIMIT, DIGEST_SIZE, bitmap_size, is_block_size
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import (
    Base,
    DiskSpec,
    DiskState,
    EpochNumber,
    Generation,
    Role,
    disk_name,
)

DISKS_LIMIT: Final = 256
HISTORY_LIMIT: Final = 32
TEXT_LIMIT: Final = 4096
"""Most bytes of a text for a person."""
NUMBER_LIMIT: Final = (1 << 63) - 1

_NO_UUID: Final = UUID(int=0)


def clean_text(text: str) -> str:
    """Make a text for a person fit to travel: no control characters but line feeds, at most 4,096 bytes of UTF-8."""
    printable = "".join(char if char == "\n" or not _is_control(char) else " " for char in text)
    return printable.encode("utf-8", "replace")[:TEXT_LIMIT].decode("utf-8", "ignore")


def _is_control(char: str) -> bool:
    return char < " " or "\x7f" <= char <= "\x9f"


def bad(why: str) -> NoReturn:
    """Refuse a value.

    :raise ValueError: always.
    """
    raise ValueError(why)


def _field(layout: Any, decoder: Callable[[Any], Any], encoder: Callable[[Any], Any]) -> Any:
    return c.ExprAdapter(layout, lambda value, _: decoder(value), lambda value, _: encoder(value))


def number(value: int, least: int = 0) -> int:
    """The value, which is at least that and less than 2^63.

    :raise ValueError: it is not.
    """
    return value if least <= value <= NUMBER_LIMIT else bad(f"a number is {value}")


def _read_text(raw: bytes) -> str:
    text = raw.decode("utf-8")
    if len(raw) > TEXT_LIMIT or any(char != "\n" and _is_control(char) for char in text):
        bad("a text is too long or holds control characters")
    return text


def _read_code(raw: bytes) -> RefusalCode:
    try:
        return RefusalCode(raw.decode("ascii"))
    except ValueError:
        # A newer release may know more reasons; the text that comes with it says which one it is.
        return RefusalCode.PROTOCOL


def _write_base(base: Base) -> int:
    return 0 if base is None else number(base, 1)


def _read_disks(entries: list[Any]) -> tuple[DiskSpec, ...]:
    disks = tuple(DiskSpec(entry.name, entry.size, entry.base) for entry in entries)
    if len({disk.name for disk in disks}) != len(disks) or len(disks) > DISKS_LIMIT:
        bad("there are too many disks, or two of one name")
    return disks


def _write_disks(disks: tuple[DiskSpec, ...]) -> list[dict[str, Any]]:
    _read_disks(list(disks))
    return [{"name": disk.name, "size": disk.size, "base": disk.base} for disk in disks]


def name(check: Callable[[str], str]) -> Any:
    """A name in ASCII, as ``check`` returns it."""
    short = c.Prefixed(c.Byte, c.GreedyBytes)
    return _field(short, lambda raw: check(raw.decode("ascii")), lambda name: check(name).encode("ascii"))


def uuid(kind: Callable[[UUID], Any]) -> Any:
    """An identity of this kind."""
    return _field(c.Bytes(16), lambda raw: kind(UUID(bytes=raw)), lambda value: value.bytes)


def _check(test: Callable[[Any], bool], what: str) -> Callable[[Any], Any]:
    return lambda value: value if test(value) else bad(f"{what} is {value!r:.60}")


def _checked(layout: Any, test: Callable[[Any], bool], what: str) -> Any:
    return _field(layout, _check(test, what), _check(test, what))


def _short(items: Any, limit: int) -> tuple[Any, ...]:
    return tuple(items) if len(items) <= limit else bad("a list is too long")


NUMBER: Final = _field(c.Int64ub, number, number)
EPOCH: Final = _field(c.Int64ub, lambda n: EpochNumber(number(n, 1)), lambda n: number(n, 1))
BASE: Final = _field(c.Int64ub, lambda n: EpochNumber(number(n)) if n else None, _write_base)
FLAG: Final = c.Mapping(c.Byte, {False: 0, True: 1})
GENERATION: Final = uuid(Generation)
OPTIONAL_GENERATION: Final = _field(
    c.Bytes(16),
    lambda raw: Generation(UUID(bytes=raw)) if any(raw) else None,
    lambda value: (value or _NO_UUID).bytes,
)
CODE: Final = _field(c.Prefixed(c.Byte, c.GreedyBytes), _read_code, lambda code: code.value.encode("ascii"))
TEXT: Final = _field(c.Prefixed(c.Int16ub, c.GreedyBytes), _read_text, lambda text: clean_text(text).encode())
DISKS: Final = _field(
    c.PrefixedArray(c.Int16ub, c.Struct("name" / name(disk_name), "size" / NUMBER, "base" / BASE)),
    _read_disks,
    _write_disks,
)
HISTORY: Final = _field(
    c.PrefixedArray(c.Byte, c.Sequence(GENERATION, EPOCH)),
    lambda ended: _short([tuple(entry) for entry in ended], HISTORY_LIMIT),
    lambda ended: ended[-HISTORY_LIMIT:],
)
FRESH: Final = _field(
    c.PrefixedArray(c.Int16ub, FLAG),
    lambda fresh: _short(fresh, DISKS_LIMIT),
    lambda fresh: _short(fresh, DISKS_LIMIT),
)
ROLE: Final = c.Mapping(c.Byte, {Role.PRIMARY: 1, Role.SECONDARY: 2})
DISK_STATE: Final = c.Mapping(
    c.Byte,
    {
        DiskState.INCONSISTENT: 1,
        DiskState.CONSISTENT: 2,
        DiskState.UP_TO_DATE: 3,
        DiskState.OUTDATED: 4,
        DiskState.FAILED: 5,
    },
)
DISK: Final = _checked(c.Int16ub, lambda disk: disk < DISKS_LIMIT, "a disk")
BLOCK_SIZE: Final = _checked(c.Int32ub, is_block_size, "a block's size")
DIGESTS: Final = _checked(
    c.GreedyBytes,
    lambda raw: len(raw) % DIGEST_SIZE == 0 and 0 < len(raw) <= BLOCKS_LIMIT * DIGEST_SIZE,
    "a list of digests",
)
BITMAP: Final = _checked(c.GreedyBytes, lambda raw: 0 < len(raw) <= bitmap_size(BLOCKS_LIMIT), "a bitmap of blocks")
