"""Two engine cores on memory heaps that compute a tiny hybrid model, and transformers' own as the oracle."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM

from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.heap.local import MemoryHeap
from microserve.kvcache.layout import KvLayout
from microserve.services.engine.core.batch import Runner
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.runner import ModelRunner
from tests.support.engine.core_mesh import VOCAB, Engine, Mesh
from tests.support.engine.model.families import make_model
from tests.support.engine.native_mesh import layout_for

FAMILIES = ("lfm2", "qwen3_next")
"""A short convolution, and a gated delta net beside one: all kinds of state that are served."""
TOLERANCE = 2e-4
"""Of log-probabilities in fp32, whose sums are in another order for each cut of a prompt."""


@functools.cache
def tiny(family: str) -> tuple[LoadedModel, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(Path(directory) / family, family, vocab_size=VOCAB)
        oracle: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return load_model(path, dtype="float32"), oracle


@functools.cache
def expected(family: str, prompt: tuple[int, ...], num_tokens: int = 6) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers, and their log-probabilities."""
    _, oracle = tiny(family)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens: list[int] = out.sequences[0, len(prompt) :].tolist()
    rows = [each[0].float().log_softmax(-1) for each in out.logits]
    return tokens, [row[token].item() for row, token in zip(rows, tokens, strict=True)]


class HybridMesh(Mesh):
    def __init__(self, family: str, **options: int) -> None:
        self.family, self.loaded = family, tiny(family)[0]
        super().__init__(**options)

    def equip(self, layout: KvLayout, incarnation: int, num_slots: int) -> tuple[Heap, Runner, int | None]:
        spec = self.loaded.spec
        layout = msgspec.structs.replace(layout_for(layout, spec), state_nbytes=spec.state_nbytes)
        heap = MemoryHeap(layout, incarnation=incarnation, registry=self.registry, num_slots=num_slots)
        heap.data[:] = 0xFF  # NaN, in every dtype
        return heap, ModelRunner(self.loaded, heap.data, layout.num_blocks, layout.block_size), None

    def assert_exact(self, engine: Engine, request_id: str, prompt: list[int], *, first: int = -1) -> None:
        """``first``: the token that came by its sender's answer."""
        tokens, logprobs = expected(self.family, tuple(prompt), len(engine.tokens[request_id]))
        own = engine.tokens[request_id]
        assert [first, *own[1:]] == tokens if own[:1] == [-1] else own == tokens, request_id
        said = [each.logprob for each in engine.logprobs[request_id]]
        if said:
            late = logprobs[len(logprobs) - len(said) :]
            assert max(abs(a - b) for a, b in zip(said, late, strict=True)) < TOLERANCE
