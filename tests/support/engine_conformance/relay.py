"""One prompt by two engines: receive, send, generate; and the one engine that would have said the same."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import FIRST_TOKEN
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import GREEDY, Answer, alone, require_equal, warm
from tests.support.engine_conformance.declared import matches, splits
from tests.support.engine_conformance.wire_client import WireClient

_numbers = itertools.count()


def fresh(name: str) -> str:
    """A name that no other request, salt or prefix has."""
    return f"{name} {next(_numbers)}"


@dataclass
class Relayed:
    """What the engines said of one relay."""

    grant: Grant
    sent: list[wire.Sent]
    answer: Answer
    finished: wire.Finished


async def relay(
    sender: WireClient,
    receiver: WireClient,
    tokens: list[int],
    end: int,
    *,
    sampling: SamplingParams = GREEDY,
    there: int = 0,
    here: int = 0,
    num_lanes: int = 1,
    first_token: bool = False,
    generate_first: bool = False,
    salt: str | None = None,
) -> Relayed:
    """``receiver`` generates behind KV of ``tokens[:end]`` from ``sender``, where ``there`` tokens are cached
    before, and ``here`` at the receiver.

    num_lanes: so many sends, one behind the other, where the range can be cut; first_token: the sender
    samples it; generate_first: ``StartGenerate`` goes before ``RemoteSend``.
    """
    salt = fresh("relay") if salt is None else salt
    request_id = fresh("request")
    await warm(sender, fresh("there"), tokens[:there], salt)
    await warm(receiver, fresh("here"), tokens[:here], salt)
    grant = await receiver.prep_recv(request_id, end, tokens, salt=salt)
    first_token = first_token and grant.matched < end  # with a full hit nobody has anything to compute there
    sent: list[wire.Sent] = []

    async def send() -> None:
        cuts = _cuts(sender, grant.matched, end, num_lanes)
        for lane, (begin, until) in enumerate(itertools.pairwise(cuts)):
            is_last = until == end
            sent.append(
                await sender.remote_send(
                    *(request_id, begin, until, grant, tokens if lane == 0 else None),
                    lane=lane,
                    sampling=sampling if first_token and is_last else None,
                    salt=salt,
                )
            )

    async def start() -> None:
        await receiver.start_generate(
            *(request_id, end, sampling, None),
            grant=grant,
            await_first=first_token,
            salt=salt,
            numerics=sender.info.numerics.name,
        )

    for step in (start, send) if generate_first else (send, start):
        await step()
    stream = await receiver.finished(request_id)
    answer = Answer.of(stream)
    if first_token:
        assert stream.first_offset == 1, "the first token came by the sender's answer"
        assert sent[-1].first_token is not None
        answer = answer.behind(sent[-1].first_token, sent[-1].first_logprob)
    assert stream.finished is not None
    return Relayed(grant, sent, answer, stream.finished)


def _cuts(sender: WireClient, matched: int, end: int, num_lanes: int) -> list[int]:
    """Where the sends begin, and the end of the last; those that the sender's granularity allows."""
    if matched >= end:
        return []
    inner = {
        splits(sender.info, matched + (end - matched) * lane // num_lanes) for lane in range(1, num_lanes)
    }
    return [matched, *sorted(cut for cut in inner if matched < cut < end), end]


async def check_relay(
    sender: WireClient,
    receiver: WireClient,
    tokens: list[int],
    end: int,
    *,
    there: int = 0,
    here: int = 0,
    num_lanes: int = 1,
    first_token: bool = False,
    generate_first: bool = False,
) -> Relayed:
    """As :func:`relay`, against one engine alone; and what grant, answers and usage have to say of it."""
    block, length = receiver.info.block_size, len(tokens)
    can = sender.info.does(FIRST_TOKEN) and receiver.info.does(FIRST_TOKEN)
    relayed = await relay(
        *(sender, receiver, tokens, end),
        there=there,
        here=here,
        num_lanes=num_lanes,
        first_token=first_token and can,
        generate_first=generate_first,
    )
    case = f"end {end} of {length}, {there} there, {here} here"
    grant, matched = relayed.grant, relayed.grant.matched
    assert matched in matches(receiver.info, here, end) and grant.end == end, (case, grant)
    assert len(grant.blocks) == -(-(end - matched) // block), case
    assert len(set(grant.blocks)) == len(grant.blocks), case
    assert sum(each.sent for each in relayed.sent) == end - matched, case
    for each in relayed.sent:
        assert each.computed + each.cached >= each.sent and (each.nbytes > 0) == (each.sent > 0), (case, each)
    usage = relayed.finished.usage
    assert usage.prompt_tokens == length, (case, usage)
    known = usage.cached_tokens + usage.received_tokens
    assert end - receiver.info.recompute_tokens <= known <= max(end, 0), (case, usage)
    # Who samples the first token has computed the last row of the prompt in one go with those before it.
    was_first = bool(relayed.sent) and relayed.sent[-1].first_token is not None
    # What the sender had behind the end it did not send; and it computed as its sends were cut.
    cached = {min(there, end // block * block), here, *_cuts(sender, matched, end, num_lanes)[:-1]}
    cached |= set() if was_first else {end}
    expected = await alone(receiver, fresh("oracle"), tokens, cached=sorted(cached - {0}))
    require_equal(relayed.answer, expected, receiver.info, case)
    return relayed
