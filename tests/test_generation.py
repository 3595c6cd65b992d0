"""The handshake's decision: one case per row, and over all combinations never a verdict that could lose data."""

from __future__ import annotations

from itertools import product

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.generation import (
    DisksMismatch,
    FailedOver,
    Incremental,
    InitialSync,
    NeedsFullSync,
    PairMismatch,
    Refusal,
    RoleConflict,
    SplitBrain,
    StorageFailed,
    UnrelatedData,
    decide,
)
from qemu_remus.core.model import Base, DiskName, DiskSpec, DiskState, EpochNumber, PairName, Role

from .message_strategies import GENERATIONS, hello

G1, G2, G3 = GENERATIONS
VDA, VDB = DiskName("vda"), DiskName("vdb")
E3, E4, E5, E6 = map(EpochNumber, (3, 4, 5, 6))


def primary(**changes: object) -> m.Hello:
    return hello(Role.PRIMARY, **changes)


def secondary(**changes: object) -> m.Hello:
    return hello(Role.SECONDARY, **changes)


def disks(*bases: Base) -> tuple[DiskSpec, ...]:
    return tuple(
        DiskSpec(DiskName(f"vd{letter}"), 1 << 20, base) for letter, base in zip("abcdef", bases, strict=False)
    )


def test_equal_sides_go_on_with_what_has_changed() -> None:
    assert decide(primary(), secondary()) == Incremental(E5, E5, None)


def test_an_older_record_serves_a_newer_checkpoint() -> None:
    assert decide(primary(disks=disks(E3)), secondary(committed=E6, staged=None)) == Incremental(E3, E6, None)


def test_the_newest_base_among_the_disks_is_what_the_secondary_must_hold() -> None:
    verdict = decide(primary(disks=disks(E3, E5)), secondary(disks=disks(None, None)))
    assert verdict == Incremental(E5, E5, None)


def test_a_staged_epoch_is_named_in_the_verdict_and_forbids_nothing() -> None:
    assert decide(primary(), secondary(staged=E6)) == Incremental(E5, E5, E6)


def test_a_new_secondary_gets_a_full_copy() -> None:
    new = secondary(generation=None, committed=None, highest_epoch=0, disk_state=DiskState.INCONSISTENT)
    assert isinstance(decide(primary(generation=None, committed=None), new), InitialSync)
    assert isinstance(decide(primary(), new), InitialSync)


@pytest.mark.parametrize("theirs", [G1, G2])
def test_an_unfinished_full_copy_begins_anew_whatever_its_generation(theirs: object) -> None:
    """A primary that died between choosing a generation and telling it must not be locked out by the last one."""
    unfinished = secondary(generation=theirs, committed=None, disk_state=DiskState.INCONSISTENT)
    assert isinstance(decide(primary(), unfinished), InitialSync)


def test_a_disk_without_a_record_needs_a_full_copy_and_is_named() -> None:
    verdict = decide(primary(disks=disks(E5, None)), secondary(disks=disks(None, None)))
    assert isinstance(verdict, NeedsFullSync)
    assert verdict.disks == (VDB,)
    assert "vdb" in verdict.diagnosis.what
    assert "--allow-inconsistent-resync" in verdict.diagnosis.hint


def test_a_record_that_begins_after_the_secondarys_checkpoint_needs_a_full_copy() -> None:
    verdict = decide(primary(disks=disks(E6)), secondary())
    assert isinstance(verdict, NeedsFullSync)
    assert verdict.disks == (VDA,)


def test_a_secondary_of_a_history_that_was_taken_over_needs_a_full_copy() -> None:
    verdict = decide(primary(generation=G2, history=((G1, E4),)), secondary())
    assert isinstance(verdict, NeedsFullSync)


def test_an_old_primary_is_told_that_its_vm_was_taken_over_and_where() -> None:
    taken_over = secondary(generation=G2, history=((G1, E5),))
    verdict = decide(primary(), taken_over)
    assert isinstance(verdict, FailedOver)
    assert "checkpoint 5" in verdict.diagnosis.what


def test_a_secondary_in_the_middle_of_a_failover_has_failed_over() -> None:
    assert isinstance(decide(primary(), secondary(role=Role.PRIMARY)), FailedOver)


def test_two_sides_that_both_went_on_from_one_history_are_a_split_brain() -> None:
    verdict = decide(
        primary(generation=G2, history=((G1, E4),)),
        secondary(generation=G3, history=((G1, E5),)),
    )
    assert isinstance(verdict, SplitBrain)
    assert str(G1) in verdict.diagnosis.what


def test_a_primary_that_knows_nothing_does_not_overwrite_a_good_copy() -> None:
    verdict = decide(primary(generation=None, committed=None, disks=disks(None)), secondary())
    assert isinstance(verdict, UnrelatedData)
    assert "--state-dir" in verdict.diagnosis.hint


def test_data_of_another_history_are_not_overwritten() -> None:
    assert isinstance(decide(primary(), secondary(generation=G2)), UnrelatedData)


@pytest.mark.parametrize(
    "theirs",
    [
        disks(None, None),
        (DiskSpec(VDB, 1 << 20),),
        (DiskSpec(VDA, 1 << 21),),
        (DiskSpec(VDA, 512),),
        (),
        (DiskSpec(VDA, 1 << 20), DiskSpec(VDA, 1 << 20)),
    ],
    ids=["more", "other name", "larger", "smaller", "none", "twice"],
)
def test_other_disks_are_refused(theirs: tuple[DiskSpec, ...]) -> None:
    verdict = decide(primary(), secondary(disks=theirs))
    assert isinstance(verdict, DisksMismatch)
    assert "1048576" in verdict.diagnosis.what


def test_a_size_that_is_not_known_yet_and_another_order_are_fine() -> None:
    ours = disks(E5, E5)
    theirs = (DiskSpec(VDB, 1 << 20), DiskSpec(VDA, 0))
    assert isinstance(decide(primary(disks=ours), secondary(disks=theirs)), Incremental)


def test_another_pair_is_refused_before_anything_else_is_looked_at() -> None:
    verdict = decide(primary(), secondary(pair=PairName("other"), generation=G2, disks=()))
    assert isinstance(verdict, PairMismatch)


@pytest.mark.parametrize(("ours", "theirs"), [(Role.SECONDARY, Role.SECONDARY), (Role.SECONDARY, Role.PRIMARY)])
def test_two_sides_that_are_not_one_primary_and_one_secondary_are_refused(ours: Role, theirs: Role) -> None:
    assert isinstance(decide(primary(role=ours), secondary(role=theirs)), RoleConflict)


def test_a_failed_store_is_left_alone() -> None:
    assert isinstance(decide(primary(), secondary(disk_state=DiskState.FAILED)), StorageFailed)


def test_every_refusal_tells_what_is_safe_what_to_do_and_goes_over_the_wire_with_its_own_code() -> None:
    kinds = {
        PairMismatch: RefusalCode.UNKNOWN_PAIR,
        RoleConflict: RefusalCode.ROLE_CONFLICT,
        StorageFailed: RefusalCode.STORAGE_FAILED,
        FailedOver: RefusalCode.FAILED_OVER,
        SplitBrain: RefusalCode.SPLIT_BRAIN,
        UnrelatedData: RefusalCode.UNRELATED_DATA,
        DisksMismatch: RefusalCode.DISK_MISMATCH,
        NeedsFullSync: RefusalCode.NEEDS_FULL_SYNC,
    }
    assert {kind.__name__ for kind in Refusal.__subclasses__()} == {kind.__name__ for kind in kinds}
    for kind, code in kinds.items():
        extra = ("a reason", (VDA,)) if kind is NeedsFullSync else ()
        refusal = kind(primary(), secondary(), *extra)
        said = refusal.diagnosis
        assert said.what
        assert said.safe
        assert said.hint
        assert refusal.goodbye() == m.Goodbye(code, str(said))
        assert refusal.error().code is code
        assert str(refusal.error()) == str(said)


def test_over_all_combinations_there_is_a_verdict_and_none_that_could_lose_data() -> None:
    histories = ((), ((G1, E3),), ((G2, E3),))
    incremental = initial = 0
    for generation, base, ended in product((None, G1, G2), (None, E3, E5, E6), histories):
        ours = primary(generation=generation, disks=disks(base), history=ended)
        for role, their_generation, committed, staged, disk_state, their_ended in product(
            Role, (None, G1, G2), (None, E3, E5), (None, E6), DiskState, histories
        ):
            theirs = secondary(
                role=role,
                generation=their_generation,
                committed=committed,
                staged=staged,
                disk_state=disk_state,
                history=their_ended,
            )
            verdict = decide(ours, theirs)
            usable = disk_state not in (DiskState.INCONSISTENT, DiskState.FAILED)
            taken_over = generation in [ended_generation for ended_generation, _ in their_ended]
            if isinstance(verdict, Incremental):
                incremental += 1
                assert usable
                assert role is Role.SECONDARY
                assert generation == their_generation is not None
                assert committed is not None
                assert base is not None
                assert base == verdict.base <= committed == verdict.committed
                assert verdict.in_doubt == staged
                assert not taken_over
            elif isinstance(verdict, InitialSync):
                initial += 1
                assert disk_state is DiskState.INCONSISTENT
                assert role is Role.SECONDARY
                assert not taken_over
            else:
                assert str(verdict.diagnosis)
                assert (verdict.primary, verdict.secondary) == (ours, theirs)
    assert incremental
    assert initial
