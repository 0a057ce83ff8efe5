"""``microserve plan``: how much two clusters serve, from which length on prompts go to the other one, and how
many engines compute and decode.

Owns flags and the table. The model is services/clusters/planner.py; what waits in queues is simulated by
services/simulation/clusters/, if asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import echo

if TYPE_CHECKING:
    from microserve.services.clusters.lengths import Lengths
    from microserve.services.clusters.planner import Plan
    from microserve.services.clusters.profile import ClusterProfile

Path_ = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("profile_file", metavar="PROFILE", type=Path_)
@click.option("--trace", type=Path_, help="Prompt lengths from JSON lines in Mooncake's format, or gzip.")
@click.option("--histogram", type=Path_, help="Prompt lengths as JSON: [[upper end in tokens, count], ...].")
@click.option(
    "--link-gbps",
    type=click.FloatRange(min=0, min_open=True),
    help="Gbit/s of KV between the clusters. [default: the profile's]",
)
@click.option("--remote", type=click.IntRange(min=1), help="Engines there. [default: the profile's]")
@click.option("--local", type=click.IntRange(min=2), help="Engines here. [default: the profile's]")
@click.option(
    "--alone",
    type=click.IntRange(min=2),
    help="Engines here that the other cluster is compared with. [default: as many as all]",
)
@click.option(
    "--simulate",
    "seconds",
    type=click.FloatRange(min=100, max=1e6),
    help="Also let so many seconds of requests wait in queues, at shares of each plan's rate.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    profile_file: Path,
    trace: Path | None,
    histogram: Path | None,
    link_gbps: float | None,
    remote: int | None,
    local: int | None,
    alone: int | None,
    seconds: float | None,
    as_json: bool,
) -> None:
    """Requests a second that two clusters serve by PROFILE, and the threshold and split that serve most.

    A formula (PrfaaS, arXiv 2604.15039): nothing waits in it, and TTFT is of service alone. The file's
    fields are in docs/clusters.md.
    """
    import msgspec

    from microserve.protocol.errors import ConfigError
    from microserve.services.clusters.planner import homogeneous, offload_all, solve
    from microserve.services.clusters.profile import load_profile

    if trace is not None and histogram is not None:
        raise WrongFlag("--trace and --histogram: one of the two")
    try:
        profile = _resized(load_profile(profile_file), remote, local, link_gbps)
        lengths = _lengths(profile, trace, histogram)
        both = profile.remote.instances + profile.local.instances
        plans = {
            "plan": solve(profile, lengths),
            "no other cluster": homogeneous(profile, lengths, alone or both),
            "all prefill there": offload_all(profile, lengths),
        }
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    if as_json:
        echo(msgspec.json.format(msgspec.json.encode(plans), indent=2).decode())
    else:
        echo("\n".join([*_head(profile, lengths), *_table(plans)]))
        if seconds is not None:
            echo("\n".join(["", *_simulated(profile, lengths, plans["plan"], seconds)]))


def _resized(
    profile: ClusterProfile, remote: int | None, local: int | None, link_gbps: float | None
) -> ClusterProfile:
    from msgspec.structs import replace

    return replace(
        profile,
        remote=replace(profile.remote, instances=remote or profile.remote.instances),
        local=replace(profile.local, instances=local or profile.local.instances),
        link_gbps=link_gbps or profile.link_gbps,
    )


def _lengths(profile: ClusterProfile, trace: Path | None, histogram: Path | None) -> Lengths:
    """Those that were asked for, else the profile's. Raises :class:`ConfigError`."""
    import msgspec

    from microserve.protocol.errors import ConfigError
    from microserve.services.clusters.lengths import Lengths, LengthSpec

    if trace is not None:
        from microserve.services.simulation.load.trace import read_trace

        return Lengths([float(request.num_prompt_tokens) for request in read_trace(trace)])
    if histogram is not None:
        try:
            spec = msgspec.json.decode(b'{"histogram":' + histogram.read_bytes() + b"}", type=LengthSpec)
        except OSError as error:
            raise ConfigError(f"cannot read {histogram}: {error.strerror}", field="histogram") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{histogram}: {error}", field="histogram") from None
        return Lengths.of(spec)
    if profile.lengths is None:
        raise ConfigError("the profile has no lengths: --trace or --histogram", field="lengths")
    return Lengths.of(profile.lengths)


# --- the table ---------------------------------------------------------------------------------------


def _head(profile: ClusterProfile, lengths: Lengths) -> list[str]:
    here, there = profile.local, profile.remote
    return [
        f"{there.instances} engines {there.kind} there, {here.instances} engines {here.kind} here, "
        f"{profile.link_gbps:g} Gbit/s between; prompts of {lengths.mean:,.0f} tokens on average",
        f"figures: {profile.what or 'not said'}",
        "a formula: nothing waits in it, and TTFT is of service alone",
        "",
    ]


def _table(plans: dict[str, Plan]) -> list[str]:
    rows = [("", *plans)]
    rows += [
        (name, *map(say, plans.values()))
        for name, say in (
            ("threshold, tokens", lambda p: f"{p.threshold:,.0f}" if 0 < p.share_long < 1 else "-"),
            ("engines there", lambda p: f"{p.num_remote or '-'}"),
            ("prefill here", lambda p: f"{p.num_prefill or '-'}"),
            ("decode here", lambda p: f"{p.num_decode}"),
            ("requests/s", lambda p: f"{p.rate:.3f}"),
            ("bound by", lambda p: p.bound),
            ("computed there", lambda p: f"{p.share_long:.1%}"),
            ("their mean tokens", lambda p: f"{p.mean_long:,.0f}" if p.share_long else "-"),
            ("link, Gbit/s", lambda p: f"{p.link_bytes_per_s * 8e-9:.2f}" if p.share_long else "-"),
            ("link in use", lambda p: f"{p.link_share:.1%}" if p.share_long else "-"),
            ("long/s there", lambda p: f"{p.remote_rate:.2f}" if p.share_long else "-"),
            ("short/s here", lambda p: f"{p.prefill_rate:.2f}" if p.share_long < 1 else "-"),
            ("answers/s", lambda p: f"{p.decode_rate:.2f}"),
            ("TTFT mean, s", lambda p: f"{p.mean_ttft_s:.2f}"),
            ("TTFT p90, s", lambda p: f"{p.p90_ttft_s:.2f}"),
        )
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def _simulated(profile: ClusterProfile, lengths: Lengths, plan: Plan, seconds: float) -> list[str]:
    """The plan's threshold, and simple load balancing of the same engines, with queues."""
    from microserve.services.simulation.clusters.figures import figures
    from microserve.services.simulation.clusters.policy import ByLoad, ByThreshold
    from microserve.services.simulation.clusters.world import World

    lines = [
        f"simulated, {seconds:g} s of requests by lot (seed 0) that wait for engines, link and places",
        "                  requests/s  TTFT p90, s  without waiting  prompts waiting  more each s",
    ]
    for name, policy in (("plan", ByThreshold(plan.threshold)), ("by load alone", ByLoad())):
        for share in (0.8, 0.9, 1.05):
            world = World(profile, policy, plan.num_prefill)
            world.run(lengths, share * plan.rate, seconds)
            seen = figures(world)
            lines.append(
                f"{name:<14}{share:>4.0%}{share * plan.rate:>10.2f}{seen.p90_ttft_s:>13.2f}"
                f"{seen.p90_service_s:>17.2f}{seen.mean_waiting:>17.1f}{seen.growth:>+13.3f}"
            )
    return lines
