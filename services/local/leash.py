"""Ties a child's life to its supervisor's, then becomes the child: ``leash.py SUPERVISOR_PID COMMAND ...``.

Owns PR_SET_PDEATHSIG, which survives exec: when the supervisor dies, even by SIGKILL, the kernel kills the
child. A program of its own, run by path with ``-S -E``, because Python code between fork and exec
(``preexec_fn``) is unsafe beside threads. Imports the standard library only, and nothing of the house.

NOTE: the kernel watches the *thread* that forked; supervisors spawn from their main thread.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
