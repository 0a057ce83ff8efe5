"""Many small copies between two mappings of memory in one native call; see ``host_copy.cc`` for why.

Owns the call of its object, which ``kernels/host_object.py`` builds. Must not know what is copied. Where
there is no compiler there is no copier: callers copy by slices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from microserve.kernels.host_object import HostSource, build
from microserve.kernels.kernel_cache import KernelUnavailable

SOURCE = HostSource("host-copy", Path(__file__).parent / "host_copy.cc")

SpanCopier = Callable[[int, int, int, int], None]
"""Addresses of target, source and spans, and the number of spans. A span is three int64: source offset,
target offset, bytes. Whoever sees a later store sees all of these."""


@functools.cache
def span_copier() -> SpanCopier | None:
    """None where it cannot be built or loaded. It keeps the interpreter's lock: a copy takes microseconds,
    and getting the lock back beside a busy thread may take milliseconds."""
    try:
        function = ctypes.PyDLL(str(build(SOURCE))).ms_copy_spans
    except (KernelUnavailable, OSError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None

    def copy(target: int, source: int, spans: int, count: int) -> None:
        function(target, source, spans, count)

    return copy
