"""By which profile a send goes: the one asked for, or the one that a controller of the pair chooses.

Owns what this engine knows of profiles (its library, what is built in), a codec for each, and a controller
for each receiver. Under the engine's lock. How a choice is made is kvcache/codec/choice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from microserve.kvcache.codec.choice.controller import Controller
from microserve.kvcache.codec.choice.decision import Context, Decision, Reason
from microserve.kvcache.codec.codec import SUPPORTED, Codec
from microserve.kvcache.codec.library import BUILT_IN, Library
from microserve.kvcache.codec.profile import NONE
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.coding import AUTO, MAX_CODEC_CHARS
from microserve.protocol.messages.kv.geometry import difference
from microserve.services.engine.core.coding.encoder import Encoder
from microserve.services.engine.core.coding.outgoing import Outgoing

MAX_RECEIVERS = 256
"""With a controller; the longest unused goes first."""


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """What an engine is given to send and receive in fewer bytes."""

    library: Library = BUILT_IN
    num_threads: int = 1
    """That encode, and as many that decode; 0: in the steps, for tests and simulations."""
    min_quality: float = 0.0
    """Least score of a profile that ``auto`` chooses."""


class Choices:
    def __init__(
        self,
        layout: KvLayout,
        encoder: Encoder | None,
        options: CodecOptions,
        *,
        seed: int,
        chunk_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        """``encoder``: None where nothing can be encoded. ``chunk_tokens``: that a step computes at most.

        Raises :class:`ConfigError` for a library that is of other KV."""
        self._layout = layout
        self._encoder = encoder
        self._options = options
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._library = _with_built_in(options.library, layout)
        self._codecs = self._make_codecs() if encoder is not None else {}
        self._controllers: OrderedDict[str, Controller] = OrderedDict()

    def outgoing(self, message: wire.RemoteSend, num_tokens: int, link_bytes_per_s: float) -> Outgoing | None:
        """For a send of so many tokens; None: no codec was asked for. Raises :class:`InvalidRequest` for a
        name that is not known."""
        name, grant = message.codec, message.grant
        if not name:
            return None
        if len(name) > MAX_CODEC_CHARS:
            raise InvalidRequest(
                f"codec has {len(name)} characters, at most {MAX_CODEC_CHARS}", field="codec"
            )
        decoding = grant.decoding
        if self._encoder is None or decoding is None:
            self._require_known(name)
            where = "here" if self._encoder is None else "there"
            return Outgoing(Decision(NONE, Reason.REFUSED, detail=f"no codecs {where}"), link_bytes_per_s)
        nbytes = 2 * num_tokens * self._layout.row_nbytes * self._layout.num_layers
        context = Context(
            nbytes=nbytes,
            num_payloads=self._layout.num_layers * -(-num_tokens // self._chunk_tokens),
            link_bytes_per_s=link_bytes_per_s,
            slo_s=message.within_s if message.within_s > 0.0 else math.inf,  # NaN as well
            quality_floor=self._options.min_quality,
            may_lose=message.may_lose,
            codecs=frozenset(decoding.codecs).intersection(SUPPORTED),
            decode_queued_s=max(0.0, decoding.queued_s),
            decode_s_per_byte=max(0.0, decoding.ns_per_byte * 1e-9),
            is_overlapped=True,
        )
        decision = self._controller(grant.engine_id).decide(name, context)
        codec = self._codecs.get(decision.profile.name)
        return Outgoing(decision, link_bytes_per_s, self._encoder, codec, self._clock)

    def observe(self, engine_id: str, outgoing: Outgoing, until: float, decode_s: float) -> None:
        """A send to that engine is over: its last byte was there at ``until``, and decoding takes the
        receiver about ``decode_s``."""
        busy_s = outgoing.busy_s(until)
        if busy_s > 0.0 and (controller := self._controllers.get(engine_id)) is not None:
            controller.observe(outgoing.decision, max(busy_s, decode_s))

    def _controller(self, engine_id: str) -> Controller:
        if (known := self._controllers.get(engine_id)) is None:
            known = self._controllers[engine_id] = Controller(self._library, seed=self._seed)
            if len(self._controllers) > MAX_RECEIVERS:
                self._controllers.popitem(last=False)
        self._controllers.move_to_end(engine_id)
        return known

    def _require_known(self, name: str) -> None:
        if name != AUTO and self._library.profile(name) is None:
            raise InvalidRequest(f"codec {name!r} is not in the engine's library", field="codec")

    def _make_codecs(self) -> dict[str, Codec]:
        scores = self._library.head_scores
        head_scores = None if scores is None else np.array(scores, np.float32)
        codecs = {}
        for entry in self._library.entries:
            profile = entry.profile
            if profile.needs not in SUPPORTED:
                continue  # never chosen here
            of_heads = head_scores if profile.quantiser == "mixed_head" else None
            try:
                codecs[profile.name] = Codec(profile, self._layout.geometry, head_scores=of_heads)
            except ConfigError as error:
                what = f"codec library: profile {profile.name}: {error.detail}"
                raise ConfigError(what, field="engine.codec_library") from None
        return codecs


def _with_built_in(library: Library, layout: KvLayout) -> Library:
    fault = difference(library.geometry, layout.geometry, ours="in the codec library", theirs="here")
    if not fault and library.revision and layout.revision and library.revision != layout.revision:
        fault = f"revision: {library.revision} in the codec library, {layout.revision} here"
    if fault:
        raise ConfigError(
            f"the codec library is of another model's KV: {fault}", field="engine.codec_library"
        )
    known = {entry.profile.name for entry in library.entries}
    more = [entry for entry in BUILT_IN.entries if entry.profile.name not in known]
    return msgspec.structs.replace(library, entries=[*library.entries, *more])
