"""The mesh as one request's strategy sees it: engines, their labels and load, who holds which prefix.

The base layer of every decision; owns no state of its own. Knows no sockets and no strategy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

from microserve.protocol.errors import InvalidRequest, NoEngines, StrategyError, UnsupportedAction
from microserve.protocol.messages.engine_info import GRAMMAR, PREP_RECV, PROMPT_LOGPROBS, REMOTE_SEND
from microserve.protocol.messages.strategy.control import Scalar
from microserve.protocol.messages.strategy.decisions import MAX_NOTE_CHARS, MAX_NOTE_VALUES
from microserve.services.router.authoring.action.engine import Engine, barred
from microserve.services.router.authoring.action.generating import Generating
from microserve.services.router.authoring.action.race import Entrant, race
from microserve.services.router.authoring.choice import Scores, combined, softmax_choice
from microserve.services.router.authoring.view import MeshView, StrategyState, within
from microserve.services.router.engines.connection import Connection
from microserve.services.router.engines.load import Load, LoadBook
from microserve.services.router.engines.prediction import decode_cost_s, prefill_cost_s
from microserve.services.router.engines.prefix import Lookup
from microserve.services.router.request.cap import capped
from microserve.services.router.request.request import RETRY_AFTER_S, Request, fits
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.request.trail import Trail

READS_ONLY = ("Mesh.",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""

_ROLES = {"prefill": REMOTE_SEND, "decode": PREP_RECV}
"""What a label is about, where an author does not say what he wants of an engine."""
_NEEDS = {"grammar": GRAMMAR, "prompt_logprobs": PROMPT_LOGPROBS}
"""By field of ``SamplingParams``, what a request that has it cannot do without."""

Scorer = Callable[["Mesh", Engine, Request], float]
"""What speaks for an engine; more is better (scoring.py)."""


class Mesh(MeshView):
    """Made for one request; membership and load are as of each call."""

    def __init__(
        self,
        scope: RequestScope,
        connections: Callable[[], Sequence[Connection]],
        book: LoadBook,
        lookup: Lookup,
        rng: random.Random,
        state: StrategyState,
        numerics: str = "",
        *,
        is_shadow: bool = False,
    ) -> None:
        """``connections`` lists the engines that may take new work, of which those count that have the
        request's adapter, if it names one; ``state`` is the strategy's;
        ``numerics`` names the class in which the answer began, if it has."""
        super().__init__(_fitting(connections, scope.request), book, rng, state, is_shadow=is_shadow)
        self._numerics = numerics
        self._scope = scope
        self._lookup = lookup
        self._handles: dict[str, Engine] = {}
        self._matched: dict[str, int] | None = None
        self._rate: float | None = None

    def engines(
        self, label: str | None = None, *, strict: bool = False, cluster: str | None = None
    ) -> list[Engine]:
        """As in :class:`MeshView`, with the request's actions."""
        return [self._engine(connection) for connection in self._fit(label, strict, cluster)]

    def departing(self, connection: Connection) -> Engine:
        """An engine that drains: not among :meth:`engines`, but it still sends what it holds."""
        return self._engine(connection)

    def _engine(self, connection: Connection) -> Engine:
        handle = self._handles.get(connection.engine_id)
        if handle is None or handle._connection is not connection:  # an engine may have another life by now
            handle = Engine(connection, self.state.labels, self._scope, self._cached)
            self._handles[connection.engine_id] = handle
        return handle

    def pick(
        self,
        label: str | None,
        request: Request,
        *,
        exclude: Collection[Engine] = (),
        strict: bool = False,
        cluster: str | None = None,
        can: Collection[str] | None = None,
        prefix: bool = False,
        cost: Callable[[Engine], float] | None = None,
        scorers: Mapping[Scorer, float] | None = None,
        temperature: float = 0.0,
    ) -> Engine:
        """The engine with the least work (uncached tokens, then sequences); equals by lot.

        ``scorers``, ``cost`` or else ``prefix`` counts first: the largest weighted sum (scoring.py says of
        what), the least of your own measure, or the longest prefix of the prompt. ``temperature`` > 0 draws
        by that instead of taking the best, so that routers which see the same do not all do the same.
        ``exclude`` yields when nobody else is left, so a mesh of one engine serves every strategy; others of
        its numerics class come before any measure, and so do those of the class in which the answer began.
        One that exchanges no KV with them (a self-check found that answers differ) comes last, after them too
        for ``prefill`` and ``decode``.
        With ``strict`` neither yields: an engine that bears the label and is not excluded, or nobody.
        ``cluster``: as if there were no engine outside of that one.
        ``can``: what it must do (:meth:`Engine.can`). Not given, ``prefill`` is for engines that send KV and
        ``decode`` for those that receive it, where there are such. What the request needs, as a grammar, each
        engine has that is picked. Raises :class:`NoEngines`, ``UnsupportedAction`` where nobody can,
        ``TransferFailed`` where those that are excluded exchange KV with nobody, so that another one shall
        serve it, and ``StrategyError`` for scores that are no numbers.
        """
        self._scope.check(request)
        if cost is not None and scorers is not None:
            raise StrategyError("pick takes a cost or scorers, not both")
        if not temperature >= 0.0:
            raise StrategyError(f"temperature {temperature} is below 0")
        by = "scorers" if scorers is not None else "cost" if cost is not None else "load"
        if cost is None and prefix:
            matched, by = self.prefix(request), by if scorers is not None else "prefix"

            def cost(engine: Engine) -> float:
                return -matched.get(engine.id, 0)

        able = self._able(request, label, can, cluster)
        labelled = [self._engine(connection) for connection in self._labelled(able, label, strict)]
        candidates = [e for e in labelled if e not in exclude]
        if label in _ROLES and not strict and exclude:
            # No KV would go between the two: one engine for both serves better.
            candidates = [e for e in candidates if not _is_stranger(e, exclude)]
        if not candidates and not strict:
            others = [e for e in map(self._engine, able) if e not in exclude]
            if label in _ROLES:
                others = [e for e in others if not _is_stranger(e, exclude)]
            candidates = others or [e for e in labelled if e in exclude] or labelled
        if not candidates:
            raise NoEngines(_nobody(label, strict), retry_after_s=RETRY_AFTER_S)
        names = {self._numerics} if self._numerics else {e.info.numerics.name for e in exclude}
        if exclude:
            candidates = self._trusted(candidates, exclude, able, strict or label not in _ROLES)
        narrowed_to = ""
        if len(names) == 1 and "" not in names:
            own = [e for e in candidates if e.info.numerics.name in names]
            if own and len(own) < len(candidates):
                [narrowed_to], candidates = names, own
        scored: Sequence[Scores] = ()
        if scorers is not None:
            scored = self._scores(candidates, request, scorers)
            costs = [-score for score in combined(scored, len(candidates))]
        else:
            costs = [cost(engine) if cost is not None else 0.0 for engine in candidates]
        trail = self._scope.trail
        loads = [] if temperature > 0.0 and trail is None else [*map(self.load, candidates)]
        if temperature > 0.0:
            chosen = candidates[softmax_choice([-c for c in costs], temperature, self.rng)]
        else:
            ranked: list[tuple[float, Load]] = [*zip(costs, loads, strict=True)]
            least = min(ranked)
            chosen = self.rng.choice([e for e, rank in zip(candidates, ranked, strict=True) if rank == least])
        if trail is not None:
            now = self._scope.now
            if trail.is_new:
                everyone = [e._connection for e in labelled] if label is None else self._connections()
                self._see(trail, everyone, now)
            ids = [e._connection.engine_id for e in candidates]
            excluded = [e._connection.engine_id for e in exclude] if exclude else ()
            trail.choose(
                label, by, temperature, ids, costs, loads, chosen.id, excluded, narrowed_to, scored, now
            )
        return chosen

    def _trusted(
        self, candidates: list[Engine], exclude: Collection[Engine], able: Sequence[Connection], strict: bool
    ) -> list[Engine]:
        """Without those that exchange no KV with who is excluded, for it is them that they are to work with;
        where that leaves nobody, these do it alone. Raises :class:`TransferFailed` where they cannot
        either."""
        left = [
            engine
            for engine in candidates
            if not any(
                other.id in engine._connection.barred or engine.id in other._connection.barred
                for other in exclude
            )
        ]
        if left or strict:
            return left or candidates
        alone = [engine for engine in map(self._engine, able) if engine in exclude]
        well = [engine for engine in alone if engine.id not in engine._connection.barred]
        if alone and not (well or self.is_shadow):
            raise barred(alone[0].id, candidates[0].id, suspect=alone[0].id)
        return well or candidates

    def _able(
        self, request: Request, label: str | None, can: Collection[str] | None, cluster: str | None
    ) -> Sequence[Connection]:
        """Engines that do what is to be asked of them."""
        everyone, sampling = within(self._connections(), cluster), self._scope.sampling
        for field, ability in _NEEDS.items():
            if getattr(sampling, field) is None or (ability == PROMPT_LOGPROBS and request.num_output_tokens):
                continue
            able = [c for c in everyone if c.info.does(ability)]
            if everyone and not able:
                raise InvalidRequest(f"no engine here does {ability}", field=field)
            everyone = able
        if can is None:
            role = _ROLES.get(label or "")
            return everyone if role is None else [c for c in everyone if c.info.does(role)] or everyone
        able = [c for c in everyone if all(map(c.info.does, can))]
        if everyone and not able:
            raise UnsupportedAction(f"no engine does {' and '.join(can)}")
        return able

    def note(self, text: str, **values: Scalar) -> None:
        """Say why, for whoever asks later (``microserve explain``): words, and values with their names.

        Bounded: MAX_NOTES a run of the strategy, MAX_NOTE_CHARS of each text, MAX_NOTE_VALUES values; what is
        beyond is cut. An operator reads it: nothing of a prompt, and nothing private, belongs there. Raises
        ``StrategyError`` for a value that is no number, text, true or false.
        """
        for name, value in values.items():
            if type(value) not in (bool, int, float, str):
                raise StrategyError(f"note: {name} is {type(value).__name__}, not a number or a text")
        if (trail := self._scope.trail) is not None:
            kept = [*values.items()][:MAX_NOTE_VALUES]
            cut = {name: value[:MAX_NOTE_CHARS] if isinstance(value, str) else value for name, value in kept}
            trail.note(str(text)[:MAX_NOTE_CHARS], cut, self._scope.now)

    def cap(self, request: Request, *, max_tokens: int | None = None, logprobs: int | None = None) -> None:
        """Let the request have less than it asks for: at most ``max_tokens`` of output, prompt aside, then it
        ends with ``length``; at most ``logprobs`` alternatives a token (0: the chosen one's alone).

        Before its first action that computes. It holds for whatever becomes of the request in this router,
        other engines and other runs of the strategy included; of several caps the lowest. What asks for less
        stays as it is, and nothing else of how tokens are drawn can be changed. Raises ``StrategyError`` for
        what is no cap, or too late.
        """
        scope = self._scope
        scope.check(request)
        if scope.decision.engine_id or scope.decision.sends:
            raise StrategyError("a request is capped before it is sent to an engine")
        sampling = capped(scope.sampling, max_tokens, logprobs)
        if sampling is not scope.sampling:
            self.note("capped", max_tokens=sampling.max_tokens, logprobs=sampling.logprobs or 0)
            scope.sampling = sampling

    def _see(self, trail: Trail, connections: Sequence[Connection], now: float) -> None:
        """What is known of the engines now, for the record."""
        own = self.state.labels
        labels = [own.of(c.engine_id, c.labels) for c in connections] if own else None
        trail.see(connections, labels, self._book, now)

    async def hold(
        self,
        request: Request,
        until: Callable[[], bool],
        *,
        queue: str = "",
        rank: float = 0.0,
        most: int = 1000,
        max_s: float | None = None,
    ) -> None:
        """Let the request wait until it is next and ``until()`` is true, which is asked again and again.

        Of those that this strategy holds in this router, in queues of their own, the highest ``rank`` goes
        first, then the oldest. ``most`` may wait in each queue, for ``max_s``; beyond that ``QueueFull``,
        which reaches the client as 429. One that has begun its answer elsewhere is not held, nor is a shadow.
        """
        self._scope.check(request)
        if not (request.num_output_tokens or self.is_shadow):
            held = self.state.held
            await held.wait(self._scope, until, queue=queue, rank=rank, most=most, max_s=max_s)

    async def race(self, request: Request, *entrants: Entrant, after_s: float = 0.0) -> Generating:
        """Generate on several engines and go on with the one whose first token comes first; the others drop
        the request. ``yield`` what this returns: each token comes once, and with the request's seed they are
        the same whoever wins.

        entrants: engines that compute all of the prompt (one that is named twice races once), or functions
        that start another generation (with a grant of its own). ``after_s``: the next one starts only if
        nothing has come for so long, or at once when the one before fails. Raises the last error when all
        have failed, ``StrategyError`` for what is no race.
        """
        return await race(self._scope, request, entrants, after_s)

    def move(self, request: Request, engine: Engine) -> bool:
        """Let the answer, which has begun, go on on ``engine``, with its KV: as when an engine drains, the
        strategy has ended by then, and what it has running with it. Not of another numerics class.

        For whoever has kept this mesh, such as a plan. False: nothing has come of it yet, it is over, or it
        is there already.
        """
        scope = self._scope
        if scope.is_closed or scope.request is not request or scope.leave is None:
            return False
        if engine.id == scope.decision.engine_id or engine.id not in [each.id for each in self.engines()]:
            return False
        if scope.numerics.is_exact and engine.info.numerics != scope.numerics:
            raise StrategyError(f"engine {engine.id} computes in another numerics class")
        return scope.leave(engine.id)

    def _scores(
        self, candidates: Sequence[Engine], request: Request, scorers: Mapping[Scorer, float]
    ) -> list[Scores]:
        return [
            Scores(
                getattr(scorer, "__qualname__", repr(scorer)),
                [scorer(self, engine, request) for engine in candidates],
                weight,
            )
            for scorer, weight in scorers.items()
        ]

    def prefix(self, request: Request) -> dict[str, int]:
        """Prompt tokens that each engine holds from the start, by engine id; engines with none are absent."""
        self._scope.check(request)
        if self._matched is None:
            self._matched = self._lookup(request.tokens, request.salt, request.adapter)
            if self._scope.trail is not None:
                self._scope.trail.cached = self._matched
        return self._matched

    def prefix_by_cluster(self, request: Request) -> dict[str, int]:
        """The same of the best engine in each cluster; those with none are absent."""
        matched, best = self.prefix(request), dict[str, int]()
        for connection in self._connections():
            if num_tokens := matched.get(connection.engine_id, 0):
                cluster = connection.info.cluster
                best[cluster] = max(best.get(cluster, 0), num_tokens)
        return best

    def uncached(self, engine: Engine, request: Request) -> int:
        """Prompt tokens that the engine would have to compute or receive."""
        return request.num_tokens - self.prefix(request).get(engine.id, 0)

    def prefill_cost_s(self, engine: Engine, num_tokens: int) -> float:
        """Seconds that ``num_tokens`` more of a prompt cost there: until they are computed, and what others
        lose by it (prediction.py). An engine that has measured nothing counts as fast as the others; where
        none has, a token counts as a second."""
        load = self.load(engine)
        rate = load.prefill_tokens_per_s or self._usual_rate()
        return prefill_cost_s(load, engine.reported, num_tokens, rate)

    def decode_cost_s(self, engine: Engine) -> float:
        """Seconds of an average answer there, with the prefills that come between; 0: not measured."""
        return decode_cost_s(self.load(engine), engine.reported)

    def _usual_rate(self) -> float:
        if self._rate is None:
            known = [rate for c in self._connections() if (rate := c.load.prefill_tokens_per_s) > 0.0]
            self._rate = sum(known) / len(known) if known else 1.0
        return self._rate

    def source_for(self, engine: Engine, request: Request) -> Engine:
        """Of those whose KV ``engine`` would keep, the one with the longest prefix of the prompt; itself, if
        nobody holds any of it."""
        held = self.prefix(request)
        sources = [e for e in self.engines() if e.id in held and engine.keeps_kv_of(e)] if held else []
        return max(sources, key=lambda source: held[source.id], default=engine)

    def _cached(self, engine_id: str) -> int:
        return self.prefix(self._scope.request).get(engine_id, 0)


def _fitting(
    connections: Callable[[], Sequence[Connection]], request: Request
) -> Callable[[], Sequence[Connection]]:
    """Those that have its adapter."""
    if not request.adapter:
        return connections
    return lambda: [each for each in connections() if fits(request, each.info)]


def _nobody(label: str | None, strict: bool) -> str:
    return f"no engine with the label {label!r} is free to take it" if strict else "no engine is alive"


def _is_stranger(engine: Engine, others: Collection[Engine]) -> bool:
    return any(engine.info.is_stranger(other.info) for other in others)
