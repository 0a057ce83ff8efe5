"""docs/api.md has every field and every probe, as the code says."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from microserve.gateway.document import OPERATIONS
from tests.test_packaging import ROOT


def test_the_page_is_as_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "tooling/api.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_field_of_every_path_has_a_row() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    _, _, rows = page.partition("<!-- fields -->")
    for operation in OPERATIONS:
        if operation.request is not None:
            for field in msgspec.structs.fields(operation.request):
                assert f"| `{field.encode_name}`" in rows, (operation.path, field.name)
