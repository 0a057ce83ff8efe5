"""The index's desk for questions: an operator asks, the routers that know the question answer (WIRE.md 6.6).

Owns which question is whose, bounded; keeps no answer. Knows nothing of what is asked or said.
"""

from __future__ import annotations

from collections.abc import Callable

from microserve.protocol.messages import index as wire
from microserve.protocol.messages.strategy.decisions import Answer, Asked, Explain, Explained, Question
from microserve.protocol.types import MAX_REQUEST_ID_CHARS

MAX_OPEN = 256
"""Questions that may be answered; beyond it the oldest are forgotten."""

Send = Callable[[bytes, wire.IndexReply], bool]


class QuestionDesk:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._routers: dict[bytes, wire.Watch] = {}
        self._open: dict[int, tuple[bytes, int]] = {}
        """Who asked, and in which call, by question."""
        self._last_id = 0

    def watch(self, peer: bytes, message: wire.Watch) -> None:
        """What a watcher says of itself; who applies control states is a router."""
        if message.control_version >= 0:
            self._routers[peer] = message

    def forget(self, peer: bytes) -> None:
        self._routers.pop(peer, None)

    def ask(self, peer: bytes, message: Explain) -> Asked:
        """Hand it on to every router that knows the question."""
        self._last_id += 1
        question = Question(self._last_id, message.request_id[: 2 * MAX_REQUEST_ID_CHARS], message.scores_of)
        self._open[question.question_id] = (peer, message.call_id)
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]
        asked: list[str] = []
        silent: list[str] = []
        for router, watch in self._routers.items():
            is_asked = watch.answers and self._send(router, question)
            (asked if is_asked else silent).append(watch.watcher_id)
        return Asked(message.call_id, sorted(asked), sorted(silent))

    def answer(self, peer: bytes, message: Answer) -> None:
        """Hand on what a router says to who asked; nobody else's answers, and none to nobody."""
        asker = self._open.get(message.question_id)
        if asker is not None and peer in self._routers:
            said = (message.router_id, message.found, message.num_left_out, message.num_kept, message.scores)
            self._send(asker[0], Explained(asker[1], *said))
