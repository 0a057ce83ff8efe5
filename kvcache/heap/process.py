"""Which process this is, in one word, and the proof that a process is gone with all that it had open.

    word    pid << 42 | start time of its first thread, in clock ticks since boot

A pid below 2**22 (the kernel's limit) and 2**42 ticks (1,400 years at 100 a second) fit. Pid and start time
together name one life: a reused pid shows another start time. The word means something inside one pid
namespace of one boot only, which ``this_namespace`` names.

What the proof rests on. A pidfd is readable when every thread of the process has exited. A thread of
Linux gives up its descriptors (exit_files) and runs the closing that this leaves behind (exit_task_work)
before it is announced as exited (exit_notify); so the release function of every device file that only this
process had open has returned. A zombie is gone in this sense. ``/proc/<pid>/stat`` saying Z is not: the
first thread may be a zombie while others run.
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack
from pathlib import Path

_TICK_BITS = 42
_START_TIME = 19
"""Field 22 of /proc/<pid>/stat, counted after the name, which may itself have spaces."""


def this_process() -> int:
    """The word of this process; never 0."""
    return os.getpid() << _TICK_BITS | _start_time("self")


def this_namespace() -> str:
    """Kernel and pid namespace of this process: words of one are not to be judged in another."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def is_gone(word: int) -> bool:
    """Proof that the process of that word has exited with all its threads; False when unsure."""
    pid, start_time = word >> _TICK_BITS, word & ((1 << _TICK_BITS) - 1)
    ends: select.poll | None = None
    with ExitStack() as closing:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except OSError:
            # The number of a thread by now, perhaps: its start time tells. Or there is no descriptor:
            # who is reaped is gone, and that can be asked without one.
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
            except OSError:
                pass
        else:
            closing.callback(os.close, pidfd)
            ends = select.poll()
            ends.register(pidfd, select.POLLIN)
            if ends.poll(0):
                # Whoever had that pid when we asked is its last holder, or came after it.
                return True
        if not _is_proc_ours():
            return False
        try:
            return _start_time(pid) != start_time
        except (FileNotFoundError, ProcessLookupError):
            # Reaped since we looked, or hidden from us (hidepid).
            return ends is None or bool(ends.poll(0))
        except OSError:
            return False


def _is_proc_ours() -> bool:
    """/proc may be that of another pid namespace, where our numbers are others' (``unshare --pid`` alone)."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def _start_time(pid: int | str) -> int:
    """Raises OSError if there is no such process, or if it may not be looked at."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(stat.rpartition(")")[2].split()[_START_TIME])
