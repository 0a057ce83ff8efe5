"""The desk of questions: who is asked, whose answers are handed on, and what is forgotten."""

from __future__ import annotations

from microserve.protocol.messages.index import IndexReply, Watch
from microserve.protocol.messages.strategy.decisions import Answer, Asked, Explain, Explained, Question
from microserve.services.index.questions import MAX_OPEN, QuestionDesk


class Desk:
    def __init__(self) -> None:
        self.sent: list[tuple[bytes, IndexReply]] = []
        self.gone: set[bytes] = set()
        self.desk = QuestionDesk(self._send)

    def _send(self, peer: bytes, reply: IndexReply) -> bool:
        if peer in self.gone:
            return False
        self.sent.append((peer, reply))
        return True

    def questions(self, peer: bytes) -> list[int]:
        return [m.question_id for to, m in self.sent if to == peer and isinstance(m, Question)]


def desk_of_routers() -> Desk:
    made = Desk()
    made.desk.watch(b"1", Watch("one", 0, answers=True))
    made.desk.watch(b"2", Watch("two", 5, answers=True))
    made.desk.watch(b"3", Watch("old", 5))
    made.desk.watch(b"4", Watch("publisher", -1, answers=True))
    return made


def test_routers_that_know_the_question_are_asked_and_the_others_are_named() -> None:
    made = desk_of_routers()
    assert made.desk.ask(b"me", Explain(7, "r")) == Asked(7, ["one", "two"], ["old"])
    assert [peer for peer, _ in made.sent] == [b"1", b"2"]
    made.gone.add(b"2")
    made.desk.forget(b"3")
    assert made.desk.ask(b"me", Explain(8, "r")) == Asked(8, ["one"], ["two"])


def test_an_answer_goes_to_who_asked_and_only_if_a_router_gives_it() -> None:
    made = desk_of_routers()
    made.desk.ask(b"me", Explain(7, "r"))
    made.desk.ask(b"you", Explain(7, "s"))
    first, second = made.questions(b"1")
    made.sent.clear()
    made.desk.answer(b"1", Answer(second, "one", [], 0, 9))
    assert made.sent == [(b"you", Explained(7, "one", [], 0, 9))]
    for peer, question_id in ((b"4", first), (b"x", first), (b"1", 99)):
        made.desk.answer(peer, Answer(question_id, "one", [], 0, 9))
    assert len(made.sent) == 1


def test_the_oldest_questions_are_forgotten() -> None:
    made = desk_of_routers()
    for number in range(MAX_OPEN + 3):
        made.desk.ask(b"me", Explain(number + 1, "r"))
    asked = made.questions(b"1")
    made.sent.clear()
    for question_id in asked:
        made.desk.answer(b"1", Answer(question_id, "one", [], 0, 9))
    assert [m.call_id for _, m in made.sent if isinstance(m, Explained)] == [*range(4, MAX_OPEN + 4)]
