"""How soon a canary is seen to be slower, and what it costs a router to know it.

    python benchmarks/canary.py [--runs 200] [--requests 800] [--plot docs/img]

Simulated comparisons (canary_traffic.py) of a canary that has half of the requests: after how many of both it
is called worse in TTFT, by how much slower it is, with what is known of requests and without; looked at after
every ``LOOK``th. Cost: what one request adds in ``StrategyControl.ended``, in CPU time, without a canary and
with one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from canary_traffic import Comparison, Traffic

from microserve.protocol.messages.engine import Usage
from microserve.protocol.messages.router import Ended, Phases
from microserve.protocol.messages.strategy.control import ControlEntry, ControlState, StrategyVersion
from microserve.services.index.trial.comparison import NOT_YET
from microserve.services.index.trial.judging import judge
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import StrategyControl
from microserve.services.router.rollout.scoreboard import Scoreboard
from microserve.services.router.rollout.sums import timing_of
from microserve.services.router.rollout.trial import Trials
from microserve.services.router.strategies import BUILT_IN

LOOK = 4
LINES = {
    "30 % slower": Traffic(factor=1.3),
    "20 % slower": Traffic(factor=1.2),
    "10 % slower": Traffic(factor=1.1),
    "as fast": Traffic(),
    "20 % slower, nothing known": Traffic(factor=1.2, is_known=False),
}
NUM_TIMED = 20_000


def decided_after(traffic: Traffic, seed: int, count: int) -> int | None:
    """Requests of both until something is said of TTFT."""
    for number, (ours, theirs) in enumerate(Comparison(traffic, seed).steps(count), 1):
        if number % LOOK == 0 and judge(ours, theirs, traffic.share)["TTFT"].verdict != NOT_YET:
            return number
    return None


def ended(number: int) -> Ended:
    usage = Usage(prompt_tokens=500, cached_tokens=100, output_tokens=60)
    phases = Phases(total_s=1.0 + number % 7, decoded_s=0.8)
    return Ended(
        "length",
        usage,
        phases,
        "auto",
        [f"e{number % 8}"],
        strategy_version=1 + number % 2,
        share=("stable", "canary")[number % 2],
    )


def cost_us(add: Callable[[float, Ended], object]) -> float:
    """CPU microseconds a request; the quickest of five."""
    ends = [ended(number) for number in range(64)]
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for number in range(NUM_TIMED):
            add(1000.0 + number, ends[number % 64])
        best = min(best, time.process_time() - began)
    return 1e6 * best / NUM_TIMED


def costs() -> dict[str, float]:
    board, trials = Scoreboard(), Trials()
    clock = [1000.0]
    control = StrategyControl(StrategyBook(BUILT_IN), lambda: clock[0])
    versions = [StrategyVersion(number, "", "", {}) for number in (1, 2)]
    control.apply(ControlState(2, [ControlEntry("auto", *versions, 0.5)]))
    trials.take(control._book.published, 0.0)

    def whole(now: float, end: Ended) -> None:
        clock[0] = now
        control.ended(end, False, False, 400)

    return {
        "scoreboard": cost_us(lambda now, end: board.add(now, end, False, timing_of(end, False), 400)),
        "a canary's trial": cost_us(lambda now, end: trials.add(now, end, False, timing_of(end, False), 400)),
        "all that is done at an end, with a canary": cost_us(whole),
    }


def draw(found: dict[str, list[int | None]], count: int, directory: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from microserve.services.simulation.load.figures.plots import STYLE

    path = directory / "canary.svg"
    colours = ("#7a1f2b", "#d1495b", "#e8a0a8", "#1f5fa8", "#9a9a9a")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        panel = figure.subplots()
        for (name, numbers), colour in zip(found.items(), colours, strict=True):
            at = list(range(0, count + 1, LOOK))
            shares = [sum(n is not None and n <= each for n in numbers) / len(numbers) * 100 for each in at]
            style = "--" if "nothing" in name else "-"
            panel.plot(at, shares, style, color=colour, label=name, linewidth=1.5)
        panel.axhline(5, color="#bbbbbb", linewidth=0.6)
        panel.set_xlabel("requests of both versions")
        panel.set_ylabel("comparisons that have said so, %")
        panel.set_ylim(0, 101)
        panel.set_xlim(0, count)
        panel.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for what, cost in costs().items():
        print(f"{what}: {cost:.2f} us of CPU a request")
    found: dict[str, list[int | None]] = {}
    for name, traffic in LINES.items():
        numbers = [decided_after(traffic, seed, options.requests) for seed in range(options.runs)]
        found[name] = numbers
        said = sorted(each for each in numbers if each is not None)
        within = sum(each <= 400 for each in said)
        half = said[options.runs // 2] if len(said) > options.runs // 2 else None
        print(
            f"{name}: {within} of {options.runs} within 400 requests, {len(said)} within {options.requests}; "
            f"half of them within {half}"
        )
    if options.plot is not None:
        print(draw(found, options.requests, options.plot))


if __name__ == "__main__":
    main()
