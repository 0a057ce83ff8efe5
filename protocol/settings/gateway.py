"""Settings of a gateway: every field with its default, its bounds and its sentence."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microserve.protocol.settings.bounds import Count, CountOrZero, Positive, PositiveOrZero, Section


class GatewaySettings(Section, frozen=True):
    id: str = ""
    """Default: made up at start."""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    workers: Annotated[int, Meta(gt=0, le=64)] = 1
    """Processes that share the port. ``max_streams`` and ``max_connections`` are of all of them together."""
    routers: list[str] = msgspec.field(default_factory=list)
    """Router addresses; default: ``router.address``."""
    router_keys: list[str] = msgspec.field(default_factory=list)
    """For each of them, NAME of NAME.key in ``bus.curve_dir``; default: ``router`` for all."""
    api_keys: list[str] = msgspec.field(default_factory=list)
    """The operator's own, without limits. Without any here or in ``api_keys_file``, none is needed."""
    api_keys_file: str = ""
    """TOML with named keys and their limits (``microserve key new``); read anew when it changes."""
    allow_no_keys: bool = False
    """Listen off loopback without API keys: everybody who can reach the address may use the mesh."""
    usage_path: str = ""
    """File (SQLite) of what each key has used; empty: in memory, daily budgets begin anew at a restart."""
    responses_path: str = ""
    """File (SQLite) of responses that ``/v1/responses`` keeps, with their input; gateways may share it.
    Empty: none is kept."""
    responses_mb: Count = 256
    """Of all that it keeps; beyond it, as beyond ``responses_count``, the oldest goes."""
    responses_count: Count = 10_000
    responses_days: Positive = 30.0
    """How long one is kept."""
    attributes: list[str] = msgspec.field(default_factory=lambda: ["user", "prompt_cache_key"])
    """What strategies may see of a request beside its prompt, tenant and priority: ``user``,
    ``prompt_cache_key``, ``safety_identifier``, ``service_tier``, ``metadata`` or ``metadata.KEY``,
    ``header.NAME``."""
    private_attributes: list[str] = msgspec.field(default_factory=lambda: ["user", "prompt_cache_key"])
    """Of these, those whose values stand in no log."""
    shared_prefix_cache: bool = False
    """All keys have one prefix cache: faster, and each can tell whether a prompt was asked before."""
    tls_cert: str = ""
    """PEM file of the certificate and its chain; with ``tls_key``: HTTPS."""
    tls_key: str = ""
    cors_origins: list[str] = msgspec.field(default_factory=list)
    """Whose pages may ask from a browser, e.g. ``https://chat.example.org``; ``*``: everybody's."""
    max_body_mb: Count = 32
    max_body_values: Count = 1_048_576
    """Values that one body may have, of all its lists and maps together."""
    max_body_depth: Count = 64
    """Lists and maps within each other."""
    parse_control_tokens: bool = False
    """What a message says in the form of a control token (``<|im_end|>``) is one; else it is text."""
    view_requests: CountOrZero = 20_000
    """Requests of the last quarter of an hour that ``/view`` and the page can show, at most, of all workers
    together; 0: no view, and the index is not asked."""
    template_cpu_s: Positive = 2.0
    """CPU time that the model's chat template may take for one conversation; beyond it: 400."""
    request_timeout_s: Positive = 600.0
    drain_s: PositiveOrZero = 9.0
    """For answers that run when the gateway is stopped; what is left then ends with an error."""
    generation_config: bool = True
    """Sampling that a request leaves open is as the model's ``generation_config.json`` says."""
    max_n: Count = 16
    max_streams: Count = 20_000
    max_connections: CountOrZero = 0
    """Open at a time; 0: as many as descriptors allow. The others wait until there is room."""
