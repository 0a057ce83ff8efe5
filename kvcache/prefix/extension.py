"""The prefix index's native part as a Python extension (``native/``), or nothing where it cannot be had.

Owns that it is loaded, once a process, and says what is missing. Must not know what it computes:
``python_blocks.py`` and ``hash.py`` have the same in Python, which runs where there is none.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from typing import Protocol, cast

import structlog

from microserve.kernels.host_object import build
from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kvcache.prefix.blocks import Blocks
from microserve.kvcache.prefix.build import SOURCE
from microserve.protocol import log

_MODULE = "microserve_prefix"

_logger = structlog.get_logger()


class Extension(Protocol):
    @staticmethod
    def NativeBlocks(block_size: int, /) -> Blocks: ...
    @staticmethod
    def chain(before: bytes, tokens: list[int], block_size: int, first: int, /) -> list[bytes]:
        """Hashes of the full blocks of ``tokens`` from number ``first`` on, behind the hash ``before``."""
        ...

    @staticmethod
    def digest(message: bytes, is_best: bool, /) -> bytes:
        """First half of SHA-256, by the processor's instructions or by the formula."""
        ...


@functools.cache
def extension() -> Extension | None:
    """Built at the first call if need be, which takes a second or two; a service calls it at its start."""
    try:
        path = str(build(SOURCE))
        loader = importlib.machinery.ExtensionFileLoader(_MODULE, path)
        spec = importlib.util.spec_from_file_location(_MODULE, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (KernelUnavailable, ImportError, OSError) as error:
        _logger.warning(log.KERNEL_MISSING, kernel="prefix_index", instead="python", detail=str(error))
        return None
    return cast(Extension, module)
