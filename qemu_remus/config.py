"""From what the operator wrote to :mod:`qemu_remus.core.settings`: parsing, checks, and this machine's default places.

Owns every default that depends on the user or the machine.  It reads the environment that it is handed, and touches no
file beyond asking whether a control socket is there.  Every error here is a ConfigError: nothing was started.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from qemu_remus.core.errors import ConfigError, ControlUnreachable
from qemu_remus.core.model import DiskName, Generation, NodeName, PairName, Role, disk_name, pair_name
from qemu_remus.core.settings import (
    DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    DEFAULT_INTERVAL_SECONDS,
    DEFAULT_JOURNAL_LIMIT_BYTES,
    DEFAULT_PAIR,
    DEFAULT_WATCHDOG_SECONDS,
    Address,
    PrimaryConfig,
    SecondaryConfig,
)
from qemu_remus.core.target_spec import parse_target, with_options

INTERVAL_MS: Final = (10, 600_000)
"""Shortest and longest interval between checkpoints, in milliseconds."""
HEARTBEAT_SECONDS: Final = (0.5, 3600.0)
"""Shortest and longest heartbeat time-out, in seconds."""
WATCHDOG_SECONDS: Final = (2.0, 3600.0)
"""Shortest and longest time for which a primary's controller may hang until it is killed, in seconds."""
JOURNAL_LIMIT_BYTES: Final = 128 << 20
"""Smallest limit of a journal, in bytes."""
RATE_BYTES: Final = 64 << 10
"""Slowest pace for copying disks, in bytes a second: one message of data takes four seconds with it."""

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(\d{1,15})\s*([KMGT]?)(?:iB)?", re.IGNORECASE)
_PROGRAM: Final = "qemu-remus"


@dataclass(frozen=True, slots=True)
class Places:
    """This machine's and user's default directories.

    :param runtime: for control sockets; None where the user has none.
    :param state: for what must survive a restart of a controller.
    """

    runtime: Path | None
    state: Path

    def control(self, pair: PairName, role: Role) -> Path:
        """Default control socket.

        :raise ConfigError: when this user has no runtime directory.
        """
        if self.runtime is None:
            raise ConfigError(
                "there is no default place for a control socket, since XDG_RUNTIME_DIR is not set",
                hint="give one with --control PATH",
            )
        return self.runtime / f"{pair}.{role}.sock"


def places(environ: Mapping[str, str], uid: int) -> Places:
    """The default places.

    Root always has the system's, so that a login as root and sudo agree on them.

    :param uid: the effective user.
    """
    if uid == 0:
        return Places(Path("/run") / _PROGRAM, Path("/var/lib") / _PROGRAM)
    runtime = environ.get("XDG_RUNTIME_DIR")
    state = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or "/") / ".local" / "state")
    return Places(Path(runtime) / _PROGRAM if runtime else None, Path(state) / _PROGRAM)


def find_control(places: Places, pair: PairName, roles: Sequence[Role]) -> Path:
    """The control socket of the controller of this pair that runs here.

    :param roles: that are looked for.
    :raise ControlUnreachable: when there is none.
    :raise ConfigError: when there is more than one.
    """
    candidates = [places.control(pair, role) for role in roles]
    found = [path for path in candidates if path.exists()]
    if not found:
        raise ControlUnreachable(
            f"no {' or '.join(roles)} controller of pair {pair} was found on this host: there is no "
            + " and no ".join(map(str, candidates)),
            hint="name the pair with --pair, or the socket with --control, as the controller was started with",
        )
    if len(found) > 1:
        raise ConfigError(
            f"both controllers of pair {pair} run on this host", hint=f"choose one with --control {found[0]}"
        )
    return found[0]


def parse_address(text: str, option: str) -> Address:
    """Read ``HOST:PORT``; an IPv6 address stands in brackets.

    :param option: for the error.
    :raise ConfigError: when it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid = _is_ipv6(host)
    else:
        valid = ":" not in host
    if not (colon and host and valid and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(
            f"{option} {text!r} is not HOST:PORT",
            hint="for example 192.0.2.7:7400 or backup.example.org:7400 or [2001:db8::7]:7400",
        )
    return Address(host, int(port))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def beyond_loopback(address: Address) -> bool:
    """Whether other hosts may be able to connect to it."""
    if address.host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return True


def parse_size(text: str, option: str) -> int:
    """Read a size: bytes, or with K, M, G or T (powers of 1,024), KiB to TiB meaning the same.

    :raise ConfigError: when it is not of that form.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option} {text!r} is not a size", hint="for example 512M, 4G or 4GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_assignments(texts: Sequence[str], form: str) -> dict[DiskName, str]:
    """Read the values of a repeated ``--disk NAME=VALUE``, in their order.

    :param form: for the error, such as ``NAME=PATH``.
    :raise ConfigError: when one is not of that form, or a name comes twice.
    """
    disks: dict[DiskName, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise ConfigError(f"--disk {text!r} is not {form}")
        disk = disk_name(name)
        if disk in disks:
            raise ConfigError(f"--disk {disk} is given twice", hint="every disk of a pair has a name of its own")
        disks[disk] = value
    return disks


def primary_config(
    *,
    places: Places,
    qmp: Path,
    peer: str,
    pair: str = DEFAULT_PAIR,
    disks: Sequence[str] = (),
    interval_ms: float | None = DEFAULT_INTERVAL_SECONDS * 1000,
    state_dir: Path | None = None,
    fleece_dir: Path | None = None,
    control: Path | None = None,
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
    watchdog_seconds: float = DEFAULT_WATCHDOG_SECONDS,
    allow_inconsistent_resync: bool = False,
    commit_at_shutdown: bool = True,
    rate: str | None = None,
    fleece_memory: str | None = None,
) -> PrimaryConfig:
    """Check the options of ``qemu-remus primary`` and fill in the defaults.

    Paths that QEMU is told of become absolute: its working directory is not ours.

    :param interval_ms: None: a toolstack drives the checkpoints.
    :param rate: a size, for each second; None: no limit.
    :raise ConfigError: when one cannot be what it is.
    """
    name = pair_name(pair)
    address = parse_address(peer, "--peer")
    if address.port == 0:
        raise ConfigError(f"--peer {peer} has no port", hint="give the port that the secondary listens on")
    socket = control or places.control(name, Role.PRIMARY)
    state = (state_dir or places.state / f"{name}.primary").absolute()
    nodes = {disk: NodeName(node) for disk, node in parse_assignments(disks, "NAME=NODE").items()}
    if len(set(nodes.values())) < len(nodes):
        raise ConfigError("two --disk options name the same node", hint="a node is one disk")
    return PrimaryConfig(
        pair=name,
        qmp=qmp,
        peer=address,
        disks=nodes or None,
        interval_seconds=None if interval_ms is None else _interval(interval_ms),
        state_dir=state,
        fleece_dir=(fleece_dir or state / "fleece").absolute(),
        runtime_dir=socket.absolute().parent,
        control=socket,
        heartbeat_timeout_seconds=_heartbeat(heartbeat_timeout_seconds),
        watchdog_seconds=_within(watchdog_seconds, WATCHDOG_SECONDS, "--watchdog", "seconds"),
        allow_inconsistent_resync=allow_inconsistent_resync,
        commit_at_shutdown=commit_at_shutdown,
        rate_bytes_per_second=None if rate is None else _rate(rate),
        fleece_memory_bytes=_fleece_memory(fleece_memory),
    )


def secondary_config(
    *,
    places: Places,
    listen: str,
    store: Path,
    disks: Sequence[str],
    target_options: Sequence[str] = (),
    target_secrets: Sequence[str] = (),
    pair: str = DEFAULT_PAIR,
    control: Path | None = None,
    sparse: bool = False,
    overwrite: bool = False,
    force_discard: str | None = None,
    disk_dir: Path | None = None,
    journal_limit: str | None = None,
    heartbeat_timeout_seconds: float = DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
) -> SecondaryConfig:
    """Check the options of ``qemu-remus secondary`` and fill in the defaults.

    :raise ConfigError: when one cannot be what it is.
    """
    name = pair_name(pair)
    here = Path.cwd()
    given = parse_assignments(disks, "NAME=PATH or NAME=FORMAT:PATH")
    targets = {disk: parse_target(disk, text, here) for disk, text in given.items()}
    targets = with_options(targets, target_options, target_secrets, here)
    if not targets and disk_dir is None:
        raise ConfigError("no disk was given", hint="give each disk's image as --disk NAME=PATH, or --disk-dir DIR")
    if disk_dir is not None and not disk_dir.is_dir():
        raise ConfigError(
            f"--disk-dir {disk_dir} is not a directory", hint="make it first, on storage with room for the images"
        )
    if len({target.location for target in targets.values()}) < len(targets):
        raise ConfigError("two --disk options name the same path", hint="every disk needs an image of its own")
    limit = DEFAULT_JOURNAL_LIMIT_BYTES if journal_limit is None else parse_size(journal_limit, "--journal-limit")
    if limit < JOURNAL_LIMIT_BYTES:
        raise ConfigError(f"--journal-limit {journal_limit} is too small", hint="give at least 128M")
    return SecondaryConfig(
        pair=name,
        listen=parse_address(listen, "--listen"),
        store=store.absolute(),
        disks=targets,
        control=control or places.control(name, Role.SECONDARY),
        sparse=sparse,
        overwrite=overwrite,
        discard=None if force_discard is None else _generation(force_discard),
        disk_dir=None if disk_dir is None else disk_dir.absolute(),
        journal_limit_bytes=limit,
        heartbeat_timeout_seconds=_heartbeat(heartbeat_timeout_seconds),
    )


def _fleece_memory(text: str | None) -> int | None:
    return None if text is None else parse_size(text, "--fleece-memory")


def _generation(text: str) -> Generation:
    try:
        return Generation(UUID(text))
    except ValueError:
        raise ConfigError(
            f"--force-discard {text} is no generation",
            safe="nothing was started or changed",
            hint="give the UUID that the refusal, or `qemu-remus status --json`, names",
        ) from None


def _interval(milliseconds: float) -> float:
    return _within(milliseconds, INTERVAL_MS, "--interval", "milliseconds") / 1000


def _heartbeat(seconds: float) -> float:
    return _within(seconds, HEARTBEAT_SECONDS, "--heartbeat-timeout", "seconds")


def _rate(text: str) -> float:
    rate = parse_size(text, "--rate")
    if rate < RATE_BYTES:
        raise ConfigError(f"--rate {text} is too slow", hint="give at least 64K, or leave it out for no limit")
    return float(rate)


def _within(value: float, bounds: tuple[float, float], option: str, unit: str) -> float:
    low, high = bounds
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{option} {value:g} is not from {low:g} to {high:g} {unit}")
    return value
