"""The mesh as the index tells of it: engines that are members and engines that are not, and how old that is.

Sans-I/O. A silent index is no news about any engine: what it said last stays, with its age.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations
from urllib.parse import urlsplit

from microserve.gateway.view.forms import CheckForm, EngineForm, LoadForm, PairForm
from microserve.gateway.view.history import History
from microserve.protocol.messages.check import PairCheck, Suspect
from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.messages.engine_info import ABILITIES, EngineInfo
from microserve.protocol.messages.engine_load import MAX_LINKS_TOLD
from microserve.protocol.messages.index import Member, Members, MissingEngine
from microserve.protocol.messages.strategy.control import EngineLabels

MAX_PAIRS = 64 * 64


class Mesh:
    def __init__(self, now: float, *, silence_s: float) -> None:
        """``silence_s``: an index that says nothing for so long is silent."""
        self.history = History(now)
        self._silence_s = silence_s
        self._members: dict[str, Member] = {}
        self._missing: Sequence[MissingEngine] = ()
        self._checks: list[CheckForm] = []
        self.suspects: Sequence[Suspect] = ()
        """Between which no KV goes."""
        self._labels: dict[str, list[str]] = {}
        self._heard_at: float | None = None
        self._life = (0, -1)

    def take_members(self, message: Members, now: float) -> None:
        self._heard_at = now
        incarnation, version = self._life
        if message.index_incarnation == incarnation and message.version < version:
            return
        self._life = (message.index_incarnation, message.version)
        self._members = {each.info.engine_id: each for each in message.members}
        self.suspects = message.suspects
        for member in message.members:
            self.history.add(member.info.engine_id, load_form(member.info, member.load), now)

    def take_missing(self, missing: Sequence[MissingEngine]) -> None:
        self._missing = missing

    def take_checks(self, checks: Sequence[PairCheck], wall_s: float) -> None:
        """What the index reports of self-checks. A check's time stays what it was when it was heard first."""
        known = {(each.source, each.target, each.router, each.took_s): each.at for each in self._checks}
        self._checks = [
            CheckForm(
                source=each.source,
                target=each.target,
                outcome=each.outcome,
                differs=each.differs,
                compared=each.compared,
                code=each.code,
                at=known.get((*each.pair, each.router_id, each.took_s), wall_s - each.age_s),
                took_s=each.took_s,
                tokens=each.num_tokens,
                router=each.router_id,
            )
            for each in checks
        ]

    def checks(self) -> list[CheckForm]:
        return self._checks

    def take_labels(self, labels: Iterable[EngineLabels]) -> None:
        """Those that an operator has given."""
        self._labels = {each.engine: each.labels for each in labels}

    def index_age_s(self, now: float) -> float:
        """Since it was heard; as long as it never was: infinite."""
        return float("inf") if self._heard_at is None else now - self._heard_at

    def is_index_alive(self, now: float) -> bool:
        return self.index_age_s(now) <= self._silence_s

    def engines(self) -> list[EngineForm]:
        """Members first, then those that are missing; each by name."""
        members = [self._form(member) for _, member in sorted(self._members.items())]
        missing = [
            _missing_form(each)
            for each in sorted(self._missing, key=lambda each: each.engine_id)
            if each.engine_id not in self._members
        ]
        return members + missing

    def pairs(self) -> list[PairForm]:
        """Of members between which KV may go."""
        infos = [member.info for _, member in sorted(self._members.items()) if member.info.exchanges_kv]
        if len(infos) * (len(infos) - 1) > MAX_PAIRS:
            return []
        rates = {
            (source, link.engine_id): link.bytes_per_s
            for source, member in self._members.items()
            for link in member.load.links[:MAX_LINKS_TOLD]
        }
        return [
            PairForm(*pair, heap_between(source, target), rates.get(pair, 0.0))
            for source, target in permutations(infos, 2)
            for pair in [(source.engine_id, target.engine_id)]
            if source.does("remote_send") and target.does("prep_recv")
        ]

    def _form(self, member: Member) -> EngineForm:
        info, load = member.info, member.load
        return EngineForm(
            id=info.engine_id,
            state="draining" if load.draining else "ready",
            detail="",
            address=info.address,
            host=host_of(info.address),
            model=info.model,
            backend=info.backend,
            backend_version=info.backend_version,
            numerics=info.numerics.name,
            exact=info.numerics.is_exact,
            labels=self._labels.get(info.engine_id, info.labels),
            heaps=info.all_heaps,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            can=list(ABILITIES) if info.can is None else info.can,
            load=load_form(info, load),
            cluster=info.cluster,
        )


def load_form(info: EngineInfo, load: EngineLoad) -> LoadForm:
    free = max(0, load.free_blocks - load.cached_blocks)
    others = load.decode_share + load.transfer_share + load.idle_share
    return LoadForm(
        running=load.num_running,
        waiting=load.num_waiting,
        grants=load.num_grants,
        queued_prefill_tokens=load.queued_prefill_tokens,
        used_blocks=max(0, info.num_blocks - load.free_blocks - load.quarantined_blocks),
        cached_blocks=load.cached_blocks,
        free_blocks=free,
        quarantined_blocks=load.quarantined_blocks,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_s=load.decode_step_s,
        # An engine of vLLM's does not say it: it is what is left.
        prefill_share=load.prefill_share or (max(0.0, 1.0 - others) if others else 0.0),
        num_steps=load.num_steps,
        draining=load.draining,
        granted_blocks=load.granted_blocks,
        oldest_lease_s=load.oldest_lease_s,
        decode_share=load.decode_share,
        transfer_share=load.transfer_share,
        idle_share=load.idle_share,
    )


def heap_between(source: EngineInfo, target: EngineInfo) -> str:
    """The first kind of the target's that the source has as well; empty: none. Whether it reaches is seen at
    the first transfer only: the canonical line says through what KV went."""
    return next((heap for heap in target.all_heaps if heap in source.all_heaps), "")


def host_of(address: str) -> str:
    """``10.0.0.5`` of ``tcp://10.0.0.5:7200``; of an address without a host the address."""
    return urlsplit(address).hostname or address


def _missing_form(each: MissingEngine) -> EngineForm:
    state = "lost" if each.code == "engine_lost" and not each.field else "refused"
    detail = f"{each.field}: {each.detail}" if each.field else each.detail
    return EngineForm(
        id=each.engine_id,
        state=state,
        detail=detail or each.code,
        address=each.address,
        host=host_of(each.address),
        model="",
        backend="",
        backend_version="",
        numerics="",
        exact=False,
        labels=[],
        heaps=[],
        block_size=0,
        num_blocks=0,
        can=[],
        load=None,
    )
