"""Variables of a board, and the readers whose selectors are narrowed by them."""

from __future__ import annotations

from board.promql import Reader

SOURCE = "DS_PROMETHEUS"
"""The data source, as boards of the field call it."""
RATE_WINDOW = "$__rate_interval"
_NARROWED = {label: f'{label}=~"${label}"' for label in ("job", "model_name", "engine", "strategy")}

ALL = Reader(RATE_WINDOW, {label: _NARROWED[label] for label in ("job", "model_name", "engine")})
"""Of a board that has engines and models to choose from."""
BY_STRATEGY = Reader(RATE_WINDOW, {label: _NARROWED[label] for label in ("job", "strategy")})
"""Of one that has strategies."""
