"""A corpus of JSON schemas through the gateway's check and the engine's matcher (``make conformance``).

For each schema: refused, and by which keyword, or what of its valid and invalid instances the matcher takes.
An invalid one that is taken without a warning is *silent*: with ``--strict`` there must be none, and the tool
fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
import time
from collections import Counter
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import msgspec

from microserve.gateway.grammar.checking import checked
from microserve.gateway.helper.work import GRAMMAR_CPU_S
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.compiled import load_tokenizer
from microserve.protocol.messages.request.sampling import MAX_GRAMMAR_NBYTES, Grammar
from microserve.services.engine.guidance.matching import GrammarCompiler, GrammarMatcher
from tests.conformance.corpora import Case, cases_of, in_integers, in_order
from tests.support.gateway.gateway_world import make_tokenizer

_PLACE = re.compile(r"(?P<names>[\w$, ]+) at #")
_REASONS = (
    ("may have", "bounds: size"),
    ("nested", "bounds: depth"),
    ("must be an object", "a schema that is true or false"),
    ("regex", "pattern"),
    ("lookaround", "pattern"),
    ("nsatisfiable", "nothing fits"),
    ("$ref", "$ref"),
    ("ref ", "$ref"),
)


class Tally:
    """What one process has counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.compile_ms: list[float] = []
        self.silent: list[str] = []
        self.rejected: list[str] = []

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.refused += other.refused
        self.compile_ms += other.compile_ms
        self.silent += other.silent
        self.rejected += other.rejected


class Judge:
    """The gateway's check and the engine's matcher, over one vocabulary."""

    def __init__(self, model: Path | None, *, is_strict: bool) -> None:
        self._is_strict = is_strict
        with tempfile.TemporaryDirectory() as made:
            directory = model or Path(made)
            if model is None:
                make_tokenizer().save(str(directory / "tokenizer.json"))
            self._tokenizer = load_tokenizer(directory)
            self._compiler = GrammarCompiler(directory, self._tokenizer.vocab_size, frozenset())

    def judge(self, case: Case, tally: Tally) -> None:
        tally.counts["schemas"] += 1
        text = json.dumps(case.schema)
        begun = time.process_time()
        try:
            if len(text) > MAX_GRAMMAR_NBYTES:
                raise InvalidRequest("a schema may have so many bytes", field="grammar")
            grammar = Grammar(kind="json_schema", text=text)
            grammar, warnings = checked(self._tokenizer, grammar, is_strict=self._is_strict)
            if time.process_time() - begun > GRAMMAR_CPU_S:
                raise InvalidRequest(f"it takes more than {GRAMMAR_CPU_S} s", field="grammar")
        except (InvalidRequest, msgspec.MsgspecError) as error:
            tally.refused[_keyword_of(str(error))] += 1
            return
        tally.compile_ms.append(1e3 * (time.process_time() - begun))
        tally.counts["compiled with a warning" if warnings else "compiled"] += 1
        matcher = self._compiler.compile(grammar)
        for instance, is_valid in case.instances:
            self._instance(case, matcher, instance, is_valid, bool(warnings), tally)

    def _instance(
        self, case: Case, matcher: GrammarMatcher, instance: Any, is_valid: bool, warned: bool, tally: Tally
    ) -> None:
        is_taken = self._takes(matcher, instance)
        ordered = in_order(instance, case.schema)
        if is_valid:  # of an invalid one it may be what is wrong
            ordered = in_integers(ordered)
        in_its_order = is_taken or self._takes(matcher, ordered)
        if is_valid:
            tally.counts["valid"] += 1
            tally.counts["valid, accepted"] += is_taken
            tally.counts["valid, accepted in order"] += in_its_order and not is_taken
            if not in_its_order:
                tally.rejected.append(case.name)
            return
        tally.counts["invalid"] += 1
        if not in_its_order:
            tally.counts["invalid, rejected"] += 1
        elif warned:
            tally.counts["invalid, accepted with a warning"] += 1
        else:
            tally.silent.append(f"{case.name}: {json.dumps(instance)[:200]}")

    def _takes(self, matcher: GrammarMatcher, instance: Any) -> bool:
        """Is an answer that is this instance one of the grammar?"""
        fork = matcher.fork()
        text = json.dumps(instance, separators=(",", ":"), ensure_ascii=False)
        try:
            for token in self._tokenizer.tokenize_str(text):
                fork.take(token)
        except Exception as error:  # a token that the grammar does not have, in the engine's words
            assert "is not in the grammar" in str(error), error
            return False
        return fork.may_end()


def _keyword_of(detail: str) -> str:
    if found := _PLACE.search(detail):
        return found["names"].strip().split(",")[0]
    for sign, name in _REASONS:
        if sign in detail:
            return name
    return detail.split(":", maxsplit=1)[0][:60]


_JUDGE: list[Judge] = []


def _begin(model: Path | None, is_strict: bool) -> None:
    _JUDGE.append(Judge(model, is_strict=is_strict))


def _of_file(asked: tuple[Path, Path, str]) -> Tally:
    directory, path, draft = asked
    _, _, read = cases_of(directory, draft)
    tally = Tally()
    for case in read(path):
        _JUDGE[0].judge(case, tally)
    return tally


def report(name: str, tally: Tally, seconds: float, *, is_strict: bool) -> str:
    """As it is printed, and kept in docs/reliability.md."""
    counts = tally.counts
    times = sorted(tally.compile_ms) or [0.0]
    lines = [
        f"{name}, {'strict' if is_strict else 'not strict'}: {counts['schemas']} schemas in {seconds:.0f} s "
        f"({platform.machine()}, Python {platform.python_version()})",
        f"  compiled {counts['compiled']}, with a warning {counts['compiled with a warning']}, "
        f"refused {tally.refused.total()}",
        f"  check in ms of CPU time: p50 {times[len(times) // 2]:.1f}, p99 "
        f"{times[len(times) * 99 // 100]:.0f}",
        f"  valid {counts['valid']}: accepted {counts['valid, accepted']}, in the schema's order "
        f"{counts['valid, accepted in order']}, rejected {len(tally.rejected)}",
        f"  invalid {counts['invalid']}: rejected {counts['invalid, rejected']}, accepted with a warning "
        f"{counts['invalid, accepted with a warning']}, silent {len(tally.silent)}",
        "  refused by: " + ", ".join(f"{name} {count}" for name, count in tally.refused.most_common(20)),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="a checkout of one of the two corpora")
    parser.add_argument("--draft", default="draft2020-12", help="of the test suite")
    parser.add_argument("--strict", action="store_true", help="nothing may be relaxed")
    parser.add_argument("--model", type=Path, help="whose vocabulary; default: a small one of bytes")
    parser.add_argument("--every", type=int, default=1, help="only each n-th file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="name what is silent or rejected")
    asked = parser.parse_args()
    name, paths, _ = cases_of(asked.corpus, asked.draft)
    begun, tally = time.monotonic(), Tally()
    with Pool(asked.processes, _begin, (asked.model, asked.strict)) as pool:
        files = [(asked.corpus, path, asked.draft) for path in paths[:: asked.every]]
        for each in pool.imap_unordered(_of_file, files, chunksize=8):
            tally.add(each)
    print(report(name, tally, time.monotonic() - begun, is_strict=asked.strict))
    if asked.show:
        print("\n".join(["rejected:", *sorted(tally.rejected), "silent:", *sorted(tally.silent)]))
    if asked.strict and tally.silent:
        raise SystemExit(f"{len(tally.silent)} invalid instances are accepted without a word")


if __name__ == "__main__":
    main()
