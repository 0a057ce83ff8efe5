"""Log-probabilities of a prompt's own tokens on the device that has the logits: scorer.py's, rows at once.

Owns that path; the log-softmax is device_sampler.py's, so a row has the bits that a sampled token of it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.services.engine.core.batch import Scored, ScoreSpec
from microserve.services.engine.model.attention.step import upload
from microserve.services.engine.model.device.device_sampler import MAX_ROWS, logprobs_of
from microserve.services.engine.model.sampler import failure

_BEST, _RANK, _OWN, _TOP = 0, 1, 2, 3
"""Columns of what comes to the host: the highest logit, then as a row is told."""


def score_there(logits: Tensor, places: npt.NDArray[np.int64], specs: Sequence[ScoreSpec]) -> list[Scored]:
    """As ``scorer.score``, with one wait for the device of ``logits``."""
    num_top = min(max(spec.num_top for spec in specs), logits.shape[1])
    targets = upload(
        np.concatenate([np.asarray(spec.targets, dtype=np.int64) for spec in specs]), logits.device
    )
    there = upload(places, logits.device)
    found = torch.zeros(len(targets), _TOP + 2 * num_top, dtype=torch.float64, device=logits.device)
    for start in range(0, len(targets), MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        raw, tokens = logits[there[part]].float(), targets[part]
        found[part, _BEST] = raw.max(dim=1).values.double()
        told, rank = logprobs_of(raw, tokens, num_top)
        found[part, _RANK] = rank.double()
        found[part, _OWN:] = told
    here = found.cpu().numpy()
    scored, start = [], 0
    for spec in specs:
        end = start + len(spec.targets)
        scored.append(_packed(here[start:end], min(spec.num_top, num_top), num_top))
        start = end
    return scored


def _packed(found: npt.NDArray[np.float64], wanted: int, num_top: int) -> Scored:
    """``wanted``: of the ``num_top`` likeliest that were found, so many were asked for."""
    failed = next((f for best in found[:, _BEST] if (f := failure(float(best), 0.0)) is not None), None)
    if failed is not None:
        return Scored(b"", wanted, failed.error)
    pair = np.dtype([("id", "<u4"), ("logprob", "<f4")])
    rows = np.empty(len(found), np.dtype([("logprob", "<f4"), ("rank", "<u4"), ("top", pair, (wanted,))]))
    rows["logprob"], rows["rank"] = found[:, _OWN], found[:, _RANK]
    rows["top"]["id"] = found[:, _TOP : _TOP + wanted]
    rows["top"]["logprob"] = found[:, _TOP + num_top : _TOP + num_top + wanted]
    return Scored(rows.tobytes(), wanted)
