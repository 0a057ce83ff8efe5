"""An engine that is not ours, as far as its KV events go: vLLM's two sockets, and batches of any making.

It says nothing while it idles, names no life, and keeps its last batches for whoever asks.
"""

from __future__ import annotations

from collections import deque

from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.kv.kv_events import (
    parse_replay_request,
    publish_frames,
    replay_answer,
    replay_end,
)


class ForeignEngine:
    """One life of it."""

    def __init__(
        self,
        bus: Bus,
        *,
        events: str = "tcp://127.0.0.1:0",
        replay: str = "tcp://127.0.0.1:0",
        topic: str = "",
        max_kept: int = 10_000,
    ) -> None:
        self.num_replays = 0
        self.answers = True
        """False: it hangs."""
        self._topic = topic
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=max_kept)
        self._next_seq = 0
        self._publisher = bus.publisher(events)
        self._replay = bus.server(replay, self._on_request)

    @property
    def events(self) -> str:
        return self._publisher.address

    @property
    def replay(self) -> str:
        return self._replay.address

    def line(self, engine_id: str, model: str, block_size: int) -> str:
        """What ``index.foreign`` says of it."""
        return f"{engine_id} model={model} events={self.events} replay={self.replay} block_size={block_size}"

    def publish(self, payload: bytes, *, is_lost: bool = False) -> None:
        if not is_lost:
            self._publisher.send(publish_frames(self._topic, self._next_seq, payload))
        self._kept.append((self._next_seq, payload))
        self._next_seq += 1

    def close(self) -> None:
        self._publisher.close()
        self._replay.close()

    def _on_request(self, peer: bytes, frames: list[bytes]) -> None:
        _, start_seq = parse_replay_request([peer, *frames])
        self.num_replays += 1
        if not self.answers:
            return
        for seq, payload in self._kept:
            if seq >= start_seq:
                self._replay.send(peer, replay_answer(peer, self._topic, seq, payload)[1:])
        self._replay.send(peer, replay_end(peer)[1:])
