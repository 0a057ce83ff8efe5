"""What is left of a model's answers when its KV has been through a codec: beside those with KV as it is.

Each prompt is computed once. Then the model goes on from its KV, as it is or as it came back: with its own
likeliest next tokens, given one by one, and with the right answer, where the prompt has one. At each token
given, what the model would have said is compared. A greedy answer is the same up to its first token that is
not: so what is counted here in one call is what would be said in many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kvcache.codec.library import Quality
from microserve.protocol.errors import ConfigError
from microserve.services.command.profile.measure.interval import relative, wilson
from microserve.services.command.profile.measure.replay import Branch, Continuation, Kv, Replay
from microserve.services.command.profile.workload import Prompt

Told = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one prompt, beside KV as it is."""

    attention_error: float
    """Relative L2 of attention's outputs behind the prompt, mean of the layers."""
    logit_kl: float
    """Mean over the next tokens, nats."""
    agreement: float
    """Share of next tokens that are the likeliest still."""
    is_right: bool | None
    """Greedily it says the prompt's answer; None: the prompt has none."""


@dataclass(frozen=True, slots=True)
class _Exact:
    """Of one prompt, with its KV as it is."""

    branches: list[Branch]
    said: Tensor
    """The next tokens: int64."""
    logprobs: Tensor
    attention: Tensor
    is_right: bool | None


class Judge:
    """Prompts with what the model says to them. Memory: KV of all prompts, and the logits of their next
    tokens in float32."""

    def __init__(
        self, replay: Replay, prompts: Sequence[Prompt], num_next: int, told: Told = lambda done: None
    ) -> None:
        """num_next: tokens of an answer that are compared. ``told``: of prompts that are computed."""
        self._replay, self._prompts = replay, prompts
        self.kvs: list[Kv] = []
        for number, prompt in enumerate(prompts):
            self.kvs.append(replay.prefill(prompt.token_ids))
            told(number + 1)
        rests = [
            list(prompt.token_ids[kv.num_tokens :]) for prompt, kv in zip(prompts, self.kvs, strict=True)
        ]
        said = replay.answers(self.kvs, rests, num_next)
        branches = [
            [Branch(rest + own[:-1], len(own))]
            + ([Branch(rest + list(prompt.answer[:-1]), len(prompt.answer))] if prompt.answer else [])
            for prompt, rest, own in zip(prompts, rests, said, strict=True)
        ]
        exact = replay.go_on(self.kvs, branches)
        self._exact = [
            _Exact(
                branches[index],
                # By the same call as below, not by the one that has found them: sums round by their company.
                own[0].logits.argmax(-1),
                own[0].logits.log_softmax(-1),
                own[0].attention,
                _is_right(prompts[index], own),
            )
            for index, own in enumerate(exact)
        ]

    @property
    def num_right(self) -> tuple[int, int]:
        """Prompts whose answer the model says with KV as it is, and prompts that have one."""
        known = [each.is_right for each in self._exact if each.is_right is not None]
        return sum(known), len(known)

    @property
    def said(self) -> list[list[int]]:
        """Of each prompt the likeliest next tokens, with KV as it is."""
        return [each.said.tolist() for each in self._exact]

    def seen(self, received: Sequence[npt.NDArray[np.uint8]]) -> list[Seen]:
        """received: of each prompt, rows as they came back, in the shape of ``kvs``."""
        every = self._replay.go_on([Kv(rows) for rows in received], [each.branches for each in self._exact])
        return [
            self._seen(prompt, exact, own)
            for prompt, exact, own in zip(self._prompts, self._exact, every, strict=True)
        ]

    def _seen(self, prompt: Prompt, exact: _Exact, got: Sequence[Continuation]) -> Seen:
        logprobs = got[0].logits.log_softmax(-1)
        kl = (exact.logprobs.exp() * (exact.logprobs - logprobs)).sum(-1).mean()
        error = (got[0].attention - exact.attention).flatten(1).norm(dim=1)
        return Seen(
            attention_error=float((error / exact.attention.flatten(1).norm(dim=1).clamp_min(1e-12)).mean()),
            logit_kl=max(0.0, float(kl)),
            agreement=float((got[0].logits.argmax(-1) == exact.said).float().mean()),
            is_right=_is_right(prompt, got),
        )

    def quality(self, seen: Sequence[Seen]) -> Quality:
        """Of all prompts. The score is of the task where any prompt has an answer, else it is the agreement.
        Raises :class:`ConfigError` where the model answers nothing right with KV as it is."""
        agreement = float(np.mean([each.agreement for each in seen]))
        score = (agreement, *wilson(agreement, len(seen)))
        pairs = [
            (exact.is_right, bool(each.is_right))
            for exact, each in zip(self._exact, seen, strict=True)
            if exact.is_right is not None
        ]
        if pairs:
            before = sum(was for was, _ in pairs)
            if not before:
                raise ConfigError(
                    f"the model gives none of {len(pairs)} answers, also with KV as it is: there is nothing "
                    "that could be lost",
                    field="file",
                )
            lost = sum(was and not now for was, now in pairs)
            score = relative(before, lost, sum(now and not was for was, now in pairs), len(pairs))
        return Quality(
            score=score[0],
            score_low=score[1],
            score_high=score[2],
            logit_kl=float(np.mean([each.logit_kl for each in seen])),
            attention_error=float(np.mean([each.attention_error for each in seen])),
            greedy_agreement=agreement,
        )


def _is_right(prompt: Prompt, got: Sequence[Continuation]) -> bool | None:
    if not prompt.answer:
        return None
    return bool(torch.equal(got[1].logits.argmax(-1), torch.tensor(prompt.answer)))
