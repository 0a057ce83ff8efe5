"""Flags that say how a canary goes on by itself, and what they mean. Shared by publish and set."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from microserve.services.command.shared.flags import WrongFlag

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.scores import Ramp

Command = TypeVar("Command", bound=Callable[..., Any])

EVERY_S = 300.0
MIN_REQUESTS = 20
"""Requests of the canary that each share has seen before the next one comes."""
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def share_of(text: str, flag: str = "--share") -> float:
    """``10%`` or ``0.1``."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise WrongFlag(f"{flag} {text}: a share is above 0% and at most 100%")
    return share


def seconds_of(text: str, flag: str) -> float:
    """``90``, ``90s``, ``5m``, ``1h`` or ``1d``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise WrongFlag(f"{flag} {text}: a time is 90s, 5m, 1h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def ramp_flags(command: Command) -> Command:
    """``--ramp``, ``--every``, ``--min-requests`` and ``--promote-after``, for :func:`ramp_of`."""
    for option in (
        click.option(
            "--promote-after",
            metavar="N|TIME|better|not-worse",
            help="The canary is promoted by itself: after N of its requests, a time, or when that is seen.",
        ),
        click.option(
            "--min-requests",
            type=click.IntRange(0),
            default=MIN_REQUESTS,
            show_default=True,
            help="Requests of the canary with each share before it has more.",
        ),
        click.option(
            "--every",
            metavar="TIME",
            help=f"How long each share of a ramp lasts at least.  [default: {EVERY_S / 60:.0f}m]",
        ),
        click.option(
            "--ramp",
            "ramp_text",
            metavar="SHARE,SHARE,...",
            help="The canary's shares, one after the other while all is well; 100%: it is promoted.",
        ),
    ):
        command = option(command)
    return command


def ramp_of(
    ramp_text: str | None, every: str | None, min_requests: int, promote_after: str | None
) -> Ramp | None:
    """What the flags say; None: nothing. Raises :class:`WrongFlag`."""
    from microserve.protocol.messages.strategy.scores import BETTER, NOT_WORSE, Ramp, fault_of_ramp

    until = {"better": BETTER, "not-worse": NOT_WORSE}.get(promote_after or "", "")
    if ramp_text is not None:
        if promote_after is not None and not until:
            raise WrongFlag("--promote-after beside --ramp is better or not-worse (--every says how long)")
        shares = [share_of(each.strip(), "--ramp") for each in ramp_text.split(",")]
        every_s = seconds_of(every, "--every") if every is not None else EVERY_S
        ramp = Ramp(shares, every_s, min_requests, until)
    elif promote_after is not None:
        if every is not None:
            raise WrongFlag("--every is for a --ramp")
        if promote_after.isdecimal():
            ramp = Ramp([1.0], 0.0, int(promote_after))
        else:
            after_s = 0.0 if until else seconds_of(promote_after, "--promote-after")
            ramp = Ramp([1.0], after_s, min_requests, until)
    else:
        if every is not None:
            raise WrongFlag("--every is for a --ramp")
        return None
    if fault := fault_of_ramp(ramp):
        raise WrongFlag(f"--ramp: {fault}")
    return ramp
