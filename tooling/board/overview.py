"""The first board: is it up, how fast, how many, what fails, what is full."""

from __future__ import annotations

from board import result
from board.panel import Board, Panel, Query, Row, Unit, lines, number
from board.promql import over, share
from board.variable import ALL as ask
from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.table import common, engine, gateway, index, router

ANSWERS = gateway.BY_STRATEGY.requests
REQUESTS = ask.rate(gateway.RESPONSES)
FAILED = share(ask.rate(gateway.RESPONSES, status="~5.."), REQUESTS)
NAMED = "{{service}} {{id}}"
PERCENTILES = (0.5, 0.95, 0.99)


def percentiles(title: str, family: Family, says: str) -> Panel:
    queries = (Query(ask.quantile(part, family), f"p{part * 100:g}") for part in PERCENTILES)
    return lines(title, Unit.SECONDS, says, *queries)


NOW = Row(
    "Now",
    (
        number(
            "Engines",
            Unit.COUNT,
            "Members at the index. Fewer than you started: `microserve ps`, then `microserve doctor`, which "
            "names those that are refused or lost, and why.",
            ask.total(index.MEMBERS),
            bad_below=1,
        ),
        number(
            "Services unread",
            Unit.COUNT,
            "Targets whose metrics Prometheus does not get. `microserve ps` says whether they run; "
            "`metrics.unserved` in a log, that a port was taken.",
            f"count({ask.outside('up')} == 0) or vector(0)",
            bad_from=1,
        ),
        number(
            "Requests",
            Unit.PER_S,
            "HTTP answers of the API, of every status. None where there should be some: `microserve tail "
            "--follow`, and `/ready` of the gateway.",
            REQUESTS,
        ),
        number(
            "Failed",
            Unit.SHARE,
            "Answers with a status of 500 and more. `microserve tail --filter status=5xx` names their codes.",
            FAILED,
            bad_from=0.01,
        ),
        number(
            "TTFT p95",
            Unit.SECONDS,
            "HTTP arrival to first token. When it grows, look at Where time goes: queueing is too little of "
            "something, prefill long prompts or no cache hits, transfer a slow link.",
            ask.quantile(0.95, gateway.TTFT),
        ),
        number(
            "Waiting",
            Unit.COUNT,
            "Sequences that wait at engines. Growing for minutes: more engines, or limits for the keys that "
            "flood (`microserve usage`).",
            ask.total(engine.WAITING),
        ),
    ),
)
TRAFFIC = Row(
    "Traffic",
    (
        lines(
            "Answers by status",
            Unit.PER_S,
            "By status and error code. 429 is limits of keys, 503 a mesh that is full or without engines, "
            "4xx else the clients'. `microserve tail --filter code=CODE` shows them one by one.",
            Query(ask.rate(gateway.RESPONSES, "status", "code"), "{{status}} {{code}}"),
            stacked=True,
        ),
        lines(
            "Tokens",
            Unit.TOKENS_PER_S,
            "Of prompts that were admitted, and generated. Output that falls while requests do not: see "
            "Steps on the board of disaggregation.",
            Query(ask.rate(gateway.PROMPT_TOKENS), "prompt"),
            Query(ask.rate(gateway.GENERATED), "output"),
        ),
        lines(
            "In flight",
            Unit.COUNT,
            "Sequences at gateways, in the batches of engines, and at engines waiting. At gateways many "
            "more than at engines: the router holds them back (`microserve top`), or it is away.",
            Query(ask.total(gateway.CHOICES), "at gateways"),
            Query(ask.total(engine.RUNNING), "running"),
            Query(ask.total(engine.WAITING), "waiting"),
        ),
        lines(
            "Lengths",
            Unit.TOKENS,
            "Median and 95th percentile of prompts and answers. Latencies that change with these are the "
            "traffic's, not the mesh's.",
            *(
                Query(ask.quantile(part, family), f"{what} p{part * 100:g}")
                for what, family in (("prompt", gateway.PROMPT_LENGTH), ("output", gateway.OUTPUT_LENGTH))
                for part in (0.5, 0.95)
            ),
        ),
        lines(
            "Tokens by key",
            Unit.TOKENS_PER_S,
            "Prompts and answers by the name of the API key. Who floods gets limits (`tokens_per_minute` in "
            "the file of keys); `microserve usage` has days.",
            Query(
                f"{ask.rate(gateway.KEY_COUNTS['prompt_tokens'], 'key')}\n"
                f"+ {ask.rate(gateway.KEY_COUNTS['output_tokens'], 'key')}",
                "{{key}}",
                empty_until="somebody with a named API key has asked",
            ),
            stacked=True,
        ),
        lines(
            "Refused by key",
            Unit.PER_S,
            "Requests beyond a limit of their key. Raise the limit, or tell the client; nothing is wrong "
            "with the mesh.",
            Query(
                ask.rate(gateway.KEY_COUNTS["refused"], "key"),
                "{{key}}",
                empty_until="somebody with a named API key has asked",
            ),
        ),
    ),
)
LATENCY = Row(
    "Latency",
    (
        percentiles(
            "Time to first token",
            gateway.TTFT,
            "HTTP arrival to first token, at the gateway. p99 alone: single long prompts or failovers, "
            "`microserve tail --slow 2s --why`; all of them: load.",
        ),
        percentiles(
            "Between tokens",
            gateway.INTER_TOKEN,
            "At the gateway. Bad at engines too: batches are large or prompts are computed between (strategy "
            "`disaggregated`); bad here alone: the gateway's core is full (Loop lag), add `gateway.workers`.",
        ),
        percentiles(
            "Whole answers",
            gateway.E2E,
            "HTTP arrival to last byte, of answers with status 200. Grows with the length of answers.",
        ),
        lines(
            "Where time goes",
            Unit.SECONDS,
            "Mean of each part of a request's time at routers; they add up. routed: the strategy thought; "
            "granted and admitted: engines were full; prefilled and transferred: prompts and links; "
            "decoded: answers.",
            Query(ask.mean(router.PHASES, "phase"), "{{phase}}"),
            stacked=True,
        ),
        lines(
            "Waiting for a turn",
            Unit.SECONDS,
            "95th percentile of the time in each engine's queue, and the oldest that waits now. One engine "
            "alone: its label or its prefixes draw too much (`microserve explain ID`); all: add engines.",
            Query(ask.quantile(0.95, engine.QUEUE_TIME, "engine"), "{{engine}} p95"),
            Query(ask.most(engine.OLDEST_WAIT, "engine"), "{{engine}} oldest"),
        ),
        lines(
            "Time of a token",
            Unit.SECONDS,
            "Mean of an answer's tokens after the first, 95th percentile by engine. One engine slower than "
            "its like: its host is busy (`microserve doctor` there).",
            Query(ask.quantile(0.95, engine.TPOT, "engine"), "{{engine}}"),
        ),
    ),
)
ERRORS = Row(
    "Errors",
    (
        lines(
            "Failed answers",
            Unit.SHARE,
            "With status 500 and more, of all; and answers that broke off after they had begun. `microserve "
            "tail --filter status=5xx`, then `microserve explain ID`.",
            Query(FAILED, "5xx"),
            Query(
                share(ask.rate(ANSWERS, result=result.FAILED), ask.rate(ANSWERS)),
                "broken off",
            ),
        ),
        lines(
            "Ends",
            Unit.PER_S,
            "How answers ended. abort is clients that left: with a high TTFT they may have lost patience.",
            Query(ask.rate(gateway.FINISHED, "finished_reason"), "{{finished_reason}}"),
            stacked=True,
        ),
        lines(
            "Failovers",
            Unit.RATE,
            "Attempts that were followed by another one, by what ended them. Clients notice nothing but "
            "time. engine_lost: `microserve doctor`; out of room: KV in use, below.",
            Query(ask.rate(router.FAILOVERS, "code"), "{{code}}", empty_until="an attempt has failed"),
        ),
        lines(
            "Not let in",
            Unit.PER_S,
            "Requests that a router refused, by code; and work that engines did not take. queue_full: more "
            "engines; strategy_not_found: the client's word is wrong.",
            Query(ask.rate(router.REFUSED, "code"), "{{code}}", empty_until="a router has refused a request"),
            Query(ask.rate(engine.CUT_OFF, "reason"), "engines: {{reason}}"),
        ),
        lines(
            "Clients that left",
            Unit.RATE,
            "By what their request was at. Many in queued or prefill: answers begin too late for them.",
            Query(
                ask.rate(gateway.DISCONNECTS, "phase"),
                "{{phase}}",
                empty_until="a client has left before its answer's end",
            ),
            stacked=True,
        ),
        lines(
            "Lost messages and lines",
            Unit.RATE,
            "What a full queue of the bus refused, whose handler failed, and log lines that could not be "
            "written. Should be 0: see the log of that service for `log.dropped` and errors, and free its "
            "disk.",
            Query(ask.rate(common.BUS_DROPPED, "service", "id"), "{{service}} {{id}} dropped"),
            Query(ask.rate(common.BUS_FAILED, "service", "id"), "{{service}} {{id}} failed"),
            Query(ask.rate(common.LOG_DROPPED, "service", "id"), "{{service}} {{id}} log"),
        ),
    ),
)
FULL = Row(
    "What is full",
    (
        lines(
            "Waiting by reason",
            Unit.COUNT,
            "For their turn (capacity), for KV on its way (kv), for their grammar. capacity: add engines; "
            "kv: see Transfers on the board of disaggregation.",
            Query(ask.total(engine.WAITING_FOR, "reason"), "{{reason}}"),
            stacked=True,
        ),
        lines(
            "KV in use",
            Unit.SHARE,
            "Share of each engine's blocks that are neither free nor cached. Near 1 sequences are put back "
            "(Preemptions) and grants refused: more `kvcache.num_blocks`, fewer `engine.max_num_seqs`, or "
            "more engines.",
            Query(ask.most(engine.USAGE, "engine"), "{{engine}}"),
        ),
        lines(
            "KV blocks",
            Unit.BLOCKS,
            "Of all engines. cached is good. quarantined for more than a minute: a writer hangs, "
            "`microserve doctor`.",
            Query(ask.total(engine.BLOCKS, "state"), "{{state}}"),
            stacked=True,
        ),
        lines(
            "Prefix hits",
            Unit.SHARE,
            "Share of prompt tokens that the cache had, by engine, and of all answers. Falls to 0: prompts "
            "differ from their first tokens on, keys have salts of their own, or the strategy spreads what "
            "belongs together.",
            Query(
                over(ask.rate(engine.PREFIX_HITS, "engine"), ask.rate(engine.PREFIX_QUERIES, "engine")),
                "{{engine}}",
            ),
            Query(over(ask.rate(gateway.PREFIX_HITS), ask.rate(gateway.PREFIX_QUERIES)), "answers"),
        ),
        lines(
            "Preemptions",
            Unit.RATE,
            "Sequences that gave their blocks back and are computed again. Should be rare: see KV in use.",
            Query(ask.rate(engine.PREEMPTIONS, "engine"), "{{engine}}"),
        ),
        lines(
            "Loop lag p99",
            Unit.SECONDS,
            "How late a service's event loop wakes up. Over 0.1 s its core is full or its host is: fewer "
            "processes there, more `gateway.workers`, or the strategy that holds the router (board of "
            "strategies).",
            Query(ask.quantile(0.99, common.LOOP_LAG, "service", "id"), NAMED),
        ),
        lines(
            "CPU",
            Unit.CORES,
            "Cores that each process uses. A gateway or a router at 1 can no more: a process is one core of "
            "Python.",
            Query(
                f"sum by (service, id) (rate({ask.outside('process_cpu_seconds_total')}[{ask.window}]))",
                NAMED,
            ),
        ),
        lines(
            "Memory",
            Unit.BYTES,
            "Resident, of each process; an engine's has its weights and the KV that it has used so far. "
            "Growth without an end is a bug: report it with this picture.",
            Query(f"sum by (service, id) ({ask.outside('process_resident_memory_bytes')})", NAMED),
        ),
        lines(
            "Slow readers",
            Unit.TOKENS,
            "Tokens at gateways that their clients have not taken. Thousands: clients or the way to them "
            "are slow.",
            Query(ask.total(gateway.MAILBOX_TOKENS, "id"), "{{id}}"),
        ),
    ),
)
MEMBERS = Row(
    "Who is there",
    (
        lines(
            "Engines",
            Unit.COUNT,
            "At the index, by model; and as routers see them. Fewer at a router than at the index: it does "
            "not reach some, `microserve doctor` on its host.",
            Query(ask.total(index.MEMBERS, "model_name"), "{{model_name}}"),
            Query(ask.total(router.ENGINES, "router", "state"), "{{router}}: {{state}}"),
        ),
        lines(
            "Missing",
            Unit.COUNT,
            "Engines that were refused or lost in the last hour and are not back. The code is the reason: "
            "`microserve doctor` has it in words, with what mends it.",
            Query(ask.total(index.MISSING, "code"), "{{code}}", empty_until="an engine was refused or lost"),
        ),
        lines(
            "Comings and losses",
            Unit.RATE,
            "Engines that came, and that were lost: silent (gone, or not reached) or stuck (no progress). "
            "Both high: an engine that crashes again and again, `microserve tail` and its `.out` file.",
            Query(ask.rate(index.JOINED), "came"),
            Query(ask.rate(index.LOST, "how"), "lost, {{how}}"),
        ),
        lines(
            "Links",
            Unit.COUNT,
            "Routers that each gateway reaches, gateways that each router has. 0 routers: nobody is served; "
            "start one, or look whether `gateway.routers` names them.",
            Query(ask.total(gateway.ROUTERS_ALIVE, "id"), "{{id}}: routers"),
            Query(ask.total(router.GATEWAYS, "router"), "{{router}}: gateways"),
        ),
    ),
)
OVERVIEW = Board(
    "microserve-overview",
    "MicroServe: overview",
    "Is it up, how fast is it, how much is asked of it, what fails, what is full.",
    (NOW, TRAFFIC, LATENCY, ERRORS, FULL, MEMBERS),
)
