"""Small native objects: built once, found again, and only where nobody else could have put them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microserve.kernels.host_object import HostSource, build
from microserve.kernels.kernel_cache import KernelUnavailable

PLAIN = "/usr/bin:/bin"


@pytest.fixture
def source(tmp_path: Path) -> HostSource:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "seven.h").write_text("#define SEVEN 7\n")
    file = folder / "seven.cc"
    file.write_text('#include "seven.h"\nextern "C" int seven() { return SEVEN; }\n')
    return HostSource("seven", file, (folder / "seven.h",))


def built(source: HostSource, cache: Path) -> Path:
    try:
        return build(source, {"MICROSERVE_KERNEL_CACHE": str(cache), "PATH": PLAIN})
    except KernelUnavailable:
        pytest.skip("no C++ compiler here")


def test_without_a_compiler_it_is_unavailable(source: HostSource, tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailable):
        build(source, {"CXX": str(tmp_path / "missing"), "MICROSERVE_KERNEL_CACHE": str(tmp_path / "cache")})


def test_a_compiler_that_fails_is_told_of(source: HostSource, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken || { echo it broke >&2; exit 1; }\n')
    broken.chmod(0o755)
    with pytest.raises(KernelUnavailable, match="it broke"):
        build(source, {"CXX": str(broken), "MICROSERVE_KERNEL_CACHE": str(tmp_path / "cache")})


def test_it_is_built_once_and_then_needs_no_compiler(source: HostSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = built(source, cache)
    before = first.stat().st_mtime_ns
    again = build(source, {"MICROSERVE_KERNEL_CACHE": str(cache), "CXX": str(tmp_path / "missing")})
    assert again == first and first.stat().st_mtime_ns == before
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_another_header_is_another_object(source: HostSource, tmp_path: Path) -> None:
    first = built(source, tmp_path / "cache")
    source.headers[0].write_text("#define SEVEN 8\n")
    assert built(source, tmp_path / "cache") != first


def test_what_another_user_could_have_written_is_not_taken(source: HostSource, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = built(source, cache)
    nowhere = {"MICROSERVE_KERNEL_CACHE": str(cache), "CXX": str(tmp_path / "missing")}
    first.chmod(0o777)
    with pytest.raises(KernelUnavailable):
        build(source, nowhere)
    first.chmod(0o755)
    aside = first.rename(tmp_path / "aside.so")
    first.symlink_to(aside)
    with pytest.raises(KernelUnavailable):
        build(source, nowhere)


def test_what_came_with_the_package_is_taken_first(source: HostSource, tmp_path: Path) -> None:
    first = built(source, tmp_path / "cache")
    source.prebuilt.mkdir()
    packaged = source.prebuilt / first.name
    os.link(first, packaged)
    assert built(source, tmp_path / "cache") == packaged
