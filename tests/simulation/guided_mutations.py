"""Bugs planted where output is constrained: hunted in worlds whose requests have grammars."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from unittest import mock

from microserve.services.engine.core import batch, core
from microserve.services.engine.core.batch import Batch, Sampled
from microserve.services.engine.guidance.guide import Guide
from tests.simulation.planting import mutation, replace

NOT_REPLAYED = "A grammar does not follow the tokens that another engine has delivered"
NEIGHBOUR = "A row is given the mask of the row beside it"
GUIDED = {NOT_REPLAYED, NEIGHBOUR}
"""The others are hunted in worlds without grammars."""


@mutation
def _a_matcher_is_not_replayed(stack: ExitStack) -> None:
    """A grammar does not follow the tokens that another engine has delivered."""
    follow = Guide.follow

    def follow_own(self: Guide, output: Sequence[int]) -> None:
        if not self._num_taken:
            self._num_taken = len(output)
        follow(self, output)

    replace(stack, Guide, "follow", follow_own)


@mutation
def _the_mask_of_the_row_beside(stack: ExitStack) -> None:
    """A row is given the mask of the row beside it."""
    constrain = batch.constrain

    def constrain_beside(asked: Batch) -> dict[int, Sampled]:
        failed = constrain(asked)
        specs = [chunk.sample for chunk in asked.chunks if chunk.sample and chunk.sample.guide]
        masks = [spec.allowed for spec in specs]
        for spec, mask in zip(specs, masks[1:] + masks[:1], strict=True):
            spec.allowed = mask
        return failed

    stack.enter_context(mock.patch.object(core, "constrain", constrain_beside))
