"""The board of prefill, decode and the KV between them."""

from __future__ import annotations

from board.panel import Board, Query, Row, Unit, lines, number
from board.promql import over
from board.variable import ALL as ask
from microserve.protocol.metrics.table import engine, index, router

SENT_BYTES = ask.rate(engine.SEND_NBYTES, of="_sum")
SENDS = ask.rate(engine.SEND_NBYTES, of="_count")
A_SEND = "KV has gone from one engine to another"

NOW = Row(
    "Now",
    (
        number(
            "KV sent",
            Unit.BYTES_PER_S,
            "By all engines. 0 under a strategy that splits: `microserve explain ID` says why one engine "
            "served alone.",
            SENT_BYTES,
        ),
        number("Sends", Unit.RATE, "KV of a prompt, or a part of one, put to another engine.", SENDS),
        number(
            "Send p95",
            Unit.SECONDS,
            "Time of all puts of a send. Grows with prompts and shrinks with links: see Link goodput.",
            ask.quantile(0.95, engine.SEND_SECONDS),
        ),
        number(
            "Prompt tokens sent",
            Unit.SHARE,
            "Of all prompt tokens of answers, those whose KV another engine computed or had.",
            over(
                ask.rate(engine.PROMPT_SOURCES, source="external_kv_transfer"),
                ask.rate(engine.PROMPT_SOURCES),
            ),
        ),
        number(
            "Open grants",
            Unit.COUNT,
            "Permissions to write that wait for their KV. Many and old (Oldest lease): senders are slow or "
            "away.",
            ask.total(engine.GRANTS, state="open"),
        ),
        number(
            "Quarantined blocks",
            Unit.BLOCKS,
            "Blocks that a writer which is not proven gone could still write to. More than 0 for a minute: "
            "a sender hangs or its host is cut off; `microserve doctor` names it.",
            ask.total(engine.BLOCKS, state="quarantined"),
            bad_from=1,
        ),
    ),
)
SHARES = Row(
    "Who does what",
    (
        lines(
            "Prompt tokens computed",
            Unit.TOKENS_PER_S,
            "Prefill, by engine. One at its measured rate (Prefill speed) and others idle: too few engines "
            "have the label that the strategy prefers for prompts; `microserve label`.",
            Query(ask.rate(engine.PROMPT_SOURCES, "engine", source="local_compute"), "{{engine}}"),
            stacked=True,
        ),
        lines(
            "Output tokens",
            Unit.TOKENS_PER_S,
            "Decode, by engine. Engines for prompts alone have none here.",
            Query(ask.rate(engine.GENERATED, "engine"), "{{engine}}"),
            stacked=True,
        ),
        lines(
            "Steps",
            Unit.SHARE,
            "Share of its time that each engine spends in steps, by what is in them; what is left to 1 it "
            "is idle. Much mixed: prompts hold up answers, a strategy that splits keeps them apart. All "
            "near 1: add engines.",
            Query(ask.rate(engine.STEP_SECONDS, "engine", "kind", of="_sum"), "{{engine}} {{kind}}"),
            stacked=True,
        ),
        lines(
            "Where prompts come from",
            Unit.TOKENS_PER_S,
            "Computed where the answer is made, in its cache, or sent there.",
            Query(ask.rate(engine.PROMPT_SOURCES, "source"), "{{source}}"),
            stacked=True,
        ),
        lines(
            "Engines chosen",
            Unit.RATE,
            "By strategy, label asked for and what decided. A label that nobody has is `any`: `microserve "
            "label --list`.",
            Query(ask.rate(router.PICKS, "strategy", "label", "reason"), "{{strategy}} {{label}} {{reason}}"),
            stacked=True,
        ),
        lines(
            "Served alone",
            Unit.PER_S,
            "Requests that one engine served whatever their strategy says, by why. Error codes: look at "
            "Failed sends; prompt_logprobs is the client's wish.",
            Query(
                ask.rate(router.ALONE, "reason"),
                "{{reason}}",
                empty_until="a strategy could not be followed",
            ),
        ),
        lines(
            "Prefill speed",
            Unit.TOKENS_PER_S,
            "Of full steps, as measured last, by engine: what admission and `balanced` reckon with. One "
            "lower than its like: its host is busy or has other kernels (`microserve ps --json`).",
            Query(ask.most(engine.PREFILL_RATE, "engine"), "{{engine}}"),
        ),
        lines(
            "Decode step",
            Unit.SECONDS,
            "Of a step without prefill, smoothed. It is the least time between two tokens there.",
            Query(ask.most(engine.DECODE_STEP, "engine"), "{{engine}}"),
        ),
        lines(
            "Prompt tokens not computed yet",
            Unit.TOKENS,
            "Queued at each engine; divided by Prefill speed it is the wait of the next prompt there.",
            Query(ask.total(engine.QUEUED_TOKENS, "engine"), "{{engine}}"),
        ),
    ),
)
TRANSFERS = Row(
    "Transfers",
    (
        lines(
            "KV sent",
            Unit.BYTES_PER_S,
            "By sender and by kind of the receiver's heap. tcp between engines of one host: they cannot "
            "share memory, see `kvcache.share_memory` and the users that they run as.",
            Query(
                ask.rate(engine.SEND_NBYTES, "engine", "heap", of="_sum"), "{{engine}} by {{heap}}", A_SEND
            ),
            stacked=True,
        ),
        lines(
            "Link goodput",
            Unit.BYTES_PER_S,
            "While KV is put from one engine to another, smoothed. One direction slower than the other: "
            "that cable, or that host; `microserve doctor` measures each.",
            Query(ask.most(router.LINK_GOODPUT, "source", "target"), "{{source}} to {{target}}", A_SEND),
        ),
        lines(
            "Time of a send",
            Unit.SECONDS,
            "By kind of heap. Growing while Link goodput is steady: prompts are longer, or more of them at "
            "a time.",
            *(
                Query(
                    ask.quantile(part, engine.SEND_SECONDS, "heap"), f"{{{{heap}}}} p{part * 100:g}", A_SEND
                )
                for part in (0.5, 0.95)
            ),
        ),
        lines(
            "From grant to KV",
            Unit.SECONDS,
            "At the receiver: the sender's wait, prefill and puts together; and what generations waited for "
            "it. Much more than Time of a send: the sender queues or computes, see Prompt tokens not "
            "computed yet.",
            Query(ask.quantile(0.95, engine.RECEIVE_SECONDS, "heap"), "{{heap}} p95", A_SEND),
            Query(ask.quantile(0.95, engine.ARRIVAL_TIME, "engine"), "{{engine}} waited p95"),
        ),
        lines(
            "Failed sends",
            Unit.RATE,
            "Sends that ended without all of their KV put, by code, and grants whose KV did not come whole. "
            "Requests go on elsewhere and cost twice; `microserve doctor` tries each link and says why.",
            Query(ask.rate(engine.SENDS_FAILED, "engine", "code"), "{{engine}} {{code}}"),
            Query(ask.rate(engine.RECEIVES_FAILED, "engine"), "{{engine}} not whole"),
        ),
        lines(
            "Early starts",
            Unit.RATE,
            "Steps that began before all of their KV was in: good, the transfer is hidden behind them.",
            Query(ask.rate(engine.EARLY_STARTS, "engine"), "{{engine}}"),
        ),
    ),
)
GRANTS = Row(
    "Grants and quarantine",
    (
        lines(
            "Grants",
            Unit.COUNT,
            "By state. Sealed: the KV is in. Quarantined: closed, and its writer is not proven gone.",
            Query(ask.total(engine.GRANTS, "state"), "{{state}}"),
            stacked=True,
        ),
        lines(
            "Grants given and refused",
            Unit.RATE,
            "Refused for want of room: see KV in use on the overview. Expired: a router or sender died, or "
            "is too slow.",
            Query(ask.rate(engine.GRANTS_OPENED, "engine"), "{{engine}} given"),
            Query(ask.rate(engine.GRANTS_REFUSED, "engine"), "{{engine}} refused"),
            Query(ask.rate(engine.GRANTS_EXPIRED, "engine"), "{{engine}} expired"),
        ),
        lines(
            "Oldest lease",
            Unit.SECONDS,
            "Since the oldest open grant was given, by engine. Minutes: its router keeps it alive and no KV "
            "comes; `microserve top`, or restart that sender.",
            Query(ask.most(engine.OLDEST_LEASE, "engine"), "{{engine}}"),
        ),
        lines(
            "Quarantine",
            Unit.BLOCKS,
            "Blocks by engine. They come back when the writer is gone: kill it (`microserve doctor` names "
            "it), or wait for `kvcache.door_silence_s` where it is on another host.",
            Query(ask.total(engine.BLOCKS, "engine", state="quarantined"), "{{engine}}"),
        ),
        lines(
            "Oldest quarantine",
            Unit.SECONDS,
            "Since it began. Grows without end only while a writer lives that does not answer.",
            Query(ask.most(engine.OLDEST_QUARANTINE, "engine"), "{{engine}}"),
        ),
        lines(
            "Blocks for writers",
            Unit.SHARE,
            "Share of each engine's blocks that are granted or quarantined. High with few answers running: "
            "transfers, not decode, fill the memory; fewer prompts at a time, or more engines for decode.",
            Query(
                over(
                    ask.total(engine.BLOCKS, "engine", state="~granted|quarantined"),
                    ask.total(engine.BLOCKS, "engine"),
                ),
                "{{engine}}",
            ),
        ),
    ),
)
PREFIXES = Row(
    "Who has which prefix",
    (
        lines(
            "Prefixes known",
            Unit.SHARE,
            "Share of engines whose prefixes are up to date, at each router and at the index. Below 1 for "
            "minutes: the engine's events do not come through, `microserve doctor` (port_closed).",
            Query(f"avg by (router) ({ask.series(router.FEED_LIVE)})", "{{router}}"),
            Query(f"avg ({ask.series(index.FEED_LIVE)})", "index"),
        ),
        lines(
            "Repairs",
            Unit.RATE,
            "Gaps in the events of caches, and resyncs. Now and then is nothing; all the time: the network "
            "loses, or a process is too busy (Loop lag).",
            Query(ask.rate(router.FEED_EVENTS, "router", "what"), "{{router}} {{what}}"),
            Query(ask.rate(index.FEED_EVENTS, "what"), "index {{what}}"),
        ),
        lines(
            "Memory of prefixes",
            Unit.BYTES,
            "At the index, its limit, and in each router. At the limit the oldest are forgotten, and "
            "requests miss caches that they could have had.",
            Query(ask.total(index.NBYTES), "index"),
            Query(ask.most(index.MAX_NBYTES), "index, limit"),
            Query(ask.total(router.INDEX_NBYTES, "router"), "{{router}}"),
        ),
    ),
)
DISAGGREGATION = Board(
    "microserve-disaggregation",
    "MicroServe: disaggregation",
    "Who computes prompts, who computes answers, and how KV goes between them.",
    (NOW, SHARES, TRANSFERS, GRANTS, PREFIXES),
)
