"""What the secondary writes a disk's copy to, as the operator names it: ``NAME=PATH`` or ``NAME=FORMAT:PATH``.

Owns the forms and the formats.  Pure: no file is looked at here, and no QEMU asked.

A path that begins with ``/`` or ``.`` is a path, whatever follows, so that colons in paths need no care.  Of anything
else, what stands before the first colon has to be a format's name: a format that is misspelt must not become a raw file
of a strange name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from qemu_remus.core.errors import ConfigError
from qemu_remus.core.model import DiskName, disk_name

RAW: Final = "raw"
NBD: Final = "nbd"
LUKS: Final = "luks"
QCOW2: Final = "qcow2"

WITH_BACKING: Final = frozenset({"qcow", QCOW2, "qed", "vmdk"})
"""Formats whose images may take what they lack from another one."""

IMAGE_FORMATS: Final = frozenset({LUKS, "parallels", "vdi", "vhdx", "vpc"}) | WITH_BACKING
"""Formats of image files that QEMU creates and writes; raw files we write ourselves."""

DEFAULT_NBD_PORT: Final = 10809

_FORM: Final = "NAME=PATH or NAME=FORMAT:PATH"
_KNOWN: Final = ", ".join(sorted(IMAGE_FORMATS | {NBD, RAW}))
_NBD_FORM: Final = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=/PATH"
_URI: Final = re.compile(r"(nbd|nbd\+tcp|nbd\+unix)://")
_FORMAT: Final = re.compile(r"([A-Za-z0-9_+,=.-]*):(.*)", re.DOTALL)
_KEY: Final = re.compile(r"[a-z][a-z0-9_.-]*")

_OURS: Final = {
    "size": "an image gets the size of the primary's disk",
    "backing_file": "an image that needs another one is no copy of a disk",
    "backing_fmt": "an image that needs another one is no copy of a disk",
    "backing": "an image that needs another one is no copy of a disk",
    "key-secret": "give the secret with --target-secret NAME=FILE",
    "encrypt.key-secret": "give the secret with --target-secret NAME=FILE",
    "encryption": "use encrypt.format=luks and --target-secret NAME=FILE",
    "help": "'qemu-img create -f FORMAT -o help' lists them",
}
"""Options of ``qemu-img create`` that are not the operator's, with the reason."""


@dataclass(frozen=True, slots=True)
class NbdPlace:
    """Where an NBD target is.

    :param socket: path of a Unix socket; empty: a TCP address.
    """

    export: str
    socket: str = ""
    host: str = ""
    port: int = DEFAULT_NBD_PORT


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One disk's target.

    :param location: absolute path of a file or block device; of an NBD target its URI.
    :param format: one of ``IMAGE_FORMATS``, ``raw`` or ``nbd``.
    :param options: for ``qemu-img create``, in the order given. They matter only when an image is made.
    :param secret: file that holds the passphrase of an encrypted image.
    """

    location: str
    format: str = RAW
    options: tuple[tuple[str, str], ...] = ()
    secret: Path | None = None

    def __str__(self) -> str:
        """As ``--disk`` takes it; the same target always has the same text."""
        return self.location if self.format in (RAW, NBD) else f"{self.format}:{self.location}"

    @property
    def path(self) -> Path:
        """The file or device; not of an NBD target."""
        assert self.format != NBD
        return Path(self.location)

    @property
    def encrypted(self) -> bool:
        """What it holds is encrypted: what was never written there reads as anything."""
        return self.secret is not None

    @property
    def needs_qemu(self) -> bool:
        """It is written by QEMU's storage daemon, and not by ourselves."""
        return self.format != RAW


def raw_target(path: Path) -> TargetSpec:
    """A raw file, or a block device.

    :param path: absolute.
    """
    return TargetSpec(str(path))


def parse_target(name: DiskName, text: str, directory: Path) -> TargetSpec:
    """Read what stands behind ``NAME=``.

    :param directory: absolute; relative paths begin there.
    :raise ConfigError: it is no target that can be written.
    """
    if text.startswith(("/", ".")):
        return raw_target(directory / text)
    if _URI.match(text):
        nbd_place(text)
        return TargetSpec(text, NBD)
    match = _FORMAT.fullmatch(text)
    if match is None:
        return raw_target(directory / text)
    given, place = match.groups()
    if "," in given:
        raise ConfigError(
            f"--disk {name}={text} has options where only a format may be",
            hint=f"give each as --target-option {name}=KEY=VALUE; write ./{text} if it is a path",
        )
    if given not in IMAGE_FORMATS | {RAW}:
        raise ConfigError(
            f"--disk {name}={text} names no format that can be written: {given}",
            hint=f"the form is {_FORM}, with {_KNOWN}; an NBD target is {_NBD_FORM}; write ./{text} if it is a path",
        )
    if not place:
        raise ConfigError(f"--disk {name}={text} has no path", hint=f"the form is {_FORM}")
    return TargetSpec(str(directory / place), given)


def known_target(name: DiskName, text: str) -> TargetSpec:
    """A target from its own text, without options and secret.

    :raise ConfigError: it is not what ``str`` of one gives.
    """
    return parse_target(name, text, Path("/"))


def nbd_place(uri: str) -> NbdPlace:
    """Read the URI of an NBD target, by the NBD project's document on them.

    :raise ConfigError: it is none, or asks for TLS.
    """
    wrong = ConfigError(
        f"{uri!r} is not {_NBD_FORM}", hint="TLS is not supported; use a network of its own, or a tunnel"
    )
    try:
        parts = urlsplit(uri)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
        export = unquote(parts.path.removeprefix("/"))
        port = parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme == "nbd+unix":
        sockets = query.pop("socket", [])
        if query or parts.netloc or parts.fragment or len(sockets) != 1 or not sockets[0].startswith("/"):
            raise wrong
        return NbdPlace(export, socket=sockets[0])
    if parts.scheme not in ("nbd", "nbd+tcp") or query or parts.fragment or parts.username or not parts.hostname:
        raise wrong
    return NbdPlace(export, host=parts.hostname, port=port or DEFAULT_NBD_PORT)


def with_options(
    targets: dict[DiskName, TargetSpec], options: Sequence[str], secrets: Sequence[str], directory: Path
) -> dict[DiskName, TargetSpec]:
    """The targets, with what ``--target-option NAME=KEY=VALUE`` and ``--target-secret NAME=FILE`` say.

    :raise ConfigError: one is not of that form, or does not fit its target, or a secret is missing.
    """
    result = dict(targets)
    for text in options:
        name, rest = _named(result, text, "--target-option", "NAME=KEY=VALUE")
        key, equals, value = rest.partition("=")
        if not (equals and value and _KEY.fullmatch(key)):
            raise ConfigError(f"--target-option {text!r} is not NAME=KEY=VALUE")
        if key in _OURS:
            raise ConfigError(f"--target-option {text} cannot be given: {_OURS[key]}")
        target = result[name]
        if target.format not in IMAGE_FORMATS:
            raise ConfigError(
                f"--target-option {text} is for an image that is created, and {target} is {_kind(target)}",
                hint=f"options need a format: --disk {name}=FORMAT:PATH",
            )
        if key in dict(target.options):
            raise ConfigError(f"--target-option {name}={key} is given twice")
        result[name] = replace(target, options=(*target.options, (key, value)))
    for text in secrets:
        name, file = _named(result, text, "--target-secret", "NAME=FILE")
        target = result[name]
        if target.format not in (LUKS, QCOW2):
            raise ConfigError(
                f"--target-secret {text} is for an encrypted image, and {target} is {_kind(target)}",
                hint=f"encrypted images are --disk {name}=luks:PATH or --disk {name}=qcow2:PATH",
            )
        if target.secret is not None:
            raise ConfigError(f"--target-secret {name} is given twice")
        result[name] = replace(target, secret=directory / file)
    for name, target in result.items():
        encrypts = target.format == LUKS or any(key.startswith("encrypt.") for key, _ in target.options)
        if encrypts and target.secret is None:
            raise ConfigError(
                f"the target {target} is encrypted, and no secret is given",
                hint=f"write the passphrase to a file that only you can read, and give --target-secret {name}=FILE",
            )
    return result


def _named(targets: dict[DiskName, TargetSpec], text: str, option: str, form: str) -> tuple[DiskName, str]:
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise ConfigError(f"{option} {text!r} is not {form}")
    disk = disk_name(name)
    if disk not in targets:
        raise ConfigError(f"{option} {text} names a disk that no --disk gives", hint=f"the disks: {' '.join(targets)}")
    return disk, rest


def _kind(target: TargetSpec) -> str:
    return {RAW: "a raw file or device", NBD: "an NBD export"}.get(target.format, f"of format {target.format}")


__all__ = [
    "IMAGE_FORMATS",
    "LUKS",
    "NBD",
    "QCOW2",
    "RAW",
    "WITH_BACKING",
    "NbdPlace",
    "TargetSpec",
    "known_target",
    "nbd_place",
    "parse_target",
    "raw_target",
    "with_options",
]
