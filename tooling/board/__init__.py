"""What stands on boards and in alerts: tables of panels and alerts, and the files that are made of them.

    promql.py     expressions over our own families: a name or a label that is in no table is an error here
    panel.py      what a panel, a row and a board are
    overview.py, disaggregation.py, strategies.py     the boards, panel by panel
    alert.py      what an alert is;  alerts.py: all of them, a row each
    grafana.py    boards as Grafana's JSON;  prometheus.py: alerts and scrapes as Prometheus' YAML, and the
                  alerts' part of docs/operations.md

Must not know what a service does: what there is to ask for is in protocol/metrics/table. It is run by
``tooling/boards.py``. Start with overview.py.
"""
