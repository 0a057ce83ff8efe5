"""Traces: where a request stands in one (W3C ``traceparent``), and the spans that services make of it.

Owns the header's text, the names of attributes, and the one way out (OpenTelemetry's SDK, an extra, where
``OTEL_EXPORTER_OTLP_ENDPOINT`` is set). Services say of what spans are to be made when a request has ended
there, of durations that they keep anyway; nothing of it stands on a token's path, and no prompt and no answer
is in it. Must not know what a gateway, a router or an engine does. Start at traceparent.py, then output.py.
"""
