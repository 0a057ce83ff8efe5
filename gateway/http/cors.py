"""Cross-origin requests of browsers: which origins may ask, and what their pages may read of an answer.

Owns the headers of CORS; Starlette's middleware does the rest, around the application and its streams.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from microserve.protocol.errors import ConfigError

READABLE = (
    *("x-request-id", "retry-after", "x-microserve-strategy", "x-microserve-strategy-version"),
    *(
        "x-microserve-engines",
        "x-microserve-exact",
        "x-microserve-warning",
        "x-ratelimit-limit-requests",
        "x-ratelimit-limit-tokens",
    ),
    *("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"),
    *("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"),
)
"""Headers of an answer that a page of another origin may read."""
PREFLIGHT_AGE_S = 600

_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+")


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app``, open to pages of ``origins`` (``*``: all); itself without any.

    Raises :class:`ConfigError` (field ``gateway.cors_origins``) for what is no origin.
    """
    for origin in origins:
        if _ORIGIN.fullmatch(origin) is None:
            raise ConfigError(
                f"gateway.cors_origins: {origin!r} is not '*' or scheme://host[:port] without a path",
                field="gateway.cors_origins",
            )
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=READABLE,
        max_age=PREFLIGHT_AGE_S,
    )
