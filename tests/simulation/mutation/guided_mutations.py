"""Bugs planted where output is constrained: hunted in worlds whose requests have grammars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest import mock

from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core import batch, core
from microserve.services.engine.core.batch import Batch, Sampled
from microserve.services.simulation.engine.toy_guides import ToyGuides, ToyGuiding
from tests.simulation.mutation.planting import mutation, replace

NOT_REPLAYED = "A grammar does not follow the tokens that another engine has delivered"
NEIGHBOUR = "A row is given the mask of the row beside it"
GUIDED = {NOT_REPLAYED, NEIGHBOUR}
"""The others are hunted in worlds without grammars."""


@mutation
def _a_matcher_is_not_replayed(stack: ExitStack) -> None:
    """A grammar does not follow the tokens that another engine has delivered."""
    prepare = ToyGuides.prepare

    def prepare_at_its_begin(
        self: ToyGuides,
        params: SamplingParams,
        output: Sequence[int],
        ends: frozenset[int],
        on_done: Callable[[], None],
    ) -> ToyGuiding:
        guiding = prepare(self, params, [], ends, on_done)
        assert guiding.guide is not None
        guiding.guide._num_taken = len(output)
        return guiding

    replace(stack, ToyGuides, "prepare", prepare_at_its_begin)


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
