"""Prefix indexes with their blocks in either form: compiled, and in Python."""

from __future__ import annotations

import pytest

from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.kvcache.prefix.python_blocks import PythonBlocks

FORMS = ("native", "python")


def new_index(form: str, block_size: int, model: str, max_nbytes: int, *, revision: str = "") -> PrefixIndex:
    index = PrefixIndex(block_size, model, max_nbytes, revision=revision)
    if form == "python":
        index._blocks = PythonBlocks(block_size, max_nbytes // 16)
    elif extension() is None:
        pytest.skip("no C++ compiler, or no headers of Python")
    return index
