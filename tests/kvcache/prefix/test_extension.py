"""The native part: hashes of the formula, its table beside a dict, and what runs where there is none."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.kvcache.prefix import hash as block_hash
from microserve.kvcache.prefix.extension import Extension, extension
from microserve.kvcache.prefix.hash import block_hashes, root_hash
from tests.support.examples import examples
from tests.support.kvcache.prefix_indexes import new_index

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@pytest.fixture(scope="module")
def native() -> Extension:
    if (found := extension()) is None:
        pytest.skip("no C++ compiler, or no headers of Python")
    return found


@given(message=st.binary(max_size=400), is_best=st.booleans())
def test_digests_are_those_of_the_standard(native: Extension, message: bytes, is_best: bool) -> None:
    assert native.digest(message, is_best) == sha256(message).digest()[:16]


@given(tokens=TOKENS, block_size=st.sampled_from([1, 2, 3, 16, 64, 65]), first=st.integers(0, 3))
def test_chains_are_those_of_python(
    native: Extension, tokens: list[int], block_size: int, first: int
) -> None:
    root = root_hash("model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(block_hash, "extension", lambda: None)
        expected = block_hashes(tokens, block_size, root)
    assert native.chain(root, tokens, block_size, 0) == expected
    before = expected[first - 1] if 0 < first <= len(expected) else root
    if before != root or not first:
        assert native.chain(before, tokens, block_size, first) == expected[first:]


def test_what_is_no_argument_is_an_error(native: Extension) -> None:
    blocks = native.NativeBlocks(2)
    blocks.join(0, "engine")
    with pytest.raises(IndexError):
        blocks.store(64, [bytes(16)])
    with pytest.raises(ValueError):
        blocks.lookup(b"short", [1, 2])
    with pytest.raises(ValueError):
        blocks.lookup_hashes([b"short"])
    for calls in (lambda: native.NativeBlocks(0), lambda: native.chain(bytes(16), [1], 0, 0)):
        with pytest.raises(ValueError):
            calls()
    with pytest.raises(SystemError):
        blocks.lookup(bytes(16), (1, 2))  # type: ignore[arg-type]


class TableAgainstDict(RuleBasedStateMachine):
    """Hashes that are close together and at both ends, so that chains of probes are long and wrap around."""

    hashes = st.lists(
        st.tuples(st.sampled_from([0, 1, 2**63, 2**64 - 2, 2**64 - 1]), st.integers(0, 30)).map(
            lambda words: b"".join(word.to_bytes(8, sys.byteorder) for word in words)
        ),
        max_size=24,
    )
    engines = st.sampled_from([0, 1, 63, 64, 200])

    def __init__(self) -> None:
        super().__init__()
        found = extension()
        if found is None:
            pytest.skip("no C++ compiler, or no headers of Python")
        self.blocks = found.NativeBlocks(1)
        self.joined: set[int] = set()
        self.young: dict[bytes, set[int]] = {}
        self.old: dict[bytes, set[int]] = {}

    def join(self, engine: int) -> None:
        if engine not in self.joined:
            self.joined.add(engine)
            self.blocks.join(engine, f"e{engine}")

    @rule(engine=engines, hashes=hashes)
    def store(self, engine: int, hashes: list[bytes]) -> None:
        self.join(engine)
        assert self.blocks.store(engine, [*hashes, b"short", 7]) == 2  # type: ignore[list-item]
        for each in hashes:
            self.young.setdefault(each, self.old.pop(each, set())).add(engine)

    @rule(engine=engines, hashes=hashes)
    def remove(self, engine: int, hashes: list[bytes]) -> None:
        self.join(engine)
        self.blocks.remove(engine, [*hashes, b"short"])
        for each in hashes:
            held = self.young if each in self.young else self.old
            held.get(each, set()).discard(engine)
        self.drop_empty()

    @rule(engine=engines)
    def forget(self, engine: int) -> None:
        self.join(engine)
        self.blocks.forget(engine)
        for held in (*self.young.values(), *self.old.values()):
            held.discard(engine)
        self.drop_empty()

    @rule()
    def age(self) -> None:
        assert self.blocks.age() == len(self.old)
        self.old, self.young = self.young, {}

    @rule(hashes=hashes)
    def lookup(self, hashes: list[bytes]) -> None:
        expected: dict[str, int] = {}
        common: set[int] | None = None
        has_moved = False
        for each in hashes:
            if each in self.old:
                self.young[each] = self.old.pop(each)
                has_moved = True
            held = self.young.get(each, set())
            common = held if common is None else common & held
            if not common:
                break
            expected |= {f"e{engine}": expected.get(f"e{engine}", 0) + 1 for engine in common}
        assert self.blocks.lookup_hashes(hashes) == expected
        assert self.blocks.take_moved() == has_moved

    def drop_empty(self) -> None:
        self.young = {each: held for each, held in self.young.items() if held}
        self.old = {each: held for each, held in self.old.items() if held}

    @invariant()
    def agrees(self) -> None:
        told = [{each: set(engines) for each, engines in held} for held in self.blocks.generations()]
        assert told == [self.young, self.old]
        assert (self.blocks.num_blocks, self.blocks.num_young) == (
            len(self.young) + len(self.old),
            len(self.young),
        )
        assert all(self.blocks.holds(each) for each in (*self.young, *self.old))


TableAgainstDict.TestCase.settings = settings(
    max_examples=examples(60), stateful_step_count=30, deadline=None
)
TestTableAgainstDict = TableAgainstDict.TestCase


def test_nothing_is_kept_of_an_index_that_goes(native: Extension) -> None:
    names = [number.to_bytes(16, "big") for number in range(1000)]

    def life() -> None:
        blocks = native.NativeBlocks(2)
        for engine in (0, 100):
            blocks.join(engine, "engine")
            blocks.store(engine, names)
        blocks.age()
        blocks.lookup(bytes(16), [*range(40)])
        blocks.lookup_hashes(names)
        list(blocks.generations())
        with pytest.raises(OverflowError):
            blocks.lookup(bytes(16), [-1, 1])

    life()
    tracemalloc.start()
    try:
        life()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            life()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_without_a_compiler_python_does_and_says_so(tmp_path: Path) -> None:
    code = (
        "from microserve.kvcache.prefix.index import PrefixIndex\n"
        "from microserve.kvcache.prefix.hash import block_hashes, root_hash\n"
        "index = PrefixIndex(2, 'model', 1 << 20)\n"
        "print(type(index._blocks).__name__, block_hashes([1, 2], 2, root_hash('model'))[0].hex())\n"
    )
    environment = {
        "CXX": str(tmp_path / "missing"),
        "MICROSERVE_KERNEL_CACHE": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("kernel.missing") == 1
    assert done.stdout.splitlines()[-1].split() == [
        "PythonBlocks",
        block_hashes([1, 2], 2, root_hash("model"))[0].hex(),
    ]
    assert new_index("python", 2, "model", 1 << 20).num_blocks == 0
