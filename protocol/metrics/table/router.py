"""Families of a router. All have ``router``."""

from __future__ import annotations

from microserve.protocol.metrics.bounds import PHASE_BOUNDS
from microserve.protocol.metrics.family import counter, gauge, histogram
from microserve.protocol.metrics.table.strategies import strategy_families

BY_STRATEGY = strategy_families("microserve_router_strategy")

LIVE = gauge("microserve_router_requests", "Requests that it serves now.")
MAX_LIVE = gauge("microserve_router_max_requests", "As many as it takes.")
HELD_BACK = gauge(
    "microserve_router_requests_held_back", "Of these, those that wait for their API key's turn."
)
REFUSED = counter("microserve_router_refused", "Requests that were not let in, by error code.", "code")
PHASES = histogram(
    "microserve_router_phase_seconds",
    "Of finished requests, each part of their time; the parts add up.",
    "strategy",
    "phase",
    bounds=PHASE_BOUNDS,
)
PICKS = counter(
    "microserve_router_picks",
    "Engines chosen, by strategy, label asked for, and what decided: `load`, `prefix`, `cost`, `scorers`.",
    *("strategy", "label", "reason"),
)
FAILOVERS = counter(
    "microserve_router_failovers", "Attempts that were followed by another one, by error code.", "code"
)
ALONE = counter(
    "microserve_router_served_alone",
    "Requests that one engine alone served, whatever their strategy says, by why.",
    "reason",
)
MISTAKES = counter(
    "microserve_router_strategy_mistakes", "Requests whose strategy made a mistake.", "strategy"
)
SLOW = counter(
    "microserve_router_strategy_slow",
    "Requests whose strategy held the router for longer than it may.",
    "strategy",
)
VERSIONS = gauge(
    "microserve_router_strategy_version_info",
    "1; the version in force of each strategy, as `stable`, `canary` or `shadow`; 0 is the router's own.",
    *("strategy", "version", "share"),
)
SHARES = gauge(
    "microserve_router_canary_share_ratio",
    "Share of a strategy's requests that its canary serves, or its shadow sees.",
    *("strategy", "share"),
    unit="ratio",
)
SHADOW_DECISIONS = counter(
    "microserve_router_shadow_decisions",
    "Decisions of shadows: another engine than was taken (`differed`), the same (`agreed`), none (`failed`).",
    *("strategy", "version", "outcome"),
)
SHADOW_TTFT = gauge(
    "microserve_router_shadow_predicted_ttft_seconds",
    "Mean predicted time to the first token, by the shadow (`shadow`) and by what was done (`served`).",
    *("strategy", "version", "of"),
    unit="seconds",
)
CONTROL_VERSION = gauge(
    "microserve_router_control_version", "Of the control log, as far as it is applied here."
)
ENGINES = gauge("microserve_router_engines", "Engines by state: `usable`, `draining`.", "state")
FEED_LIVE = gauge(
    "microserve_router_index_live", "1 while the replica of an engine's prefixes is up to date.", "engine"
)
FEED_SILENT = gauge(
    "microserve_router_index_silent_seconds",
    "Since an engine's KV events were last heard.",
    "engine",
    unit="seconds",
)
FEED_EVENTS = counter(
    "microserve_router_index_events",
    "What befell the replica of an engine's prefixes: `gaps`, `resyncs`, `skipped`, `rejected`.",
    *("engine", "what"),
)
INDEX_BLOCKS = gauge("microserve_router_index_blocks", "Blocks in the replica.", unit="blocks")
INDEX_NBYTES = gauge("microserve_router_index_bytes", "Memory of the replica.", unit="bytes")
LINK_GOODPUT = gauge(
    "microserve_router_link_goodput_bytes_per_second",
    "While KV is put from one engine to another, as far as it was measured, smoothed.",
    *("source", "target"),
    unit="bytes/second",
)
CODINGS = counter(
    "microserve_router_codec_sends",
    "KV sent that was asked to go by a codec, by the profile that it went by and why that was chosen.",
    *("profile", "reason"),
)
CODED_NBYTES = counter(
    "microserve_router_codec_bytes",
    "Of these, KV as it is (`raw`), and what was put for it (`wire`).",
    "what",
    unit="bytes",
)
GATEWAYS = gauge("microserve_router_gateways", "Gateways that are connected.")
RECORDS = gauge(
    "microserve_router_records", "Requests of which it is remembered why they went where they went."
)
CHECKS = counter(
    "microserve_router_checks",
    "Self-checks that this router made, by what came of them: `equal`, `differs`, `unfinished`, `skipped`.",
    "outcome",
)
CHECK_SECONDS = counter("microserve_router_check_seconds", "That they took, in all.", unit="seconds")
CHECK_TOKENS = counter("microserve_router_check_tokens", "That engines computed for them.", unit="tokens")
CHECK_AGE = gauge(
    "microserve_router_check_age_seconds",
    "Since this router's last one that was brought to its end; none before that.",
    unit="seconds",
)
SUSPECTS = gauge(
    "microserve_router_suspects",
    "Pairs of engines that exchange no KV because some router's check found that their answers differ.",
)
INFO = gauge("microserve_router_info", "1; what runs here.", "version", "default_strategy")

ROUTER = (
    *(INFO, LIVE, MAX_LIVE, HELD_BACK, REFUSED, PHASES, PICKS, FAILOVERS, ALONE, MISTAKES, SLOW, VERSIONS),
    *(SHARES, SHADOW_DECISIONS, SHADOW_TTFT, CONTROL_VERSION, ENGINES, FEED_LIVE, FEED_SILENT, FEED_EVENTS),
    *(
        INDEX_BLOCKS,
        INDEX_NBYTES,
        LINK_GOODPUT,
        CODINGS,
        CODED_NBYTES,
        GATEWAYS,
        RECORDS,
        CHECKS,
        CHECK_SECONDS,
    ),
    *(CHECK_TOKENS, CHECK_AGE, SUSPECTS, *BY_STRATEGY.all),
)
