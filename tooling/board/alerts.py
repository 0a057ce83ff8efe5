"""All alerts, the worst first. One more is a row here, and a case in tests/support/boards/alert_cases.py."""

from __future__ import annotations

from board import result
from board.alert import Alert, Severity
from board.promql import Reader, share
from microserve.protocol.metrics.table import common, engine, gateway, index, router

ask = Reader("5m")
JOB = ("job",)
ENGINE = ("job", "model_name", "engine")
FAILED = share(ask.rate(gateway.RESPONSES, *JOB, status="~5.."), ask.rate(gateway.RESPONSES, *JOB))
ANSWERS = gateway.BY_STRATEGY.requests
BROKEN_OFF = share(ask.rate(ANSWERS, *JOB, result=result.FAILED), ask.rate(ANSWERS, *JOB))
SENDS_FAILED = ask.rate(engine.SENDS_FAILED, *JOB, "engine")
SENDS = ask.rate(engine.SEND_SECONDS, *JOB, "engine", of="_count")
CRITICAL, WARNING = Severity.CRITICAL, Severity.WARNING

ALERTS = (
    Alert(
        "MicroserveNoEngine",
        f"group by (job, model_name) ({ask.series(gateway.CHOICES)})\n"
        f"unless on (job, model_name) ({ask.series(index.MEMBERS)} > 0)\n"
        f'and on (job) ({ask.outside("up")}{{service="index"}} == 1)',
        "1m",
        CRITICAL,
        "No engine serves {{ $labels.model_name }} in {{ $labels.job }}: microserve doctor",
        "A gateway takes requests for a model of which the index has no engine. Clients get 503.",
        (
            "`microserve doctor`: were they refused (another model, a wrong key) or lost?",
            "`microserve ps`, or `systemctl status 'microserve-engine@*'`: why they do not run; `failed` is "
            "a crash loop.",
            "Start one: `microserve engine --id NAME`, under systemd `systemctl start "
            "microserve-engine@NAME`.",
        ),
    ),
    Alert(
        "MicroserveNoRouter",
        f"{ask.most(gateway.ROUTERS_ALIVE, 'job', 'id')} == 0",
        "1m",
        CRITICAL,
        "Gateway {{ $labels.id }} of {{ $labels.job }} reaches no router: microserve doctor",
        "No router answers a gateway. Its clients get 503.",
        (
            "`microserve doctor` on the gateway's host: `no_router`, `port_closed`, `wrong_key`.",
            "`gateway.routers` must name the routers' addresses; `microserve ps` says whether they run.",
        ),
    ),
    Alert(
        "MicroserveErrors",
        f"{FAILED} > 0.05",
        "5m",
        CRITICAL,
        "More than 5 % of the answers of {{ $labels.job }} are errors: microserve tail --filter status=5xx",
        "Of the last five minutes' answers more than one in twenty had a status of 500 or more.",
        (
            "`microserve tail --filter status=5xx` has the code of each: `queue_full` and `no_engines` are "
            "capacity, `engine_lost` is engines that die, `deadline_exceeded` is too slow.",
            "`microserve explain ID` for one of them; `microserve doctor` for what is wrong now.",
        ),
    ),
    Alert(
        "MicroserveIndexUnreachable",
        f'{ask.outside("up")}{{service="index"}} == 0',
        "1m",
        CRITICAL,
        "The index of {{ $labels.job }} does not answer: microserve ps",
        "Requests are served on, by what routers know. But no engine can come or come back, no strategy can "
        "change, and nobody is told who is lost.",
        (
            "`microserve ps`, or `systemctl status microserve-index`; then its log.",
            "Start it; engines register again by themselves, and its control log is at `index.control_path`.",
            "If it runs, its metrics are not reached: as [MicroserveUnread](#microserveunread).",
        ),
    ),
    Alert(
        "MicroserveSelfCheckDiffers",
        f"{ask.most(index.SUSPECTS, 'job')} > 0",
        "1m",
        CRITICAL,
        "{{ $value }} pairs of engines of {{ $labels.job }} do not agree: microserve top",
        "A check found that two engines of one numerics class answer a small prompt differently: cold, from "
        "the cache, or with KV that one sent to the other. No KV goes between them; each answers by itself.",
        (
            "`microserve top` or the page's health view: which pair, and which of the answers differed.",
            "[A self-check differs](#a-self-check-differs) has what to do about it.",
            "A later check that finds the pair equal puts it back by itself.",
        ),
    ),
    Alert(
        "MicroserveEngineStalled",
        f"{ask.total(engine.RUNNING, *ENGINE)} + {ask.total(engine.WAITING, *ENGINE)} > 0\n"
        f"and {ask.rate(engine.STEP_SECONDS, *ENGINE, of='_count')}\n"
        f"+ {ask.rate(engine.GENERATED, *ENGINE)} + {ask.rate(engine.PROMPT_TOKENS, *ENGINE)} == 0",
        "2m",
        CRITICAL,
        "Engine {{ $labels.engine }} of {{ $labels.job }} has work and computes nothing: microserve doctor",
        "For seven minutes an engine has had sequences and has ended no step and begun no answer. A router "
        "leaves it after `bus.stuck_s`, and the watchdog kills it after `mesh.watchdog_s`, so something has "
        "kept both from it.",
        (
            "`microserve doctor` and `microserve tail`: `child.stuck`, `engine.lost`.",
            "`microserve top`: is it waiting for KV? Then it is the sender that hangs.",
            "Keep a stack if you can (`py-spy dump --pid PID`), then kill it: requests go on elsewhere.",
        ),
    ),
    Alert(
        "MicroserveEngineGone",
        f"{ask.total(index.MISSING, *JOB, code='engine_lost')} > 0",
        "1m",
        WARNING,
        "{{ $value }} engines of {{ $labels.job }} are lost and not back: microserve doctor",
        "Engines fell silent or made no progress, and have not come back within a minute. The others serve "
        "their requests. It ends when they are back, or an hour later.",
        (
            "`microserve doctor` names them (`dead_engine`, `stuck_engine`) and their hosts.",
            "`microserve ps`: `failed` is a crash loop, `logs/NAME.out` and the log's last lines say why; "
            "out of memory is in `dmesg`.",
            "One that is gone for good: start another one. One that should be there: `systemctl start "
            "microserve-engine@NAME`.",
        ),
    ),
    Alert(
        "MicroserveEngineRefused",
        f"{ask.total(index.MISSING, *JOB, 'code', code='!engine_lost')} > 0",
        "2m",
        WARNING,
        "An engine of {{ $labels.job }} is not let in ({{ $labels.code }}): microserve doctor",
        "An engine asks to join and is refused: another model, block size or version than the others have, "
        "or a wrong key. During an update to other weights that is as it should be, until the old engines "
        "have left.",
        (
            "`microserve doctor` has both values and what mends it.",
            "After an update: drain the old engines ([Drain](#drain-and-restart-an-engine)).",
        ),
    ),
    Alert(
        "MicroserveEngineFailing",
        f"{ask.rate(engine.STEPS_FAILED, *ENGINE)} > 0",
        "1m",
        WARNING,
        "Steps of engine {{ $labels.engine }} of {{ $labels.job }} fail: microserve tail",
        "The computation of a step raised an error. The requests that were in it go on elsewhere.",
        (
            "`microserve tail`, and the engine's log: `step.failed` has the error. Out of memory on a GPU: "
            "fewer `kvcache.num_blocks`.",
            "`microserve drain ENGINE` and start it again; if it comes back, report it with that line.",
        ),
    ),
    Alert(
        "MicroserveUnread",
        f'{ask.outside("up")}{{service!="", service!="index"}} == 0',
        "1m",
        WARNING,
        "Metrics of {{ $labels.service }} {{ $labels.id }} of {{ $labels.job }} cannot be read: microserve "
        "ps",
        "The service does not run, or it runs and its port for metrics is not reached: taken by another "
        "process, on another address, or (a gateway with keys) without an operator's key.",
        (
            "`microserve ps`: does it run? An engine that was taken out for good is taken out of the "
            "targets as well.",
            "Its log: `metrics.unserved` names a port that is taken. `metrics.host` must be an address that "
            "Prometheus reaches.",
            "`curl http://HOST:PORT/metrics`; 401 or 403 of a gateway: `credentials_file` of scrape.yml, "
            "with a key that has `operator = true`.",
        ),
    ),
    Alert(
        "MicroserveAnswersBreak",
        f"{BROKEN_OFF} > 0.01",
        "5m",
        WARNING,
        "More than 1 % of the answers of {{ $labels.job }} end in an error: microserve tail",
        "Answers fail, streams in their midst among them, which have had status 200 by then.",
        (
            "`microserve tail` shows how each ended, with its code (a stream's status is 200); `microserve "
            "explain ID` what was tried.",
            "`engine_lost` after four attempts: engines die faster than requests go on, see `microserve "
            "doctor`.",
        ),
    ),
    Alert(
        "MicroserveFailovers",
        f"{ask.rate(router.FAILOVERS, *JOB)}\n/ {ask.rate(router.BY_STRATEGY.requests, *JOB)} > 0.05",
        "5m",
        WARNING,
        "More than one request in twenty of {{ $labels.job }} has to begin again elsewhere: microserve "
        "doctor",
        "Attempts fail and are followed by others. Clients get the same tokens, later; engines compute them "
        "twice.",
        (
            "The board's Failovers has the codes: `engine_lost` is engines, `transfer_failed` links, "
            "`capacity` room for KV.",
            "`microserve doctor` tries each link and names engines that are sick.",
        ),
    ),
    Alert(
        "MicroserveQueue",
        f"{ask.most(engine.OLDEST_WAIT, *ENGINE)} > 30",
        "2m",
        WARNING,
        "Requests wait {{ $value | humanizeDuration }} at engine {{ $labels.engine }} of {{ $labels.job }}: "
        "microserve top",
        "The oldest request that waits there has come more than half a minute ago.",
        (
            "`microserve top`: all engines, or this one? All: more engines, or fewer requests "
            "(`router.max_requests`, limits of keys).",
            "This one alone: a label or a shared prefix draws requests to it, `microserve explain ID` says "
            "which.",
            "`microserve usage`: is it one key? Give it limits ([API keys](#api-keys)).",
        ),
    ),
    Alert(
        "MicroserveKvFull",
        f"{ask.most(engine.USAGE, *ENGINE)} > 0.95",
        "5m",
        WARNING,
        "KV of engine {{ $labels.engine }} of {{ $labels.job }} is {{ $value | humanizePercentage }} in "
        "use: microserve top",
        "Hardly a block is free. Sequences are put back and computed again, and grants are refused.",
        (
            "The board's KV blocks: `used` by answers, or `granted` and `quarantined` by transfers?",
            "More memory (`kvcache.num_blocks`), more engines, or fewer sequences at a time "
            "(`engine.max_num_seqs`).",
        ),
    ),
    Alert(
        "MicroserveTransfersFail",
        f"{SENDS_FAILED}\n/ ({SENDS_FAILED} + ({SENDS} or 0 * {SENDS_FAILED})) > 0.05",
        "5m",
        WARNING,
        "KV that engine {{ $labels.engine }} of {{ $labels.job }} sends does not arrive: microserve doctor",
        "More than one send in twenty ends without all of its KV put. Requests go on, with more computation.",
        (
            "`microserve doctor` lets each engine send to each other one: `heap_unreachable` says why, "
            "`slow_link` how slow.",
            "Between hosts: `kvcache.doors` and `kvcache.door_address` of the receiver, and the firewall "
            "before that port.",
        ),
    ),
    Alert(
        "MicroserveQuarantine",
        f"{ask.most(engine.OLDEST_QUARANTINE, *ENGINE)} > 120",
        "1m",
        WARNING,
        "Engine {{ $labels.engine }} of {{ $labels.job }} holds blocks in quarantine: microserve doctor",
        "A writer that may still write to blocks of a closed grant has not been proven gone for two "
        "minutes. These blocks serve nobody until it is.",
        (
            "`microserve doctor`: which engine is silent or stuck? Its process, frozen or not, must end: "
            "kill it.",
            "On another host that is cut off: they are free `kvcache.door_silence_s` after it was heard "
            "last.",
        ),
    ),
    Alert(
        "MicroserveLoopLag",
        f"{ask.quantile(0.99, common.LOOP_LAG, *JOB, 'service', 'id')} > 0.25",
        "5m",
        WARNING,
        "{{ $labels.service }} {{ $labels.id }} of {{ $labels.job }} is late by {{ $value | "
        "humanizeDuration }}: microserve top",
        "Its event loop wakes up a quarter of a second late and more: its core is full, or its host is.",
        (
            "The host: `top`. Too little CPU for too many engines is the usual reason; `engine.threads`.",
            "A router: a strategy that computes too long (`microserve strategy list`, Mistakes on the board "
            "of strategies).",
            "An index or engine: how often do clients and boards ask it?",
        ),
    ),
    Alert(
        "MicroservePrefixesUnknown",
        f"{ask.least(router.FEED_LIVE, *JOB, 'router', 'engine')} == 0",
        "5m",
        WARNING,
        "Router {{ $labels.router }} of {{ $labels.job }} does not know what {{ $labels.engine }} has "
        "cached: microserve doctor",
        "The engine's KV events do not come through. It is served by load alone, and caches are missed.",
        (
            "`microserve doctor` on the router's host: `port_closed` for events or replay.",
            "The engine's `engine.events_address` and `engine.replay_address` must be reached from routers.",
        ),
    ),
    Alert(
        "MicroserveStrategyMistakes",
        f"{ask.rate(router.MISTAKES, *JOB, 'strategy')} > 0",
        "1m",
        WARNING,
        "Strategy {{ $labels.strategy }} of {{ $labels.job }} makes mistakes: microserve strategy show {{ "
        "$labels.strategy }}",
        "It raised, or did what it may not. `data_parallel` has served these requests; enough of them take a "
        "published version back.",
        (
            "`microserve strategy show NAME` and the router's log (`strategy.failed`) have the line of its "
            "source.",
            "`microserve strategy rollback NAME`; `microserve strategy check FILE` before the next try.",
        ),
    ),
    Alert(
        "MicroserveRoutersBehind",
        f"{ask.most(index.BEHIND, *JOB)} > 0",
        "2m",
        WARNING,
        "Routers of {{ $labels.job }} have not applied the last change: microserve strategy list",
        "A change of strategies or labels is in force at some routers and not at all.",
        (
            "`microserve strategy list` has each router's version; `strategy.rejected` in its log says why "
            "not.",
            "One that does not reach the index keeps what it had: `microserve doctor` on its host.",
        ),
    ),
    Alert(
        "MicroserveDropped",
        f"{ask.rate(common.BUS_DROPPED, *JOB, 'service', 'id')} > 0",
        "5m",
        WARNING,
        "{{ $labels.service }} {{ $labels.id }} of {{ $labels.job }} drops messages: microserve top",
        "A queue of the bus has been full for minutes: who should read it is too slow, or away. Nothing is "
        "lost for good, since both ends count what they send, but it is sent again or given up.",
        (
            "`microserve top` and Loop lag on the board: which service is late?",
            "A network between hosts that is full: see Link goodput, and use a strategy that sends less.",
        ),
    ),
)
