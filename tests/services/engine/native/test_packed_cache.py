"""Packed weights that are kept: the same bits as without, never another model's, and where there is no
keeping them, an engine starts all the same."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from microserve.kernels.cpu.library import library
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, Chunk, Sampled, SampleSpec
from microserve.services.engine.loading import make_runner
from microserve.services.engine.model.model import load_model
from microserve.services.engine.native import packed_cache
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.native.packing import pack_model
from microserve.services.engine.room import unpromised_room
from tests.support.engine.model.packed_models import files, is_mapped, load, loading
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

MIB = 1 << 20


def answer(model: PackedModel) -> list[Sampled]:
    """Tokens and log-probabilities of a prompt and of what follows it."""
    spec = model.spec
    layout = KvLayout("m", spec.num_layers, 8, 16, spec.num_kv_heads, spec.head_dim, spec.dtype)
    settings = load_settings(overrides=["kvcache.block_size=16", f"model.dtype={spec.dtype}"])
    runner = make_runner(settings, model, np.zeros(layout.data_nbytes, np.uint8), 8, None)
    tokens, said = list(range(20, 57)), []
    for start in (0, *range(37, 42)):
        wanted = SampleSpec(SamplingParams(temperature=0.0, logprobs=5), tokens, [], frozenset())
        chunk = Chunk(0, tokens[start:], start, [3, 1, 2], start, wanted)
        (sampled,) = runner.execute(Batch([chunk])).sampled
        assert sampled is not None
        said.append(sampled)
        tokens.append(sampled.token_id)
    return said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_mapped_is_what_was_packed(tmp_path: Path, cache: Path, family: str, dtype: str) -> None:
    directory = make_tiny_model(tmp_path / "model", family)
    here = pack_model(load_model(directory, dtype=dtype), library())
    first = load(directory, f"model.dtype={dtype}")
    second = loading(directory, f"model.dtype={dtype}").find()

    assert second is not None and is_mapped(first) and is_mapped(second)
    assert len(files(cache)) == 1
    for found in (first, second):
        assert (found.spec, found.shape, found.tables) == (here.spec, here.shape, here.tables)
        assert found.weights.layers == here.weights.layers
        assert found.weights.memory.tobytes() == here.weights.memory.tobytes()
        assert found.numerics(library(), "cpu1") == here.numerics(library(), "cpu1")
    assert answer(second) == answer(here)


def test_int8_and_plain_weights_are_kept_apart(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    plain, rounded = load(directory), load(directory, "model.weights=int8")
    here = pack_model(load_model(directory, dtype="bfloat16"), library(), "int8")

    assert len(files(cache)) == 2 and plain.spec.revision != rounded.spec.revision == here.spec.revision
    found = loading(directory, "model.weights=int8").find()
    assert found is not None and is_mapped(found)
    assert found.weights.memory.tobytes() == here.weights.memory.tobytes()
    assert found.numerics(library(), "cpu1") == here.numerics(library(), "cpu1")
    assert answer(found) == answer(here) != answer(plain)


def test_an_engine_that_finds_its_weights_packed_imports_no_torch(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    load(directory)
    program = """
import sys
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.loading import Loading
from microserve.services.engine.service import run_engine
assert Loading(load_settings(overrides=["model.path=" + sys.argv[1]])).find() is not None
print([name for name in ("torch", "transformers", "safetensors") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# --- never another model's ---------------------------------------------------------------------------


def rewrite(directory: Path, other: Path) -> None:
    for file in other.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())


def rewrite_with_the_times_of_before(directory: Path, other: Path) -> None:
    times = {file.name: file.stat() for file in directory.iterdir()}
    rewrite(directory, other)
    for name, status in times.items():
        os.utime(directory / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_a_file(directory: Path, other: Path) -> None:
    shutil.copy2(other / "model.safetensors", directory / "new")
    os.rename(directory / "new", directory / "model.safetensors")


def replace_the_directory(directory: Path, other: Path) -> None:
    os.rename(directory, directory.with_name("old"))
    os.rename(other, directory)


@pytest.mark.parametrize(
    "change", [rewrite, rewrite_with_the_times_of_before, replace_a_file, replace_the_directory]
)
def test_a_model_that_changed_is_packed_anew(
    tmp_path: Path, cache: Path, change: Callable[[Path, Path], None]
) -> None:
    directory, other = (
        make_tiny_model(tmp_path / name / "tiny", seed=seed) for seed, name in enumerate("ab")
    )
    before = load(directory)
    expected = pack_model(load_model(other, dtype="bfloat16"), library())
    old_bytes = before.weights.memory.tobytes()
    change(directory, other)

    assert loading(directory).find() is None
    found = load(directory)
    assert found.spec.revision == expected.spec.revision != before.spec.revision
    assert found.weights.memory.tobytes() == expected.weights.memory.tobytes()
    assert before.weights.memory.tobytes() == old_bytes  # who serves the old one still has it


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_setting_of_the_model_that_changed_counts(tmp_path: Path, cache: Path, file: str) -> None:
    directory = make_tiny_model(tmp_path / "model")
    load(directory)
    (directory / file).write_text('{"eos_token_id": 7}' if file != "config.json" else "{}")
    assert loading(directory).find() is None


def test_another_dtype_is_another_file(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    dtypes = [load(directory, f"model.dtype={dtype}").spec.dtype for dtype in ("bfloat16", "float32")]
    assert dtypes == ["bfloat16", "float32"] and len(files(cache)) == 2


def test_what_was_read_while_it_changed_is_not_kept(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    way = loading(directory)
    os.utime(directory / "model.safetensors")
    with capture_logs() as logs:
        model, _ = way.load()
    assert isinstance(model, PackedModel) and not is_mapped(model) and not files(cache)
    (line,) = [line for line in logs if line["event"] == log.WEIGHTS_NOT_KEPT]
    assert (line["log_level"], line["detail"]) == ("warning", "the model's files have changed just now")


def test_files_that_changed_a_moment_ago_may_change_once_more_and_look_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(packed_cache, "SETTLED_NS", 3600 * 10**9)
    monkeypatch.setattr(packed_cache, "COARSELY_SETTLED_NS", 3600 * 10**9)
    assert not is_mapped(load(directory)) and not files(cache)


# --- where it cannot be kept -------------------------------------------------------------------------


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_one_warning_and_the_next_start(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_tiny_model(tmp_path / "model")
    monkeypatch.setattr(os, "fsync", full)  # where delayed writes say that there is no room
    with capture_logs() as logs:
        model = load(directory)
    assert not is_mapped(model) and list(cache.iterdir()) == []
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert (line["event"], line["detail"]) == (log.WEIGHTS_NOT_KEPT, "No space left on device")
    assert answer(model) == answer(pack_model(load_model(directory, dtype="bfloat16"), library()))


def test_a_cache_that_cannot_be_made_costs_one_warning(tmp_path: Path, cache: Path) -> None:
    cache.write_text("no directory")
    directory = make_tiny_model(tmp_path / "model")
    with capture_logs() as logs:
        model = load(directory)
    assert not is_mapped(model)
    assert {line["event"] for line in logs if line["log_level"] == "warning"} == {log.WEIGHTS_NOT_KEPT}


def test_a_cache_that_is_only_read_serves_and_takes_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other = (make_tiny_model(tmp_path / name / "tiny", seed=seed) for seed, name in enumerate("ab"))
    load(kept)
    held = files(cache)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", refused)
    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "open", _read_only(os.open))
    with capture_logs() as logs:
        assert is_mapped(load(kept)) and not is_mapped(load(other))
    assert [line["detail"] for line in logs if line["log_level"] == "warning"] == ["Read-only file system"]
    assert files(cache) == held


def _read_only(opens: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opens(path, flags, *more, **options)

    return opened


def test_nothing_is_kept_where_that_is_switched_off(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    with capture_logs() as logs:
        assert not is_mapped(load(directory, "model.packed_cache_mb=0"))
    assert not cache.exists() and [line for line in logs if line["log_level"] == "warning"] == []


def test_random_weights_are_not_kept(tmp_path: Path, cache: Path) -> None:
    assert not is_mapped(load(make_tiny_model(tmp_path / "model"), "model.load_format=random"))
    assert not cache.exists()


def test_those_that_were_used_least_recently_make_room(tmp_path: Path, cache: Path) -> None:
    models = [make_tiny_model(tmp_path / str(seed), seed=seed, hidden_size=432) for seed in range(4)]
    for model in models[:3]:
        load(model)
    size_mb = files(cache)[0].stat().st_size / MIB
    assert size_mb > 1  # so that whole megabytes can say it
    oldest = files(cache)
    for age, file in enumerate(oldest):
        os.utime(file, (1000 + age, 1000 + age))
    mapped = loading(models[0]).find()  # used now
    assert mapped is not None
    content = mapped.weights.memory.tobytes()

    load(models[3], f"model.packed_cache_mb={int(2.5 * size_mb)}")
    left = files(cache)
    assert len(left) == 2
    assert loading(models[0]).find() is not None and loading(models[3]).find() is not None

    assert not is_mapped(load(models[1], "model.packed_cache_mb=1"))  # larger than all may be
    assert files(cache) == left
    for file in left:
        file.unlink()
    assert mapped.weights.memory.tobytes() == content


# --- several at a time -------------------------------------------------------------------------------


def test_of_two_that_start_at_once_one_packs(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")

    async def start(packed: list[str]) -> PackedModel:
        way = loading(directory)
        assert way.find() is None
        async with way.alone():
            await asyncio.sleep(0)  # the other one is at the door
            found = way.find()
            if found is None:
                packed.append("one")
                model, _ = await asyncio.to_thread(way.load)
                assert isinstance(model, PackedModel)
                return model
            return found

    async def both() -> tuple[list[str], PackedModel, PackedModel]:
        packed: list[str] = []
        return packed, *await asyncio.gather(start(packed), start(packed))

    packed, first, second = asyncio.run(both())
    assert packed == ["one"] and len(files(cache)) == 1
    assert is_mapped(first) and first.weights.memory.tobytes() == second.weights.memory.tobytes()


def test_whoever_waits_for_one_that_dies_goes_on(tmp_path: Path, cache: Path) -> None:
    directory = make_tiny_model(tmp_path / "model")
    way = loading(directory)
    program = """
import asyncio, sys
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.loading import Loading
async def hold():
    async with Loading(load_settings(overrides=["model.path=" + sys.argv[1]])).alone():
        print("held", flush=True)
        await asyncio.sleep(600)
asyncio.run(hold())
"""
    holder = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    while holder.stdout.readline() not in (b"held\n", b""):
        pass

    async def wait() -> None:
        asyncio.get_running_loop().call_later(0.2, holder.kill)
        async with way.alone():
            assert await asyncio.to_thread(holder.wait) != 0

    asyncio.run(wait())
    assert isinstance(way.load()[0], PackedModel) and files(cache)
    holder.stdout.close()


def test_what_a_dead_writer_left_goes_when_room_is_made(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    left, fresh = cache / ".packing-dead", cache / ".packing-alive"
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    fresh.write_bytes(b"half")
    load(make_tiny_model(tmp_path / "model"))
    assert not left.exists() and fresh.exists()


def test_mapped_weights_count_as_taken_though_the_kernel_would_let_them_go(
    tmp_path: Path, cache: Path
) -> None:
    model = load(make_tiny_model(tmp_path / "model"))
    proc = tmp_path / "proc"
    (proc / "7" / "fd").mkdir(parents=True)
    (proc / "8" / "fd").mkdir(parents=True)
    (proc / "self").mkdir()
    (proc / "meminfo").write_text(f"MemTotal: {1 << 30} kB\nMemAvailable: {1 << 20} kB\n")
    (file,) = files(cache)
    for process in ("7", "8"):  # two engines, one file
        os.symlink(file, proc / process / "fd" / "5")
    room = unpromised_room(proc, tmp_path / "none")
    assert (1 << 30) - room.nbytes == file.stat().st_size > model.weights.memory.nbytes
