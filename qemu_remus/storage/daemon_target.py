"""A target that QEMU's storage daemon writes: an image of any format, or an NBD export.

Owns the daemon's life, and what its end means for what was written.  What may not enter: which image is acceptable
(:mod:`qemu_remus.storage.qemu_images`), and whose extents these are.  Calls block.

One daemon serves one target.  Nobody but us can connect to it: its socket has no name any more when it begins to listen
to us.  It holds QEMU's locks on the image, so that no VM can be started on it, and ends when we do.  These locks do not
keep a second daemon off an image of each format (luks), so we hold one of our own beside them: an open file description
lock on a byte that QEMU does not use.

What was written since the last good flush is lost with the daemon, as far as anybody knows, and has to be written
again.  Where nothing was, its end changes nothing: it is started again, and the work goes on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from qemu_remus.core.errors import (
    InternalError,
    NbdConnectionLost,
    NbdError,
    NbdRequestFailed,
    NoSpace,
    StorageError,
    TargetInUse,
    TargetTooLarge,
    TargetTooSmall,
    TargetUnsuitable,
    WriteFailed,
)
from qemu_remus.core.target_spec import LUKS, NBD, QCOW2, TargetSpec
from qemu_remus.nbd.blocking import WINDOW, BlockingNbd, connect_nbd
from qemu_remus.storage.blockdev import NODE, daemon_arguments, resize_arguments
from qemu_remus.storage.files import Buffer, is_no_space
from qemu_remus.storage.programs import QEMU_IMG, STORAGE_DAEMON, Child, run_program, start_child

START_TIMEOUT: Final = 60.0
"""Seconds that a daemon has to open its image: a passphrase takes some, a slow server of an NBD target too."""

IO_TIMEOUT: Final = 300.0
"""Seconds of silence, with something asked of it, after which a daemon is taken for hung and killed."""

END_TIMEOUT: Final = 25.0
"""Seconds that a daemon has to close its image; less than a controller has that is told to stop."""

IN_USE_PATIENCE: Final = 5.0
"""Seconds for which an image that is in use is tried again: a controller that was killed takes its daemon along, and
the kernel takes a moment for that."""

_WELL_USED: Final = frozenset({LUKS, NBD, QCOW2})
"""Formats whose drivers are given several writes at once by everybody. Of the others each gets one at a time: QEMU
aborts (an assertion in ``qed_aio_write_alloc``) where two writes allocate in an image of the format qed."""

_LOCK_BYTE: Final = 300
_FLOCK: Final = struct.Struct("hhqqi4x")

_UNCHANGED: Final = "it was not changed"
_AGAIN: Final = "what it got since its last flush is written again"

_T = TypeVar("_T")

Lost = Callable[[str], None]
"""Called, in a thread of its own, with what there is to say about a daemon that ended without being told to."""


class DaemonTarget:
    """One open target; the counterpart of :class:`qemu_remus.storage.targets.Target`, with the same rules.

    Only :meth:`revive` may be called beside another call. Use :func:`qemu_remus.storage.qemu_images.prepare_image`.

    :param size: bytes of the disk; an NBD export may be larger.
    :param created: this call created it, empty: it reads as zeroes.
    :param sparse: give space back where zeroes are written.
    :param device: it is in a block device.
    """

    def __init__(
        self, spec: TargetSpec, size: int, *, created: bool, sparse: bool, device: bool, on_lost: Lost
    ) -> None:
        self.spec = spec
        self.size = size
        self.created = created
        self._sparse = sparse
        self._device = device
        self._on_lost = on_lost
        self._turn = threading.RLock()
        self._child: Child | None = None
        self._nbd: BlockingNbd | None = None
        self._lock = -1
        self._closed = False
        self._unsynced = False  # of our own writes
        self._flushed = False  # whatever is there
        self._failure: StorageError | None = None
        self._extent = (0, 0, False)

    def open(self) -> None:
        """Start the daemon.

        :raise TargetInUse: another process uses it.
        :raise TargetUnsuitable: it cannot be opened, or has another size.
        """
        with self._turn:
            deadline = time.monotonic() + IN_USE_PATIENCE
            while True:
                try:
                    self._claim()
                    return self._start()
                except TargetInUse:
                    if time.monotonic() >= deadline:
                        raise
                time.sleep(0.1)

    # --- as a raw target ---------------------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; not durable before :meth:`flush`, and its errors may come only there.

        :raise NoSpace, WriteFailed: something could not be written, or an earlier write or flush failed.
        """
        self._change(offset, len(data), lambda nbd: nbd.write(offset, data))

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; it stays allocated unless the target is sparse. As :meth:`write` otherwise."""
        self._change(offset, length, lambda nbd: nbd.zero(offset, length, may_punch=self._sparse))

    def read(self, offset: int, length: int) -> bytes:
        """What the target holds there.

        :raise TargetUnsuitable: it cannot be read.
        :raise NoSpace, WriteFailed: an earlier write or flush failed.
        """
        self._check(offset, length)
        return self._look(lambda nbd: nbd.read(offset, length)) if length else b""

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the whole range is known to read as zeroes.

        :raise TargetUnsuitable, NoSpace, WriteFailed: as :meth:`read`.
        """
        self._check(offset, length)
        end = offset + length
        while offset < end:
            start, stop, zero = self._extent
            if not start <= offset < stop:
                count, zero = self._look(partial(BlockingNbd.extent, offset=offset, length=self.size - offset))
                start, stop = offset, offset + count
                self._extent = (start, stop, zero)
            if not zero:
                return False
            offset = stop
        return True

    def flush(self) -> None:
        """Make durable what was written before.

        :raise NoSpace, WriteFailed: it could not be made durable: everything since the last good flush has to be
            written again.
        """
        self._check(0, 0)
        with self._turn:
            if self._flushed:
                return
            self._do("flushing", lambda nbd: nbd.flush())
            self._unsynced = False
            self._flushed = True

    def resize(self, size: int) -> None:
        """Give the image another size, durably; an NBD export has to be large enough.

        What an image gains reads as zeroes, unless it is encrypted.

        :param size: bytes of the disk from now on.
        :raise TargetUnsuitable: its format cannot be resized, or it could not; it is as it was.
        :raise StorageError: it cannot be opened again.
        """
        with self._turn:
            self.flush()
            before, self.size = self.size, size
            self._end(END_TIMEOUT)
            try:
                if self.spec.format != NBD:
                    arguments = resize_arguments(self.spec, size, device=self._device, shrink=size < before)
                    run_program([QEMU_IMG, *arguments], timeout=IO_TIMEOUT)
                self._start()
            except StorageError as error:
                self.size = before
                self._start()
                raise TargetUnsuitable(
                    f"the target {self.spec} cannot be given {size} bytes instead of {before}: {error.what}",
                    safe="what it holds it still holds",
                    hint=error.hint or "not every format can be resized: use qcow2, or raw",
                ) from error

    def reset_after_failure(self) -> None:
        """Take writes again; the caller writes again everything since its last good flush.

        With another daemon: of a flush that failed QEMU never takes another, and what is cached in it is not the image.
        """
        with self._turn:
            if self._failure is not None:
                self._end(END_TIMEOUT)
                self._failure = None
                self._unsynced = False

    def close(self) -> None:
        """End the daemon, which closes the image and releases its locks; does not flush."""
        with self._turn:
            self._closed = True
            self._end(END_TIMEOUT)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # --- the daemon --------------------------------------------------------------------------------------------------

    @property
    def daemon(self) -> int | None:
        """The daemon's process id; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.running else None

    def revive(self) -> bool:
        """Start a daemon that has ended while nothing was asked of it. Whether that was so.

        :raise StorageError: it cannot be started.
        """
        with self._turn:
            if self._closed or self._unsynced or self._failure is not None or self.daemon is not None:
                return False
            self._end(0)
            self.open()
            return True

    def _change(self, offset: int, length: int, work: Callable[[BlockingNbd], None]) -> None:
        self._check(offset, length)
        if not length:
            return
        with self._turn:
            self._extent = (0, 0, False)
            self._flushed = False
            if self._unsynced:
                self._do("writing", work)
            else:
                # Waited for, so that it can be done again by another daemon, where this one has ended meanwhile.
                self._do("writing", partial(_settled, work))
                self._unsynced = True

    def _look(self, work: Callable[[BlockingNbd], _T]) -> _T:
        with self._turn:
            if self._unsynced:
                # So that an error of a write is not taken for one of this.
                self._do("writing", lambda nbd: nbd.settle())
            try:
                return self._do("reading", work)
            except NbdRequestFailed as error:
                raise TargetUnsuitable(
                    f"the target {self.spec} cannot be read: {error.what}",
                    safe=_UNCHANGED,
                    hint="look at the host's kernel log for the device's errors, and run 'qemu-img check' on the image",
                ) from error

    def _do(self, doing: str, work: Callable[[BlockingNbd], _T]) -> _T:
        """Have the daemon do something; where it is gone, and took nothing along, another one does."""
        for again in (True, False):
            try:
                return work(self._connected())
            except NbdRequestFailed as error:
                if doing == "reading":
                    raise
                raise self._fail(doing, error) from error
            except NbdConnectionLost as error:
                what = self._gone(error)
                if self._unsynced or not again:
                    raise self._fail(doing, NbdConnectionLost(what)) from error
            except NbdError as error:
                self._end(0)
                raise self._fail(doing, error) from error
            except TargetUnsuitable as error:
                if self._unsynced:
                    raise self._fail(doing, error) from error
                raise WriteFailed(error.what, safe=error.safe, hint=error.hint) from error
        raise AssertionError

    def _connected(self) -> BlockingNbd:
        if self._nbd is None:
            self.open()
        assert self._nbd is not None
        return self._nbd

    def _gone(self, error: NbdConnectionLost) -> str:
        """End what is left of a daemon that does not answer: what there is to say about it."""
        child = self._child
        # The connection ends before the process does.
        if child is not None and not isinstance(error.__cause__, TimeoutError):
            child.wait(2.0)
        how = child.how if child is not None and not child.running else error.what
        self._end(0)
        return f"the storage daemon of {self.spec} ended: {how}"

    def _fail(self, doing: str, error: NbdError | TargetUnsuitable) -> StorageError:
        number = error.error if isinstance(error, NbdRequestFailed) else 0
        text = f"{doing} {self.spec} failed: {error.what}"
        if is_no_space(OSError(number, "")):
            self._failure = NoSpace(text, safe=_AGAIN, hint="make room where the image is")
        else:
            hint = error.hint or "look at the log, and at the host's kernel log for the device's errors"
            self._failure = WriteFailed(text, safe=_AGAIN, hint=hint)
        return self._failure

    def _check(self, offset: int, length: int) -> None:
        if self._closed:
            raise InternalError(f"{self.spec} is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InternalError(f"{length} bytes at {offset} are outside {self.spec} with its {self.size} bytes")
        if self._failure is not None:
            raise type(self._failure)(
                f"{self.spec} takes nothing more since {self._failure.what}", hint=self._failure.hint
            ) from self._failure

    def _claim(self) -> None:
        """Take our own lock, once; it is held while this process lives and the target is open."""
        if self._lock >= 0 or self.spec.format == NBD:
            return
        try:
            descriptor = os.open(self.spec.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._unsuitable(error.strerror or str(error)) from error
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK_BYTE, 1, 0))
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._in_use("another secondary, or another disk of this one") from error
            raise self._unsuitable(f"it cannot be locked: {error.strerror}") from error
        self._lock = descriptor

    def _start(self) -> None:
        self._forget_cached()
        self._extent = (0, 0, False)
        self._flushed = False
        ours, theirs = _private_socket()
        with theirs:
            arguments = daemon_arguments(self.spec, listener=theirs.fileno(), device=self._device, sparse=self._sparse)
            try:
                child = start_child([STORAGE_DAEMON, *arguments], pass_fds=[theirs.fileno()], on_end=self._ended)
            except BaseException:
                ours.close()
                raise
        self._child = child
        try:
            window = WINDOW if self.spec.format in _WELL_USED else 1
            what = f"the storage daemon of {self.spec}"
            self._nbd = connect_nbd(ours, what, NODE, timeout=START_TIMEOUT, window=window)
            self._nbd.set_timeout(IO_TIMEOUT)
            self._see_size(self._nbd.info.size)
            child.served = True
        except NbdError as error:
            child.wait(2.0)
            said = child.said if not child.running else ""
            self._end(0)
            raise self._unsuitable(said or error.what) from error
        except BaseException:
            self._end(END_TIMEOUT)
            raise

    def _see_size(self, found: int) -> None:
        if found < self.size:
            raise TargetTooSmall(
                f"the target {self.spec} has {found} bytes; the primary's disk has {self.size}",
                safe=_UNCHANGED,
                hint="name a larger one, or remove the image: it is then created with the right size",
            )
        if found > self.size and self.spec.format != NBD:
            raise TargetTooLarge(
                f"the target {self.spec} has {found} bytes; the primary's disk has {self.size}",
                safe=_UNCHANGED,
                hint="a guest must see its disk at the size it knows: remove the image, and it is created anew",
            )

    def _unsuitable(self, said: str) -> TargetUnsuitable:
        if "lock" in said and "Failed to get" in said:
            return self._in_use(f"another process ({said})")
        return TargetUnsuitable(
            f"the target {self.spec} cannot be opened by QEMU's storage daemon: {said}",
            safe=_UNCHANGED,
            hint="see that it is what it is named as, that this user may write to it, and that the secret is right",
        )

    def _in_use(self, who: str) -> TargetInUse:
        return TargetInUse(
            f"{who} uses the target {self.spec}",
            safe=_UNCHANGED,
            hint="end it first (a VM must never run on a target while this secondary does), or name another target",
        )

    def _ended(self, child: Child) -> None:
        # Another one may have taken its place by now.
        if child.served:
            self._on_lost(f"the storage daemon of {self.spec} ended: {child.how}")

    def _end(self, patience: float) -> None:
        nbd, self._nbd = self._nbd, None
        child, self._child = self._child, None
        if child is not None:
            if not patience:
                child.end(0)
            if nbd is not None:
                nbd.close()
            child.end(patience)
        elif nbd is not None:
            nbd.close()

    def _forget_cached(self) -> None:
        """Have it read from the device; see :func:`qemu_remus.storage.targets.reopen_target`."""
        if self.spec.format == NBD:
            return
        with suppress(OSError):
            descriptor = os.open(self.spec.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _settled(work: Callable[[BlockingNbd], None], nbd: BlockingNbd) -> None:
    work(nbd)
    nbd.settle()


def _private_socket() -> tuple[socket.socket, socket.socket]:
    """A connection that waits at a listening socket, and that one, which has no name any more.

    :raise StorageError: there is no place for a socket.
    """
    try:
        ours, theirs = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        try:
            with tempfile.TemporaryDirectory(prefix="qemu-remus-") as directory:
                handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    # However long the directory's name is.
                    place = Path(f"/proc/self/fd/{handle}") / "nbd"
                    theirs.bind(str(place))
                    theirs.listen(1)
                    ours.connect(str(place))
                finally:
                    os.close(handle)
        except BaseException:
            ours.close()
            theirs.close()
            raise
    except OSError as error:
        raise StorageError(
            f"no socket can be made in {tempfile.gettempdir()}: {error.strerror}",
            hint="see that this user may write there, or set TMPDIR",
        ) from error
    return ours, theirs
