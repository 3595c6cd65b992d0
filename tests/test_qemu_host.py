"""What the host allows, read from copies of /proc and /sys: what may not be read is no complaint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_remus.qemu import host
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.host import look_at_host, xen_disk_name
from qemu_remus.qemu.probe_model import Confinement
from qemu_remus.qemu.socket_holders import holders_of

QEMU = PeerCredentials(7, 64055, 108)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of which only QEMU's process is known."""
    root = tmp_path / "root"
    process = root / "proc" / "7"
    (process / "attr" / "apparmor").mkdir(parents=True)
    (process / "net").mkdir()
    (process / "status").write_text("Name:\tqemu\nGroups:\t108 994\n")
    (process / "root").symlink_to("/")
    return root


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def directory(path: Path, mode: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that every user can reach, as far as its own parents allow."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and len(parent.parts) > 2:
            parent.chmod(0o755)
    return directory(tmp_path / "place", 0o755)


def blocked(root: Path, fleece: Path, qemu: PeerCredentials = QEMU) -> Path | None:
    look = look_at_host(qemu, fleece, None, root).fleece
    assert look is not None
    return look.blocked


def test_a_directory_that_qemus_user_can_reach_is_no_obstacle(root: Path, place: Path) -> None:
    assert blocked(root, directory(place / "fleece", 0o711)) is None


def test_the_directory_that_keeps_qemus_user_out_is_named(root: Path, place: Path) -> None:
    private = directory(place / "private", 0o700)
    assert blocked(root, directory(private / "fleece", 0o777)) == private
    assert blocked(root, private / "fleece", PeerCredentials(7, os.geteuid(), 0)) is None
    assert blocked(root, private / "fleece", PeerCredentials(7, 0, 0)) is None


def test_a_directory_that_we_would_make_for_ourselves_keeps_qemus_user_out(root: Path, place: Path) -> None:
    assert blocked(root, place / "not" / "there") == place / "not" / "there"


def test_qemu_must_be_able_to_make_its_socket_and_only_to_reach_the_fleece(root: Path, place: Path) -> None:
    shared = directory(place / "shared", 0o755)
    look = look_at_host(QEMU, shared, shared, root)
    assert look.fleece is not None
    assert look.fleece.blocked is None
    assert look.runtime is not None
    assert look.runtime.blocked == shared


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to a group that it is not in")
def test_supplementary_groups_of_qemu_count(root: Path, place: Path) -> None:
    shared = directory(place / "shared", 0o710)
    os.chown(shared, 0, 994)
    assert blocked(root, shared) is None
    os.chown(shared, 0, 995)
    assert blocked(root, shared) == shared


def test_a_qemu_with_another_file_system_tree_is_found_out(root: Path, tmp_path: Path, place: Path) -> None:
    look = look_at_host(QEMU, place, None, root).fleece
    assert look is not None
    assert look.elsewhere is False
    assert look.free > 0
    container = directory(tmp_path / "container", 0o755)
    (root / "proc" / "7" / "root").unlink()
    (root / "proc" / "7" / "root").symlink_to(container)
    look = look_at_host(QEMU, place, None, root).fleece
    assert look is not None
    assert look.elsewhere is True


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"attr/apparmor/current": "libvirt-0af3 (enforce)\n"}, Confinement("AppArmor", "libvirt-0af3 (enforce)")),
        ({"attr/current": "libvirt-0af3 (enforce)\n"}, Confinement("AppArmor", "libvirt-0af3 (enforce)")),
        ({"attr/apparmor/current": "unconfined\n"}, None),
        ({"attr/apparmor/current": "libvirt-0af3 (complain)\n"}, None),
        ({"attr/current": "system_u:system_r:svirt_t:s0:c1,c2\0"}, None),
        ({"attr/current": "u:r:svirt_t:s0:c1,c2\0", "sys": "0"}, None),
        ({"attr/current": "u:r:svirt_t:s0:c1,c2\0", "sys": "1"}, Confinement("SELinux", "u:r:svirt_t:s0:c1,c2")),
        ({"attr/current": "u:r:unconfined_t:s0\0", "sys": "1"}, None),
    ],
)
def test_only_a_security_module_that_enforces_confines(
    root: Path, files: dict[str, str], found: Confinement | None
) -> None:
    for name, text in files.items():
        write(root, "sys/fs/selinux/enforce" if name == "sys" else f"proc/7/{name}", text)
    assert look_at_host(QEMU, None, None, root).confinement == found


def test_the_sockets_on_which_qemu_listens_are_found(root: Path) -> None:
    process = root / "proc" / "7"
    assert look_at_host(QEMU, None, None, root).listeners is None
    (process / "fd").mkdir()
    for number, target in enumerate(["/dev/null", "socket:[11]", "socket:[12]", "socket:[13]", "socket:[14]"]):
        (process / "fd" / str(number)).symlink_to(target)
    head = "Num       RefCount Protocol Flags    Type St Inode Path\n"
    row = "0000000000000000: 00000002 00000000 {} 0001 01 {} {}\n"
    rows = [("00010000", 11, "/run/qmp sock"), ("00000000", 12, "/run/connected"), ("00010000", 99, "/run/not-qemus")]
    (process / "net" / "unix").write_text(head + "".join(row.format(*one) for one in rows))
    tcp = "   0: 0100007F:{} 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 {} 1\n"
    (process / "net" / "tcp").write_text("  sl  local\n" + tcp.format("2A39", "0A", 13) + tcp.format("1234", "01", 14))
    assert look_at_host(QEMU, None, None, root).listeners == ("/run/qmp sock", "TCP port 10809")


def test_xens_disks_in_the_kernel_are_those_of_this_domain(root: Path) -> None:
    write(root, "proc/7/cmdline", "qemu-system-i386\0-xen-domid\x003\0-name\0web\0")
    devices = root / "sys" / "bus" / "xen-backend" / "devices"
    for name in ("vbd-3-51728", "vbd-4-51712", "vif-3-0", "vbd-3-268439552"):
        (devices / name).mkdir(parents=True)
    look = look_at_host(QEMU, None, None, root)
    assert look.xen_domain == 3
    assert look.kernel_disks == ("xvdq", "xvdb")


@pytest.mark.parametrize(
    ("number", "name"),
    [(51712, "xvda"), (51729, "xvdb1"), (51952, "xvdp"), (1 << 28 | 26 << 8, "xvdaa"), (768, "768")],
)
def test_xens_disk_numbers_are_named_as_in_the_guest(number: int, name: str) -> None:
    assert xen_disk_name(number) == name


def test_the_memory_that_fleeces_may_take_is_what_the_primary_would_take(root: Path) -> None:
    assert look_at_host(QEMU, None, None, root).memory == 0
    write(root, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert look_at_host(QEMU, None, None, root).memory == 1 << 20
    assert look_at_host(QEMU, None, None, root, fleece_memory=4096).memory == 4096


def test_a_process_that_is_gone_is_no_error(tmp_path: Path) -> None:
    look = look_at_host(QEMU, tmp_path, tmp_path, tmp_path)
    assert look.listeners is None
    assert look.fleece is not None
    assert look.fleece.elsewhere is None


def test_nothing_is_made(root: Path, place: Path) -> None:
    look_at_host(QEMU, place / "fleece", place / "run", root)
    assert list(place.iterdir()) == []
    assert host.__doc__ is not None


def test_who_is_connected_to_a_socket_is_told_and_who_waits_is_not(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True); input()"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert holders_of(path) == ()
            with listener.accept()[0]:
                holders = holders_of(path)
            process.kill()
    assert [holder.pid for holder in holders] == [process.pid]
    assert sys.executable in str(holders[0]) or "python" in str(holders[0])
    assert holders_of(tmp_path / "nobody") == ()
