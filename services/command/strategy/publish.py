"""``microserve strategy publish``: a file that has passed its check goes to every router.

Owns its flags. The check is check.py's, the change change.py's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.shared.flags import WrongFlag, change_flags, parameter, talk_to_index
from microserve.services.command.strategy.change import apply
from microserve.services.command.strategy.check import look, source_flags, source_of, tell
from microserve.services.command.strategy.ramp import ramp_flags, ramp_of, share_of

if TYPE_CHECKING:
    from microserve.services.command.shared.control_client import ControlClient

BOUND = click.FloatRange(min=0.0)


@click.command()
@source_flags
@click.option("--share", "share_text", help="Below 100%: a canary.  [default: 100%, or a ramp's first]")
@click.option(
    "--shadow", is_flag=True, help="Decides about live requests, serves none; see its score in show."
)
@click.option(
    "--max-ttft", "max_ttft_s", type=BOUND, default=0.0, help="Taken back beyond it (seconds, p90)."
)
@click.option("--max-tpot", "max_tpot_s", type=BOUND, default=0.0, help="Likewise, for an output token.")
@click.option(
    "--sticky-by",
    metavar="ATTRIBUTE",
    default="",
    help="Canary or shadow: all requests of one user, tenant, ... alike (gateway.attributes).",
)
@ramp_flags
@click.option("--no-dry-run", is_flag=True, help="Without serving in the simulation first.")
@change_flags
def publish(
    file: Path,
    name: str | None,
    assignments: tuple[str, ...],
    share_text: str | None,
    shadow: bool,
    max_ttft_s: float,
    max_tpot_s: float,
    sticky_by: str,
    ramp_text: str | None,
    every: str | None,
    min_requests: int,
    promote_after: str | None,
    no_dry_run: bool,
    config: str | None,
    index: str | None,
    reason: str,
    timeout_s: float,
) -> None:
    """Check FILE, or a folder with an __init__.py, log it, and let every router serve by it from its next
    request on."""
    ramp = ramp_of(ramp_text, every, min_requests, promote_after)
    first = ramp.shares[0] if ramp is not None and ramp_text is not None else 1.0
    share = share_of(share_text) if share_text is not None else first
    if ramp is not None and (shadow or share == 1.0):
        raise WrongFlag(
            "only a canary goes on by itself: --share below 100%, or a --ramp that begins below it"
        )
    parameters, chosen = dict(map(parameter, assignments)), name or file.stem
    source = source_of(file)

    async def talk(client: ControlClient) -> int:
        labels = await client.labels() or [[]]
        if not tell(look(chosen, source, parameters, labels, dry_run=not no_dry_run), file):
            return 1
        return await apply(
            client,
            "publish",
            chosen,
            timeout_s,
            source=source,
            parameters=parameters,
            share=share,
            shadow=shadow,
            max_ttft_s=max_ttft_s,
            max_tpot_s=max_tpot_s,
            sticky_by=sticky_by,
            ramp=ramp,
            reason=reason,
        )

    sys.exit(talk_to_index(config, index, talk))
