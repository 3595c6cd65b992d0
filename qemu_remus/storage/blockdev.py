"""The words in which QEMU's programs are told of a target: block device descriptions, and arguments of commands. Pure.

A secret appears by its file's name only.
"""

from __future__ import annotations

import json
from typing import Any, Final

from qemu_remus.core.target_spec import LUKS, NBD, QCOW2, WITH_BACKING, TargetSpec, nbd_place

NODE: Final = "disk"
"""Node and export of a daemon that has only one."""

_SECRET: Final = "secret0"

_DEFAULTS: Final = {
    QCOW2: {"preallocation": "falloc"},
    LUKS: {"preallocation": "falloc"},
}
"""What an image that is not to be sparse is made with, unless the operator says otherwise; others cannot, or would only
write zeroes."""

_ALWAYS: Final = {"vpc": {"force_size": "on"}}
"""So that it gets the size of the disk, and not one of whole cylinders."""


def daemon_arguments(target: TargetSpec, *, listener: int, device: bool, sparse: bool) -> list[str]:
    """What a storage daemon is started with: it exports the target, writable, on a socket that it inherits.

    :param listener: the socket's descriptor, already listening.
    :param device: it is a block device.
    :param sparse: space is given back where zeroes are written.
    """
    export = {"type": "nbd", "id": NODE, "node-name": NODE, "name": NODE, "writable": True}
    return [
        *_object(target),
        *("--blockdev", _json(node(target, device=device, sparse=sparse))),
        *("--nbd-server", f"addr.type=fd,addr.str={listener},max-connections=1"),
        *("--export", _json(export)),
    ]


def node(target: TargetSpec, *, device: bool, sparse: bool) -> dict[str, Any]:
    """The block device description of a target (``BlockdevOptions`` of the QMP reference)."""
    # Writes are durable after a flush, as those of a raw target.
    common: dict[str, Any] = {"node-name": NODE, "cache": {"direct": False, "no-flush": False}}
    if sparse:
        common["discard"] = "unmap"
    if target.format == NBD:
        place = nbd_place(target.location)
        server = (
            {"type": "unix", "path": place.socket}
            if place.socket
            else {"type": "inet", "host": place.host, "port": str(place.port)}
        )
        return {"driver": "nbd", **common, "server": server, "export": place.export}
    file: dict[str, Any] = {"driver": "host_device" if device else "file", "filename": target.location}
    if sparse:
        file["discard"] = "unmap"
    described: dict[str, Any] = {"driver": target.format, **common, "file": file}
    if target.format in WITH_BACKING:
        described["backing"] = None  # whatever the image says
    if target.secret is not None:
        if target.format == LUKS:
            described["key-secret"] = _SECRET
        else:
            described["encrypt"] = {"format": _encryption(target), "key-secret": _SECRET}
    return described


def create_arguments(target: TargetSpec, file: str, size: int, *, sparse: bool) -> list[str]:
    """Arguments of ``qemu-img`` that make a new image.

    :param file: where, which may be another place than the target's.
    """
    options = _ALWAYS.get(target.format, {}) | ({} if sparse else _DEFAULTS.get(target.format, {}))
    options |= dict(target.options)
    if target.secret is not None:
        if target.format == LUKS:
            options["key-secret"] = _SECRET
        else:
            options["encrypt.format"] = _encryption(target)
            options["encrypt.key-secret"] = _SECRET
    said = [f"{key}={value.replace(',', ',,')}" for key, value in options.items()]
    return [
        *("create", "-q", "-f", target.format),
        *_object(target),
        *(("-o", ",".join(said)) if said else ()),
        file,
        str(size),
    ]


def info_arguments(target: TargetSpec, file: str, *, probe: bool = False) -> list[str]:
    """Arguments of ``qemu-img`` that describe, as JSON, what is there.

    :param probe: of whatever format it seems to be; else it fails where that is another.
    """
    return ["info", "--output=json", *(() if probe else ("-f", target.format)), file]


def resize_arguments(target: TargetSpec, size: int, *, device: bool, shrink: bool) -> list[str]:
    """Arguments of ``qemu-img`` that give an image another size."""
    described = node(target, device=device, sparse=False)
    image = "json:" + _json({key: value for key, value in described.items() if key not in ("node-name", "cache")})
    return ["resize", "-q", *(("--shrink",) if shrink else ()), *_object(target), image, str(size)]


def option_names_arguments(target: TargetSpec) -> list[str]:
    """Arguments of ``qemu-img`` that list the options with which an image of the format can be made."""
    return ["create", "-f", target.format, "-o", "help"]


def _encryption(target: TargetSpec) -> str:
    return dict(target.options).get("encrypt.format", "luks")


def _object(target: TargetSpec) -> list[str]:
    if target.secret is None:
        return []
    return ["--object", _json({"qom-type": "secret", "id": _SECRET, "file": str(target.secret)})]


def _json(what: dict[str, Any]) -> str:
    return json.dumps(what, separators=(",", ":"))
