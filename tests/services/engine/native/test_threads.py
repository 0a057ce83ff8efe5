"""Threads of the native step on a busy machine: whoever is late does nothing to the next step."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from microserve.services.engine.model.model import load_model
from microserve.services.engine.native.packing import native_runner
from tests.support.engine.model.tiny_model import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_BLOCKS, BLOCK_SIZE, LENGTH = 20, 16, 300
ROUNDS = 1500


class Ended(Exception):
    pass


@pytest.fixture
def neighbours() -> Iterator[None]:
    """More than the cores can bear, so that threads of a step are put aside in the middle of it."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for each in busy:
        each.kill()
        each.wait()


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.usefixtures("neighbours")
def test_steps_of_all_sizes_that_end_early_or_not_have_the_same_bits(tmp_path: Path, threads: int) -> None:
    model = load_model(make_tiny_model(tmp_path, "llama", head_dim=32, num_hidden_layers=6), dtype="bfloat16")
    spec = model.spec
    nbytes = spec.num_layers * NUM_BLOCKS * 2 * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * 2
    data = np.zeros(nbytes, np.uint8)
    step = native_runner(model, data, NUM_BLOCKS, BLOCK_SIZE, threads=threads, max_rows=LENGTH).step
    token_ids = np.arange(LENGTH) % spec.vocab_size
    table = list(range(NUM_BLOCKS))

    def run(begin: int, end: int, on_layer: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        positions = np.arange(begin, end)
        spans = [(end - begin, end, table)]
        rows = np.array([end - begin - 1])
        return step.run(token_ids[begin:end], positions, positions, spans, rows, on_layer)

    expected = [run(0, end) for end in range(1, LENGTH)]
    generator = random.Random(threads)
    for _ in range(ROUNDS):
        end, last_layer = generator.randrange(1, LENGTH), generator.randrange(-1, spec.num_layers)

        def tell(layer: int, last_layer: int = last_layer) -> None:
            if layer == last_layer:
                raise Ended

        if last_layer >= 0:
            with pytest.raises(Ended):
                run(0, end, tell)
        else:
            begin = generator.choice((0, max(0, end - 3)))
            on_layer = generator.choice((None, tell))
            assert np.array_equal(run(begin, end, on_layer), expected[end - 1])
    step.close()
