"""The token deltas of one request from one engine, put in order: duplicates dropped, gaps refused.

Sans-I/O but for the one waiter. Waiting tokens merge, so a slow reader costs memory for at most the
request's own output, and one wake-up; a reader that only hands them on need not be woken for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from microserve.protocol.errors import MeshError, PeerError, error_for
from microserve.protocol.messages.engine import Delta, Finished, TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import FIRST_POSITION, PromptLogprobs


class Tokens(msgspec.Struct, frozen=True):
    """Output tokens ``[offset, offset + len(token_ids))`` of a request.

    A struct: a frozen dataclass takes four times as long to make, and there is one a token."""

    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    """As many as ``token_ids``, or none."""
    finished: Finished | None = None
    """Set on the last chunk, which may be without tokens."""
    prompt: PromptLogprobs | None = None
    """The next log-probabilities of the prompt's own tokens, if they were asked for; they come before tokens,
    or with the first."""


class TokenStream:
    """In: deltas, a first token, a failure, in any order. Out: :class:`Tokens` in order."""

    def __init__(self, request_id: str, engine_id: str, *, await_first: bool = False, start: int = 0) -> None:
        """``await_first``: the first token comes by :meth:`push_first` (its sender sampled it), not as delta.
        ``start``: its offset."""
        self.request_id = request_id
        self.engine_id = engine_id
        self._awaits_first = await_first
        self._first_delta = self._next = start + (1 if await_first else 0)
        """Offset of the next token that a delta may bring."""
        self._offset = start
        """Offset of the first waiting token."""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt: PromptLogprobs | None = None
        self._next_row = FIRST_POSITION
        """Position in the prompt of the next row that a delta may bring."""
        self._finished: Finished | None = None
        self._error: MeshError | None = None
        self._wake = asyncio.Event()
        self._tell: Callable[[Tokens], None] | None = None
        self.on_news: Callable[[], None] | None = None
        """Called when :attr:`is_ready` may have changed; must not raise."""
        self.accepted: asyncio.Future[Any] | None = None
        """The answer to ``StartGenerate``: what comes before it is left over from an older stream."""

    @property
    def started(self) -> bool:
        """The engine has produced tokens itself: all the KV that it waited for is in."""
        return self._next > self._first_delta

    @property
    def offset(self) -> int:
        """Of the next token that :meth:`next` brings."""
        return self._offset

    @property
    def is_ready(self) -> bool | None:
        """:meth:`next` would bring something at once; False: would raise at once; None: would wait."""
        is_whole = self._finished is not None and self._finished.reason in ("stop", "length")
        if not self._awaits_first and (self._token_ids or self._prompt or is_whole):
            return True
        has_failed = self._error is not None or (self._finished is not None and not is_whole)
        return False if has_failed else None

    def _rouse(self) -> None:
        self._wake.set()
        if self.on_news is not None:
            self.on_news()

    def push(self, delta: Delta) -> None:
        """Take one delta. A gap or a malformed one fails the stream; what is old is dropped."""
        if self._finished is not None or self._error is not None:
            return
        missing = delta.offset - self._next
        if missing > 0:
            self.fail(
                PeerError(
                    f"{self.engine_id} lost output tokens [{self._next}, {delta.offset}) of {self.request_id}"
                )
            )
            return
        if delta.offset < 0 or (delta.logprobs and len(delta.logprobs) != len(delta.token_ids)):
            self.fail(PeerError(f"{self.engine_id} sent a malformed delta of {self.request_id}"))
            return
        rows = None if delta.prompt is None else self._fresh_rows(delta.prompt)
        if self._error is not None:
            return
        fresh = delta.token_ids[-missing:]
        self._next += len(fresh)
        self._token_ids += fresh
        self._logprobs += delta.logprobs[-missing:]
        self._finished = delta.finished
        if self._tell is not None and delta.finished is None and not self._awaits_first:
            if fresh or rows:
                self._tell(self._take(None))
        elif fresh or rows or delta.finished:
            self._rouse()

    def _fresh_rows(self, prompt: PromptLogprobs) -> PromptLogprobs | None:
        """What of them is new, which waits from now on."""
        last = self._prompt
        if not prompt.is_whole or (last is not None and last.num_top != prompt.num_top):
            self.fail(PeerError(f"{self.engine_id} sent malformed log-probabilities of {self.request_id}"))
            return None
        if prompt.begin > self._next_row:
            lost = f"[{self._next_row}, {prompt.begin})"
            self.fail(PeerError(f"{self.engine_id} lost log-probabilities {lost} of {self.request_id}"))
            return None
        fresh = prompt.behind(self._next_row)
        if not len(fresh):
            return None
        self._next_row = fresh.end
        self._prompt = fresh if last is None else last.joined(fresh)
        return fresh

    def tell(self, tell: Callable[[Tokens], None]) -> None:
        """From now on tokens are handed to ``tell`` as they come, and wake nobody; :meth:`next` waits for the
        end. ``tell`` must not raise: a delta of other streams may stand behind this one's."""
        self._tell = tell

    def push_first(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Token 0, from the engine that computed the prompt. Only the first one counts."""
        if not self._awaits_first:
            return
        self._awaits_first = False
        self._token_ids.insert(0, token_id)
        if logprob is not None:
            self._logprobs.insert(0, logprob)
        self._rouse()

    def fail(self, error: MeshError) -> None:
        """End with ``error`` after the tokens that are in. No effect on a stream that is whole."""
        if self._error is None and (self._finished is None or self._awaits_first):
            self._error = error
            self._rouse()

    async def next(self) -> Tokens:
        """All that waits, at least a token or a row of the prompt, or the end. For one reader.

        Raises what :meth:`fail` was given, or the engine's error, once no token is left. An engine's own
        ``abort`` (nobody here asked for it) is a :class:`PeerError`.
        """
        while True:
            if (self._token_ids or self._prompt) and not self._awaits_first:
                failed = self._finished is not None and self._finished.reason not in ("stop", "length")
                return self._take(None if failed else self._finished)
            if self._finished is not None:
                if self._finished.reason == "error":
                    error = error_for(self._finished.code, f"{self.engine_id}: {self._finished.detail}")
                    error.reporter = self.engine_id
                    raise error
                if self._finished.reason not in ("stop", "length"):
                    raise PeerError(f"{self.engine_id} ended the request: {self._finished.reason}")
                if not self._awaits_first:
                    return self._take(self._finished)
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()

    def _take(self, finished: Finished | None) -> Tokens:
        chunk = Tokens(self._offset, self._token_ids, self._logprobs, finished, self._prompt)
        self._offset += len(self._token_ids)
        self._token_ids, self._logprobs, self._prompt = [], [], None
        return chunk


class TokenStreams:
    """The streams of one engine by request id."""

    def __init__(self) -> None:
        self.late_deltas = 0
        """Deltas of requests that nobody here waits for any more: what an abort overtook."""
        self._streams: dict[str, TokenStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: TokenStream) -> None:
        """One stream a request."""
        self._streams[stream.request_id] = stream

    def remove(self, stream: TokenStream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]

    def push(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None or (stream.accepted is not None and not stream.accepted.done()):
                self.late_deltas += 1
            else:
                stream.push(delta)

    def fail_all(self, make_error: Callable[[], MeshError]) -> None:
        """The engine is lost; streams get an error each, as a raised one collects its own traceback."""
        for stream in self._streams.values():
            stream.fail(make_error())
        self._streams.clear()
