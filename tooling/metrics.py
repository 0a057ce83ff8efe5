"""docs/metrics.md, made of the tables of metrics (protocol/metrics/table/).

python tooling/metrics.py           print whether the page is as the tables say; exit code 1 if it is not
python tooling/metrics.py --write   make it so
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from microserve.protocol.metrics.family import Family, Kind
from microserve.protocol.metrics.table.common import COMMON
from microserve.protocol.metrics.table.engine import ENGINE
from microserve.protocol.metrics.table.gateway import GATEWAY
from microserve.protocol.metrics.table.index import INDEX
from microserve.protocol.metrics.table.router import ROUTER

PAGE = Path(__file__).resolve().parents[1] / "docs/metrics.md"
HEAD = """# Metrics

Made of the tables in `protocol/metrics/table/` by `python tooling/metrics.py --write`; a test holds it.

Each service has its metrics at a port of its own, in Prometheus' text format: `engine.metrics_port`,
`router.metrics_port`, `index.metrics_port`, at `metrics.host` (loopback). The gateway has them at its own
port, behind an operator's key where there are keys. `microserve up` takes free ports where none are set
(`mesh.metrics`), shows them in `ps --json`, and writes all of them into `targets.json` of the mesh's
directory, with labels `service` and `id`:

    scrape_configs:
      - job_name: microserve
        file_sd_configs: [{ files: [".microserve/targets.json"] }]

`GET /metrics` gives these names. `GET /metrics?names=vllm` gives vLLM's instead where it has the same (last
column), for boards, autoscalers and schedulers that know those. Scrape engines **or** the gateway by vLLM's
names, not both into one sum: what an engine counts, the gateway counts too. `GET /health` is 200 as long as
the service's loop answers. A port that is taken is told in the log (`metrics.unserved`), and the service
serves on. `process_*` are prometheus-client's, of each process.

Rates are for who reads: hits are `rate(hits) / rate(queries)`, and nothing here is a mean over all time.
Times are of one process's monotonic clock. No label is a request, a client or a prompt; an API key's name is
one at the gateway.
"""
CHAPTERS: tuple[tuple[str, str, Iterable[Family]], ...] = (
    ("Gateway", "Labels are as written.", GATEWAY),
    ("Engine", "All have `model_name` and `engine`.", ENGINE),
    ("Router", "All have `router`.", ROUTER),
    ("Index", "Labels are as written.", INDEX),
    ("Every service", "Beside its own, with its own common labels.", COMMON),
)

COLUMNS = "| name | kind | unit | labels | is | vLLM's |\n|---|---|---|---|---|---|\n"


def page() -> str:
    parts = [HEAD]
    for title, sentence, families in CHAPTERS:
        rows = "".join(_row(family) for family in families)
        parts.append(f"\n## {title}\n\n{sentence}\n\n{COLUMNS}{rows}")
    return "".join(parts)


def _row(family: Family) -> str:
    total = "_total" if family.kind is Kind.COUNTER else ""
    labels = ", ".join(f"`{label}`" for label in family.labels)
    theirs = ", ".join(f"`{name}{total}`" for name in family.vllm)
    return (
        f"| `{family.name}{total}` | {family.kind} | {family.unit} | {labels} | {family.text} | {theirs} |\n"
    )


def main(arguments: list[str]) -> int:
    made = page()
    if "--write" in arguments:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or made != PAGE.read_text(encoding="utf-8"):
        print("docs/metrics.md is not as the tables say: python tooling/metrics.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
