"""The handshake's decision: one case per row, and over all combinations never a verdict that could lose data."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core.disk_changes import DiskChanges, asked_for
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.generation import (
    DiskShrunk,
    DisksMismatch,
    FailedOver,
    Incremental,
    InitialSync,
    NeedsFullSync,
    NoPlace,
    PairMismatch,
    Refusal,
    RoleConflict,
    SplitBrain,
    StorageFailed,
    UnrelatedData,
    decide,
)
from qemu_remus.core.model import Base, DiskName, DiskSpec, DiskState, EpochNumber, PairName, Role
from qemu_remus.core.primary_machine import LASTING

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
    assert decide(primary(), secondary()) == Incremental(E5, None)


def test_an_older_record_serves_a_newer_checkpoint() -> None:
    assert decide(primary(disks=disks(E3)), secondary(committed=E6, staged=None)) == Incremental(E6, None)


def test_each_disk_may_reach_back_to_a_base_of_its_own() -> None:
    verdict = decide(primary(disks=disks(E3, E5)), secondary(disks=disks(None, None)))
    assert verdict == Incremental(E5, None)


def test_a_staged_epoch_is_named_in_the_verdict_and_forbids_nothing() -> None:
    assert decide(primary(), secondary(staged=E6)) == Incremental(E5, E6)


def test_a_new_secondary_gets_a_full_copy() -> None:
    new = secondary(generation=None, committed=None, highest_epoch=0, disk_state=DiskState.INCONSISTENT)
    assert isinstance(decide(primary(generation=None, committed=None), new), InitialSync)
    assert isinstance(decide(primary(), new), InitialSync)


@pytest.mark.parametrize("theirs", [G1, G2])
def test_an_unfinished_full_copy_begins_anew_whatever_its_generation(theirs: object) -> None:
    """A primary that died between choosing a generation and telling it must not be locked out by the last one."""
    unfinished = secondary(generation=theirs, committed=None, disk_state=DiskState.INCONSISTENT)
    assert isinstance(decide(primary(), unfinished), InitialSync)


@pytest.mark.parametrize(
    ("bases", "compare"),
    [((E5, None), (1,)), ((None, E5), (0,)), ((None, None), (0, 1)), ((E6, E5), (0,)), ((E6, None, E3), (0, 1))],
)
def test_a_disk_whose_record_does_not_reach_back_is_compared_and_no_other(
    bases: tuple[Base, ...], compare: tuple[int, ...]
) -> None:
    verdict = decide(primary(disks=disks(*bases)), secondary(disks=disks(*[None] * len(bases))))
    assert verdict == Incremental(E5, None, compare)


def test_the_disks_to_compare_are_counted_in_the_primarys_order() -> None:
    theirs = (DiskSpec(VDB, 1 << 20), DiskSpec(VDA, 1 << 20))
    assert decide(primary(disks=disks(E5, None)), secondary(disks=theirs)) == Incremental(E5, None, (1,))


def test_a_secondary_of_a_history_that_was_taken_over_needs_a_full_copy_and_the_disks_are_named() -> None:
    verdict = decide(
        primary(generation=G2, history=((G1, E4),), disks=disks(E5, E5)), secondary(disks=disks(None, None))
    )
    assert isinstance(verdict, NeedsFullSync)
    assert verdict.disks == (VDA, VDB)
    assert "vda, vdb" in verdict.diagnosis.what
    assert "--allow-inconsistent-resync" in verdict.diagnosis.hint


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


def test_a_split_brain_is_told_also_where_both_sides_are_primaries_by_now() -> None:
    """The one that failed over listens; the old one has made another full copy meanwhile."""
    ours = primary(generation=G2, history=((G1, E4),))
    assert isinstance(decide(ours, secondary(role=Role.PRIMARY, generation=G3, history=((G1, E5),))), SplitBrain)
    assert isinstance(decide(ours, secondary(role=Role.PRIMARY, generation=G3)), RoleConflict)


def test_a_diagnosis_names_what_each_side_holds_and_since_when() -> None:
    ours = primary(generation=G2, history=((G1, E4),), begun=1_700_000_000, decided=1_700_000_001)
    said = decide(ours, secondary(generation=G3, history=((G1, E5),), decided=1_700_003_600))
    assert isinstance(said, SplitBrain)
    text = said.diagnosis.what
    assert (
        f"checkpoint 5 of generation {G2} (begun 2023-11-14 22:13:20 UTC, last decided on 2023-11-14 22:13:21" in text
    )
    assert f"checkpoint 5 of generation {G3} (last decided on 2023-11-14 23:13:20 UTC)" in text


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (primary(generation=G2, history=((G1, E4),)), secondary(generation=G3, history=((G1, E5),))),
        (primary(), secondary(generation=G2, history=((G1, E5),))),
        (primary(), secondary(generation=G2)),
    ],
    ids=["split brain", "failed over", "unrelated"],
)
def test_the_way_out_names_the_generation_that_would_be_given_up(ours: m.Hello, theirs: m.Hello) -> None:
    verdict = decide(ours, theirs)
    assert isinstance(verdict, SplitBrain | FailedOver | UnrelatedData)
    assert f"on its store, with --force-discard {theirs.generation}" in verdict.diagnosis.hint
    if not isinstance(verdict, UnrelatedData):
        assert f"on its state directory and --force-discard {ours.generation}" in verdict.diagnosis.hint


@pytest.mark.parametrize("lost", ["the primary's side", "the secondary's side"])
def test_what_was_given_up_is_a_fresh_secondary_of_the_winner(lost: str) -> None:
    old = primary()
    taken_over = secondary(role=Role.PRIMARY, generation=G2, history=((G1, E5),))
    assert isinstance(decide(old, taken_over), FailedOver)
    fresh = secondary(generation=None, committed=None, highest_epoch=0, disk_state=DiskState.INCONSISTENT)
    winner = old if lost == "the secondary's side" else primary(generation=G2, history=((G1, E5),))
    assert isinstance(decide(winner, fresh), InitialSync)


def test_a_primary_that_knows_nothing_does_not_overwrite_a_good_copy() -> None:
    verdict = decide(primary(generation=None, committed=None, disks=disks(None)), secondary())
    assert isinstance(verdict, UnrelatedData)
    assert "--state-dir" in verdict.diagnosis.hint


def test_data_of_another_history_are_not_overwritten() -> None:
    assert isinstance(decide(primary(), secondary(generation=G2)), UnrelatedData)


@pytest.mark.parametrize(
    "theirs",
    [(DiskSpec(VDB, 1 << 20),), (), (DiskSpec(VDA, 1 << 20), DiskSpec(VDA, 1 << 20)), (DiskSpec(VDA, 0),)],
    ids=["other name", "none", "twice", "only a place"],
)
def test_disks_that_have_nothing_in_common_are_refused(theirs: tuple[DiskSpec, ...]) -> None:
    verdict = decide(primary(), secondary(disks=theirs))
    assert isinstance(verdict, DisksMismatch)
    assert "1048576" in verdict.diagnosis.what


@pytest.mark.parametrize("theirs", [(DiskSpec(VDB, 0),), ()])
def test_a_full_copy_needs_a_place_for_every_disk(theirs: tuple[DiskSpec, ...]) -> None:
    empty: dict[str, Any] = {"disk_state": DiskState.INCONSISTENT, "committed": None}
    assert isinstance(decide(primary(), secondary(disks=theirs, **empty)), DisksMismatch)
    more = (*theirs, DiskSpec(VDA, 0))
    assert isinstance(decide(primary(), secondary(disks=more, **empty)), InitialSync)
    # of whatever size an earlier attempt was
    assert isinstance(decide(primary(), secondary(disks=(DiskSpec(VDA, 512),), **empty)), InitialSync)


def test_another_order_is_fine() -> None:
    theirs = (DiskSpec(VDB, 1 << 20), DiskSpec(VDA, 1 << 20))
    assert decide(primary(disks=disks(E5, E5)), secondary(disks=theirs)) == Incremental(E5, None)


def test_a_disk_that_is_larger_is_grown_and_nothing_else_of_it_is_compared() -> None:
    verdict = decide(primary(), secondary(disks=(DiskSpec(VDA, 1 << 19),)))
    assert verdict == Incremental(E5, None, (), DiskChanges(grown=((0, 1 << 19),)))


def test_a_disk_that_is_smaller_is_refused_for_as_long_as_it_is() -> None:
    verdict = decide(primary(), secondary(disks=(DiskSpec(VDA, 1 << 21),)))
    assert isinstance(verdict, DiskShrunk)
    assert "from 2097152 to 1048576 bytes" in verdict.diagnosis.what
    assert verdict.code not in LASTING


def test_a_new_disk_with_a_place_is_compared_whatever_its_bitmaps_say() -> None:
    theirs = (DiskSpec(VDA, 1 << 20), DiskSpec(VDB, 0))
    verdict = decide(primary(disks=disks(E5, E5)), secondary(disks=theirs))
    assert verdict == Incremental(E5, None, (1,), DiskChanges(added=(1,)))


def test_a_new_disk_without_a_place_is_left_out_and_asked_about() -> None:
    verdict = decide(primary(disks=disks(E5, E5)), secondary())
    assert isinstance(verdict, NoPlace)
    assert verdict.disks == (VDB,)
    assert verdict.code not in LASTING
    asking = primary(disks=(*disks(E5), DiskSpec(VDB, 0)))
    assert decide(asking, secondary()) == Incremental(E5, None)
    assert asked_for(asking, secondary()) == ()
    assert asked_for(asking, secondary(disks=(*disks(None), DiskSpec(VDB, 0)))) == (VDB,)


def test_a_disk_that_the_primary_has_no_more_is_gone_and_a_place_without_one_is_none() -> None:
    theirs = (*disks(None, None), DiskSpec(DiskName("vdc"), 0))
    assert decide(primary(), secondary(disks=theirs)) == Incremental(E5, None, (), DiskChanges(removed=(VDB,)))


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
        DiskShrunk: RefusalCode.DISK_SHRUNK,
        NoPlace: RefusalCode.NO_PLACE,
    }
    more: dict[type[Refusal], tuple[Any, ...]] = {
        NeedsFullSync: ("a reason", (VDA,)),
        DiskShrunk: (((0, 1 << 21),),),
        NoPlace: ((VDB,),),
    }
    assert {kind.__name__ for kind in Refusal.__subclasses__()} == {kind.__name__ for kind in kinds}
    for kind, code in kinds.items():
        extra = more.get(kind, ())
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
    for generation, base, ended, our_role in product((None, G1, G2), (None, E3, E5, E6), histories, Role):
        ours = primary(role=our_role, generation=generation, disks=disks(base), history=ended)
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
                assert (our_role, role) == (Role.PRIMARY, Role.SECONDARY)
                assert generation == their_generation is not None
                assert committed is not None
                assert committed == verdict.committed
                # An epoch applies to it only where everything since was recorded; else blocks are compared.
                assert (verdict.compare == ()) == (base is not None and base <= committed)
                assert verdict.in_doubt == staged
                assert not taken_over
            elif isinstance(verdict, InitialSync):
                initial += 1
                assert disk_state is DiskState.INCONSISTENT
                assert (our_role, role) == (Role.PRIMARY, Role.SECONDARY)
                assert not taken_over
            else:
                assert str(verdict.diagnosis)
                assert (verdict.primary, verdict.secondary) == (ours, theirs)
    assert incremental
    assert initial
