"""Logits of a prompt to the log-probabilities of its own tokens, one row at a time.

The same log-softmax of the same raw logits as a sampled token's (sampler.py), so that a row has the same bits
whichever of the two it is looked at for. Logits that are on a GPU stay there: device/device_scorer.py. Must
not know models or sequences' states.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from microserve.services.engine.core.batch import Scored, ScoreSpec
from microserve.services.engine.model.sampler import failure, likeliest_of, log_softmax

if TYPE_CHECKING:
    from torch import Tensor

_Ids = npt.NDArray[np.int64]


def score(logits: Tensor, places: _Ids, specs: Sequence[ScoreSpec]) -> list[Scored]:
    """:func:`score_rows` of ``logits`` of any float dtype, on a CPU."""
    return score_rows(logits.float().numpy(), places, specs)


def score_rows(raw: npt.NDArray[np.float32], places: _Ids, specs: Sequence[ScoreSpec]) -> list[Scored]:
    """raw: logits [N, vocab_size]; places: rows of the first spec, then those of the next, one a target.

    Where a row has no finite maximum, what its spec asked for is an :class:`InternalError`."""
    ends = np.cumsum([len(spec.targets) for spec in specs])
    return [_score(raw, part, spec) for part, spec in zip(np.split(places, ends[:-1]), specs, strict=True)]


def _score(raw: npt.NDArray[np.float32], places: _Ids, spec: ScoreSpec) -> Scored:
    num_top = min(spec.num_top, raw.shape[1])
    layout = struct.Struct("<fI" + "If" * num_top)
    rows = []
    for place, target in zip(places, spec.targets, strict=True):
        if (failed := failure(float(raw[place].max()), 0.0)) is not None:
            return Scored(b"", num_top, failed.error)
        logprobs = log_softmax(raw[place])
        own = logprobs[target]
        likeliest = [logprobs.argmax()] if num_top == 1 else likeliest_of(logprobs, num_top)
        top = [each for token in likeliest for each in (int(token), float(logprobs[token]))]
        rows.append(layout.pack(float(own), 1 + int(np.count_nonzero(logprobs > own)), *top))
    return Scored(b"".join(rows), num_top)
