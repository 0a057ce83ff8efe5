"""The command that builds a small C++ source of ours ahead of its first use; which one, its caller says.

Must not know what is in it. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from microserve.kernels.cpu.compiler import find_zig
from microserve.kernels.host_object import HostSource, build, put
from microserve.kernels.kernel_cache import KernelUnavailable


def run(program: str, source: HostSource, without: str, arguments: Sequence[str]) -> int:
    """The exit code. ``program``: as it is called; ``without``: what is so where it cannot be built."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--ahead", action="store_true", help="fail in no case")
    parser.add_argument("--package", action="store_true", help="put it into the package: for all users")
    parser.add_argument("--into", type=Path, metavar="DIR", help="put it there, and older ones away")
    parser.add_argument("--zig", action="store_true", help="by the package ziglang, for glibc 2.28 and later")
    options = parser.parse_args(arguments)
    into = source.prebuilt if options.package else options.into
    try:
        zig = find_zig() if options.zig else None
        if options.zig and zig is None:
            raise KernelUnavailable("no ziglang in this environment")
        path = put(source, into, zig) if into else build(source)
    except (KernelUnavailable, OSError, subprocess.SubprocessError) as error:
        print(f"== {without}: {error}", file=sys.stderr)
        return 0 if options.ahead else 1
    if not options.ahead:
        print(path)
    return 0
