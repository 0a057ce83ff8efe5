"""What the front holds for its routers, and the ways in which a request ends. Sans-I/O, in one thread.

    begin ── launch ──> at vLLM ── outputs ──> finish        each once; whoever is over hears no more
                        abort, deadline, refusal ──────^

Invariant: whatever is at vLLM is reachable from ``records``, so dropping a router's records takes all of it
away from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, MeshError, TransferFailed, UnknownRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import MIXED, Numerics
from microserve.services.engine.core import trace
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.measure.tally import Tally
from microserve.services.engine.core.request.record import Key, Outbox, Records
from microserve.services.engine.core.state import PURGE_INTERVAL_S, failed
from microserve.services.engine.vllm.front.output import Output, finish_of, prompt_rows, token_logprobs
from microserve.services.engine.vllm.front.rates import Rates
from microserve.services.engine.vllm.front.running import Running, RunningRecord

_logger = structlog.get_logger()


class VllmState:
    def __init__(self, limits: Limits, numerics: Numerics, launch: Callable[[Running], None]) -> None:
        """``launch``: give a request to vLLM; what becomes of it is told by ``accepted``, ``take_output`` and
        ``fail``."""
        self.limits = limits
        self.numerics = numerics
        self.records: Records[Running] = Records()
        self.outbox = Outbox()
        self.counters: Counter[str] = Counter()
        self.tally = Tally()
        self.draining = False
        self.live: set[Running] = set()
        """Begun and not over."""
        self.awaited: dict[Key, float] = {}
        """Generations aborted while draining, whose KV their routers may now want: until when they may."""
        self.rates = Rates()
        self.on_over: Callable[[Running, float], None] = lambda running, now: None
        """Called at the end of each that receives or builds on a receive (receives.py)."""
        self.close_received: Callable[[RunningRecord, float], None] = lambda record, now: None
        """Close the record's open grant, and end what waits for it (receives.py)."""
        self.has_receives: Callable[[], bool] = lambda: False
        self._launch = launch
        self._purged_at = float("-inf")

    @property
    def num_requests(self) -> int:
        return len(self.live)

    @property
    def may_expire_soon(self) -> bool:
        return bool(self.live) or self.has_receives()

    def is_drained(self, now: float) -> bool:
        """Nothing is at vLLM, no grant is open or in quarantine, and no context is about to move."""
        return not (self.may_expire_soon or any(until > now for until in self.awaited.values()))

    # --- beginnings ----------------------------------------------------------------------------------

    def begin(self, running: Running, *, launches: bool = True) -> None:
        self.live.add(running)
        if launches:
            self.launch(running)

    def launch(self, running: Running) -> None:
        self._launch(running)

    def accepted(self, running: Running) -> None:
        """vLLM has taken it."""
        running.is_accepted = True
        if running.transfer is None and not running.is_parked and not running.is_over:
            self.answer(running, wire.Accepted(0))

    def fail(self, running: Running, error: MeshError, now: float) -> None:
        """vLLM has refused it (actions.py: ``refused``), or something that it waits for cannot come."""
        if running.is_over:
            return
        if running.transfer is not None or running.is_parked or running.call_ids:
            self.over(running, now)
            self._tell_failure(running, error)
            if running.transfer is not None:
                took_s = now - running.arrived_at
                trace.send_failed(running.traceparent, running.request_id, took_s, error)
        else:
            self.finish(running, "error", now, error=error)

    # --- what vLLM says ------------------------------------------------------------------------------

    def take_output(self, running: Running, output: Output, now: float) -> None:
        if running.is_over:
            return
        if running.first_token_at is None and not running.received_tokens:
            running.cached_tokens = output.cached_tokens  # else it counts what was received as well
        if running.transfer is not None:
            self._take_sends(running, output, now)
            return
        params = running.params
        if params is None:  # it is parked
            if output.finish:
                self.over(running, now)
            return
        token_ids = list(output.token_ids) if params.max_tokens else []
        rows = token_logprobs(token_ids, output.logprobs, params.logprobs) if token_ids else []
        scored = None
        if output.prompt_logprobs and params.prompt_logprobs is not None:  # none behind the first output
            prompt = running.token_ids[: running.num_prompt_tokens]
            scored = prompt_rows(prompt, output.prompt_logprobs, params.prompt_logprobs)
        if token_ids:
            self.count_tokens(running, len(token_ids), now)
            self.rates.measure(running, len(token_ids), now)
            running.is_mixed |= running.is_foreign
        delta = wire.Delta(running.request_id, running.num_delivered, token_ids, rows, None, scored)
        running.num_delivered += len(token_ids)
        if not output.finish:
            if token_ids or scored is not None:
                self.outbox.deltas.append((running.owner, delta))
            return
        reason, stop = ("length", None) if not params.max_tokens else finish_of(output)
        if reason in ("stop", "length"):
            self.finish(running, reason, now, stop_token_id=stop, delta=delta)
        else:
            error = TransferFailed(f"vLLM has ended it: {output.finish}")
            self.finish(running, "error", now, error=error, delta=delta)

    def count_tokens(self, running: Running, num_tokens: int, now: float) -> None:
        """For metrics: new ones of a generation have come."""
        self.counters["generated_tokens"] += num_tokens
        if running.first_token_at is None or running.last_token_at is None:
            lengths = (running.num_prompt_tokens, running.cached_tokens, running.received_tokens)
            self.tally.began(now - running.arrived_at, *lengths)
        else:
            self.tally.inter_token.observe((now - running.last_token_at) / num_tokens)

    def _take_sends(self, running: Running, output: Output, now: float) -> None:
        transfer = running.transfer
        if transfer is None or not output.token_ids:
            return
        transfer.is_computed = True
        if running.params is not None:
            transfer.first_token = output.token_ids[0]
            rows = token_logprobs(list(output.token_ids), output.logprobs, running.params.logprobs)
            transfer.first_logprob = rows[0] if rows else None
        self.end_send(running, now)

    def end_send(self, running: Running, now: float) -> None:
        """If its token is here and all is put."""
        transfer = running.transfer
        if transfer is None or running.is_over or not transfer.is_computed or transfer.nbytes is None:
            return
        grant = transfer.grant
        sent = wire.Sent(
            call_id=0,
            request_id=running.request_id,
            computed=max(0, transfer.end - running.cached_tokens),
            cached=running.cached_tokens,
            sent=max(0, transfer.end - max(transfer.begin, grant.matched)),
            nbytes=transfer.nbytes,
            timings=wire.Timings(
                prefill_s=max(0.0, now - running.arrived_at - transfer.put_s), transfer_s=transfer.put_s
            ),
            first_token=transfer.first_token,
            first_logprob=transfer.first_logprob,
            heap=transfer.heap,
        )
        record = self._record_of(running)
        if record is not None:
            record.sent[(grant.grant_id, transfer.lane)] = sent
        self.answer(running, sent)
        self.over(running, now)
        self.counters["sends_done"] += 1
        self.tally.sent(sent)
        self.counters["sent_bytes"] += transfer.nbytes
        _logger.info(
            log.KV_SENT,
            request_id=running.request_id,
            receiver=grant.engine_id,
            computed=sent.computed,
            cached=sent.cached,
            sent=sent.sent,
            nbytes=sent.nbytes,
            numerics=self.numerics.name,
            receiver_numerics=grant.numerics,
        )
        trace.sent(running.traceparent, now - running.arrived_at, sent, grant)

    # --- endings -------------------------------------------------------------------------------------

    def finish(
        self,
        running: Running,
        reason: str,
        now: float,
        *,
        error: MeshError | None = None,
        stop_token_id: int | None = None,
        delta: wire.Delta | None = None,
    ) -> None:
        """End a generation: tell its router. ``delta``: its last tokens."""
        if running.is_over:
            return
        first = now if running.first_token_at is None else running.first_token_at
        ready = running.ready_at or running.arrived_at
        finished = wire.Finished(
            reason=reason,
            usage=wire.Usage(
                prompt_tokens=running.num_prompt_tokens,
                cached_tokens=running.cached_tokens,
                received_tokens=running.received_tokens,
                output_tokens=running.num_delivered,
            ),
            timings=wire.Timings(
                arrival_s=ready - running.arrived_at,
                prefill_s=max(0.0, first - ready),
                decode_s=max(0.0, now - first),
            ),
            code=error.code if error else "",
            detail=error.detail if error else "",
            stop_token_id=stop_token_id,
            numerics=Numerics(MIXED) if running.is_mixed else self.numerics,
        )
        self.over(running, now)
        if reason != "abort":
            empty = wire.Delta(running.request_id, running.num_delivered, [])
            last = msgspec.structs.replace(delta or empty, finished=finished)
            self.outbox.deltas.append((running.owner, last))
        if reason in ("stop", "length"):
            self.rates.ended(running.num_delivered)
        _logger.info(
            log.REQUEST_FINISHED,
            request_id=running.request_id,
            action="generate",
            finish=reason,
            code=finished.code,
            numerics=finished.numerics.name,
            exact=False,
            **msgspec.structs.asdict(finished.usage),
        )
        trace.generated(running.traceparent, running.request_id, now - running.arrived_at, finished)
        self.counters[f"generate_{reason}"] += 1
        self.tally.ended(finished, running.params.max_tokens if running.params is not None else 0)

    def over(self, running: Running, now: float) -> None:
        """vLLM need not go on with it; its record, if it has one, is without it."""
        if running.is_over:
            return
        running.is_over = True
        self.live.discard(running)
        running.cancel()
        record = self._record_of(running)
        if record is not None:
            if record.generate is running:
                record.generate = None
            if record.asked is running:
                record.asked = None
            if running.transfer is not None:
                record.sends.pop((running.transfer.grant.grant_id, running.transfer.lane), None)
        self.on_over(running, now)
        if record is not None and record.is_idle:
            record.last_used = now
            if record.aborted or running.transfer is None:
                self.records.drop(record)

    def _record_of(self, running: Running) -> RunningRecord | None:
        """None for one that is parked, or whose id belongs to a newer record by now."""
        record = self.records.find(running.owner, running.request_id)
        return record if record is not None and record.holds(running) else None

    def abort(self, record: RunningRecord, now: float) -> None:
        """End everything under a record. Whoever aborts listens no more."""
        self.counters["aborts"] += 1
        record.aborted = True
        self.close_received(record, now)
        for running in list(record.sends.values()):
            self.fail(running, TransferFailed("the send ended: abort"), now)
        if record.generate is not None:
            if record.generate.call_ids:  # vLLM has not said yet whether it takes it
                self.fail(record.generate, UnknownRequest("it was aborted", field="request_id"), now)
            else:
                self.finish(record.generate, "abort", now)
        key = (record.owner, record.request_id)
        self.outbox.deltas = [(o, d) for o, d in self.outbox.deltas if (o, d.request_id) != key]
        if record.is_idle:
            self.records.drop(record)

    def drop_owner(self, owner: bytes, now: float) -> int:
        """The router is lost: end all of its requests. The number that were open."""
        records = self.records.of(owner)
        for record in records:
            self.abort(record, now)
        return len(records)

    def expire(self, now: float) -> None:
        """End what has passed its deadline."""
        for running in [each for each in self.live if each.deadline <= now]:
            self.fail(running, DeadlineExceeded("the request's time was used up on this engine"), now)
        if now - self._purged_at > PURGE_INTERVAL_S:
            self._purged_at = now
            self.records.purge(now)
            self.awaited = {key: until for key, until in self.awaited.items() if until > now}

    # --- answers -------------------------------------------------------------------------------------

    def answer(self, running: Running, reply: wire.Accepted | wire.Granted | wire.Sent) -> None:
        """To every call that waits for it."""
        for call_id in running.call_ids:
            self.outbox.replies.append((running.owner, msgspec.structs.replace(reply, call_id=call_id)))
        running.call_ids.clear()

    def _tell_failure(self, running: Running, error: MeshError) -> None:
        if running.transfer is not None:
            self.counters["sends_failed"] += 1
            self.tally.sends_failed[error.code] += 1
            _logger.warning(
                log.KV_SEND_FAILED, request_id=running.request_id, code=error.code, detail=error.detail
            )
        for call_id in running.call_ids:
            self.outbox.replies.append((running.owner, failed(call_id, error)))
        running.call_ids.clear()
