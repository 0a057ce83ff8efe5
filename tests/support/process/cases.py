"""What is asked of a mesh that must be exact: mixed prompts, shared prefixes, greedy and seeded sampling."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from microserve.protocol.messages.request.sampling import Grammar, SamplingParams


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0


def make_cases(count: int, *, vocab_size: int, max_prompt: int, seed: int = 0) -> list[Case]:
    """Mixed lengths, a third with a shared prefix; two greedy for each sampled one."""
    rng = random.Random(seed)
    low = min(20, vocab_size // 4)
    prefixes = [
        tuple(rng.randrange(low, vocab_size) for _ in range(rng.randrange(max_prompt // 4, max_prompt // 2)))
        for _ in range(6)
    ]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, max_prompt]
    cases = []
    for number in range(count):
        if number < len(lengths):
            length = lengths[number]
        else:
            length = min(max_prompt, max(1, int(rng.lognormvariate(5.0, 1.3))))
        prompt = tuple(rng.randrange(low, vocab_size) for _ in range(length))
        if rng.random() < 0.35:
            prompt = (*rng.choice(prefixes), *prompt)[:max_prompt]
        params = SamplingParams(max_tokens=rng.randrange(4, 25), temperature=0.0, ignore_eos=True)
        if number % 3 == 2:
            params = SamplingParams(
                max_tokens=params.max_tokens,
                temperature=rng.choice([0.5, 0.8, 1.0]),
                top_p=rng.choice([0.9, 1.0]),
                top_k=rng.choice([0, 50]),
                seed=rng.randrange(1 << 40),
                ignore_eos=True,
            )
        cases.append(Case(prompt, params))
    return cases


GRAMMARS = (
    Grammar(kind="json_object"),
    Grammar(
        kind="json_schema",
        text='{"type":"object","properties":{"name":{"enum":["é日本😀","ab"]},"ids":{"type":"array","items":'
        '{"type":"integer","minimum":0,"maximum":999},"minItems":3,"maxItems":9}},"required":["name","ids"]}',
    ),
    Grammar(kind="regex", text="([ab]{2,9} ){3,20}"),
    Grammar(kind="choice", text='["yes, and more than that","no, by no means","日本語の答え"]'),
    Grammar(kind="lark", text='start: ("x" | "yz")+ "."'),
)


def with_grammars(cases: Sequence[Case], max_tokens: int = 40) -> list[Case]:
    """The same, and each answer is to be one of a grammar; it may end before its last token."""
    return [
        replace(
            case,
            params=msgspec.structs.replace(
                case.params, max_tokens=max_tokens, grammar=GRAMMARS[number % len(GRAMMARS)]
            ),
        )
        for number, case in enumerate(cases)
    ]


CALLS = Grammar(
    kind="lark",
    text=r"""start: call call?
call: "<tool_call>\n{\"name\": \"" /plan|book/ "\", \"arguments\": " args "}\n</tool_call>\n"
args: %json {"type": "object", "properties": {"city": {"enum": ["Zürich", "日本 😀", "</tool_call>"]},
"days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4}},
"required": ["city", "days"], "additionalProperties": false}
""",
)
"""What a gateway makes of tools one or two of which must be called."""


def with_calls(cases: Sequence[Case], thought_end: int, max_tokens: int = 60) -> list[Case]:
    """The same, and each answer is to call tools; that of every second one behind a thought, which the token
    ``thought_end`` ends."""
    found = []
    for number, case in enumerate(cases):
        params = msgspec.structs.replace(case.params, max_tokens=max_tokens, grammar=CALLS)
        if number % 2:
            behind = msgspec.structs.replace(CALLS, after_token_ids=(thought_end,))
            # Random weights end no thought by themselves, and greedy ones repeat one token for ever.
            params = msgspec.structs.replace(
                params, grammar=behind, logit_bias={thought_end: 6.0}, repetition_penalty=1.3
            )
        found.append(replace(case, params=params))
    return found


def times_n(cases: Sequence[Case], n: int = 3) -> list[Case]:
    """As a gateway asks for ``n`` choices: one prompt, sampled, with seeds in a row."""
    return [
        replace(
            case, params=msgspec.structs.replace(case.params, temperature=0.8, seed=1000 * number + index)
        )
        for number, case in enumerate(cases)
        for index in range(n)
    ]


def with_prompts_told(cases: Sequence[Case], count: int = 2) -> list[Case]:
    """The same, and the prompt's own tokens are told of; every second one wants nothing else."""
    return [
        replace(
            case,
            params=msgspec.structs.replace(
                case.params,
                prompt_logprobs=count,
                max_tokens=0 if number % 2 else case.params.max_tokens,
            ),
        )
        for number, case in enumerate(cases)
    ]


def all_kinds(plain: Sequence[Case], vocab_size: int) -> list[Case]:
    """Plain ones, and a quarter as many with grammars, with calls of tools, of n = 3 (grammars, too), and
    that are told of their prompts; all tell log-probabilities."""
    some = plain[-(len(plain) // 4) :]
    others = [*with_grammars(some), *with_calls(some, vocab_size // 2), *with_prompts_told(some)]
    return with_logprobs([*plain, *others, *times_n([*some[::2], *with_grammars(some[1::2])])])


def with_logprobs(cases: Sequence[Case], count: int = 2) -> list[Case]:
    """The same, and each token tells its log-probability and those of the likeliest others."""
    return [replace(case, params=msgspec.structs.replace(case.params, logprobs=count)) for case in cases]
