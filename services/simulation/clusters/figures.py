"""What came of a run: TTFT with its waiting and without, and whether queues stay or grow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from microserve.services.simulation.clusters.world import World


@dataclass(frozen=True)
class Figures:
    """Of the prompts that came after the first fifth; of those that are ready."""

    num_prompts: int
    num_ready: int
    mean_ttft_s: float
    p90_ttft_s: float
    p90_service_s: float
    """Of the same prompts, without waiting and without the link."""
    mean_waiting: float
    """Prompts that no engine computes, in the last fifth of the run."""
    growth: float
    """Prompts that wait and are more each second, from the middle of the run to its end."""
    link_share: float
    """Of what the link could have carried, by its first rate."""
    most_link_nbytes: float


def figures(world: World) -> Figures:
    looks, seconds = world.looks, world.looks[-1].at_s
    came = [prompt for prompt in world.prompts if prompt.at_s >= seconds / 5]
    ready = [prompt for prompt in came if prompt.ready_s >= 0.0]
    ttft = np.array([prompt.ttft_s for prompt in ready])
    at = np.array([look.at_s for look in looks])
    waiting = np.array([look.waiting for look in looks], dtype=float)
    late = at >= seconds / 2
    return Figures(
        num_prompts=len(came),
        num_ready=len(ready),
        mean_ttft_s=float(ttft.mean()),
        p90_ttft_s=float(np.quantile(ttft, 0.9)),
        p90_service_s=float(np.quantile([prompt.service_s for prompt in ready], 0.9)),
        mean_waiting=float(waiting[at >= seconds * 0.8].mean()),
        growth=float(np.polyfit(at[late], waiting[late], 1)[0]),
        link_share=world.link.sent_nbytes / (world.link.rate(0.0) * seconds),
        most_link_nbytes=max(look.link_nbytes for look in looks),
    )
