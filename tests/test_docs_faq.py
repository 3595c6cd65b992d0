"""docs/faq.md has every message that a person can see, word for word, and no other; each with something to do.

A message was added? The failing test names the heading. Put it, with what an operator needs at three in the morning,
under the topic that it belongs to; headings in a row share the text below them.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.error_messages import Message, Unknown, _Module, classes, find

PAGE: Final = (Path(__file__).parent.parent / "docs" / "faq.md").read_text(encoding="utf-8")

DEFECTS: Final = {"InternalError", "LocalProtocolError"}
"""Their text is for us; a person reads "this is a defect"."""

HANDED_ON: Final = {
    ("cli.epoch", "error.what"): "another error, with an exit code of its own",
    ("control", "str(error)"): "an answer to a command's arguments, in msgspec's words",
    ("core.connection", "self._error.what"): "the error that closed the connection, again",
    ("core.generation", "said.what"): "a Diagnosis, which is found where it is made",
    ("core.toolstack_machine", "OutOfOrder"): "made when it is answered, from another error",
    ("primary.outcome", "effect.reason"): "the reason in the status report, from another error",
    ("storage.apply", "error.what"): "another error, with what is safe",
    ("storage.daemon_target", "error.what"): "another error, of another class",
    ("storage.daemon_target", "what"): "why the storage daemon ended, within what it was doing",
    ("storage.qemu_images", "said"): "what run_program has made of a program's words",
    ("storage.store", "error.what"): "another error, of another class",
    ("storage.recovery", "self._broken[epoch]"): "a FormatError of an earlier record, again",
}
"""Where a message is not written but handed on, and why that needs no entry."""


@cache
def everything() -> tuple[Message | Unknown, ...]:
    return tuple(find())


@cache
def messages() -> dict[str, list[Message]]:
    """Where each message is made."""
    found: dict[str, list[Message]] = {}
    for message in everything():
        if isinstance(message, Message) and message.kind not in DEFECTS:
            found.setdefault(message.text, []).append(message)
    return found


def groups() -> list[tuple[list[str], str]]:
    """The headings of each entry, and what stands below them."""
    parts = re.split(r"^((?:### `.*`\n)+)", PAGE, flags=re.M)
    return [
        (re.findall(r"^### `(.*)`$", headings, re.M), body.split("\n## ")[0].strip())
        for headings, body in zip(parts[1::2], parts[2::2], strict=True)
    ]


HEADINGS: Final = [heading for headings, _ in groups() for heading in headings]


def test_every_message_has_its_heading() -> None:
    missing = {text: made for text, made in messages().items() if text not in HEADINGS}
    lines = [f"### `{text}`    ({made[0].kind} in {made[0].where})" for text, made in sorted(missing.items())]
    assert not lines, "docs/faq.md lacks:\n" + "\n".join(lines)


def test_every_heading_is_a_message() -> None:
    odd = [f"### `{heading}`" for heading in HEADINGS if heading not in messages()]
    assert not odd, "no error says any more what docs/faq.md explains here:\n" + "\n".join(odd)


def test_no_message_is_explained_twice() -> None:
    assert len(HEADINGS) == len(set(HEADINGS))


def test_a_message_that_cannot_be_followed_is_listed_with_the_reason() -> None:
    unknown = {
        (error.where.partition(":")[0], error.expression) for error in everything() if isinstance(error, Unknown)
    }
    assert unknown == set(HANDED_ON), "write the message where the error is made, or say in HANDED_ON why not"


@pytest.mark.parametrize(("headings", "body"), groups(), ids=lambda value: value[0] if isinstance(value, list) else "")
def test_an_entry_says_something_and_is_short(headings: list[str], body: str) -> None:
    assert len(body) >= 80, headings
    assert len(body.splitlines()) <= 6, headings


def test_the_page_is_found_from_the_others() -> None:
    tree = Path(__file__).parent.parent
    assert "(docs/faq.md)" in (tree / "README.md").read_text(encoding="utf-8")
    assert "(faq.md)" in (tree / "docs" / "cli.md").read_text(encoding="utf-8")


# --- the finder

SAMPLES: Final = [
    ('ConfigError("plain")', ["plain"]),
    ('ConfigError(f"a {b} c")', ["a ... c"]),
    ('ConfigError(f"a {b}{c}")', ["a ..."]),
    ('ConfigError("a" + ", ".join(b))', ["a..."]),
    ('ConfigError("a" if b else "c")', ["a", "c"]),
    ('what = "first" if b else f"second {c}"\nConfigError(what, safe="x")', ["first", "second ..."]),
    ('def fail(what):\n    raise ConfigError(what)\nfail("one")\nfail(what="two")', ["one", "two"]),
    ('def fail(self, *, what):\n    raise ConfigError(what)\nfail(what=f"{x} two")', ["... two"]),
    ('kind = ConfigError\nkind("chosen", hint="x")', ["chosen"]),
    ('class SnapshotBroken(X):\n    def __init__(self):\n        super().__init__(f"broke {x}")', ["broke ..."]),
    ("ConfigError(error.what)", [None]),
    ("ConfigError(said[0])", [None]),
    ('print("nothing")', []),
]


@pytest.mark.parametrize(("source", "texts"), SAMPLES)
def test_messages_are_found_however_they_are_written(source: str, texts: list[str | None]) -> None:
    found = _Module("m", ast.parse(source), set()).find()
    assert [one.text if isinstance(one, Message) else None for one in found] == texts


def test_the_finder_knows_every_error_class() -> None:
    assert {"ConfigError", "CommandFailed", "TargetInUse", "EpochLost"} <= set(classes())
    assert "RefusalCode" not in classes()
    assert len(messages()) > 150
