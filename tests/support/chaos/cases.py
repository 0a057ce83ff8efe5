"""The few questions that a chaos run asks again and again, and their answers from one undisturbed engine."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import SampleSpec
from microserve.services.engine.model.sampler import sample
from tests.support.engine.engine_client import EngineClient
from tests.support.process.cases import Case

NUM_PREFIXES = 5
NOISE = 3e-4
"""Standard deviation on each logit: some thirty times what another batch or split changes in fp32."""
NOISY_ROUNDS = 8
IN_FLIGHT = 16


@dataclass(frozen=True)
class Question:
    case: Case
    tokens: tuple[int, ...]
    text: str
    """What a client of the gateway sees of the tokens."""


def make_pool(count: int, *, vocab_size: int, max_prompt: int, max_output: int, seed: int) -> list[Case]:
    """Half with a shared prefix; every third sampled by a seed, the rest greedy."""
    rng = random.Random(seed)
    low = min(20, vocab_size // 4)

    def some(num_tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(low, vocab_size) for _ in range(num_tokens))

    prefixes = [some(rng.randrange(max_prompt // 4, max_prompt // 2)) for _ in range(NUM_PREFIXES)]
    cases = []
    for number in range(count):
        prompt = some(rng.randrange(1, max_prompt // 2))
        if number % 2:
            prompt = rng.choice(prefixes) + prompt
        params = SamplingParams(
            max_tokens=rng.randrange(max_output // 6, max_output), temperature=0.0, ignore_eos=True
        )
        if number % 3 == 2:
            params = SamplingParams(
                max_tokens=params.max_tokens,
                temperature=rng.choice([0.7, 1.0]),
                top_p=rng.choice([0.9, 1.0]),
                top_k=rng.choice([0, 40]),
                seed=rng.randrange(1 << 40),
                ignore_eos=True,
            )
        cases.append(Case(prompt, params))
    return cases


async def ask_oracle(
    bus: Bus, engine_address: str, cases: list[Case], model: Path, *, salt: str = "oracle"
) -> list[Question]:
    """Every case once, by one engine that nobody else uses.

    ``salt``: nothing that is asked later may live on what the oracle has cached.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(engine: EngineClient, number: int, case: Case) -> Question:
        async with gate:
            request_id = f"oracle-{number}"
            await engine.call(
                wire.Accepted,
                wire.StartGenerate,
                request_id,
                0,
                case.params,
                120.0,
                salt=salt,
                tokens=list(case.prompt),
            )
            tokens, _ = await engine.finished(request_id, 120.0)
        return Question(case, tuple(tokens), tokenizer.decode(tokens, skip_special_tokens=True))

    async with EngineClient(bus, engine_address) as engine:
        return list(await asyncio.gather(*(one(engine, *each) for each in enumerate(cases))))


def keep_stable(questions: list[Question], model_path: Path) -> list[Question]:
    """Those whose every token stands although the logits of ``transformers`` are shaken a little.

    A near-tie would be decided by rounding, and a right mesh called wrong. Raises ``RuntimeError`` where the
    answer is stable and the engine's is another one.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(0)
    kept = []
    for number, question in enumerate(questions):
        prompt, tokens = list(question.case.prompt), list(question.tokens)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        specs = [
            SampleSpec(question.case.params, prompt, tokens[:position], frozenset())
            for position in range(len(tokens))
        ]
        shaken = {
            tuple(
                choice.token_id
                for choice in sample(logits + NOISE * torch.randn(logits.shape, generator=noise), specs)
            )
            for _ in range(NOISY_ROUNDS)
        }
        if len(shaken) > 1:
            continue
        if shaken != {question.tokens}:
            raise RuntimeError(f"question {number}: the engine alone and transformers differ")
        kept.append(question)
    return kept
