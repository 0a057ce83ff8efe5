"""The engine that is measured: a real core over a real heap, asked as a router asks it and stepped by hand.

Owns asking and stepping. Must not know which figures are made of it.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from microserve.kvcache.heap.factory import make_heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, Runner, StepResult
from microserve.services.engine.model.attention_choice import EXACT, choose_attention
from microserve.services.engine.model.device.exact import make_exact
from microserve.services.engine.model.model import load_model
from microserve.services.engine.service import make_core, make_layout

INCARNATION = 1
OWNER = b"benchmark"
TTL_S = 600.0
BLOCK_SIZE = 16
DRAIN_POLL_S = 0.0002


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def device_settings(device: str) -> list[str]:
    if device == "cpu":
        return [f"kvcache.block_size={BLOCK_SIZE}"]
    return [f"kvcache.block_size={BLOCK_SIZE}", f"engine.device={device}", "kvcache.heap=cuda_ipc"]


class LayerClock:
    """A runner that notes when each layer's KV stood in the blocks, by the host's clock.

    On a GPU that is the time of an event behind the writing of the layer's KV, counted from an event at the
    step's begin, when the stream is empty and the host's clock is read: right within some microseconds.
    """

    def __init__(self, runner: Runner, device: str) -> None:
        self._runner = runner
        self.numerics = runner.numerics
        self._device = torch.device(device)
        self.computed_ns: list[int] = []
        """Of the last step, by layer."""
        self.step_ns = 0
        """The last step's length."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        stream: int | None = getattr(self._runner, "stream", None)
        events: list[torch.cuda.Event] = []
        written_ns: list[int] = []

        def noted(layer: int) -> None:
            if stream is None:
                written_ns.append(time.monotonic_ns())
            else:
                events.append(self._event(stream))
            if on_layer is not None:
                on_layer(layer)

        begin = self._event(stream) if stream is not None else None
        begin_ns = time.monotonic_ns()
        result = self._runner.execute(batch, noted)
        self.step_ns = time.monotonic_ns() - begin_ns
        if begin is not None:
            written_ns = [begin_ns + round(begin.elapsed_time(event) * 1e6) for event in events]
        self.computed_ns = written_ns
        return result

    def _event(self, stream: int) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.ExternalStream(stream, self._device))
        return event


class Engine:
    """Frees everything when it is left as a context manager. Prompts must differ, or the cache has them."""

    def __init__(
        self,
        model: Path,
        device: str,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_exact: bool = False,
    ) -> None:
        settings = load_settings(
            overrides=[
                *device_settings(device),
                f"model.path={model}",
                "model.dtype=bfloat16",
                "model.load_format=random",
                f"kvcache.num_blocks={num_blocks}",
                f"engine.max_num_seqs={max_num_seqs}",
                f"engine.max_num_batched_tokens={max_num_batched_tokens}",
            ]
        )
        torch.set_num_threads(settings.engine.threads)
        loaded = load_model(model, dtype="bfloat16", device=device, load_format="random")
        block_size = settings.kvcache.block_size
        if is_exact:
            loaded = make_exact(loaded)
        attention = choose_attention(
            EXACT if is_exact else "auto", loaded.spec, block_size, torch.device(device)
        )
        heap, data = make_heap(settings, make_layout(settings, loaded), INCARNATION)
        self.core = make_core(settings, loaded, "sender", heap, data, attention)
        self._device = device
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_calls = 0

    @property
    def layout(self) -> KvLayout:
        return self.core.layout

    def prefill(self, token_ids: list[int]) -> float:
        """Seconds from the request to its first and only token."""
        started = time.perf_counter()
        self._generate(token_ids, 1)
        while True:
            self.core.step()
            for _, delta in self.core.take_output()[0].deltas:
                if delta.finished is not None:
                    if delta.finished.reason != "length":
                        raise InternalError(f"the prefill ended with {delta.finished}")
                    return time.perf_counter() - started

    def send(self, token_ids: list[int], grant: Grant, *, sampling: bool) -> tuple[float, wire.Sent]:
        """Compute, or find in the cache, what the grant is for and put it; seconds until the answer, which
        comes when all puts are enqueued. With ``sampling`` a first token as well, as ``prefill``."""
        call_id = self._call()
        message = wire.RemoteSend(
            *(call_id, f"send-{call_id}", 0, len(token_ids), grant, 0, TTL_S),
            greedy(1) if sampling else None,
        )
        started = time.perf_counter()
        with self.core.lock:
            self.core.actions.remote_send(OWNER, message, token_ids, time.monotonic())
        while True:
            self.core.step()
            for _, reply in self.core.take_output()[0].replies:
                if not isinstance(reply, wire.Sent):
                    raise InternalError(f"the send was answered with {reply}")
                return time.perf_counter() - started, reply

    def settle(self) -> None:
        """Until all that was put has been read, and its lanes are let go."""
        while self.core.memory.is_departing:
            time.sleep(DRAIN_POLL_S)
            self.core.step()

    def decode(self, prompts: list[list[int]], num_warm_up: int, num_steps: int) -> tuple[list[float], int]:
        """Steps in which all sequences get one token each: their seconds, and how many tokens the sequences
        had together in all of the timed steps, the new ones counted."""
        longest = self.num_prefill_steps(prompts) + num_warm_up + num_steps + 1
        request_ids = [self._generate(prompt, longest) for prompt in prompts]
        running = self.core.state.scheduler.running
        while len(running) < len(prompts) or not all(sequence.is_decoding() for sequence in running):
            self._step()
        for _ in range(num_warm_up):
            self._step()
        times, num_context_tokens = [], 0
        for _ in range(num_steps):
            num_context_tokens += sum(sequence.num_tokens for sequence in running)
            started = time.perf_counter()
            self._step()
            times.append(time.perf_counter() - started)
        if len(running) != len(prompts):
            raise InternalError(f"{len(prompts) - len(running)} sequences have ended too early")
        with self.core.lock:
            for request_id in request_ids:
                self.core.actions.abort(OWNER, wire.Abort(self._call(), request_id), time.monotonic())
        self.core.step()
        self.core.take_output()
        return times, num_context_tokens

    def num_prefill_steps(self, prompts: list[list[int]]) -> int:
        """At most: in each step every sequence that decodes takes one token of the step's budget."""
        budget = self._max_num_batched_tokens - len(prompts)
        return -(-sum(map(len, prompts)) // budget) + 1

    def clock_layers(self) -> LayerClock:
        """From now on every step's layers are noted."""
        clock = LayerClock(self.core._runner, self._device)
        self.core._runner = clock
        return clock

    def stop_clock(self, clock: LayerClock) -> None:
        self.core._runner = clock._runner

    def _generate(self, token_ids: list[int], max_tokens: int) -> str:
        call_id = self._call()
        request_id = f"generate-{call_id}"
        message = wire.StartGenerate(call_id, request_id, 0, greedy(max_tokens), TTL_S)
        with self.core.lock:
            self.core.actions.start_generate(OWNER, message, token_ids, time.monotonic())
        return request_id

    def _step(self) -> None:
        if not self.core.step():
            raise InternalError("there was nothing to run")
        self.core.take_output()

    def _call(self) -> int:
        self._num_calls += 1
        return self._num_calls

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.core.close()
