"""What is loaded is whole, and no other user could have written it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microserve.kernels.cpu.build import build
from microserve.kernels.cpu.compiler import sources_digest
from microserve.kernels.kernel_cache import KernelUnavailable
from tests.support.kernels.scripted_compiler import Compilers

BY_CXX = b"an object by c++\n"


def test_a_broken_object_is_built_anew(compilers: Compilers) -> None:
    environment = compilers("c++")
    whole = build(environment)
    file, content = compilers.cache / whole.name, whole.content
    for wrong in (b"", content[:-1], content.upper(), content + b"\0"):
        file.unlink()
        file.write_bytes(wrong)
        assert build(environment).content == content
        assert file.read_bytes() == content
    assert compilers.num_linked == 5
    file.write_text("half")
    with pytest.raises(KernelUnavailable, match="no C"):
        build(compilers())


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_what_others_could_have_written_is_not_loaded(compilers: Compilers, mode: int) -> None:
    found = build(compilers("c++"))
    (compilers.cache / found.name).chmod(mode)
    with pytest.raises(KernelUnavailable, match="no C"):
        build(compilers())
    assert build(compilers("c++")).content == found.content
    assert compilers.num_linked == 2


def test_what_belongs_to_another_user_or_is_a_link_is_not_loaded(
    compilers: Compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build(compilers("c++"))
    file = compilers.cache / found.name
    elsewhere = file.rename(tmp_path / "elsewhere.so")
    file.symlink_to(elsewhere)
    with pytest.raises(KernelUnavailable, match="no C"):
        build(compilers())
    elsewhere.rename(file)
    assert build(compilers()).name == found.name
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    else:
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KernelUnavailable, match="no C"):
        build(compilers())


def test_a_file_that_would_block_its_reader_is_passed_by(compilers: Compilers, tmp_path: Path) -> None:
    compilers.cache.mkdir()
    os.mkfifo(tmp_path / f"cache/cpu-step-{sources_digest()}-00000000-{'0' * 16}.so")
    assert build(compilers("c++")).content == BY_CXX


def test_the_lock_of_another_user_is_not_waited_for(compilers: Compilers, tmp_path: Path) -> None:
    compilers.cache.mkdir()
    lock = tmp_path / f"cache/.cpu-step-{sources_digest()}.{os.geteuid()}.lock"
    lock.symlink_to(tmp_path / "anything")
    found = build(compilers("c++"))
    assert (found.content, compilers.objects()) == (BY_CXX, [])
    assert not (tmp_path / "anything").exists()
