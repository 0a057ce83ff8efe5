"""Which object of the native step is taken, and how one comes to be: by compilers that are shell scripts.

What real ones make is in ``test_compilers.py``. Nothing here needs torch."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest

from microserve.kernels.cpu import build as building
from microserve.kernels.cpu.build import build, main
from microserve.kernels.cpu.compiler import MISSING, source_files, sources_digest
from microserve.kernels.cpu.objects import keep, prebuilt
from microserve.kernels.kernel_cache import KernelUnavailable
from tests.support.kernels.scripted_compiler import LINK, WAIT, Compilers

BY_CXX = b"an object by c++\n"
Gate = Callable[[str], int]
Start = Callable[[Mapping[str, str]], subprocess.Popen[str]]

# --- from sources to an object -------------------------------------------------------------------------


def test_each_source_is_compiled_once_and_the_object_kept(compilers: Compilers, tmp_path: Path) -> None:
    environment, told = compilers("c++"), list[str]()
    first = build(environment, told.append)
    again = build(environment, told.append)
    assert first.content == BY_CXX
    assert (first.name, first.digest) == (again.name, again.digest)
    assert (compilers.num_compiled, compilers.num_linked) == (len(source_files()), 1)
    assert told == ["compiles with c++, for half a minute or so"]
    (kept,) = compilers.objects()
    assert (kept.name, kept.read_bytes()) == (first.name, first.content)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644
    assert list(compilers.others()) == []


def test_another_compiler_or_another_version_of_one_compiles_anew(
    compilers: Compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(compilers("c++"))
    monkeypatch.setattr("microserve.kernels.cpu.compiler._versions", {})
    other = build(compilers("c++", version="2"))
    named = build({**compilers("mine"), "CXX": str(tmp_path / "bin/mine") + " --with a-word"})
    assert len({first.name, other.name, named.name}) == 3
    assert named.content == b"an object by mine\n"


def test_a_compiler_that_cannot_is_followed_by_one_that_can(compilers: Compilers, tmp_path: Path) -> None:
    environment = compilers("c++", compile="echo 'fatal error: no atomic'; exit 1")
    compilers.add("g++")
    assert build(environment).content == b"an object by g++\n"


@pytest.mark.parametrize(
    ("compile", "says"),
    [
        ("echo note; echo 'x.cc:1: error: that is no C++'; exit 1", r"c\+\+ failed: x\.cc:1: error: that is"),
        ("kill -9 $$", r"c\+\+ failed: killed by signal 9"),
        (
            "echo 'fatal error: Killed signal terminated program cc1plus'; exit 1",
            "terminated program cc1plus",
        ),
        ("exit 3", r"c\+\+ failed: exit code 3, without a word"),
    ],
)
def test_what_a_compiler_dies_of_is_said(compilers: Compilers, compile: str, says: str) -> None:
    with pytest.raises(KernelUnavailable, match=says):
        build(compilers("c++", compile=compile))
    assert compilers.objects() == []


@pytest.mark.slow
def test_who_takes_too_long_is_ended(compilers: Compilers, gate: Gate) -> None:
    gate("inside"), gate("go")
    with pytest.raises(KernelUnavailable, match=r"c\+\+ took more than 1 s"):
        build(compilers("c++", compile=WAIT), limit_s=1)
    assert list(compilers.others()) == []


def test_with_one_that_fails_the_others_end_and_their_children(
    compilers: Compilers, gate: Gate, tmp_path: Path
) -> None:
    """``cc1plus`` is a child of ``c++``, and holds its output open."""
    inside, go = gate("inside"), gate("go")
    gate("never")
    child = '(read -r _ < "$here/never") & echo $! >> "$here/children"; '
    first = f'case "$last" in */{source_files()[0].stem}.o) {WAIT} kill $!; echo error; exit 1;; esac; '
    others = 'echo > "$here/inside"; wait'

    def let_on() -> None:
        for _ in source_files():
            assert select.select([inside], [], [], 60)[0]
            os.read(inside, 1)
        os.write(go, b"\n")

    thread = Thread(target=let_on)
    thread.start()
    with pytest.raises(KernelUnavailable, match="failed: error"):
        build(compilers("c++", compile=child + first + others))
    thread.join()
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == len(source_files())
    assert all(has_ended(pid) for pid in children)


def has_ended(pid: int) -> bool:
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], 60)[0])
    finally:
        os.close(watched)


# --- several at once --------------------------------------------------------------------------------------

PROGRAM = """
import sys
from microserve.kernels.cpu import compiler
compiler.find_zig = lambda: None
from microserve.kernels.cpu.build import build, main
print(build(say=lambda text: print(text, flush=True)).name, flush=True)
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """A process that builds, and prints what it says and then the object's name."""
    with ExitStack() as running:

        def begin(environment: Mapping[str, str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
                text=True,
            )
            return running.enter_context(process)

        yield begin


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A pipe by name that always has a reader and a writer."""
    opened = []

    def make(name: str) -> int:
        os.mkfifo(tmp_path / name)
        opened.append(os.open(tmp_path / name, os.O_RDWR))
        return opened[-1]

    yield make
    for pipe in opened:
        os.write(pipe, b"\n" * 100)  # whoever was left behind goes on, and ends
        os.close(pipe)


@pytest.mark.slow
def test_of_several_processes_one_compiles(
    compilers: Compilers, gate: Gate, start: Start, tmp_path: Path
) -> None:
    inside, go = gate("inside"), gate("go")
    environment = compilers("c++", link=WAIT + LINK)
    first = start(environment)
    assert line(first).startswith("compiles with c++")
    assert select.select([inside], [], [], 60)[0]
    others = [start(environment) for _ in range(3)]
    assert [line(each) for each in others] == ["waits for another process, which compiles it"] * 3
    os.write(go, b"\n")
    names = {line(each) for each in [first, *others]}
    assert [each.wait(60) for each in [first, *others]] == [0] * 4
    assert names == {compilers.objects()[0].name}
    assert compilers.num_linked == 1


@pytest.mark.slow
def test_one_that_was_killed_while_it_compiled_blocks_nobody(
    compilers: Compilers, gate: Gate, start: Start, tmp_path: Path
) -> None:
    inside, _ = gate("inside"), gate("go")
    first = start(compilers("c++", link=WAIT + LINK))
    assert line(first).startswith("compiles with c++")
    assert select.select([inside], [], [], 60)[0]
    assert list(compilers.others())
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert build(compilers("c++")).content == BY_CXX
    assert list(compilers.others()) == []


def test_waiting_for_another_one_has_a_bound(compilers: Compilers, tmp_path: Path) -> None:
    environment = compilers("c++")
    compilers.cache.mkdir()
    with (tmp_path / f"cache/.cpu-step-{sources_digest()}.{os.geteuid()}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(KernelUnavailable, match="another process has been compiling it for 0 s"):
            build(environment, limit_s=0.2)
    assert compilers.num_compiled == 0


# --- where there is no room -------------------------------------------------------------------------------


def test_without_a_cache_the_object_is_kept_in_memory(
    compilers: Compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    told: list[str] = []
    environment = {**compilers("c++"), "MICROSERVE_KERNEL_CACHE": str(tmp_path / "file/cache")}
    found = build(environment, told.append)
    assert found.content == BY_CXX
    assert (found.origin, Path(found.path).read_bytes()) == ("compiled by c++, in memory", found.content)
    assert "cannot be used (Not a directory): compiles for itself alone" in told[0]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_without_a_temporary_directory_either_that_is_said(
    compilers: Compilers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    environment = {**compilers("c++"), "MICROSERVE_KERNEL_CACHE": str(tmp_path / "file/cache")}
    with pytest.raises(KernelUnavailable, match="no temporary directory to compile in: Not a directory"):
        build(environment)


# --- without a compiler -----------------------------------------------------------------------------------


def test_without_a_compiler_what_any_has_built_serves_the_newest_first(
    compilers: Compilers, tmp_path: Path
) -> None:
    with pytest.raises(KernelUnavailable) as raised:
        build(compilers())
    assert str(raised.value) == MISSING
    old, new = build(compilers("c++")), build(compilers("g++"))
    for found, age_s in ((old, 100), (new, 50)):
        os.utime(compilers.cache / found.name, (1_800_000_000 - age_s,) * 2)
    assert build(compilers()).name == new.name
    os.utime(compilers.cache / old.name, (1_800_000_000,) * 2)
    assert build(compilers()).name == old.name
    broken = compilers("clang++", compile="echo error; exit 1")
    assert build(broken).name == old.name
    assert build({**compilers(), "CXX": "/nowhere/c++"}).name == old.name


def test_an_object_of_other_sources_never_serves(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(compilers("c++"))
    monkeypatch.setattr(building, "sources_digest", lambda: "0" * 16)
    with pytest.raises(KernelUnavailable, match="no C"):
        build(compilers())


def test_a_prebuilt_object_comes_before_all_compilers(compilers: Compilers, tmp_path: Path) -> None:
    build(compilers("c++"))
    (tmp_path / "prebuilt").mkdir()
    keep(b"of other sources", tmp_path / "prebuilt", f"cpu-step-{'0' * 16}-00000000")
    assert prebuilt(sources_digest(), tmp_path / "prebuilt") is None
    keep(b"prebuilt", tmp_path / "prebuilt", f"cpu-step-{sources_digest()}-00000000")
    # Whoever could write it could write our modules beside it.
    next((tmp_path / "prebuilt").glob(f"*{sources_digest()}*")).chmod(0o666)
    assert build(compilers("c++")).content == b"prebuilt"
    assert build(compilers()).content == b"prebuilt"


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_where_it_is_and_ahead_says_what_is_done(
    compilers: Compilers, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--ahead"], compilers("c++")) == 0
    first = capsys.readouterr()
    told = first.err.splitlines()
    assert told[0] == "== CPU kernels: compiles with c++, for half a minute or so"
    assert told[1].startswith("== CPU kernels: compiled in ")
    assert main(["--ahead"], compilers("c++")) == 0
    again = capsys.readouterr()
    assert (first.out, again.out, again.err) == ("", "", "")
    assert main([], compilers("c++")) == 0
    assert capsys.readouterr().out == f"{compilers.objects()[0]}\n"


def test_the_command_fails_by_itself_and_not_ahead(
    compilers: Compilers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([], compilers()) == 1
    assert capsys.readouterr().err == f"== CPU kernels: none: {MISSING}\n"
    assert main(["--ahead"], compilers()) == 0
    told = f"== CPU kernels: none: {MISSING}; engines compute through transformers\n"
    assert capsys.readouterr().err == told
    monkeypatch.setattr(building, "find_zig", lambda: None)
    assert main(["--zig"], compilers("c++")) == 1
    assert capsys.readouterr().err == "== CPU kernels: none: no ziglang in this environment\n"


def test_the_command_puts_it_into_a_folder_and_older_ones_away(
    compilers: Compilers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    keep(b"old", folder, f"cpu-step-{'0' * 16}-00000000")
    (folder / "mine.txt").touch()
    for _ in range(2):
        assert main(["--into", str(folder)], compilers("c++")) == 0
        assert capsys.readouterr().out == f"{folder / compilers.objects()[0].name}\n"
    assert sorted(folder.iterdir()) == [folder / compilers.objects()[0].name, folder / "mine.txt"]
    found = prebuilt(sources_digest(), folder)
    assert found is not None and found.content == BY_CXX
