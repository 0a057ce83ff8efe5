"""What a metric is: tables of families, values that are plain numbers, their text, and the port for it.

    table/        name, kind, unit, labels and sentence of every family, a file a service; docs/metrics.md is
                  made of it
    histogram.py  numbers that a service's own thread adds to; as of one moment: readings.py
    text.py       Prometheus' text of readings, under our names or under vLLM's
    port.py       an HTTP server in a thread of its own: GET /metrics, /metrics?names=vllm, /health

Must not know what a service is or does: services hand in what they have read. Nothing here is on a token's
path but additions to numbers. Start with family.py, then table/.
"""
