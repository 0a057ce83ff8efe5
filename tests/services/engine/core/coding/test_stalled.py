"""An encoder, or a decoder, that takes its time: what waits for it, what does not, and what is left when
nobody waits any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from microserve.kvcache.codec import codec
from microserve.kvcache.codec.codec import Codec
from microserve.kvcache.grant import decoding
from microserve.kvcache.grant.payload import Bytes
from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.engine.core.request.sequence import SequenceState
from tests.support.engine.core_mesh import (
    GREEDY,
    ROUTER,
    Engine,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)

WIDTH = 16
LOSSLESS = "lossless-zstd"
WAIT_S = 60.0


class Gate:
    """Encodes when it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.num_begun = 0
        gate, encode = self, Codec.encode

        def gated(self: Codec, layer: int, keys: Bytes, values: Bytes, out: Bytes) -> int | None:
            gate.num_begun += 1
            assert gate.open.wait(WAIT_S)
            return encode(self, layer, keys, values, out)

        monkeypatch.setattr(Codec, "encode", gated)


class ThreadMesh(Mesh):
    codecs = CodecOptions(num_threads=1)

    def other_step(self, engine: Engine) -> None:
        """What a step of B waits for is encoded by now, it may be, and A has to put it."""
        super().other_step(engine)
        if engine is self.b:
            self.a.step()
        time.sleep(0.001)

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            self.run()
            time.sleep(0.001)
            assert time.monotonic() < end, what


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def mesh(gate: Gate) -> Iterator[ThreadMesh]:
    mesh = ThreadMesh(width=WIDTH, num_blocks=40)
    yield mesh
    gate.open.set()
    mesh.until(lambda: not mesh.a.core.memory.is_departing, "what is encoded is let go")
    mesh.close()


def wide(prompt: list[int]) -> list[int]:
    return expect(prompt, width=WIDTH)


def begin(mesh: ThreadMesh, gate: Gate, prompt: list[int]) -> int:
    """All of a send is computed; the encoder has the first piece in hand and no more."""
    granted = grant_for(mesh.b, "r", prompt, len(prompt) - 1)
    call = send(mesh.a, "r", prompt, granted, 0, len(prompt) - 1, codec=LOSSLESS)
    receive(mesh.b, "r", granted, len(prompt) - 1)
    mesh.until(lambda: mesh.a.core.state.encoding and gate.num_begun, "it is all computed")
    return call


def test_steps_go_on_while_a_send_waits_for_its_encoder(mesh: ThreadMesh, gate: Gate) -> None:
    prompt, other = prompt_of(50), prompt_of(20, seed=1)
    call = begin(mesh, gate, prompt)
    [sequence] = mesh.a.core.state.encoding
    assert sequence.state is SequenceState.ENCODING
    assert mesh.a.core.state.num_requests == 1
    assert not mesh.a.core.state.is_drained(mesh.now)
    generate(mesh.a, "other", other)
    mesh.run()
    assert mesh.a.tokens["other"] == wide(other)
    assert call not in mesh.a.replies
    assert not mesh.b.tokens

    gate.open.set()
    mesh.until(lambda: "r" in mesh.b.finished, "the answer")
    assert mesh.b.tokens["r"] == wide(prompt)
    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent) and sent.coding is not None
    assert sent.coding.wire_nbytes < sent.coding.raw_nbytes


@pytest.mark.parametrize("how", ["abort", "deadline", "router", "receiver"])
def test_whoever_ends_a_send_does_not_wait_and_its_blocks_do(mesh: ThreadMesh, gate: Gate, how: str) -> None:
    begin(mesh, gate, prompt_of(50))
    memory = mesh.a.core.memory
    if how == "abort":
        with mesh.a.core.lock:
            mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    elif how == "deadline":
        mesh.now += 100.0
        mesh.run()
    elif how == "receiver":
        with mesh.b.core.lock:
            mesh.b.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
        gate.open.set()
        mesh.until(lambda: not mesh.a.core.state.encoding, "the sender sees that the grant is closed")
        return
    else:
        with mesh.a.core.lock:
            mesh.a.core.state.drop_owner(ROUTER, mesh.now)
    mesh.run()
    assert not mesh.a.core.state.encoding
    assert memory.is_departing, "the encoder has a piece in hand"
    assert memory.pool.num_used >= 13
    mesh.a.core.check_integrity()
    gate.open.set()
    mesh.until(lambda: not memory.is_departing, "it lets go")
    assert memory.pool.num_used == 0
    mesh.now += 1.0
    mesh.until(lambda: "r" in mesh.b.finished, "the receiver hears of it")
    assert mesh.b.finished["r"].reason == "error"
    assert not mesh.b.tokens.get("r")


def test_a_preempted_send_has_its_encoder_finish_first(mesh: ThreadMesh, gate: Gate) -> None:
    """Its blocks are somebody else's as soon as it is preempted."""
    prompt = prompt_of(60)
    granted = grant_for(mesh.b, "r", prompt, 59)
    send(mesh.a, "r", prompt, granted, 0, 59, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 59)
    mesh.a.step()
    [sequence] = mesh.a.core.state.scheduler.running
    transfer = sequence.transfer
    assert transfer is not None and transfer.outgoing is not None and not transfer.outgoing.is_idle
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    with mesh.a.core.lock:
        step = mesh.a.core.stepper.next_step(mesh.now)
        assert step is not None
        mesh.a.core.state.inflight = []
        mesh.a.core.state.scheduler.preempt(sequence, step)
    assert gate.open.is_set()
    assert transfer.outgoing.is_idle
    opener.join()
    mesh.a.heap.data[:] = 0xEE
    mesh.a.core.memory.cache.clear()
    mesh.until(lambda: "r" in mesh.b.finished, "the answer")
    assert mesh.b.tokens["r"] == wide(prompt)


def test_an_engine_that_is_closed_waits_for_its_encoder(gate: Gate) -> None:
    mesh = ThreadMesh(width=WIDTH, num_blocks=40)
    begin(mesh, gate, prompt_of(50))
    closing = threading.Thread(target=mesh.a.core.close)
    closing.start()
    gate.open.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    mesh.b.core.close()


def test_a_receiver_that_closes_keeps_blocks_that_are_being_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, begun = threading.Event(), threading.Event()
    decode = codec.decode

    def gated(*arguments):  # type: ignore[no-untyped-def]
        begun.set()
        assert opened.wait(WAIT_S)
        return decode(*arguments)

    monkeypatch.setattr(decoding.LaneDecoder.__init__, "__kwdefaults__", {"decode": gated})
    mesh = ThreadMesh(width=WIDTH, num_blocks=40)
    prompt = prompt_of(50)
    granted = grant_for(mesh.b, "r", prompt, 49)
    send(mesh.a, "r", prompt, granted, 0, 49, codec=LOSSLESS)
    receive(mesh.b, "r", granted, 49)
    mesh.until(begun.is_set, "the decoder has something in hand")
    with mesh.b.core.lock:
        mesh.b.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "r"), mesh.now)
    mesh.until(lambda: not mesh.a.core.state.num_requests, "the sender is done")
    assert mesh.b.core.memory.pool.num_quarantined == len(granted.grant.blocks)
    generate(mesh.b, "other", prompt_of(40, seed=3), GREEDY)
    mesh.until(lambda: "other" in mesh.b.finished, "other work")
    opened.set()
    mesh.until(lambda: not mesh.b.core.memory.pool.num_quarantined, "its blocks")
    assert mesh.b.tokens["other"] == wide(prompt_of(40, seed=3))
    mesh.close()


@pytest.mark.parametrize(
    "error", [TransferFailed("the link is gone"), OSError(105, "no room"), MemoryError()]
)
def test_payloads_that_cannot_be_put_end_one_send_and_no_engine(
    mesh: ThreadMesh, gate: Gate, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prompt = prompt_of(50)
    call = begin(mesh, gate, prompt)

    def refuse(*arguments: object) -> int:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LaneWriter, "put_payload", refuse)
        patch.setattr(LaneWriter, "put_layer", refuse)
        gate.open.set()
        mesh.until(lambda: call in mesh.a.replies, "the send's end")
    failed = mesh.a.replies[call]
    assert isinstance(failed, wire.Failed) and failed.code == "transfer_failed"
    mesh.until(lambda: not mesh.a.core.memory.is_departing, "the encoder lets go")
    encoder = mesh.a.core._codecs.encoder
    assert encoder is not None and encoder._nbytes == 0, "nothing waits, so nothing counts as waiting"
    generate(mesh.a, "other", prompt)
    mesh.run()
    assert mesh.a.tokens["other"] == wide(prompt)
