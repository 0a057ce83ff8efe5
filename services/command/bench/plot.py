"""A picture of a run: how late first tokens were, gaps, throughput and company over time. Needs
matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from microserve.services.command.bench.report import Figures, tokens_by_second, ttft_s
from microserve.services.command.bench.task import Outcome


def draw(path: str, figures: Figures, outcomes: Sequence[Outcome], began_s: float, title: str) -> None:
    """Writes ``path``; its ending says in which format. Raises ``OSError`` or ``ValueError``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(title)
    (over_time, shares), (gaps, throughput) = picture.subplots(2, 2)
    good = [each for each in outcomes if not each.fault]
    bad = [each for each in outcomes if each.fault]
    over_time.plot([each.sent_s - began_s for each in good], [ttft_s(each) * 1000 for each in good], ".")
    for each in bad:
        over_time.axvline(each.sent_s - began_s, color="red", alpha=0.3)
    over_time.set(xlabel="sent at (s)", ylabel="TTFT (ms); red: failed", ylim=(0, None))
    for name in ("ttft", "e2el"):
        _shares(shares, figures.spreads[name].values_ms, name.upper())
    for name in ("tpot", "itl"):
        _shares(gaps, figures.spreads[name].values_ms, name.upper())
    seconds = tokens_by_second(good, began_s)
    throughput.stairs(seconds, range(len(seconds) + 1), fill=True)
    throughput.set(xlabel="s", ylabel="output tokens/s", ylim=(0, None))
    picture.savefig(path)


def _shares(axes: object, values_ms: Sequence[float], label: str) -> None:
    """The part of the values that is at most so much."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.plot(values_ms, [(number + 1) / len(values_ms) for number in range(len(values_ms))], label=label)
    axes.set(xlabel="ms", ylabel="share of all", ylim=(0, 1))
    axes.legend()
