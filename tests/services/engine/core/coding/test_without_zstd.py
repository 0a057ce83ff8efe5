"""An environment that has no zstandard: engines start, send and receive all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest

from microserve.kvcache.codec.codec import SUPPORTED
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.coding import choice
from microserve.services.engine.core.coding.choice import CodecOptions
from tests.support.engine.core_mesh import Mesh, expect, grant_for, prompt_of, receive, send

WIDTH = 16


class CodingMesh(Mesh):
    codecs = CodecOptions(num_threads=0)


@pytest.mark.parametrize(
    ("codec", "profile"), [("lossless-zstd", "none"), ("lossless-rans", "lossless-rans"), ("auto", "none")]
)
def test_a_sender_without_zstd_sends_by_what_it_has(
    monkeypatch: pytest.MonkeyPatch, codec: str, profile: str
) -> None:
    monkeypatch.setattr(choice, "SUPPORTED", tuple(each for each in SUPPORTED if "zstd" not in each))
    mesh = CodingMesh(width=WIDTH)
    prompt = prompt_of(33)
    granted = grant_for(mesh.b, "r", prompt, 32)
    call = send(mesh.a, "r", prompt, granted, 0, 32, codec=codec)
    receive(mesh.b, "r", granted, 32)
    mesh.run()
    assert mesh.b.tokens["r"] == expect(prompt, width=WIDTH)
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.coding is not None
    assert sent.coding.profile == profile
    mesh.close()


def test_engines_start_where_the_package_is_not() -> None:
    """Of another process: here it is imported already."""
    code = """
import sys
sys.modules["zstandard"] = None
from tests.services.engine.core.coding.test_without_zstd import *
assert "kv1:zstd" not in SUPPORTED and "kv1:rans" in SUPPORTED
mesh = CodingMesh(width=WIDTH)
prompt = prompt_of(33)
granted = grant_for(mesh.b, "r", prompt, 32)
assert granted.grant.decoding.codecs == list(SUPPORTED)
send(mesh.a, "r", prompt, granted, 0, 32, codec="lossless-rans")
receive(mesh.b, "r", granted, 32)
mesh.run()
assert mesh.b.tokens["r"] == expect(prompt, width=WIDTH)
mesh.close()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
