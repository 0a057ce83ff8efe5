"""Puts compiled kernels, codecs and index into a wheel, where ``make wheel`` has left them in dist/prebuilt.

Owns the wheel's tag, which is then the platform's. Only objects of these very sources are taken; without one
the wheel is for any platform, and they are compiled where they first run. An editable install takes none.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST_GLIBC = 28
"""torch's own floor: an object that would run on an older one gains nothing."""


class WheelHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        folder = Path(self.root) / "dist/prebuilt"
        if version == "editable" or not folder.is_dir():
            return
        sys.path.insert(0, str(Path(self.root) / ".src"))
        from microserve.kernels.codec import build as codec  # type: ignore[import-untyped,unused-ignore]
        from microserve.kernels.cpu.compiler import sources_digest  # type: ignore[import-untyped,unused-ignore]
        from microserve.kernels.cpu.objects import prebuilt  # type: ignore[import-untyped,unused-ignore]
        from microserve.kvcache.prefix import build as index  # type: ignore[import-untyped,unused-ignore]

        contents = []
        if found := prebuilt(sources_digest(), folder):
            build_data["force_include"][found.origin] = f"microserve/kernels/cpu/prebuilt/{found.name}"
            contents.append(found.content)
        for source, home in ((index.SOURCE, "kvcache/prefix/native"), (codec.SOURCE, "kernels/codec/native")):
            for path in folder.glob(f"{source.name}-{source.digest}-*.so"):
                build_data["force_include"][str(path)] = f"microserve/{home}/prebuilt/{path.name}"
                contents.append(path.read_bytes())
        if contents:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-manylinux_2_{max(map(_glibc, contents))}_{platform.machine()}"


def _glibc(content: bytes) -> int:
    """The oldest 2.x that has every function the object asks for."""
    return max(OLDEST_GLIBC, *(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", content)))
