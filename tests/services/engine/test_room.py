"""What fits is known before it is taken: an engine is refused, and nobody is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.heap import shm
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import CacheFull, ConfigError
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine import pool_size, room
from microserve.services.engine.model.model import load_model
from microserve.services.engine.pool_size import check_room, choose_num_blocks, layout_of
from microserve.services.engine.room import (
    MIN_BLOCKS,
    Pool,
    Room,
    host_room,
    num_blocks_in,
    turn,
    unpromised_room,
)

GIB = 1 << 30


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def machine(root: Path, available_gib: int, groups: Mapping[str, str], *lines: str) -> Room:
    """A machine of 24 GiB, and what its /sys/fs/cgroup holds; ``lines`` of /proc/self/cgroup."""
    kib = available_gib << 20
    write(root / "proc", {"meminfo": f"MemTotal: {24 << 20} kB\nMemFree: 1 kB\nMemAvailable: {kib} kB\n"})
    write(root / "proc", {"self/cgroup": "\n".join(lines)})
    write(root / "cgroup", groups)
    return host_room(root / "proc", root / "cgroup")


def test_a_machine_without_limits(tmp_path: Path) -> None:
    assert machine(tmp_path, 20, {}, "0::/user.slice") == Room(20 * GIB, 24 * GIB, "this machine")


def test_the_tightest_group_around_us_counts(tmp_path: Path) -> None:
    groups = {
        "a/memory.max": "max",
        "a/b/memory.max": str(8 * GIB),
        "a/b/memory.current": str(5 * GIB),
        # Pages of files would go; what is in shared memory stays.
        "a/b/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\nshmem {3 * GIB}\n",
        "a/b/c/memory.max": str(16 * GIB),
        "a/b/c/memory.current": str(4 * GIB),
        "a/b/c/memory.stat": "inactive_file 0\n",
    }
    assert machine(tmp_path, 20, groups, "0::/a/b/c") == Room(5 * GIB, 8 * GIB, "the control group /a/b")
    assert machine(tmp_path, 3, groups, "0::/a/b/c").of == "this machine"


def test_groups_of_the_first_version(tmp_path: Path) -> None:
    groups = {
        "memory/box/memory.limit_in_bytes": str(2 * GIB),
        "memory/box/memory.usage_in_bytes": str(GIB),
        "memory/memory.limit_in_bytes": str(1 << 62),
        "memory/memory.usage_in_bytes": str(GIB),
    }
    found = machine(tmp_path, 20, groups, "5:cpu,memory:/box", "1:name=systemd:/box")
    assert found == Room(GIB, 2 * GIB, "the control group /box")


def test_this_machine_can_be_asked() -> None:
    assert 0 < host_room().nbytes <= host_room().total_nbytes


# --- how many --------------------------------------------------------------------------------------


def pool(num_blocks: int = 0, **changes: object) -> Pool:
    fields = {"block_nbytes": 1 << 20, "useful_blocks": 1 << 20, "share": 0.25, "max_nbytes": None, **changes}
    return Pool(num_blocks, **fields)  # type: ignore[arg-type]


def test_more_than_fits_is_refused_with_the_number_that_would() -> None:
    here = Room(20 * GIB, 24 * GIB, "this machine")
    with pytest.raises(ConfigError, match=r"2000000 blocks take 1,953\.12 GiB.*20\.00 GiB left") as refused:
        num_blocks_in(here, pool(2_000_000), weights_nbytes=GIB)
    assert refused.value.field == "kvcache.num_blocks"
    assert "1.00 GiB are for weights" in refused.value.detail
    fits = int(refused.value.detail.removesuffix(" blocks fit").rpartition(" ")[2])
    assert num_blocks_in(here, pool(fits), weights_nbytes=GIB) == fits
    with pytest.raises(ConfigError):
        num_blocks_in(here, pool(fits + 1), weights_nbytes=GIB)


def test_a_model_without_room_is_refused_as_such() -> None:
    with pytest.raises(ConfigError, match="no room for this model") as refused:
        num_blocks_in(Room(GIB, 24 * GIB, "this machine"), pool(), weights_nbytes=16 * GIB)
    assert refused.value.field == "model.path"


@given(
    left=st.integers(0, 1 << 45),
    total=st.integers(1, 1 << 45),
    asked=st.integers(0, 1 << 31),
    block_nbytes=st.integers(1, 1 << 34),
    weights_nbytes=st.integers(0, 1 << 40),
    useful=st.integers(1, 1 << 31),
    share=st.floats(0.001, 0.9),
    most=st.none() | st.integers(1, 1 << 36),
)
def test_what_is_let_in_fits(
    left: int,
    total: int,
    asked: int,
    block_nbytes: int,
    weights_nbytes: int,
    useful: int,
    share: float,
    most: int | None,
) -> None:
    wanted = Pool(asked, block_nbytes, useful, share, most)
    here = Room(left, max(left, total), "here")
    try:
        chosen = num_blocks_in(here, wanted, weights_nbytes=weights_nbytes)
    except ConfigError:
        return
    assert weights_nbytes + chosen * block_nbytes + here.margin_nbytes <= left
    assert chosen == asked if asked else chosen >= MIN_BLOCKS
    if not asked and chosen > MIN_BLOCKS:
        assert chosen <= useful
        assert most is None or chosen * block_nbytes <= most


def test_of_an_engines_settings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_model(tiny_model, dtype="float32").spec

    def chosen(*overrides: str) -> int:
        return choose_num_blocks(load_settings(overrides=[f"model.path={tiny_model}", *overrides]), spec)

    monkeypatch.setattr(pool_size, "unpromised_room", lambda: Room(4 * GIB, 24 * GIB, "this machine"))
    assert chosen("kvcache.num_blocks=7") == 7
    # All that 64 sequences of 4,096 tokens hold; and half of them with twice the block.
    assert chosen() == 64 * 4096 // 16
    assert chosen("kvcache.block_size=32") == 64 * 4096 // 32
    assert chosen("engine.max_model_len=128", "engine.max_num_seqs=2") == 16
    # A quarter of what is left, shared by the engines of the machine.
    block_nbytes = spec.num_layers * 2 * 16 * spec.num_kv_heads * spec.head_dim * 4
    left = 4 * GIB - 24 * GIB // 32
    assert chosen("mesh.engines=100") == int(left * 0.25 / 100) // block_nbytes
    with pytest.raises(ConfigError, match="at most"):
        chosen("kvcache.num_blocks=2000000")


def test_a_pool_beyond_what_words_count_is_said_by_its_setting(tiny_model: Path) -> None:
    spec = load_model(tiny_model, dtype="float32").spec
    with pytest.raises(ConfigError, match=r"kvcache\.num_blocks: .* is not below 2147483648") as refused:
        layout_of(load_settings(overrides=[f"model.path={tiny_model}"]), spec, 2_000_000_000)
    assert refused.value.field == "kvcache.num_blocks"


def test_nothing_is_read_of_a_model_that_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_size, "unpromised_room", lambda: Room(GIB, GIB, "this machine"))
    settings = load_settings(overrides=[f"model.path={tiny_model}"])
    assert not check_room(settings)
    monkeypatch.setattr(pool_size, "unpromised_room", lambda: Room((512 << 20) + 1000, GIB, "this machine"))
    with pytest.raises(ConfigError, match="no room for this model"):
        check_room(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # More than any machine has: two thousand million tokens.
        (["kvcache.num_blocks=2000000000", "kvcache.block_size=1"], "blocks fit"),
        (["kvcache.num_blocks=2147483648"], "0 to 2147483647"),
    ],
)
def test_an_engine_that_cannot_fit_ends_before_it_takes_anything(
    tiny_model: Path, settings: list[str], words: str
) -> None:
    """E4: a process of its own, on this machine as it is."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "microserve.services",
        "engine",
        "--set",
        f"model.path={tiny_model}",
    ]
    for setting in [*settings, "bus.insecure=true"]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2, done.stderr
    assert "kvcache.num_blocks" in done.stderr
    assert words in done.stderr


# --- taking it -------------------------------------------------------------------------------------


def test_a_pool_makes_do_with_what_it_has_while_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take memory too, and let it go again."""
    monkeypatch.setattr(shm, "BACK_NBYTES", 1 << 20)
    left = 8 * GIB
    monkeypatch.setattr(room, "host_room", lambda: Room(left, 8 * GIB, "this machine"))
    layout = KvLayout("m", 2, 256, 16, 3, 64, "float32")
    with ShmHeap(layout, incarnation=7, may_take=room.require_margin) as heap:
        pool = BlockPool(256, heap.back)
        first = pool.allocate(20)
        left = 200 << 20
        had = pool.num_free
        with structlog.testing.capture_logs() as logs, pytest.raises(CacheFull):
            pool.allocate(had)
        assert [each["event"] for each in logs] == [log.POOL_SHORT]
        assert "0.20 GiB left" in logs[0]["error"]
        assert pool.num_free < had
        second = pool.allocate(pool.num_free)
        pool.check_integrity()
        left = 8 * GIB
        with pytest.raises(CacheFull):
            pool.allocate(1)
        pool.look_for_memory()
        rest = pool.allocate(256 - len(first) - len(second))
        assert sorted([*first, *second, *rest]) == list(range(256))
        pool.check_integrity()


def test_what_heaps_have_been_promised_is_no_room_for_others(tmp_path: Path) -> None:
    available = machine(tmp_path, 20, {}, "0::/").nbytes
    for pid in ("1", "2"):  # two that have the same heap open count once
        (tmp_path / "proc" / pid).symlink_to("/proc/self")

    def promised_nbytes() -> int:
        return available - unpromised_room(tmp_path / "proc", tmp_path / "cgroup").nbytes

    layout = KvLayout("m", 2, 4096, 16, 8, 64, "float32")
    others = promised_nbytes()
    with ShmHeap(layout, incarnation=7) as heap:
        assert promised_nbytes() - others == pytest.approx(layout.data_nbytes, abs=1 << 20)
        heap.back(0, 2048)
        assert promised_nbytes() - others == pytest.approx(layout.data_nbytes // 2, abs=1 << 20)
        heap.back(2048, 2048)
        assert promised_nbytes() - others == pytest.approx(0, abs=1 << 20)


def test_a_process_that_ends_while_it_is_looked_at_has_been_promised_nothing(tmp_path: Path) -> None:
    available = machine(tmp_path, 20, {}, "0::/").nbytes
    (tmp_path / "proc" / "7").mkdir()  # its list of open files is gone already
    assert unpromised_room(tmp_path / "proc", tmp_path / "cgroup").nbytes == available


def test_two_do_not_look_at_the_same_time() -> None:
    order: list[str] = []

    async def take(name: str, go: asyncio.Event, done: asyncio.Event) -> None:
        async with turn():
            order.append(f"{name} looks")
            done.set()
            await go.wait()
            order.append(f"{name} has taken")

    async def main() -> None:
        go, first, second = asyncio.Event(), asyncio.Event(), asyncio.Event()
        one = asyncio.create_task(take("one", go, first))
        await first.wait()
        two = asyncio.create_task(take("two", go, second))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4 * room._TURN_POLL_S):
                await second.wait()
        go.set()
        await asyncio.gather(one, two)

    asyncio.run(main())
    assert order == ["one looks", "one has taken", "two looks", "two has taken"]
