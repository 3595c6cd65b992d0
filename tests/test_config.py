"""Options: what is taken, what is refused with one clear error, and where things are by default."""

from pathlib import Path
from typing import Any

import pytest

from qemu_remus.config import (
    beyond_loopback,
    find_control,
    parse_address,
    parse_assignments,
    parse_size,
    places,
    primary_config,
    secondary_config,
)
from qemu_remus.core.errors import ConfigError, ControlUnreachable
from qemu_remus.core.model import PairName, Role
from qemu_remus.core.settings import Address, PrimaryConfig, SecondaryConfig
from qemu_remus.core.target_spec import raw_target

ROOT = places({}, 0)
USER = places({"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/u"}, 7)


def primary(**options: Any) -> PrimaryConfig:
    return primary_config(**{"places": USER, "qmp": Path("qmp.sock"), "peer": "h:1", **options})


def secondary(**options: Any) -> SecondaryConfig:
    given = {"places": USER, "listen": "127.0.0.1:1", "store": Path("store"), "disks": ["disk0=/a"], **options}
    return secondary_config(**given)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7:7400", Address("192.0.2.7", 7400)),
        ("backup.example.org:0", Address("backup.example.org", 0)),
        ("[2001:db8::7]:65535", Address("2001:db8::7", 65535)),
        ("[::]:1", Address("::", 1)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text, "--peer") == address
    assert parse_address(str(address), "--peer") == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":1",
        "host:x",
        "host:65536",
        "host:-1",
        "host:1:2",
        "::1:80",
        "[host]:1",
        "[]:1",
        "h:¹",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--peer .* is not HOST:PORT.*example"):
        parse_address(text, "--peer")


@pytest.mark.parametrize(
    ("host", "beyond"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("192.0.2.7", True), ("host", True)],
)  # fmt: skip
def test_who_can_reach_an_address(host: str, beyond: bool) -> None:
    assert beyond_loopback(Address(host, 1)) is beyond


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("4K", 4096), ("4k", 4096), ("64MiB", 64 << 20), ("4G", 4 << 30), ("2 TiB", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--journal-limit") == size


@pytest.mark.parametrize("text", ["", "K", "4GB", "-1", "1.5G", "4P", "0x10", "4 G x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--journal-limit"):
        parse_size(text, "--journal-limit")


def test_assignments_keep_their_order_and_may_hold_equal_signs() -> None:
    disks = parse_assignments(["b=/x=y", "a=/z"], "NAME=PATH")
    assert list(disks.items()) == [("b", "/x=y"), ("a", "/z")]


@pytest.mark.parametrize("texts", [["a"], ["=x"], ["a="], [""], ["a b=x"], ["a=1", "a=2"]])
def test_what_is_no_assignment_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_assignments(texts, "NAME=PATH")


def test_roots_places_are_the_systems_whatever_the_environment() -> None:
    assert places({"XDG_RUNTIME_DIR": "/run/user/0", "XDG_STATE_HOME": "/x"}, 0) == ROOT
    assert primary(places=ROOT).control == Path("/run/qemu-remus/vm.primary.sock")
    assert primary(places=ROOT).state_dir == Path("/var/lib/qemu-remus/vm.primary")


def test_a_users_places_are_xdgs() -> None:
    config = primary(pair="web")
    assert config.control == Path("/run/user/7/qemu-remus/web.primary.sock")
    assert config.runtime_dir == Path("/run/user/7/qemu-remus")
    assert config.state_dir == Path("/home/u/.local/state/qemu-remus/web.primary")
    assert config.fleece_dir == config.state_dir / "fleece"
    assert places({"XDG_STATE_HOME": "/state"}, 7).state == Path("/state/qemu-remus")


def test_a_user_without_a_runtime_directory_must_name_the_socket() -> None:
    nowhere = places({}, 7)
    with pytest.raises(ConfigError, match="--control"):
        primary(places=nowhere)
    assert primary(places=nowhere, control=Path("/t/c")).runtime_dir == Path("/t")


def test_paths_that_qemu_is_told_of_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = primary(state_dir=Path("s"), fleece_dir=Path("f"), control=Path("c"))
    assert (config.state_dir, config.fleece_dir, config.runtime_dir) == (tmp_path / "s", tmp_path / "f", tmp_path)
    assert secondary(disks=["a=x"]).disks == {"a": raw_target(tmp_path / "x")}


def test_a_toolstack_in_place_of_an_interval() -> None:
    assert primary(interval_ms=None).interval_seconds is None
    assert primary(interval_ms=50).interval_seconds == 0.05


@pytest.mark.parametrize(("text", "rate"), [("64K", 65536), ("50M", 50 << 20), ("100000000", 1e8)])
def test_a_rate_is_a_size_for_each_second(text: str, rate: float) -> None:
    assert primary(rate=text).rate_bytes_per_second == rate


@pytest.mark.parametrize("text", ["0", "63K", "fast", "", "50M/s"])
def test_what_is_no_rate_is_refused_with_its_option_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--rate"):
        primary(rate=text)


def test_defaults() -> None:
    config = primary()
    assert (config.pair, config.interval_seconds, config.disks) == ("vm", 0.2, None)
    assert not config.allow_inconsistent_resync
    assert config.rate_bytes_per_second is None
    other = secondary()
    assert (other.pair, other.journal_limit_bytes) == ("vm", 4 << 30)
    assert not other.sparse
    assert not other.overwrite
    assert config.heartbeat_timeout_seconds == other.heartbeat_timeout_seconds == 3.0
    assert config.watchdog_seconds == 10.0


@pytest.mark.parametrize(
    "options",
    [
        {"pair": "a/b"},
        {"pair": ""},
        {"peer": "h:0"},
        {"interval_ms": 9.9},
        {"interval_ms": float("nan")},
        {"interval_ms": float("inf")},
        {"heartbeat_timeout_seconds": 0.1},
        {"watchdog_seconds": 1.0},
        {"watchdog_seconds": float("inf")},
        {"disks": ["a=n", "b=n"]},
    ],
)
def test_a_primary_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        primary(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"disks": []},
        {"disks": ["a=/x", "b=/x"]},
        {"journal_limit": "1M"},
        {"journal_limit": "lots"},
        {"listen": "7400"},
    ],
)
def test_a_secondary_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        secondary(**options)


def test_the_one_controller_that_runs_here_is_found(tmp_path: Path) -> None:
    here = places({"XDG_RUNTIME_DIR": str(tmp_path)}, 7)
    pair = PairName("vm")
    with pytest.raises(ControlUnreachable, match="no primary or secondary controller of pair vm"):
        find_control(here, pair, (Role.PRIMARY, Role.SECONDARY))
    path = here.control(pair, Role.SECONDARY)
    path.parent.mkdir()
    path.touch()
    assert find_control(here, pair, (Role.PRIMARY, Role.SECONDARY)) == path
    here.control(pair, Role.PRIMARY).touch()
    with pytest.raises(ConfigError, match="both controllers"):
        find_control(here, pair, (Role.PRIMARY, Role.SECONDARY))
    assert find_control(here, pair, (Role.SECONDARY,)) == path


def test_the_generation_to_give_up_is_a_uuid() -> None:
    name = "6f0c7c0e-6d2a-4b7e-9a3c-0f9f5b1a2c3d"
    assert str(secondary(force_discard=name).discard) == name
    assert secondary().discard is None
    with pytest.raises(ConfigError, match="no generation") as caught:
        secondary(force_discard="vm")
    assert caught.value.hint
