"""Runs that are kept, and the tables made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results import record, tables

RESULTS = Path(record.__file__).parent
STEP = {
    "dtype": "bfloat16",
    "threads": 2,
    "step": "decode 1 at 256",
    "native_ms": [10.0, 9.0, 12.0],
    "transformers_ms": [40.0, 36.0, 60.0],
    "speedup": [4.0, 3.0, 5.0],
    "tokens_per_s": 100.0,
    "memory_gb_s": [30.0, 20.0, 31.0],
    "share": 0.9,
    "share_of_best": 0.95,
}


def run(date: str, *, quick: bool = False, load: float = 2.0) -> dict[str, object]:
    figures = {"quick": quick, "rounds": 3, "rows": [STEP]}
    return {
        "date": date,
        "command": "python benchmarks/engine_step.py",
        "commit": "abc",
        "machine": "2 cores, AMD EPYC",
        "load": [1.0, load],
        "figures": figures,
    }


def test_a_run_is_one_line(tmp_path: Path) -> None:
    record.append(tmp_path, "name", run("2026-11-28"))
    record.append(tmp_path, "name", run("2026-11-29"))

    lines = (tmp_path / "name.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["date"] for line in lines] == ["2026-11-28", "2026-11-29"]


def test_figures_are_the_last_line_of_json_that_a_benchmark_prints() -> None:
    assert record.last_json('{"early": 1}\nwords\n{"rows": []}\nmore words\n') == {"rows": []}
    assert record.last_json("words\n") is None


def test_a_quick_run_is_shown_only_where_there_is_no_other() -> None:
    lines = [json.dumps(each) for each in (run("1"), run("2"), run("3", quick=True))]

    assert tables.last_run("\n".join(lines))["date"] == "2"  # type: ignore[index]
    assert tables.last_run(lines[2])["date"] == "3"  # type: ignore[index]
    assert tables.last_run("") is None


def test_a_section_replaces_what_stood_between_its_marks_and_nothing_else() -> None:
    page = "by hand\n<!-- engine_step -->\nold\n<!-- end of engine_step -->\nby hand too\n"

    made = tables.replaced(page, "engine_step", tables.section("engine_step", run("2026-11-29")))

    assert made.startswith("by hand\n<!-- engine_step -->\n`python benchmarks/engine_step.py`, 2026-11-29")
    assert made.endswith("<!-- end of engine_step -->\nby hand too\n")
    assert "old" not in made and "so busy" not in made
    assert "| bfloat16, 2 | decode 1 at 256 | 10 (9-12) | 40 (36-60) | 4 (3-5) | 100 | 30 (20-31) |" in made
    assert "| 90% (95%) |  |  |  |  | ≥ 80% |" in made
    with pytest.raises(ValueError, match="has no <!-- other"):
        tables.replaced(page, "other", "")


def test_wall_times_of_a_busy_machine_are_said_to_mean_nothing() -> None:
    assert "only what is in CPU time counts" in tables.section("engine_step", run("2026-11-29", load=4.1))


def test_the_page_shows_what_is_kept() -> None:
    """Every run that is kept can be drawn, and the page is not older than they are."""
    page = tables.PAGE.read_text(encoding="utf-8")
    for name in tables.SECTIONS:
        file = RESULTS / f"{name}.jsonl"
        kept = tables.last_run(file.read_text(encoding="utf-8")) if file.is_file() else None
        if kept is not None:
            assert tables.replaced(page, name, tables.section(name, kept)) == page
