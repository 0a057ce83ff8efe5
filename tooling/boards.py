"""Boards, alerts and scrapes under deploy/, and the alerts' part of docs/operations.md: of tooling/board.

python tooling/boards.py           print what is not as the tables say; exit code 1 if something is not
python tooling/boards.py --write   make it so
python tooling/boards.py --into DIR [--for 1s]     all files below DIR; --for: alerts fire after so long
python tooling/boards.py --list    every expression of every panel as JSON, with what it may wait for
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from board import grafana, prometheus
from board.alerts import ALERTS
from board.disaggregation import DISAGGREGATION
from board.overview import OVERVIEW
from board.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/operations.md"
BOARDS = {"overview": OVERVIEW, "disaggregation": DISAGGREGATION, "strategies": STRATEGIES}


def files(lasts: str = "") -> dict[str, str]:
    """Text by path from the root."""
    made = {f"deploy/grafana/{name}.json": grafana.text_of(board) for name, board in BOARDS.items()}
    made["deploy/prometheus/alerts.yml"] = prometheus.alerts_text(ALERTS, lasts)
    made["deploy/prometheus/scrape.yml"] = prometheus.SCRAPE
    return made


def page(text: str) -> str:
    """The page with its generated part as the table says."""
    begin, end = "<!-- alerts -->\n", "<!-- end of alerts -->"
    made = f"{begin}\n{prometheus.runbook_text(ALERTS)}{end}"
    return re.sub(f"{begin}.*?{end}", lambda _: made, text, flags=re.DOTALL)


def queries() -> Iterator[dict[str, str]]:
    for name, board in BOARDS.items():
        for row in board.rows:
            for panel in row.panels:
                for query in panel.queries:
                    yield {
                        "board": name,
                        "panel": f"{row.title}: {panel.title}",
                        "expression": query.expression,
                        "empty_until": query.empty_until,
                    }


def write(made: dict[str, str], root: Path) -> None:
    for path, text in made.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--for", dest="lasts", default="")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        print(json.dumps([*queries()], indent=2))
        return 0
    if asked.into:
        write(files(asked.lasts), asked.into)
        return 0
    operations = (ROOT / PAGE).read_text(encoding="utf-8")
    made = {**files(), PAGE: page(operations)}
    if asked.write:
        write(made, ROOT)
        return 0
    stale = [
        path for path, text in made.items() if not (ROOT / path).exists() or text != (ROOT / path).read_text()
    ]
    for path in stale:
        print(f"{path} is not as the tables say: python tooling/boards.py --write")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
