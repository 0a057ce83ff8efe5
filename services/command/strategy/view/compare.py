"""``microserve strategy compare``: is one version better than another, and if it cannot be said yet, when.

Owns its flags and which requests are compared. The tests are the index's (services/index/trial/), as for
ramps; the lines are score_table.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import click

from microserve.services.command.shared.flags import WrongFlag, index_flags, talk_to_index
from microserve.services.command.shared.terminal import Failure, echo

if TYPE_CHECKING:
    from microserve.protocol.messages.strategy.control import ControlEntry, ControlReport
    from microserve.protocol.messages.strategy.decisions import Explained
    from microserve.protocol.messages.strategy.scores import Score, Side
    from microserve.services.command.shared.control_client import ControlClient

BY_LOT = "who served which was drawn by lot"
STICKY = "drawn by lot for all requests of one value: these are alike, so read it as a hint"
NOT_BY_LOT = "not drawn by lot: how the requests of the two differ is in it, but for their lengths"


class Sides(NamedTuple):
    """What is compared."""

    title: str
    ours: Side
    theirs: Side
    share: float
    """Of the requests that are dealt to us."""
    seconds: float
    dealt: str


@click.command()
@click.argument("one", metavar="NAME[/VERSION]")
@click.argument("other", metavar="[NAME[/VERSION]]", required=False)
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
@index_flags
def compare(config: str | None, index: str | None, one: str, other: str | None, output: str) -> None:
    """The canary of NAME beside its stable version; or one version beside another, of any names.

    Look as often as you like: of comparisons of equals at most 5 % ever say better or worse in anything."""
    from microserve.protocol.logging.printable import printable_json
    from microserve.services.command.strategy.view.score_table import comparison_lines, more_of
    from microserve.services.index.trial.judging import ALPHA, judge

    async def talk(client: ControlClient) -> tuple[ControlReport, list[Explained]]:
        report = await client.report()
        return report, [] if _entry_on_trial(report, one, other) else (await client.scores())[1]

    report, answers = talk_to_index(config, index, talk)
    sides = _sides(report, answers, one, other)
    results = judge(sides.ours, sides.theirs, sides.share)
    if output == "json":
        measures = {}
        for name, result in results.items():
            more, more_s = more_of(result, sides.seconds)
            measures[name] = {
                "verdict": result.verdict,
                "ratio": result.ratio,
                "low": result.low,
                "high": result.high,
                "requests": list(result.num),
                "more_requests": more,
                "more_s": more_s,
            }
        told = {"compared": sides.title, "dealt": sides.dealt, "alpha": ALPHA, "measures": measures}
        echo(printable_json(told))
        return
    numbers = (sides.ours.num_requests, sides.theirs.num_requests)
    echo(f"{sides.title}: {numbers[0]} and {numbers[1]} requests in {sides.seconds:.0f} s; {sides.dealt}")
    echo("\n".join(comparison_lines(results, sides.seconds)))
    echo(f"(however often one looks: of comparisons of equals at most {ALPHA:.0%} say anything but not yet)")


def _entry_on_trial(report: ControlReport, one: str, other: str | None) -> ControlEntry | None:
    """Whose canary and stable version are meant."""
    name, _ = _parsed(one)
    entry = next((entry for entry in report.state.entries if entry.strategy == name), None)
    if entry is None or entry.canary is None:
        return None
    canary, stable = entry.canary.version, 0 if entry.stable is None else entry.stable.version
    if other is None:
        return entry if _parsed(one)[1] in (None, canary) else None
    found = {_parsed(one), _parsed(other)}
    return entry if found <= {(name, canary), (name, stable)} and len(found) == 2 else None


def _sides(report: ControlReport, answers: list[Explained], one: str, other: str | None) -> Sides:
    from microserve.services.index.trial.merging import trial_of

    entry = _entry_on_trial(report, one, other)
    if entry is not None:
        trial = trial_of(entry, [trial for router in report.routers for trial in router.trials])
        if trial is None:
            raise Failure(f"no router has said anything of the canary of {entry.strategy} yet")
        is_swapped = other is not None and _parsed(one)[1] == trial.stable_version
        ours, theirs = (trial.stable, trial.canary) if is_swapped else (trial.canary, trial.stable)
        canary = f"canary {trial.canary_version} ({trial.share:.4g} of the requests)"
        stable = f"stable {trial.stable_version or '(own)'}"
        title = f"{stable} beside {canary}" if is_swapped else f"{canary} beside {stable}"
        share = 1 - trial.share if is_swapped else trial.share
        dealt = STICKY if trial.is_sticky else BY_LOT
        return Sides(f"{entry.strategy}: {title}", ours, theirs, share, trial.seconds, dealt)
    if other is None:
        raise Failure(f"{one} has no canary: name what it is to be compared with")
    scores = [score for answer in answers for score in answer.scores]
    found = [_version(report, scores, each) for each in (one, other)]
    (ours, ours_s), (theirs, theirs_s) = found
    total = ours.num_requests + theirs.num_requests
    share = ours.num_requests / total if total else 0.5
    return Sides(f"{one} beside {other}", ours, theirs, share, max(ours_s, theirs_s), NOT_BY_LOT)


def _version(report: ControlReport, scores: list[Score], wanted: str) -> tuple[Side, float]:
    """All that routers have seen of one version, and in how many seconds."""
    from microserve.services.index.trial.merging import added_sides

    name, version = _parsed(wanted)
    if version is None:
        entry = next((entry for entry in report.state.entries if entry.strategy == name), None)
        version = entry.stable.version if entry is not None and entry.stable is not None else 0
    found = [
        score
        for score in scores
        if (score.strategy, score.version) == (name, version) and score.side is not None
    ]
    if not found:
        known = ", ".join(sorted({f"{each.strategy}/{each.version}" for each in scores})) or "none"
        raise Failure(f"no router has served a request by {name}/{version} (there are: {known})")
    sides = added_sides(score.side for score in found if score.side is not None)
    return sides, max(score.seconds for score in found)


def _parsed(text: str) -> tuple[str, int | None]:
    name, slash, version = text.partition("/")
    if slash and not version.isdecimal():
        raise WrongFlag(
            f"{text}: NAME or NAME/VERSION, the version as in show or history (0: the routers' own)"
        )
    return name, int(version) if slash else None
