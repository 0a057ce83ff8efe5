"""For the files here, which run in Triton's interpreter: see ``test_triton_interpreted.py``."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """The interpreter of Triton 3.6 turns a scalar into a loop bound in a way that numpy 2.4 refuses."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_bounds(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_bounds
