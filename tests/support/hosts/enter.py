"""Becomes a command within the namespaces of a host: ``enter.py PIDFD COMMAND ...``.

A program of its own, run by path with ``-S -E``: Python code between fork and exec is unsafe beside threads.
Who starts it has already chosen the pid namespace, which counts for children alone.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
KINDS = 0x40000000 | 0x00020000 | 0x08000000 | 0x04000000
"""Network, mounts, IPC, name of the host."""


def main() -> None:
    pidfd, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    # Who starts it need not be looked for: when that one dies, the first process of the namespace does.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if libc.setns(pidfd, KINDS) != 0:
        sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
    os.close(pidfd)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
