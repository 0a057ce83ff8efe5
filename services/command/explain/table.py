"""How a router's record looks: words for numbers that were kept without any.

Owns the text for people and the JSON for programs. Knows no mesh and runs no strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from microserve.protocol.messages.engine_info import PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.coding import Coding
from microserve.protocol.messages.strategy.decisions import (
    Attempt,
    EngineSeen,
    Explained,
    Explanation,
    Note,
    Pick,
)
from microserve.services.router.rollout.replay import Replayed

Replays = Mapping[str, Sequence[Replayed]]


def lines(answer: Explained, replayed: Replays) -> Iterator[str]:
    """All that one router says."""
    for each in answer.found:
        yield from _request(each, answer.router_id)
        others = replayed.get(each.request_id, ())
        for number, attempt in enumerate(each.attempts):
            first = each.num_attempts - len(each.attempts)
            yield from _attempt(attempt, first + number + 1, each)
            yield from _replayed(others[number]) if number < len(others) else ()
        yield ""
    if answer.num_left_out:
        yield f"{answer.router_id} has {answer.num_left_out} more; ask for one of them by its id on the bus"


def as_json(answers: Sequence[Explained], replayed: Replays) -> list[dict[str, Any]]:
    """A list of requests, with the names of the wire; numbers that JSON has not are null."""
    made = []
    for answer in answers:
        for each in answer.found:
            fields = _plain(each) | {"router_id": answer.router_id}
            if each.request_id in replayed:
                fields["replayed"] = [_plain(other) for other in replayed[each.request_id]]
            made.append(fields)
    return made


def _plain(value: Any) -> Any:
    """With field names where the wire has positions."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _request(each: Explanation, router_id: str) -> Iterator[str]:
    state = f"ended {each.age_s:.1f} s ago: {each.code or each.reason}" if each.reason else "still runs"
    yield f"{each.request_id}  on {router_id}  {_named(each.strategy, each.version)}  {state}"
    asked_by = ", ".join(each.attributes) or "none"
    tokens = f"{each.num_prompt_tokens} tokens in, {each.num_output_tokens} of {each.max_tokens} out"
    yield f"  {tokens}  attributes: {asked_by} (values are not kept)"
    if each.is_cut:
        yield "  too long to be kept whole: without engines and candidates"
    if each.num_attempts > len(each.attempts):
        yield f"  {each.num_attempts - len(each.attempts)} attempts before these are not kept"
    if not each.attempts:
        yield "  no attempt: it was over before its turn came"


def _named(strategy: str, version: int) -> str:
    return f"{strategy} version {version}" if version else strategy


def _attempt(attempt: Attempt, number: int, each: Explanation) -> Iterator[str]:
    again = "" if number == 1 else f", {attempt.num_tokens - each.num_prompt_tokens} output tokens were there"
    who = _named(attempt.strategy, attempt.version)
    yield f"  attempt {number}  +{attempt.at_s * 1000:.1f} ms  {who}{again}"
    told: list[tuple[float, list[str]]] = [(pick.at_s, [*_pick(pick, attempt)]) for pick in attempt.picks]
    told += [(note.at_s, [_note(note)]) for note in attempt.notes]
    for _, group in sorted(told, key=lambda each: each[0]):
        yield from group
    for what, num_all, kept in (
        ("picks", attempt.num_picks, attempt.picks),
        ("notes", attempt.num_notes, attempt.notes),
    ):
        if num_all > len(kept):
            yield f"    {num_all - len(kept)} more {what} are not kept"
    yield from _done(attempt, each)


def _pick(pick: Pick, attempt: Attempt) -> Iterator[str]:
    how = f"by {pick.by}" + (f", drawn at temperature {pick.temperature:g}" if pick.temperature else "")
    yield f"    pick {pick.label or 'any'} {how}: {pick.chosen}"
    for remark in _remarks(pick, {engine.engine_id: engine for engine in attempt.engines}):
        yield f"      {remark}"
    if not pick.candidates:
        return
    header = ["engine", "cost", "uncached", "sequences", "cached", *(_short(s.name) for s in pick.scored)]
    rows = [header]
    for position, engine_id in enumerate(pick.candidates):
        loads = (
            [str(pick.uncached_tokens[position]), str(pick.sequences[position])]
            if position < len(pick.sequences)
            else ["-", "-"]
        )
        cached = str(attempt.cached.get(engine_id, 0)) if attempt.cached else "-"
        scores = [f"{scored.scores[position]:g}*{scored.weight:g}" for scored in pick.scored]
        mark = f"{engine_id} <" if engine_id == pick.chosen else engine_id
        rows.append([mark, f"{pick.costs[position]:g}", *loads, cached, *scores])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield "      " + "  ".join(cells).rstrip()


def _remarks(pick: Pick, seen: Mapping[str, EngineSeen]) -> Iterator[str]:
    """What narrowed the choice, or could not."""
    if pick.label is not None and seen and pick.candidates:
        fit = [e for e in seen.values() if not e.labels or pick.label in e.labels]
        if not {e.engine_id for e in fit} & {*pick.candidates}:
            yield f"no engine has the label {pick.label} that is not excluded: all count"
        elif len(fit) < len(seen):
            yield f"label {pick.label}: {len(fit)} of {len(seen)} engines"
    if pick.excluded:
        yielded = {*pick.excluded} & {*pick.candidates}
        also = "; it yields, for nobody else is left" if yielded else ""
        yield f"excluded: {', '.join(pick.excluded)}{also}"
    for ability in (PREP_RECV, REMOTE_SEND):
        unable = [e for e in seen.values() if e.can is not None and ability not in e.can]
        if without := [e.engine_id for e in unable if e.engine_id not in pick.candidates]:
            yield f"cannot {ability}, and is no candidate: {', '.join(without)}"
    if pick.numerics:
        yield f"only engines of numerics class {pick.numerics}"
    best = [e for e, cost in zip(pick.candidates, pick.costs, strict=True) if cost == min(pick.costs)]
    if len(best) > 1 and not pick.temperature:
        ranks = {
            e: rank
            for e, *rank in zip(pick.candidates, pick.uncached_tokens, pick.sequences, strict=True)
            if e in best
        }
        equal = [e for e in ranks if ranks[e] == min(ranks.values())]
        by = "by lot" if len(equal) > 1 else "by load"
        yield f"{len(best)} of {len(pick.candidates)} cost the same; between them {by}"


def _short(name: str) -> str:
    return name.rpartition(".")[2] if "<" not in name else name.partition(".")[0]


def _note(note: Note) -> str:
    values = " ".join(f"{name}={value}" for name, value in note.values.items())
    return f"    note {note.text} {values}".rstrip()


def _done(attempt: Attempt, each: Explanation) -> Iterator[str]:
    for send in attempt.sends:
        yield f"    sends [{send.begin}, {send.end}) from {send.source} to {send.target}"
        if send.coding is not None:
            yield f"      {_coding(send.coding)}"
    if attempt.engine_id:
        first = ", the first token comes from the sender" if attempt.awaits_first else ""
        begin = f"from {attempt.begin} of {attempt.num_tokens} tokens"
        yield f"    generates on {attempt.engine_id} {begin}{first}"
    elif each.reason or attempt is not each.attempts[-1]:
        yield "    did not come to generate"


def _coding(coding: Coding) -> str:
    sizes = f"{coding.raw_nbytes} bytes as {coding.wire_nbytes}"
    lossy = ", some of it is lost" if coding.is_lossy else ""
    times = f"predicted {coding.predicted_s:.4f} s, took {coding.observed_s:.4f} s"
    if not coding.predicted_s:
        times = f"nothing predicted, took {coding.observed_s:.4f} s"
    return f"by {coding.profile} ({coding.reason or 'no reason said'}): {sizes}{lossy}; {times}"


def _replayed(other: Replayed) -> Iterator[str]:
    yield f"    {_named(other.strategy, other.version)} by what was known then:"
    if other.unknown:
        who = ", ".join(other.unknown)
        yield f"      nothing says what {who} can do: taken as able to do everything"
    if other.mistake:
        yield f"      {other.mistake}"
        return
    for line in other.choices:
        yield f"      {line}"
    for send in other.sends:
        yield f"      sends [{send.begin}, {send.end}) from {send.source} to {send.target}"
    same = "the same engine" if other.is_same_engine else "another engine"
    yield f"      generates on {other.engine_id} from {other.begin}: {same}"
    if other.ttft_s is not None and other.done_ttft_s is not None:
        done = f"of what was done {other.done_ttft_s * 1000:.1f} ms"
        yield f"      predicted TTFT {other.ttft_s * 1000:.1f} ms, {done}"
