"""A run from prompts to a library.

    calibration prompts   scores of heads
    search prompts        ratio of every candidate, then quality of those that the search asks for
    held-out prompts      quality of those that stand on the front, with their own coders; their costs

Owns that order and what is on the front: fidelity, ratio and seconds, with the least fidelity asked for. The
search goes by fidelity, which orders profiles by far fewer prompts than right answers would; how many answers
stay right is said of what it finds. The model is the one that an engine would load by the same settings,
computed by transformers' modules.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import torch

from microserve.kvcache.codec.library import Cost, Library, Measured, Quality
from microserve.kvcache.codec.profile import LOSSLESS, Profile
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.settings.settings import Settings
from microserve.services.command.profile.journal import Journal
from microserve.services.command.profile.measure.quality import Judge
from microserve.services.command.profile.measure.replay import Replay
from microserve.services.command.profile.measure.trip import CLOCK, Bytes, Payloads
from microserve.services.command.profile.search.baseline import InOrder, by_lot
from microserve.services.command.profile.search.bayes import Bayes, Options
from microserve.services.command.profile.search.candidate import Search, candidates
from microserve.services.command.profile.search.front import pareto
from microserve.services.command.profile.space import CODERS, SMALLEST, parameters, ways, with_coder
from microserve.services.command.profile.task import EXHAUSTIVE, LOT, Task
from microserve.services.command.profile.workload import Prompt, Workload, read_workload
from microserve.services.engine.model.model import load_model

RATIO_NBYTES = 24 << 20
"""Raw bytes of which every candidate's ratio is measured."""
SAME_SPEED = 0.1
"""Part by which seconds must differ for one to count as less: what clocks of busy machines cannot tell."""
MAX_POOL_TOKENS = 8192
"""Computed at a time; 1 GiB of KV of an 8B model."""
VERSIONS = ("microserve", "numpy", "torch", "transformers", "scikit-learn", "zstandard")

Told = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Found:
    library: Library
    num_measured: int
    num_candidates: int


def profile_model(settings: Settings, task: Task, told: Told) -> Found:
    """Raises :class:`ConfigError`. What was measured is in ``task.out`` + ``.measured`` at any time."""
    told("Loading the model", None)
    torch.set_num_threads(settings.engine.threads)
    block_size = settings.kvcache.block_size
    model = load_model(settings.model.path, dtype=settings.model.dtype, device=settings.engine.device)
    workload = read_workload(
        task.file,
        settings.model.path,
        as_chat=task.as_chat,
        min_tokens=block_size + 1,
        max_tokens=min(task.longest, model.spec.max_model_len - task.num_next),
        num_prompts=task.num_prompts,
        seed=task.seed,
    )
    longest = max(len(p.token_ids) + len(p.answer) for p in _all(workload))
    needed = 2 * (longest + task.num_next + 2 * block_size)
    replay = Replay(model, block_size, max(MAX_POOL_TOKENS, needed))
    geometry = Geometry(
        dtype=model.spec.dtype,
        order="rows",
        block_size=block_size,
        num_layers=model.spec.num_layers,
        num_kv_heads=model.spec.num_kv_heads,
        head_dim=model.spec.head_dim,
        rope=model.spec.rope,
    )
    run = msgspec.json.encode(
        [
            msgspec.structs.replace(task, out="", file="", method="", most=0, floor=0.0),
            workload.name,
            model.spec.revision,
            geometry,
            settings.engine.max_num_batched_tokens,
        ]
    ).decode()
    with Journal(Path(task.out + ".measured"), run) as journal:
        return _Run(settings, task, told, replay, workload, geometry, journal).found()


def _all(workload: Workload) -> list[Prompt]:
    return workload.calibration + workload.search + workload.held_out


class _Run:
    def __init__(
        self,
        settings: Settings,
        task: Task,
        told: Told,
        replay: Replay,
        workload: Workload,
        geometry: Geometry,
        journal: Journal,
    ) -> None:
        self._settings, self._task, self._told = settings, task, told
        self._replay, self._workload, self._journal = replay, workload, journal
        self._judges: dict[str, Judge] = {}
        self._sample: list[Bytes] = []
        scores = journal.known("heads", "all", list[list[float]], self._score_heads)
        self._scores = scores
        chunk = settings.engine.max_num_batched_tokens // geometry.block_size * geometry.block_size
        self._chunk_tokens = max(geometry.block_size, chunk)
        self._geometry = geometry
        self._payloads = Payloads(geometry, np.array(scores, np.float32), self._chunk_tokens)

    def found(self) -> Found:
        all_ways = ways(self._task.space)
        ratios = []
        for number, way in enumerate(all_ways):
            ratios.append(self._ratio(with_coder(way, SMALLEST)))
            self._told(f"Ratio of {len(all_ways)} candidates", (number + 1) / len(all_ways))
        search = self._search(all_ways, ratios)
        while (candidate := search.ask()) is not None:
            done = len(search.points)
            self._told(f"Quality: {done} measured, {all_ways[candidate.index].name}", self._part(search))
            search.tell(candidate, fidelity(self._searched(all_ways[candidate.index])))
        scored = [
            (all_ways[point.candidate.index], point.score)
            for point in search.points
            if point.score >= self._task.floor
        ]
        front = self._front(scored)
        self._judges.pop("search", None)  # its memory, for the other one
        entries = []
        for number, profile in enumerate(front):
            self._told(f"Held-out prompts: {profile.name}", number / len(front))
            entries.append(self._measured(profile))
        entries.sort(key=lambda entry: -entry.ratio)
        return Found(self._library(entries), len(search.points), len(all_ways))

    # --- parts of it ---------------------------------------------------------------------------------

    def _score_heads(self) -> list[list[float]]:
        prompts, found = self._workload.calibration, []
        for number, prompt in enumerate(prompts):
            self._told("Scores of heads", number / len(prompts))
            found.append(self._replay.far_masses(prompt.token_ids, self._task.window))
        rows: list[list[float]] = np.mean(found, axis=0).round(6).tolist()
        return rows

    def _search(self, all_ways: Sequence[Profile], ratios: Sequence[float]) -> Search:
        task = self._task
        every = candidates([parameters(way) for way in all_ways], ratios)
        if task.method == EXHAUSTIVE:
            return InOrder(every)
        if task.method == LOT:
            return by_lot(every, task.most, task.seed)
        return Bayes(every, Options(floor=task.floor, most=task.most), task.seed)

    def _part(self, search: Search) -> float:
        of = len(ways(self._task.space)) if self._task.method == EXHAUSTIVE else self._task.most
        return len(search.points) / of

    def _judge(self, name: str) -> Judge:
        if name not in self._judges:
            prompts = self._workload.search if name == "search" else self._workload.held_out

            def told(done: int) -> None:
                self._told(f"Computing {len(prompts)} {name} prompts", done / len(prompts))

            self._judges[name] = Judge(self._replay, prompts, self._task.num_next, told)
        return self._judges[name]

    def _quality(self, name: str, profile: Profile) -> Quality:
        judge = self._judge(name)
        received = [self._payloads.there_and_back(profile, kv.rows)[0] for kv in judge.kvs]
        return judge.quality(judge.seen(received))

    def _searched(self, way: Profile) -> Quality:
        return self._journal.known("search", way.name, Quality, lambda: self._quality("search", way))

    def _ratio(self, profile: Profile) -> float:
        return self._journal.known(
            "ratio", profile.name, float, lambda: self._payloads.ratio(profile, self._rows())
        )

    def _rows(self) -> list[Bytes]:
        """KV of as many prompts of the search as ratios are measured of."""
        if not self._sample:
            nbytes = 0
            for prompt in self._workload.search:
                self._sample.append(self._replay.prefill(prompt.token_ids).rows)
                nbytes += self._sample[-1].nbytes
                if nbytes > RATIO_NBYTES:
                    break
        return self._sample

    def _costs(self, profile: Profile) -> tuple[Cost, Cost]:
        def measure() -> tuple[Cost, Cost]:
            rows = np.concatenate(self._rows(), axis=2)
            most = min(self._chunk_tokens, rows.shape[2])
            sizes = sorted({max(1, most // part) for part in (8, 4, 2, 1)})
            return self._payloads.costs(profile, rows, sizes, self._task.repeats, CLOCK)

        return self._journal.known("costs", profile.name, tuple[Cost, Cost], measure)

    def _front(self, scored: Sequence[tuple[Profile, float]]) -> list[Profile]:
        """What no other one is better than, by fidelity, ratio and seconds; and what loses nothing."""
        self._told("Costs", None)
        points = [(profile, 1.0) for profile in LOSSLESS]
        points += [(with_coder(way, coder), score) for way, score in scored for coder in CODERS]
        values = []
        for number, (profile, score) in enumerate(points):
            self._told(f"Costs of {len(points)} profiles", number / len(points))
            encode, decode = self._costs(profile)
            nbytes = 2 * self._chunk_tokens * self._rows()[0].shape[3]
            seconds = encode.seconds(nbytes) + decode.seconds(nbytes)
            speed = float(np.round(-np.log(seconds) / np.log1p(SAME_SPEED)))
            values.append((score, self._ratio(profile), speed))
        kept = set(pareto(values)) | set(range(len(LOSSLESS)))
        return [points[index][0] for index in sorted(kept)]

    def _measured(self, profile: Profile) -> Measured:
        encode, decode = self._costs(profile)
        quality = Quality()
        if profile.is_lossy:
            way = with_coder(profile, "none")  # what is lost is the same by every coder
            quality = self._journal.known(
                "held-out", way.name, Quality, lambda: self._quality("held-out", way)
            )
        return Measured(profile, self._ratio(profile), encode, decode, quality)

    def _library(self, entries: list[Measured]) -> Library:
        spec, workload = self._replay.spec, self._workload
        return Library(
            model=self._settings.model.name or spec.name,
            revision=spec.revision,
            dtype=spec.dtype,
            geometry=self._geometry,
            workload=f"{workload.name}, {len(workload.held_out)} held out of {len(_all(workload))} prompts",
            machine=machine(),
            made=_made(self._task),
            head_scores=self._scores,
            entries=entries,
        )


def fidelity(quality: Quality) -> float:
    """What is left, on (geometric) average, of the probability of a token that the model would have said."""
    return math.exp(-quality.logit_kl)


def machine() -> str:
    """Cores and processor of this machine, as it says itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} cores, {name or 'unknown processor'}"


def _made(task: Task) -> str:
    command = " ".join(["microserve", *sys.argv[1:]])
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return f"{datetime.now(UTC).date()}: {command} (seed {task.seed}; {versions})"
