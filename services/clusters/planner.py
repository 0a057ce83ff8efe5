"""How many requests a second two clusters can serve, and by which threshold and split they serve most.

A prompt of more than ``threshold`` uncached tokens is computed in the other cluster, and its KV comes over
the link. Every stage serves what mean prompts of its side allow; the slowest one bounds all::

    remote  min(instances / seconds(long), link / bytes(long)) / share of long ones
    prefill prefill engines / seconds(short) / share of short ones
    decode  decode engines * answers a second of one

Every threshold on a grid and every split of the local engines is tried: the functions have kinks, and all of
it takes a few milliseconds. A formula: nothing waits in it, and ``seconds`` of a mean length is less than the
mean of seconds (prefill bends upwards), so what it promises is a few per cent too much
(services/simulation/clusters/ lets requests wait).

Source: PrfaaS, arXiv 2604.15039, equations 3 to 8.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from microserve.protocol.errors import ConfigError
from microserve.services.clusters.lengths import Lengths
from microserve.services.clusters.profile import GBIT, ClusterProfile

STEP_TOKENS = 100
STAGES = ("remote prefill", "link", "local prefill", "decode")


class Plan(msgspec.Struct, frozen=True):
    """The best of what was tried, or what was asked for. Rates are requests a second."""

    threshold: float
    """Prompts with more uncached tokens than this are computed in the other cluster."""
    num_remote: int
    num_prefill: int
    """Of the local engines, those that compute prompts."""
    num_decode: int
    rate: float
    bound: str
    """One of ``STAGES``: what all others wait for."""
    share_long: float
    mean_long: float
    """Tokens."""
    mean_short: float
    remote_rate: float
    """Long prompts that the other cluster and the link can do; 0 without such."""
    prefill_rate: float
    decode_rate: float
    link_bytes_per_s: float
    """That go over the link at ``rate``."""
    link_share: float
    """The same of what the link has."""
    mean_ttft_s: float
    """Of service alone: nothing waits, and the KV arrives as the last layer ends."""
    p90_ttft_s: float


def solve(
    profile: ClusterProfile,
    lengths: Lengths,
    *,
    link_gbps: float | None = None,
    step_tokens: int = STEP_TOKENS,
    splits: range | None = None,
) -> Plan:
    """The most requests a second, by every threshold of the grid and every number of local prefill engines
    (``splits``: only those). Of equals the one with the least over the link. Raises :class:`ConfigError`."""
    thresholds = np.arange(0.0, lengths.longest + step_tokens, step_tokens)
    return _best(profile, lengths, thresholds, splits, link_gbps, profile.remote.instances)


def homogeneous(profile: ClusterProfile, lengths: Lengths, instances: int) -> Plan:
    """The best split where nothing is computed elsewhere and there are ``instances`` local engines."""
    local = msgspec.structs.replace(profile.local, instances=instances)
    alone = msgspec.structs.replace(profile, local=local)
    return _best(alone, lengths, np.array([lengths.longest]), None, None, 0)


def offload_all(profile: ClusterProfile, lengths: Lengths, *, link_gbps: float | None = None) -> Plan:
    """Every prompt is computed elsewhere, every local engine decodes."""
    return _best(profile, lengths, np.array([0.0]), range(1), link_gbps, profile.remote.instances)


def rate_at(
    profile: ClusterProfile,
    lengths: Lengths,
    threshold: float,
    num_prefill: int,
    *,
    link_gbps: float | None = None,
) -> Plan:
    """What this threshold and this split come to."""
    splits = range(num_prefill, num_prefill + 1)
    return _best(profile, lengths, np.array([threshold]), splits, link_gbps, profile.remote.instances)


def _best(
    profile: ClusterProfile,
    lengths: Lengths,
    thresholds: NDArray[np.float64],
    splits: range | None,
    link_gbps: float | None,
    num_remote: int,
) -> Plan:
    link = (profile.link_gbps if link_gbps is None else link_gbps) * GBIT
    if not link > 0.0:
        raise ConfigError(f"link_gbps must be above 0, is {link_gbps}", field="link_gbps")
    num_local = profile.local.instances
    prefill = np.array(range(num_local + 1) if splits is None else splits)[:, None]
    if prefill.size == 0 or prefill.min() < 0 or prefill.max() > num_local:
        raise ConfigError(f"splits must lie within 0..{num_local} local engines", field="splits")
    parts = lengths.part(thresholds)
    nbytes = profile.kv_nbytes.at(parts.mean_long)
    with np.errstate(divide="ignore", invalid="ignore"):
        computing = num_remote / profile.remote.prefill_s.at(parts.mean_long)
        sending = link / nbytes
        shorts = prefill / profile.local.prefill_s.at(parts.mean_short)
        share = parts.share_long
        no_long, no_short = share <= 0.0, share >= 1.0
        stages = np.stack(
            np.broadcast_arrays(
                np.where(no_long, np.inf, computing / share),
                np.where(no_long, np.inf, sending / share),
                np.where(no_short, np.inf, shorts / (1.0 - share)),
                (num_local - prefill) * profile.decode_rate,
            )
        )
    rates = stages.min(axis=0)
    best = rates.max()
    load = np.where(rates >= best * (1 - 1e-9), share * nbytes, np.inf)
    row, column = np.unravel_index(int(np.argmin(load)), load.shape)
    rate, long = float(rates[row, column]), float(share[column])
    used, threshold = rate * long * float(nbytes[column]), float(thresholds[column])
    chosen = int(prefill[row, 0])
    service = np.where(
        lengths.values > threshold,
        profile.remote.prefill_s.at(lengths.values),
        profile.local.prefill_s.at(lengths.values),
    )
    return Plan(
        threshold=threshold,
        num_remote=num_remote,
        num_prefill=chosen,
        num_decode=num_local - chosen,
        rate=rate,
        bound=STAGES[int(stages[:, row, column].argmin())],
        share_long=long,
        mean_long=float(parts.mean_long[column]),
        mean_short=float(parts.mean_short[column]),
        remote_rate=min(float(computing[column]), float(sending[column])) if long > 0.0 else 0.0,
        prefill_rate=float(shorts[row, column]) if long < 1.0 else 0.0,
        decode_rate=float((num_local - chosen) * profile.decode_rate),
        link_bytes_per_s=used,
        link_share=used / link,
        mean_ttft_s=float((lengths.weights * service).sum()),
        p90_ttft_s=lengths.quantile(service, 0.9),
    )
