"""How the operator names targets: paths stay paths, and what is misspelt is said and never taken for a file's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_remus.core.errors import ConfigError
from qemu_remus.core.model import DiskName
from qemu_remus.core.target_spec import NbdPlace, TargetSpec, known_target, nbd_place, parse_target, with_options

HERE = Path("/here")
A = DiskName("a")


def parsed(text: str) -> TargetSpec:
    return parse_target(A, text, HERE)


@pytest.mark.parametrize(
    ("text", "location", "format_name"),
    [
        ("/srv/a.raw", "/srv/a.raw", "raw"),
        ("a.raw", "/here/a.raw", "raw"),
        ("sub/a,b=c.raw", "/here/sub/a,b=c.raw", "raw"),
        ("/srv/qcow2:a", "/srv/qcow2:a", "raw"),
        ("/srv/a:b:c", "/srv/a:b:c", "raw"),
        ("./qcow2:a", "/here/qcow2:a", "raw"),
        ("../a:b", "/here/../a:b", "raw"),
        ("with space:a", "/here/with space:a", "raw"),
        ("raw:/srv/a:b", "/srv/a:b", "raw"),
        ("qcow2:/srv/a:b", "/srv/a:b", "qcow2"),
        ("qcow2:a", "/here/a", "qcow2"),
        ("luks:/dev/vg/a", "/dev/vg/a", "luks"),
        ("nbd://h/e", "nbd://h/e", "nbd"),
        ("nbd+unix:///e?socket=/s", "nbd+unix:///e?socket=/s", "nbd"),
    ],
)
def test_a_target_is_read_as_it_looks(text: str, location: str, format_name: str) -> None:
    target = parsed(text)
    assert (target.location, target.format) == (location, format_name)
    assert target.needs_qemu is (format_name != "raw")


@pytest.mark.parametrize("text", ["/srv/a", "/srv/a:b", "qcow2:/srv/a", "nbd://h:1/e"])
def test_a_target_says_how_it_is_given(text: str) -> None:
    assert str(parsed(text)) == text
    assert known_target(A, str(parsed(text))) == parsed(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qcow3:/srv/a", "qcow3"),
        ("QCOW2:/srv/a", "QCOW2"),
        ("http://h/a", "http"),
        ("qcow2:", "no path"),
        ("qcow2,cluster_size=64k:/srv/a", "--target-option a=KEY=VALUE"),
        ("C:foo", "./C:foo"),
        ("nbd:/srv/sock", "nbd://HOST"),
        ("nbd://", "nbd://HOST"),
        ("nbd://u@h/e", "nbd://HOST"),
        ("nbd://h:x/e", "nbd://HOST"),
        ("nbd+unix:///e", "socket=/PATH"),
        ("nbd+unix:///e?socket=s", "socket=/PATH"),
        ("nbd+unix://h/e?socket=/s", "socket=/PATH"),
        ("nbds://h/e", "nbds"),
    ],
)
def test_what_is_no_target_is_said(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert said in str(caught.value)


def test_an_nbd_uri_is_taken_apart() -> None:
    assert nbd_place("nbd://h/e") == NbdPlace("e", host="h", port=10809)
    assert nbd_place("nbd+tcp://[2001:db8::7]:7/a%20b/c") == NbdPlace("a b/c", host="2001:db8::7", port=7)
    assert nbd_place("nbd+unix:///?socket=/run/a%20b") == NbdPlace("", socket="/run/a b")


def given(*options: str, secrets: tuple[str, ...] = (), target: str = "qcow2:/srv/a") -> TargetSpec:
    return with_options({A: parsed(target)}, options, secrets, HERE)[A]


def test_options_and_secrets_belong_to_their_disk() -> None:
    target = given("a=cluster_size=64k", "a=data_file=/x=y:z", secrets=("a=key",))
    assert target.options == (("cluster_size", "64k"), ("data_file", "/x=y:z"))
    assert target.secret == HERE / "key"
    assert target.encrypted


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("cluster_size=64k", "names a disk that no --disk gives"),
        ("a=cluster_size", "is not NAME=KEY=VALUE"),
        ("a=cluster_size=", "is not NAME=KEY=VALUE"),
        ("a=,x=1", "is not NAME=KEY=VALUE"),
        ("a=size=1G", "size of the primary's disk"),
        ("a=backing_file=/x", "no copy of a disk"),
        ("a=encrypt.key-secret=s", "--target-secret"),
        ("a=encrypt.format=luks", "no secret is given"),
    ],
)
def test_options_that_cannot_be_are_said(option: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given(option)
    assert said in str(caught.value)


def test_options_and_secrets_are_refused_where_nothing_would_use_them() -> None:
    for target in ("/srv/a", "nbd://h/e"):
        with pytest.raises(ConfigError, match="for an image that is created"):
            given("a=cluster_size=64k", target=target)
    for target in ("/srv/a", "nbd://h/e", "vdi:/srv/a"):
        with pytest.raises(ConfigError, match="for an encrypted image"):
            given(secrets=("a=key",), target=target)
    with pytest.raises(ConfigError, match="twice"):
        given("a=compat=1.1", "a=compat=0.10")
    with pytest.raises(ConfigError, match="no secret is given"):
        given(target="luks:/srv/a")
