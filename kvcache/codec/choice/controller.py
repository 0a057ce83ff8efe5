"""The choice of a profile per transfer: predicted, corrected by what was seen, guarded by the time allowed.

    who may      decodable there, permitted to lose or losing nothing, quality at least the floor; none always
    who is near  the envelope's best at the link's rate, its neighbours, none; without who rests or raw beats
    who is used  the least T * (1 + residual), but now and then another one at random (below)

Who is tried at random is who might be better, not who is known to be far off: one that is passed over for
what was seen of it, though by the prediction it beats the one that is used, with chance ``explore``: so a
penalty ends when its reason has. Where there is none of these, one that is predicted to take little more
(``NEAR``), with chance ``wander``: what was measured elsewhere may be wrong in its favour.

The guard of the time allowed goes by the corrected time where a profile is used for its speed, and by the
prediction alone where one is tried at random: else what was once slow could never be seen to have recovered.
Where nothing keeps the time allowed, KV goes as it is: the one way that cannot make matters worse by a codec.

Of one pair: what slows a codec down, or a link, is theirs. Sans-I/O, no clock, the same for the same seed.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from microserve.kvcache.codec.choice.decision import Context, Decision, Reason
from microserve.kvcache.codec.choice.envelope import Envelope, Stages
from microserve.kvcache.codec.choice.guard import Guard
from microserve.kvcache.codec.choice.residuals import Residuals
from microserve.kvcache.codec.library import RAW, Library, Measured
from microserve.kvcache.codec.profile import NONE, Profile
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.kv.coding import AUTO

NEAR = 1.25
"""Times what the one in use takes."""
MAX_ENVELOPES = 64
"""Kept; the longest unused goes first."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The paper names no values; these are the middle of what its repository advises."""

    explore: float = 0.1
    """Chance that one is tried that is passed over for what was seen of it; 0: penalties never end."""
    wander: float = 0.02
    """Chance that one is tried that is a little slower by all that is known."""
    weight: float = 0.2
    """Of the newest residual."""
    window: int = 10
    """Uses of a profile, of which more than ``max_misses`` too late send it to rest for ``rest``
    decisions."""
    max_misses: int = 3
    rest: int = 16


def codec_of(profile: Profile) -> str:
    """What a receiver must be able to decode for it, as grants say it."""
    return f"kv1:{profile.coder}"


class Controller:
    """``select`` or ``asked`` before a transfer, ``observe`` behind it; one that failed is not observed. Of
    one thread."""

    def __init__(self, library: Library, *, tuning: Tuning | None = None, seed: int = 0) -> None:
        self._tuning = tuning or Tuning()
        self._library = library
        others = [each for each in library.entries if each.profile.name != NONE.name]
        self._candidates: list[Measured] = [RAW, *others]
        self._random = random.Random(seed)
        self._residuals = Residuals(self._tuning.weight)
        self._guard = Guard(self._tuning.window, self._tuning.max_misses, self._tuning.rest)
        self._envelopes: OrderedDict[tuple[object, ...], Envelope] = OrderedDict()

    def decide(self, codec: str, context: Context) -> Decision:
        """As a ``RemoteSend`` asks: empty, ``auto``, or a profile's name. Raises :class:`InvalidRequest` for
        a name that the library does not have."""
        if codec == AUTO:
            return self.select(context)
        return self.asked(codec or NONE.name, context)

    def asked(self, name: str, context: Context) -> Decision:
        """That profile, or raw where it may not be used, with the reason in ``detail``."""
        found = next((each for each in self._candidates if each.profile.name == name), None)
        if found is None:
            known = ", ".join(each.profile.name for each in self._candidates[:20])
            raise InvalidRequest(f"codec {name!r} is not in the engine's library: {known}", field="codec")
        if why_not := _in_the_way(found.profile, context):
            predicted = self._seconds(RAW, context)
            return Decision(NONE, Reason.REFUSED, predicted, predicted, why_not, context.slo_s)
        predicted = self._seconds(found, context)
        return Decision(found.profile, Reason.ASKED, predicted, predicted, slo_s=context.slo_s)

    def select(self, context: Context) -> Decision:
        """The one that pays, as the head of this file has it."""
        self._guard.decided()
        if context.link_bytes_per_s <= 0.0 or context.nbytes <= 0:
            return Decision(NONE, Reason.UNKNOWN_LINK, slo_s=context.slo_s)
        may = [index for index, each in enumerate(self._candidates) if self._may(each, context)]
        envelope = self._envelope(may, context)
        interval = envelope.interval(1.0 / context.link_bytes_per_s)
        best = may[envelope.best[interval]]
        cell = (frozenset(may), self._candidates[best].profile.name)
        raw_s = self._seconds(RAW, context)
        predicted = {0: raw_s}
        for index in (may[each] for each in envelope.near(interval)):
            seconds = self._seconds(self._candidates[index], context)
            # Whom raw beats by the prediction is not even tried: above every break-even nothing is lost.
            if index and seconds < raw_s and not self._guard.rests(self._candidates[index].profile.name):
                predicted[index] = seconds
        expected = {index: seconds * (1.0 + self._of(cell, index)) for index, seconds in predicted.items()}
        # In the order of time, the first of equals first: who is chosen among equals is not the seed's.
        in_time = sorted(
            (index for index in expected if expected[index] <= context.slo_s),
            key=lambda each: (expected[each], each),
        )
        chosen = in_time[0] if in_time else 0
        reason = Reason.NONE_FEASIBLE if not in_time else Reason.MODEL if chosen == best else Reason.LEARNED
        if (tried := self._tried(chosen, predicted, expected[chosen], context.slo_s)) is not None:
            chosen, reason = tried, Reason.EXPLORED
        return Decision(
            self._candidates[chosen].profile,
            reason,
            predicted[chosen],
            expected[chosen],
            slo_s=context.slo_s,
            cell=cell,
        )

    def observe(self, decision: Decision, observed_s: float) -> None:
        """It took ``observed_s`` from the first byte encoded to the last one decoded."""
        if decision.cell is None or decision.predicted_s <= 0.0 or not observed_s > 0.0:
            return
        name = decision.profile.name
        self._residuals.saw(decision.cell, name, decision.predicted_s, observed_s)
        if name != NONE.name:
            self._guard.used(name, missed=observed_s > decision.slo_s)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert len(self._envelopes) <= MAX_ENVELOPES
        assert not self._guard.rests(NONE.name), "raw is always a candidate"
        self._residuals.check_integrity()
        self._guard.check_integrity()

    def _tried(self, chosen: int, predicted: dict[int, float], used_s: float, slo_s: float) -> int | None:
        """Another one than ``chosen``, which is expected to take ``used_s``; None: not this time."""
        others = [index for index in sorted(predicted) if index != chosen and predicted[index] <= slo_s]
        passed_over = [index for index in others if predicted[index] < used_s]
        near = passed_over or [index for index in others if predicted[index] < used_s * NEAR]
        chance = self._tuning.explore if passed_over else self._tuning.wander
        return self._random.choice(near) if near and self._random.random() < chance else None

    def _of(self, cell: tuple[frozenset[int], str], index: int) -> float:
        return self._residuals.of(cell, self._candidates[index].profile.name)

    def _may(self, measured: Measured, context: Context) -> bool:
        if measured.profile == NONE:
            return True
        return not _in_the_way(measured.profile, context) and measured.quality.score >= context.quality_floor

    def _envelope(self, may: Sequence[int], context: Context) -> Envelope:
        """Of who may, for this size of payload and this load of the decoder."""
        waiting = (context.decode_queued_s / context.nbytes, context.decode_s_per_byte)
        key = (tuple(may), _payload_nbytes(context), _overlap(context), waiting)
        if (known := self._envelopes.get(key)) is None:
            stages = [_stages(self._candidates[index], context) for index in may]
            known = self._envelopes[key] = Envelope(stages, _overlap(context))
            if len(self._envelopes) > MAX_ENVELOPES:
                self._envelopes.popitem(last=False)
        self._envelopes.move_to_end(key)
        return known

    def _seconds(self, measured: Measured, context: Context) -> float:
        """Of the whole transfer; 0: nothing is known of the link."""
        if context.link_bytes_per_s <= 0.0 or context.nbytes <= 0:
            return 0.0
        per_byte = _stages(measured, context).at(1.0 / context.link_bytes_per_s, _overlap(context))
        return context.nbytes * per_byte


def _in_the_way(profile: Profile, context: Context) -> str:
    """Why it may not be used; empty: it may."""
    if profile == NONE:
        return ""
    if profile.is_lossy and not context.may_lose:
        return "it loses, and this request is exact"
    if codec_of(profile) not in context.codecs:
        return f"the receiver does not decode {codec_of(profile)}"
    return ""


def _payload_nbytes(context: Context) -> float:
    return context.nbytes / max(context.num_payloads, 1)


def _overlap(context: Context) -> float:
    return 1.0 - 1.0 / max(context.num_payloads, 1) if context.is_overlapped else 0.0


def _stages(measured: Measured, context: Context) -> Stages:
    if measured.profile == NONE:
        return Stages(0.0, 0.0, 1.0)
    nbytes = _payload_nbytes(context)
    encode = measured.encode.a_s / nbytes + measured.encode.s_per_byte
    # What the decoder has seen of late is of others' payloads too: it can only say that it is slower.
    decode = max(measured.decode.a_s / nbytes + measured.decode.s_per_byte, context.decode_s_per_byte)
    return Stages(encode, decode + context.decode_queued_s / context.nbytes, 1.0 / measured.ratio)
