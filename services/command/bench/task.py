"""What a run is asked for and what a process of it brings back: plain data that crosses between processes."""

from __future__ import annotations

import msgspec

CHAT, COMPLETIONS = "chat", "completions"
POISSON, CONSTANT, BURSTS = "poisson", "constant", "bursts"
FIXED, UNIFORM, LOGNORMAL, SHAREGPT = "fixed", "uniform", "lognormal", "sharegpt"


class Load(msgspec.Struct, kw_only=True, frozen=True):
    """The requests of a run; 0 and empty are "not given"."""

    endpoint: str = CHAT
    model: str = ""
    seed: int = 0
    num_requests: int = 0
    duration_s: float = 0.0
    """Nothing is sent later than this; what runs then runs to its end."""
    # --- when
    rate: float = 0.0
    """Requests/s; 0: all at once, as far as ``concurrency`` lets them, or when the trace says."""
    arrival: str = POISSON
    burstiness: float = 1.0
    """Of bursts: the shape of the gamma distribution of gaps; below 1 they come in bursts, 1 is Poisson."""
    concurrency: int = 0
    speed: float = 1.0
    """So many times as fast as the trace's timestamps."""
    # --- what
    lengths: str = FIXED
    input_len: int = 512
    output_len: int = 128
    spread: float = 0.0
    """Uniform: the part of a length by which it varies up and down; log-normal: sigma."""
    prefix_len: int = 0
    num_prefixes: int = 1
    trace: str = ""
    file: str = ""
    longest: int = 0
    ignore_eos: bool = True
    temperature: float = 0.0
    strategy: str = ""
    timeout_s: float = 600.0


class Words(msgspec.Struct, frozen=True):
    """What prompts are made of: token ids, or words of about so many tokens each."""

    ids: list[int] = []
    """Empty: words."""
    tokens_per_word: float = 1.0
    is_measured: bool = False
    """The server has counted."""


class Share(msgspec.Struct, frozen=True):
    """What one process sends: every ``count``-th request from ``index`` on."""

    index: int = 0
    count: int = 1


class Outcome(msgspec.Struct):
    """One request. Times in seconds of one clock (CLOCK_MONOTONIC), which all processes share."""

    number: int
    due_s: float
    """When it was to be sent; for one that waited for a free place of ``concurrency``: when it had one."""
    sent_s: float = 0.0
    first_s: float = 0.0
    """The first text (or the end of an answer that has none)."""
    end_s: float = 0.0
    """The last chunk of the answer."""
    held_s: float = 0.0
    """How long ``concurrency`` held it back from its planned time."""
    gaps_s: list[float] = []
    """Between chunks that say something."""
    input_tokens: int = 0
    output_tokens: int = 0
    """As the server counts them."""
    fault: str = ""
    """The kind of a failure; empty: it is none."""
    detail: str = ""
    engines: str = ""
    strategy: str = ""


class Health(msgspec.Struct):
    """How one process of the load generator itself fared."""

    wall_s: float
    cpu_s: float
    """Of the thread that sends and reads."""
    lags_s: list[float]
    """By how much its event loop woke too late, sampled all along."""


class Result(msgspec.Struct):
    """Of one process."""

    outcomes: list[Outcome]
    health: Health


class WorkerTask(msgspec.Struct):
    """What worker.py is told."""

    url: str
    api_key: str
    tls_cert: str
    load: Load
    words: Words
    share: Share
