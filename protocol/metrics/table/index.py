"""Families of the index."""

from __future__ import annotations

from microserve.protocol.metrics.family import counter, gauge

MEMBERS = gauge("microserve_index_members", "Engines in the mesh, by model.", "model_name")
MISSING = gauge(
    "microserve_index_missing", "Engines that were refused or lost and are not back, by why.", "code"
)
WATCHERS = gauge("microserve_index_watchers", "Peers that are told who is in.")
BLOCKS = gauge("microserve_index_blocks", "Blocks of all engines whose prefixes are known.", unit="blocks")
NBYTES = gauge("microserve_index_bytes", "Memory of the prefix indexes.", unit="bytes")
MAX_NBYTES = gauge("microserve_index_max_bytes", "Their limit.", unit="bytes")
FEED_LIVE = gauge(
    "microserve_index_feed_live", "1 while what is known of an engine's prefixes is up to date.", "engine"
)
FEED_SILENT = gauge(
    "microserve_index_feed_silent_seconds",
    "Since an engine's KV events were last heard.",
    "engine",
    unit="seconds",
)
FEED_EVENTS = counter(
    "microserve_index_feed_events", "What befell KV events: `gaps`, `resyncs`, `skipped`.", "what"
)
JOINED = counter("microserve_index_joined", "Engines that came.")
LOST = counter("microserve_index_lost", "Engines that were lost, by how: `silent`, `stuck`.", "how")
REFUSED = counter("microserve_index_refused", "Messages that were refused, by error code.", "code")
REJECTED = counter("microserve_index_frames_rejected", "Messages that nobody could read.")
LOOKUPS = counter("microserve_index_lookups", "Questions who holds a prefix.")
CONTROL_VERSION = gauge("microserve_index_control_version", "Of the control log.")
CONTROL_DURABLE = gauge("microserve_index_control_durable", "1 where the control log survives the index.")
BEHIND = gauge(
    "microserve_index_routers_behind", "Routers that have not applied the control log's last version."
)
SUSPECTS = gauge(
    "microserve_index_suspects",
    "Pairs of engines that exchange no KV because some router's check found that their answers differ.",
)
INFO = gauge("microserve_index_info", "1; what runs here.", "version")

INDEX = (
    *(INFO, MEMBERS, MISSING, WATCHERS, BLOCKS, NBYTES, MAX_NBYTES, FEED_LIVE, FEED_SILENT, FEED_EVENTS),
    *(JOINED, LOST, REFUSED, REJECTED, LOOKUPS, CONTROL_VERSION, CONTROL_DURABLE, BEHIND, SUSPECTS),
)
