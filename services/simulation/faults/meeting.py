"""Which rare situations a world had: a campaign that never meets one proves nothing about it.

Owns the list, and how each is read off a mesh that has ended; judges nothing. A new situation is an entry
here, and tests/simulation/faults/test_meetings.py says how often it must come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from microserve.protocol import log
from microserve.protocol.messages.numerics import MIXED
from microserve.services.simulation.engine.witness import Meeting
from microserve.services.simulation.faults.judge import expected
from microserve.services.simulation.gateway import Answer
from microserve.services.simulation.journal import Journal
from microserve.services.simulation.mesh import SimulatedMesh

COUNTED = {
    "early_starts": "an early start",
    "early_starts_put_back": "an early start gave way",
    "preemptions": "a sequence was preempted",
    "sends_preempted": "a send was preempted",
    "sends_failed": "a send failed",
    "grants_expired": "a grant expired",
    "generate_mixed": "a sequence was made of KV of two classes",
    "commits_of_another_class": "KV of another class was to be cache",
}
"""By counter of an engine."""
LOGGED = {
    log.REQUEST_CONTINUED: "a request was continued",
    log.REQUEST_MOVED: "a running request was moved",
    log.GRANT_DISCHARGED: "blocks came out of quarantine",
    log.KV_COMMITTED: "a grant became prefix cache",
}
"""By event."""
AT_ITS_END = "continued behind its last token"
KEPT_ON = "continued, and exact where there are two classes"
MIXED_UP = "continued in another class"
SITUATIONS = (
    *(meeting.value for meeting in Meeting),
    *(*COUNTED.values(), *LOGGED.values(), AT_ITS_END, KEPT_ON, MIXED_UP),
)


def situations(mesh: SimulatedMesh, journal: Journal, answers: Sequence[Answer]) -> Counter[str]:
    """How often each came, in a mesh that has been closed."""
    found = Counter({meeting.value: count for meeting, count in mesh.witness.met.items()})
    found.update({name: mesh.counters[counter] for counter, name in COUNTED.items()})
    found.update({name: journal.events[event] for event, name in LOGGED.items()})
    by_id = {answer.request_id: answer for answer in answers}
    for request_id, num_delivered in journal.continued:
        answer = by_id.get(request_id)
        if answer is not None and num_delivered == len(
            expected(answer.prompt, answer.params, is_marked=bool(mesh.shape.numerics))[0]
        ):
            found[AT_ITS_END] += 1
        if answer is not None and answer.is_complete and num_delivered and mesh.shape.numerics:
            found[KEPT_ON] += answer.numerics.is_exact
            found[MIXED_UP] += answer.numerics.name == MIXED
    return +found
