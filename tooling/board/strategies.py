"""The board of strategies: which versions serve, how each fares, what shadows would have done."""

from __future__ import annotations

from board import result
from board.panel import Board, Query, Row, Unit, lines
from board.promql import over
from board.promql import share as share_of
from board.variable import BY_STRATEGY as ask
from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.table import index, router

OF = router.BY_STRATEGY
VERSION = ("strategy", "version", "share")
LEGEND = "{{strategy}}/{{version}} {{share}}"
A_CANARY = "a canary has served"
A_SHADOW = "a shadow has decided"
TTFT, TPOT, JCT = (
    OF.times[name] for name in ("time_to_first_token", "time_per_output_token", "job_completion")
)
PROMPT = OF.tokens["prompt_tokens"]


def beside(family: Family) -> str:
    """The canary's mean over the stable version's."""
    return over(
        f"({ask.mean(family, 'strategy', share='canary')})",
        f"({ask.mean(family, 'strategy', share='stable')})",
    )


def failed_share(share: str) -> str:
    return share_of(
        ask.rate(OF.requests, "strategy", share=share, result=result.FAILED),
        ask.rate(OF.requests, "strategy", share=share),
    )


SERVING = Row(
    "What serves",
    (
        lines(
            "Requests by version",
            Unit.PER_S,
            "By strategy, version and share. A version that you have published and that has none: "
            "`microserve strategy list`, and Control below.",
            Query(ask.rate(OF.requests, *VERSION), LEGEND),
            stacked=True,
        ),
        lines(
            "Shares",
            Unit.SHARE,
            "Of a strategy's requests, those that its canary serves or its shadow sees. A ramp goes up by "
            "steps: `microserve strategy show NAME` says what it waits for.",
            Query(ask.most(router.SHARES, "strategy", "share"), "{{strategy}} {{share}}", A_CANARY),
        ),
        lines(
            "Versions in force",
            Unit.COUNT,
            "Routers that have each version. Fewer than there are routers: Control below.",
            Query(f"count by ({', '.join(VERSION)}) ({ask.series(router.VERSIONS)})", LEGEND),
            stacked=True,
        ),
        lines(
            "Results",
            Unit.PER_S,
            "How requests ended, by strategy. Error codes: `microserve tail --filter strategy=NAME --filter "
            "status=5xx`.",
            Query(ask.rate(OF.requests, "strategy", "result"), "{{strategy}} {{result}}"),
            stacked=True,
        ),
        lines(
            "Mistakes",
            Unit.RATE,
            "Requests whose strategy raised or did what it may not, and those for which it held the router "
            "too long. Clients notice nothing yet; `microserve strategy show NAME`, then `rollback`.",
            Query(ask.rate(router.MISTAKES, "strategy"), "{{strategy}} mistakes"),
            Query(ask.rate(router.SLOW, "strategy"), "{{strategy}} slow"),
        ),
        lines(
            "Engines by version",
            Unit.PER_S,
            "Where each version generates. All on one engine: it follows a label or a prefix that only that "
            "one has.",
            Query(
                ask.rate(OF.engines, "strategy", "version", "engine"), "{{strategy}}/{{version}} {{engine}}"
            ),
            stacked=True,
        ),
    ),
)
TIMES = Row(
    "How each version fares",
    tuple(
        lines(
            title,
            Unit.SECONDS,
            says,
            *(
                Query(ask.quantile(part, family, *VERSION), f"{LEGEND} p{part * 100:g}")
                for part in (0.5, 0.95)
            ),
        )
        for title, family, says in (
            (
                "TTFT by version",
                TTFT,
                "Router's receipt to first token. `microserve strategy compare NAME` says whether a "
                "difference is one.",
            ),
            (
                "TPOT by version",
                TPOT,
                "Of each output token after the first. Splitting strategies are for this one.",
            ),
            (
                "JCT by version",
                JCT,
                "Router's receipt to the end. Compare versions under the same traffic only.",
            ),
        )
    ),
)
CANARY = Row(
    "Canary beside stable",
    (
        lines(
            "Times, canary / stable",
            Unit.COUNT,
            "Ratio of means; above 1 the canary is slower. It is a hint: `microserve strategy compare NAME` "
            "has the test, and bounds (`--max-ttft`) take a bad one back by themselves.",
            Query(beside(TTFT), "{{strategy}} TTFT", A_CANARY),
            Query(beside(TPOT), "{{strategy}} TPOT", A_CANARY),
            Query(beside(JCT), "{{strategy}} JCT", A_CANARY),
        ),
        lines(
            "Failed",
            Unit.SHARE,
            "Share of requests that ended in an error. The canary's above the stable one's: `microserve "
            "strategy rollback NAME`.",
            Query(failed_share("stable"), "{{strategy}} stable"),
            Query(failed_share("canary"), "{{strategy}} canary", A_CANARY),
        ),
        lines(
            "Cached prompt tokens, canary and stable",
            Unit.SHARE,
            "A canary that is new finds cold caches; later it should have what the stable version has.",
            *(
                Query(
                    over(
                        ask.rate(OF.tokens["cached_tokens"], "strategy", share=share),
                        ask.rate(PROMPT, "strategy", share=share),
                    ),
                    f"{{{{strategy}}}} {share}",
                    A_CANARY if share == "canary" else "",
                )
                for share in ("stable", "canary")
            ),
        ),
    ),
)
WORK = Row(
    "What it costs",
    (
        lines(
            "Prompt tokens by version",
            Unit.SHARE,
            "Share that caches had, and that another engine computed. The rest is computed where the answer "
            "is made.",
            *(
                Query(
                    over(ask.rate(OF.tokens[name], *VERSION), ask.rate(PROMPT, *VERSION)), f"{LEGEND} {what}"
                )
                for name, what in (("cached_tokens", "cached"), ("received_tokens", "sent"))
            ),
        ),
        lines(
            "Output tokens by version",
            Unit.TOKENS_PER_S,
            "What each version delivers. Little of a canary may be no more than its share.",
            Query(ask.rate(OF.tokens["output_tokens"], *VERSION), LEGEND),
            stacked=True,
        ),
        lines(
            "Moves",
            Unit.RATE,
            "Requests that went to another engine in their midst: by `migrate`, or when an engine drains. "
            "Each costs its KV once more on a link.",
            Query(ask.rate(OF.moves, *VERSION), LEGEND),
        ),
        lines(
            "What decided",
            Unit.RATE,
            "Choices of engines by strategy and reason. prefix rarely where prompts are alike: "
            "`prefix_match` weighs too little, or Prefixes known (board of disaggregation) is low.",
            Query(ask.rate(router.PICKS, "strategy", "reason"), "{{strategy}} {{reason}}"),
            stacked=True,
        ),
        lines(
            "Where time goes",
            Unit.SECONDS,
            "Mean of each part of a request's time, by strategy; they add up.",
            Query(ask.mean(router.PHASES, "strategy", "phase"), "{{strategy}} {{phase}}"),
            stacked=True,
        ),
        lines(
            "Served alone",
            Unit.PER_S,
            "Requests that one engine alone served, whatever their strategy says, by why.",
            Query(ask.rate(router.ALONE, "reason"), "{{reason}}", "a strategy could not be followed"),
        ),
    ),
)
SHADOWS = Row(
    "Shadows",
    (
        lines(
            "Decisions",
            Unit.RATE,
            "The same engine as served (agreed), another one (differed), none (failed). failed: "
            "`shadow.failed` in the router's log.",
            Query(
                ask.rate(router.SHADOW_DECISIONS, "strategy", "version", "outcome"),
                "{{strategy}}/{{version}} {{outcome}}",
                A_SHADOW,
            ),
            stacked=True,
        ),
        lines(
            "Predicted TTFT",
            Unit.SECONDS,
            "Mean, by the shadow and by what was done, from the same state and by the same reckoning: a "
            "comparison, no promise. The shadow's lower: try it as a canary (`publish --share 1%`).",
            Query(
                ask.most(router.SHADOW_TTFT, "strategy", "version", "of"),
                "{{strategy}}/{{version}} {{of}}",
                A_SHADOW,
            ),
        ),
    ),
)
CONTROL = Row(
    "Control",
    (
        lines(
            "Version of the control log",
            Unit.COUNT,
            "At the index, and as far as each router has applied it. A router that stays behind: "
            "`strategy.rejected` in its log, or it does not reach the index.",
            Query(ask.most(index.CONTROL_VERSION), "index"),
            Query(ask.most(router.CONTROL_VERSION, "router"), "{{router}}"),
        ),
        lines(
            "Routers behind",
            Unit.COUNT,
            "That have not applied the last version. 0 within seconds of a change.",
            Query(ask.most(index.BEHIND), "behind"),
        ),
    ),
)
STRATEGIES = Board(
    "microserve-strategies",
    "MicroServe: strategies",
    "Which versions of strategies serve, how each fares, the canary beside the stable one, what shadows "
    "would do.",
    (SERVING, TIMES, CANARY, WORK, SHADOWS, CONTROL),
    by_strategy=True,
)
