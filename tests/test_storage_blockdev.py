"""What QEMU's programs are told of a target: exactly what was meant, and never a secret."""

from __future__ import annotations

import json
from pathlib import Path

from qemu_remus.core.target_spec import TargetSpec
from qemu_remus.storage.blockdev import create_arguments, daemon_arguments, node

PLAIN = TargetSpec("/srv/a,b:c", "qcow2", (("cluster_size", "64k"), ("data_file", "/x,y")))
LUKS = TargetSpec("/srv/a", "luks", secret=Path("/k,1"))
ENCRYPTED = TargetSpec("/srv/a", "qcow2", secret=Path("/k"))


def test_an_image_is_described_without_what_it_says_of_others_and_durable() -> None:
    described = node(PLAIN, device=False, sparse=False)
    assert described["driver"] == "qcow2"
    assert described["backing"] is None
    assert described["file"] == {"driver": "file", "filename": "/srv/a,b:c"}
    assert described["cache"] == {"direct": False, "no-flush": False}
    assert "discard" not in described
    assert node(PLAIN, device=True, sparse=True)["file"]["driver"] == "host_device"
    assert node(PLAIN, device=False, sparse=True)["file"]["discard"] == "unmap"
    assert "backing" not in node(LUKS, device=False, sparse=False)


def test_an_nbd_export_is_described_by_its_place() -> None:
    unix = node(TargetSpec("nbd+unix:///e?socket=/s", "nbd"), device=False, sparse=False)
    assert (unix["server"], unix["export"]) == ({"type": "unix", "path": "/s"}, "e")
    inet = node(TargetSpec("nbd://h:7/e", "nbd"), device=False, sparse=False)
    assert inet["server"] == {"type": "inet", "host": "h", "port": "7"}


def test_a_secret_is_named_by_its_file() -> None:
    arguments = daemon_arguments(LUKS, listener=5, device=False, sparse=False)
    secret = json.loads(arguments[arguments.index("--object") + 1])
    assert secret == {"qom-type": "secret", "id": "secret0", "file": "/k,1"}
    assert json.loads(arguments[arguments.index("--blockdev") + 1])["key-secret"] == secret["id"]
    encrypt = node(ENCRYPTED, device=False, sparse=False)["encrypt"]
    assert encrypt == {"format": "luks", "key-secret": secret["id"]}
    assert "--object" not in daemon_arguments(PLAIN, listener=5, device=False, sparse=False)


def options_of(target: TargetSpec, *, sparse: bool = False) -> str:
    arguments = create_arguments(target, "/srv/new", 512, sparse=sparse)
    assert arguments[-2:] == ["/srv/new", "512"]
    return arguments[arguments.index("-o") + 1] if "-o" in arguments else ""


def test_an_image_is_made_with_the_options_given_and_its_space_reserved() -> None:
    assert options_of(PLAIN) == "preallocation=falloc,cluster_size=64k,data_file=/x,,y"
    assert options_of(PLAIN, sparse=True) == "cluster_size=64k,data_file=/x,,y"
    own = TargetSpec("/srv/a", "qcow2", (("preallocation", "full"),))
    assert options_of(own) == options_of(own, sparse=True) == "preallocation=full"
    assert options_of(ENCRYPTED, sparse=True) == "encrypt.format=luks,encrypt.key-secret=secret0"
    assert options_of(LUKS, sparse=True) == "key-secret=secret0"
    assert options_of(TargetSpec("/srv/a", "vdi")) == ""
    assert options_of(TargetSpec("/srv/a", "vpc")) == "force_size=on"
