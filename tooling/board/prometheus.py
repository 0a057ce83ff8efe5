"""Alerts and scrapes as Prometheus' YAML, and the alerts' part of docs/operations.md. Written as text, for
comments have to be in it; strings are JSON's, which is YAML."""

from __future__ import annotations

import json
from collections.abc import Iterable

from board.alert import Alert

RUNBOOK = "docs/operations.md"
HEAD = "# Made of tooling/board by `python tooling/boards.py --write`; a test holds it.\n"


def alerts_text(alerts: Iterable[Alert], lasts: str = "") -> str:
    """``lasts``: in the place of each alert's own."""
    parts = [f"{HEAD}groups:\n  - name: microserve\n    rules:\n"]
    for alert in alerts:
        expression = "".join(f"          {line}\n" for line in alert.expression.splitlines())
        parts.append(
            f"      - alert: {alert.name}\n"
            f"        expr: |-\n{expression}"
            f"        for: {lasts or alert.lasts}\n"
            f"        labels: {{ severity: {alert.severity.value} }}\n"
            "        annotations:\n"
            f"          summary: {_string(alert.summary)}\n"
            f"          description: {_string(alert.means)}\n"
            f"          runbook: {_string(f'{RUNBOOK}#{alert.anchor}')}\n"
        )
    return "".join(parts)


def runbook_text(alerts: Iterable[Alert]) -> str:
    """A heading for each alert, which its annotation `runbook` leads to."""
    parts = []
    for alert in alerts:
        steps = "".join(f"{number}. {step}\n" for number, step in enumerate(alert.then, 1))
        head = f"#### {alert.name}\n\n*{alert.severity.value}, after {alert.lasts}.* {alert.means}\n\n"
        parts.append(f"{head}{steps}\n")
    return "".join(parts)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


SCRAPE = f"""{HEAD}#
#     prometheus --config.file=deploy/prometheus/scrape.yml --storage.tsdb.path=/tmp/prometheus
#
# in a checkout in which `microserve up` runs. On servers: copy this folder, and take the targets at the end.
# Every target has the labels `service` (index, router, engine or gateway) and `id`, which boards and alerts
# name services by, and `job`, which stands for the mesh: another mesh is two more jobs with another one.
global:
  scrape_interval: 15s
  evaluation_interval: 15s
rule_files: ["alerts.yml"]
scrape_configs:
  # Engines, routers, the index: a port of their own each, on loopback, without a key.
  - job_name: microserve
    file_sd_configs: [{{ files: ["../../.microserve/targets.json"], refresh_interval: 15s }}]
    relabel_configs:
      - {{ source_labels: [service], regex: gateway, action: drop }}

  # Gateways are apart, for their key goes to nobody else.
  - job_name: microserve-gateway
    file_sd_configs: [{{ files: ["../../.microserve/targets.json"], refresh_interval: 15s }}]
    relabel_configs:
      - {{ source_labels: [service], regex: gateway, action: keep }}
      - {{ target_label: job, replacement: microserve }}
    # Where gateways have API keys: one with `operator = true`, alone in a file that only Prometheus reads
    # (and take `#key# ` away).
    #key# authorization: {{ credentials_file: microserve.key }}

  # On servers targets are listed: these two jobs in the place of the two above (take `#static# ` away), with
  # the ports that you have set (`engine.metrics_port` and so on); `metrics.host` must be an address that
  # Prometheus reaches. A gateway with TLS: `scheme: https` in its job.
  #static# - job_name: microserve-servers
  #static#   relabel_configs: [{{ target_label: job, replacement: microserve }}]
  #static#   static_configs:
  #static#     - {{ targets: ["10.77.0.1:7199"], labels: {{ service: index, id: index }} }}
  #static#     - {{ targets: ["10.77.0.1:7198"], labels: {{ service: router, id: router }} }}
  #static#     - {{ targets: ["10.77.0.1:7200"], labels: {{ service: engine, id: e0 }} }}
  #static#     - {{ targets: ["10.77.0.2:7200"], labels: {{ service: engine, id: e1 }} }}
  #static# - job_name: microserve-servers-gateway
  #static#   relabel_configs: [{{ target_label: job, replacement: microserve }}]
  #static#   authorization: {{ credentials_file: microserve.key }}
  #static#   static_configs:
  #static#     - {{ targets: ["10.77.0.1:8000"], labels: {{ service: gateway, id: gateway }} }}
"""
