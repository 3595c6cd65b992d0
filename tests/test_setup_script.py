"""setup.sh qemu-root, with stand-ins for apt and debootstrap: what is not complete is never taken for whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "integration" / "setup.sh"

STANDS_IN = {
    "id": "echo 0",
    "chown": "exit 0",
    "apt-config": "exit 0",
    "apt-get": 'case "$*" in *indextargets*) echo http://mirror.invalid/debian/ ;; esac',
}

#: Like the real one, which is told the directory before the mirror; it puts its files there one after the other.
DEBOOTSTRAP = """
echo "$*" >>"$HOME/calls"
for directory; do case $directory in */.cache/*) break ;; esac; done
mkdir -p "$directory/usr/share/doc" "$directory/dev"
echo half >"$directory/first"
{then}
echo whole >"$directory/second"
"""


class Place:
    """A tree with the script in it, and a PATH on which the stand-ins come first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "integration").mkdir()
        (directory / "bin").mkdir()
        shutil.copy(SCRIPT, directory / "integration" / "setup.sh")
        for name, text in STANDS_IN.items():
            self.put(name, text)
        self.root = directory / ".cache" / "qemu" / "trixie"

    def put(self, name: str, text: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def debootstrap(self, then: str = "") -> None:
        self.put("debootstrap", DEBOOTSTRAP.replace("{then}", then))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.directory / "integration" / "setup.sh"), *(arguments or ("qemu-root", "trixie"))],
            env={"PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}", "HOME": str(self.directory)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        told = process.communicate(timeout=60)[1]
        return process.returncode, told

    def calls(self) -> Sequence[str]:
        return (self.directory / "calls").read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.debootstrap()
    return place


def test_a_root_is_made_once_from_the_machines_own_mirror(place: Place) -> None:
    assert place.run()[0] == 0
    assert (place.root / "second").read_text() == "whole\n"
    assert not (place.root / "usr/share/doc").exists()
    assert place.run() == (0, "")
    (call,) = place.calls()
    assert call.endswith(f" trixie {place.root}.new http://mirror.invalid/debian/")
    assert "--variant=minbase" in call


def test_a_debootstrap_that_fails_leaves_nothing_and_its_mirror_is_not_told(place: Place) -> None:
    place.debootstrap('echo "E: Failed getting http://mirror.invalid/debian/dists/trixie/InRelease"; exit 1')
    status, told = place.run()
    assert status == 1
    assert "Failed getting the mirror" in told
    assert "mirror.invalid" not in told
    assert not place.root.exists()
    assert not place.root.with_name("trixie.new").exists()
    place.debootstrap()
    assert place.run()[0] == 0


def test_an_interrupted_one_is_begun_anew(place: Place) -> None:
    place.debootstrap('touch "$directory/stale" "$HOME/begun"; exec sleep 600')
    process = place.start()
    while not (place.directory / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not place.root.exists()
    place.debootstrap()
    assert place.run()[0] == 0
    assert (place.root / "second").exists()
    assert not (place.root / "stale").exists()


def test_two_at_once_make_one(place: Place) -> None:
    both = [place.start(), place.start()]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(place.calls()) == 1


def test_without_a_mirror_it_says_so(place: Place) -> None:
    place.put("apt-get", "exit 0")
    status, told = place.run()
    assert status == 1
    assert "name no Debian mirror" in told


@pytest.mark.parametrize("suite", ["", "../etc", "trixie/x", "-x"])
def test_a_suite_is_a_word(place: Place, suite: str) -> None:
    assert place.run("qemu-root", suite)[0] == 2
    assert not (place.directory / ".cache").exists()
