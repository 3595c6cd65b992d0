"""Becomes another program that does not outlive the thread which started it: ``launch.py PARENT PROGRAM ARGUMENT...``.

Run by file name as ``python -I -S launch.py``; it imports only the standard library and is gone as soon as the program
runs.  The kernel's word (PR_SET_PDEATHSIG, prctl(2)) holds whatever ends the parent, SIGKILL too, and survives the
exec.
Not done by ``preexec_fn``, which may hang in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    # It may have died before it was listened for.
    if os.getppid() == parent:
        os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
