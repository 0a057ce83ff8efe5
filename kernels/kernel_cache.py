"""Where compiled kernels are kept, and the error of one that cannot be had.

Needs nothing but the standard library: who only builds kernels does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "MICROSERVE_KERNEL_CACHE"


class KernelUnavailable(RuntimeError):
    """A kernel cannot be built or loaded here; the message is one line that names what is missing."""


def cache_directory(environment: Mapping[str, str]) -> Path:
    """``$MICROSERVE_KERNEL_CACHE``, else ``$XDG_CACHE_HOME/microserve/kernels``, else under ``~/.cache``."""
    if named := environment.get(CACHE_VARIABLE):
        return Path(named)
    base = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "microserve" / "kernels"
