"""What is under control, in lines. Knows neither flags nor sockets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import ControlEntry, RouterControl, StrategyVersion
    from microserve.protocol.messages.strategy.scores import Ramp, RampState


def _version_line(kind: str, version: StrategyVersion, share: float) -> str:
    values = " ".join(f"{key}={value}" for key, value in version.parameters.items())
    for bound, bound_s in (("TTFT", version.max_ttft_s), ("TPOT", version.max_tpot_s)):
        values += f"  {bound} <= {bound_s:g} s" if bound_s else ""
    values += f"  sticky by {version.sticky_by}" if version.sticky_by else ""
    digest = version.digest[:12] or "(own)"
    return f"{kind:<7}{version.version:>6}  {share:>5.0%}  {digest:<12}  {values}".rstrip()


def ramp_line(ramp: Ramp, state: RampState | None = None) -> str:
    """How a canary goes on: ``ramp 1%, 10%, 100%  each 300 s and 20 requests; waits for 12 s more``."""
    shares = ", ".join(f"{share:.4g}" if share < 0.01 else f"{share * 100:.4g}%" for share in ramp.shares)
    until = {"better": ", until better", "not_worse": ", until no worse"}.get(ramp.until, "")
    waits = f"; waits: {state.waits_for}" if state is not None and state.waits_for else ""
    paused = "; paused" if ramp.paused and not waits else ""
    return f"ramp    {shares}  each {ramp.every_s:g} s and {ramp.min_requests} requests{until}{waits}{paused}"


def entry_lines(entry: ControlEntry, state: RampState | None = None) -> list[str]:
    lines = [entry.strategy]
    if entry.stable is not None:
        lines.append("  " + _version_line("stable", entry.stable, 1 - entry.share))
    else:
        lines.append("  " + f"stable      (what the routers came with)  {1 - entry.share:.0%}")
    if entry.canary is not None:
        lines.append("  " + _version_line("canary", entry.canary, entry.share))
    if entry.ramp is not None:
        lines.append("  " + ramp_line(entry.ramp, state))
    if entry.shadow is not None:
        lines.append("  " + _version_line("shadow", entry.shadow, entry.shadow_share))
    return lines


def strategy_lines(name: str, entry: ControlEntry | None, routers: Sequence[RouterControl]) -> list[str]:
    """One strategy: what is in force, whether it is anybody's default, and where it is otherwise."""
    having = [router for router in routers if any(each.strategy == name for each in router.serves)]
    defaults = [router for router in having if router.default_strategy == name]
    mark = _where("default", defaults, routers) if defaults else ""
    [head, *lines] = entry_lines(entry) if entry is not None else [f"{name:<24}  what the routers came with"]
    lines.insert(0, f"{head}  {mark}".rstrip())
    if entry is None and len(having) < len(routers):
        lines.append(f"  only on {', '.join(router.router_id for router in having)}")
    for router in having:
        for version in next(each.suspended for each in router.serves if each.strategy == name):
            lines.append(f"  suspended on {router.router_id}: version {version or '(own)'} has hung there, "
                         "data_parallel serves instead")  # fmt: skip
    return lines


def _where(what: str, some: Sequence[RouterControl], all_: Sequence[RouterControl]) -> str:
    if len(some) == len(all_):
        return f"({what})"
    return f"({what} on {', '.join(router.router_id for router in some)})"


def score_lines(entry: ControlEntry, routers: Sequence[RouterControl]) -> list[str]:
    """What the shadow would have done, by router, beside what was done."""
    if entry.shadow is None:
        return []
    lines = [
        f"{'shadow':<16}{'decisions':>10}{'errors':>8}{'same engine':>13}  TTFT  computed  sent (served)"
    ]
    for router in routers:
        for score in router.shadows:
            if (score.strategy, score.version) != (entry.strategy, entry.shadow.version):
                continue
            agreed = score.num_agreed / max(1, score.num_decisions - score.num_errors)
            lines.append(
                f"{router.router_id:<16}{score.num_decisions:>10}{score.num_errors:>8}{agreed:>13.0%}"
                f"  {score.ttft_s:.4f} s ({score.served_ttft_s:.4f} s)"
                f"  {score.computed_tokens:.0f} ({score.served_computed_tokens:.0f})"
                f"  {score.sent_tokens:.0f} ({score.served_sent_tokens:.0f})"
            )
    return lines if len(lines) > 1 else ["shadow: no decision yet"]
