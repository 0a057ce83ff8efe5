"""``microserve profile`` as it is typed: a library, a run that goes on, and errors with their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.kvcache.codec.library import load
from microserve.services.command.main import main
from microserve.services.command.profile.measure.quality import Judge
from tests.support.engine.model.tiny_model import make_tiny_model

WORDS = ["the", "a", "sea", "model", "token", "of", "in", "and", "sun", "tree"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": " ".join(WORDS[(turn * step) % 10] for step in range(20))} for turn in range(1, 13)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def profile(model: Path, prompts: Path, *words: str) -> Result:
    given = ("--model", str(model), "--file", str(prompts), "--set", "model.dtype=float32")
    return CliRunner().invoke(
        main, ["profile", *given, "--space", "small", "--repeats", "2", "--next", "4", *words]
    )


def test_a_library_of_what_is_worth_it(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "library.json"
    done = profile(model, prompts, "--out", str(out), "--floor", "0.2", "--exhaustive")
    assert done.exit_code == 0, done.output
    library = load(str(out))
    assert library.geometry.num_layers == 2 and library.dtype == "float32"
    assert "12 prompts" in library.workload and "seed 0" in library.made and "numpy" in library.made
    assert library.head_scores is not None and len(library.head_scores) == 2
    names = [entry.profile.name for entry in library.entries]
    assert {"lossless-zstd", "lossless-rans"} <= set(names)
    lossy = [entry for entry in library.entries if entry.profile.is_lossy]
    assert lossy and all(entry.ratio > 1 and entry.quality.logit_kl > 0 for entry in lossy)
    assert all(entry.encode.seconds(1 << 20) > 0 for entry in library.entries)
    ratios = [entry.ratio for entry in library.entries]
    assert ratios == sorted(ratios, reverse=True)
    assert "9 of 9 ways measured" in done.output
    assert done.stdout.splitlines()[0].split()[:3] == ["profile", "ratio", "score"]


def test_broken_off_it_goes_on_where_it_was(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "library.json"
    judged = Judge.seen
    calls = 0

    def broken_off(self: Judge, received: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return judged(self, received)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "seen", broken_off)
    flags = ("--out", str(out), "--floor", "0.2", "--random", "--most", "4")
    done = profile(model, prompts, *flags)
    assert done.exit_code == 130
    assert "the same command goes on" in done.output
    assert not out.exists()
    done = profile(model, prompts, *flags)
    assert done.exit_code == 0, done.output
    searched = [
        line for line in Path(f"{out}.measured").read_text().splitlines() if '"kind":"search"' in line
    ]
    assert len(searched) == 4 and "4 of 9 ways measured" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--exhaustive", "--random"), "--exhaustive or --random"),
        (("--longest", "3"), "0 of 12 prompts are of"),
        (("--set", "model.dtype=float8"), "model.dtype"),
        (("--floor", "2"), "--floor"),
    ],
)
def test_what_is_wrong_is_named(
    model: Path, prompts: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    done = profile(model, prompts, "--out", str(tmp_path / "out.json"), *words)
    assert done.exit_code == 2
    assert message in done.output


def test_a_file_that_is_no_workload(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "colour": 3}\n')
    done = profile(model, file, "--out", str(tmp_path / "out.json"))
    assert done.exit_code == 2
    assert f"{file}, line 1" in done.output and "colour" in done.output
