"""The machines' own ``replace``: the library's answers, and its refusals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from qemu_remus.core.frozen import replace


@dataclass(frozen=True)
class Plain:
    one: int
    two: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Slotted:
    one: int


def test_it_gives_what_the_library_gives_and_leaves_the_old_one_alone() -> None:
    before = Plain(1, (2,))
    after = replace(before, one=3)
    assert after == dataclasses.replace(before, one=3) == Plain(3, (2,))
    assert type(after) is Plain
    assert before == Plain(1, (2,))
    assert replace(after) == after
    assert hash(after) == hash(Plain(3, (2,)))


def test_the_copy_is_frozen_too() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        replace(Plain(1), one=2).one = 3  # type: ignore[misc]


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(TypeError, match="three"):
        replace(Plain(1), three=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        replace(Slotted(1), three=3)  # type: ignore[call-arg]


def test_slots_are_copied_as_well() -> None:
    assert replace(Slotted(1), one=2) == Slotted(2)
