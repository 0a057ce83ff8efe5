"""Strategies against load: what ``microserve simulate`` runs, with a task as JSON for its only argument.

A process of its own: services do not know their simulation. Owns the points of a task, the processes that
work on them, and what is printed. Exit codes: 0 done, 1 a simulated mesh broke, 2 the task is wrong.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec

from microserve.protocol.errors import ConfigError, MeshError
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.router.authoring.definition import Strategy, load_file
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.source.module import Run
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.load.figures.result import PointResult, middle
from microserve.services.simulation.load.figures.rows import RowFile
from microserve.services.simulation.load.figures.table import HEADER, lines_of
from microserve.services.simulation.load.point import TOKEN_PARAMETERS, Judged, judged_point
from microserve.services.simulation.load.progress import Runs, terminal
from microserve.services.simulation.load.task import Point, SimulateTask
from microserve.services.simulation.load.timing import Profile, profile_of
from microserve.services.simulation.load.trace import HASH_TOKENS, read_trace
from microserve.services.simulation.load.trouble import trouble_of

MIN_TOKENS_A_BLOCK = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """The task is the only argument, as JSON."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    try:
        task = msgspec.json.decode(text, type=SimulateTask)
        points = points_of(task)
        if task.plot:
            # Whether it is there shows now, and not after all points.
            from microserve.services.simulation.load.figures.plots import draw

        results = _run(points, task)
        if task.plot:
            for path in draw(results, Path(task.plot)):
                print(path)
    except ConfigError as error:
        print(f"Error: {error.detail}", file=sys.stderr)
        return 2
    except MeshError as error:
        print(f"Error: {error.detail}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("Error: plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def _run(points: Sequence[Point], task: SimulateTask) -> list[PointResult]:
    """Results in the order of the points, told as they come; of several seeds, the medians."""
    first = points[0]
    print(
        f"{len(first.requests)} requests, {first.num_engines} engines {first.profile.name} "
        f"({first.profile.source}), labels {' '.join(task.labels) or 'none'}, "
        f"1 simulated token for {task.scale}",
        HEADER,
        sep="\n",
    )
    results: list[PointResult] = []
    of_seeds: list[PointResult] = []
    with (
        open(task.out, "wb") if task.out else nullcontext() as out,
        RowFile(task.rows) if task.rows else nullcontext() as rows,
        closing(_judged(points, task.jobs)) as arriving,
    ):
        for judged in arriving:
            if judged.note:
                print(f"Note: {judged.note}", file=sys.stderr)
            if out is not None:
                out.write(msgspec.json.encode(judged.result) + b"\n")
            if rows is not None:
                rows.write(judged.rows)
            of_seeds.append(judged.result)
            if len(of_seeds) == task.seeds:
                print(*lines_of(of_seeds, detail=task.detail), sep="\n", flush=True)
                results.append(middle(of_seeds))
                of_seeds = []
    return results


def _judged(points: Sequence[Point], jobs: int) -> Generator[Judged, None, None]:
    if jobs == 1:
        yield from (judged_point(point, terminal()) for point in points)
        return
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(points))) as pool, Runs(len(points)) as runs:
        for judged in pool.imap(judged_point, points):
            yield judged
            runs.add_one()


# --- from a task to its points ---------------------------------------------------------------------


def points_of(task: SimulateTask) -> list[Point]:
    """Every strategy under every load by every seed. Raises :class:`ConfigError` that names what is wrong."""
    _check(task)
    trouble = trouble_of(task.kill, task.slow, task.lost, task.late, task.num_engines)
    requests = read_trace(task.trace, task.num_requests, task.longest)
    profile = profile_of(task.profile)
    if task.link_gbps:
        profile = replace(profile, link_nbytes_per_s=task.link_gbps * 1e9 / 8)
    _check_fit(profile, max(each.num_tokens for each in requests))
    with Overseer(RouterSettings().strategy_budget_s) as overseer:
        found = _found(task.strategies, overseer.call)
    unused = set(task.parameters) - {strategy.name for strategy, _ in found}
    if unused:
        raise ConfigError(f"parameters of {min(unused)}, which is not simulated", field="set")
    points = []
    seeds = range(task.seed, task.seed + task.seeds)
    for (strategy, file), load, seed in product(found, task.loads, seeds):
        parameters = _parameters(strategy, task)
        points.append(
            Point(
                strategy.name,
                file,
                load,
                requests,
                profile,
                task.num_engines,
                tuple((label,) if label else () for label in task.labels),
                task.scale,
                seed,
                {strategy.name: parameters} if parameters else {},
                task.slo_ttft_s,
                task.slo_tpot_s,
                trouble,
                bool(task.rows),
                task.max_wall_s,
            )
        )
    return points


def _check(task: SimulateTask) -> None:
    if not task.loads or min(task.loads) <= 0:
        raise ConfigError("a load is requests a second, above 0", field="load")
    counts = {"engines": task.num_engines, "jobs": task.jobs, "scale": task.scale, "seeds": task.seeds}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, at least 1", field=name)
    if not task.max_wall_s > 0:
        raise ConfigError(f"max_wall is {task.max_wall_s:g} s, above 0", field="max_wall")
    for name, number in (("link_gbps", task.link_gbps), ("requests", task.num_requests)):
        if number < 0:
            raise ConfigError(f"{name} is {number:g}, 0 or more", field=name)
    if HASH_TOKENS % task.scale or HASH_TOKENS // task.scale < MIN_TOKENS_A_BLOCK:
        most = HASH_TOKENS // MIN_TOKENS_A_BLOCK
        raise ConfigError(f"scale is {task.scale}, a power of two up to {most}", field="scale")
    if task.labels and len(task.labels) != task.num_engines:
        raise ConfigError(f"{len(task.labels)} labels for {task.num_engines} engines", field="labels")


def _check_fit(profile: Profile, num_tokens: int) -> None:
    if num_tokens > profile.num_kv_tokens:
        raise ConfigError(
            f"the trace's longest request has {num_tokens} tokens, an engine of profile {profile.name} "
            f"holds {profile.num_kv_tokens}",
            field="profile",
        )


def _found(names: Sequence[str], run: Run) -> list[tuple[Strategy, str]]:
    """Strategies, each with the file that it is from, which ``run`` runs."""
    built_in = {strategy.name: strategy for strategy in BUILT_IN}
    if not names:
        return [(strategy, "") for strategy in BUILT_IN]
    found: list[tuple[Strategy, str]] = []
    for name in names:
        if name in built_in:
            found.append((built_in[name], ""))
        elif name.endswith(".py"):
            found += [(_own(strategy, name, built_in), name) for strategy in load_file(name, run)]
        else:
            known = ", ".join(built_in)
            raise ConfigError(f"no strategy {name!r}, nor a .py file (there are: {known})", field="strategy")
    return found


def _own(strategy: Strategy, file: str, built_in: Mapping[str, Strategy]) -> Strategy:
    """A router knows each name once."""
    if strategy.name in built_in:
        raise ConfigError(
            f"{file}: {strategy.name} is the name of a built-in strategy: give it another", field="strategy"
        )
    return strategy


def _parameters(strategy: Strategy, task: SimulateTask) -> dict[str, bool | int | float | str]:
    """What differs from the defaults; token counts of built-in strategies become simulated ones."""
    bound = strategy.bind(task.parameters.get(strategy.name, {}))
    own = {name: bound.values[name] for name in task.parameters.get(strategy.name, {})}
    for name in TOKEN_PARAMETERS.get(strategy.name, ()):
        own[name] = max(1, bound.values[name] // task.scale)
    return own


if __name__ == "__main__":
    sys.exit(main())
