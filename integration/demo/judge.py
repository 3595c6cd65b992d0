"""The demonstration's verdicts: what must hold for a VM that went on, and the story in numbers.

Owns what is a failure.  It judges what was seen, and does nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from integration.demo.facts import Failed, Story
from integration.demo.screen import milliseconds, percentile, size
from integration.ledger import Verdict
from integration.witness import FULL_TURN


def judge_guest(story: Story) -> Iterator[str]:
    """What holds of the guest that answers, a line each.

    :raise Failed: at the first thing that does not.
    """
    before, after = story.before, story.after
    assert before
    assert after
    _hold(
        story.checkpoint >= story.committed,
        f"failover gave checkpoint {story.checkpoint}, but {story.committed} had been committed",
    )
    yield f"checkpoint {story.checkpoint} is no older than the last one committed, {story.committed}"
    _hold(before.boot_id == after.boot_id, f"the guest has booted: {before.boot_id} became {after.boot_id}")
    yield "the same boot id: the kernel did not start anew"
    _hold(
        before.processes == after.processes,
        f"other processes: {sorted(before.processes)} became {sorted(after.processes)}",
    )
    yield f"the same {len(after.processes)} processes, with the same pids and times of start"
    owed = max((sample.uptime for sample in story.samples if sample.captured < story.checkpoint), default=before.uptime)
    _hold(after.uptime >= owed, f"checkpoint {story.checkpoint} has seen {owed} s, but the guest is up {after.uptime}")
    yield f"its uptime goes on: {after.uptime:.1f} s, and at least {owed:.1f} s were due"


def judge_outside(story: Story) -> Iterator[str]:
    """What holds of the records that were read outside, a line each.

    :raise Failed: at the first thing that does not.
    """
    heard, later = story.heard, story.heard_later
    _hold(heard.first == 1 and not heard.faults, f"records 1 to {heard.last} were let out with faults: {heard.faults}")
    _hold(not story.torn, "what was let out ends inside a record")
    yield f"before the blow, records 1 to {heard.last} were let out, each once"
    _hold(not later.faults, f"in the survivor: {later.faults}")
    _hold(
        later.first > heard.last,
        f"record {heard.last} was let out, but the survivor has not said it yet: it goes on with {later.first}",
    )
    # what was said before a checkpoint whose output was not let out any more, the network has lost
    unheard = later.first - heard.last - 1
    allowed = story.held if story.checkpoint > story.released else 0
    _hold(
        unheard <= allowed,
        f"records {heard.last + 1} to {later.first - 1} are missing, though checkpoint {story.released} was released",
    )
    if unheard:
        yield f"the survivor has all of them and {unheard} more, held at the blow; it goes on with {later.first}"
    else:
        yield f"the survivor has all of them and goes on with the very next one, {later.first}"
    _hold(len(later.records) > FULL_TURN, f"the survivor has said {len(later.records)} records only")
    yield f"in {len(later.records)} records it found its memory, disk0 and disk2 of one checkpoint each time"


def judge_end(story: Story, verdict: Verdict) -> Iterator[str]:
    """What holds of the disks when the survivor is off, a line each.

    :raise Failed: at the first thing that does not.
    """
    after, at_end = story.after, story.at_end
    assert after
    assert at_end
    _hold(after.processes == at_end.processes, f"processes have ended: {after.processes - at_end.processes}")
    _hold(verdict.good, "the disks are not what they must be:\n" + "\n".join(verdict.faults))
    yield "the file system of disk0 is clean (e2fsck)"
    yield f"its ledger holds records 1 to {verdict.in_file} without a gap or a torn one, across both lives"
    _hold(
        verdict.in_slots >= story.reported_later > story.reported,
        f"the ledger had reported {story.reported}, then {story.reported_later}, but ends at {verdict.in_slots}",
    )
    yield f"the slots of disk1 end at record {verdict.in_slots}: both disks are of the same instant"


def _hold(fact: bool, otherwise: str) -> None:
    if not fact:
        raise Failed(otherwise)


def table(story: Story) -> str:
    """The story in numbers."""
    first, *others = story.measured
    memory = _spread([each.memory_bytes for each in others], size)
    disks = _spread([each.disk_bytes for each in others], size)
    rows = {
        "checkpoints": f"{len(story.measured)} committed, {story.missed} missed; it went on from {story.checkpoint}",
        "pause": _spread([each.pause for each in others], milliseconds),
        "  for the disks": _spread([each.disk_pause for each in others], milliseconds),
        "  for the memory": _spread([each.capture for each in others], milliseconds),
        "memory, each": f"{memory} sent; the first {size(first.memory_bytes)}",
        "disks, each": f"{disks} changed; {size(story.disk_bytes_sent / max(1, len(others)))} sent on average",
        "records let out": f"1 to {story.heard.last}; {story.held} more were held at the blow",
        "from the survivor": f"{story.heard_later.first} to {story.heard_later.last}",
        "failover": f"{story.failover_seconds:.2f} s, {story.disk_seconds:.2f} s of it for the disks",
        "outage": f"{story.outage:.2f} s from the blow until the guest answered",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}   {value}" for name, value in rows.items())


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"median {shown(percentile(values, 0.5))}, p99 {shown(percentile(values, 0.99))}"
