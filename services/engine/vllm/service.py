"""One engine process whose core is vLLM's ``AsyncLLM``: starts it, takes its KV cache as heap, runs a shell.

    digest of the model ─> link, feed ─> vLLM, whose processes open the link ─> Ready ─> heap ─> shell

Three processes, one life: vLLM's end with this one (connector/lifeline.py), and this one ends when one of
vLLM's is gone; a supervisor starts all anew. A start that fails, or is told to stop, takes along what it has
started (descendants.py). Sockets that have names are in one directory (protocol/process/scratch.py).
"""

from __future__ import annotations

import asyncio
import getpass
import os
import secrets
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microserve.kvcache.heap.factory import view_heap
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError, InternalError
from microserve.protocol.messages.engine_info import (
    COMMIT,
    EARLY_START,
    FIRST_TOKEN,
    GRAMMAR,
    LORA,
    PREP_RECV,
    PROMPT_LOGPROBS,
    REMOTE_SEND,
)
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.port import MetricsPort
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.process.scratch import Scratch
from microserve.protocol.settings.settings import Settings
from microserve.protocol.types import MAX_PROMPT_TOKENS
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.model.directory.end_tokens import eos_of
from microserve.services.engine.model.directory.model_files import read_json
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.vllm.adapters import (
    FoundAdapter,
    arguments_for,
    load_adapters,
    lora_requests,
    read_adapters,
)
from microserve.services.engine.vllm.arguments import config_of
from microserve.services.engine.vllm.descendants import adopt_orphans, kill_descendants
from microserve.services.engine.vllm.feed import Feed
from microserve.services.engine.vllm.front.asyncllm import AsyncVllm, warm_up
from microserve.services.engine.vllm.front.core import VllmCore, VllmSteps
from microserve.services.engine.vllm.link import Ready, Refused
from microserve.services.engine.vllm.link_ends import Front
from microserve.services.engine.vllm.mirror import Mirror
from microserve.services.engine.vllm.tracker import start_tracker, tracker_pids
from microserve.services.engine.vllm.weights import revision_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

CONNECTOR = "MicroserveConnector"
CONNECTOR_MODULE = "microserve.services.engine.vllm.connector.connector"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json")
SHUTDOWN_S = 5.0
"""What vLLM's processes get to end by themselves."""
GIVE_UP_S = 5.0
"""... and what they get to be gone when their start is given up."""


async def run_vllm_engine(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
    """Serve until cancelled. Raises :class:`ConfigError` when model or settings cannot work."""
    if not settings.model.path:
        raise ConfigError("model.path is not set", field="model.path")
    settings.check()
    loop = asyncio.get_running_loop()
    with ExitStack() as undo:
        scratch = Scratch()
        undo.callback(scratch.close)
        use_scratch(scratch.path)
        start = Start()
        undo.callback(start.give_up)
        starter = start.thread
        version = await loop.run_in_executor(starter, _import_vllm)
        directory = Path(settings.model.path)
        revision = await loop.run_in_executor(
            starter,
            partial(
                revision_of,
                directory,
                load_format=settings.model.load_format,
                arguments=settings.vllm.arguments,
                version=version,
            ),
        )
        model = settings.model.name or directory.name
        if model in settings.model.adapters:
            raise ConfigError(f"model.adapters: {model!r} is the model's name", field="model.adapters")
        found = await loop.run_in_executor(starter, read_adapters, settings.model.adapters, directory)
        incarnation = secrets.randbits(62) | 1
        front = Front(
            incarnation=incarnation,
            model=model,
            revision=revision,
            num_receives=settings.kvcache.grant_slots,
            grant_slots=settings.kvcache.grant_slots,
            checksums=settings.kvcache.checksums,
        )
        undo.callback(front.close)
        feed = Feed(scratch.path)
        undo.callback(feed.close)
        undo.callback(start.give_up)  # before what they have open is closed
        engine, config, ready = await loop.run_in_executor(
            starter, _start, settings, front, feed, start, found
        )
        heap = view_heap(settings, ready.heap, ready.layout)
        undo.callback(heap.close)
        adapters = lora_requests(found)
        await load_adapters(engine, found, adapters)
        core = VllmCore(
            AsyncVllm(engine, shutdown_s=SHUTDOWN_S, adapters=adapters),
            front,
            heap,
            Mirror(ready.layout.block_size, ready.layout.model, revision),
            engine_id=settings.engine.id or f"engine-{secrets.token_hex(4)}",
            incarnation=incarnation,
            kind=kind_of(
                version,
                ready.layout.block_size,
                has_tokenizer=_has_tokenizer(directory),
                starts_early=settings.vllm.early_start,
                has_adapters=bool(found),
            ),
            numerics=numerics_of(version, ready.layout.dtype, revision),
            # vLLM keeps one block for itself.
            limits=_limits(settings, config, directory, ready.num_blocks - 1, found),
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            lease_s=settings.kvcache.lease_s,
            checksums=settings.kvcache.checksums,
            kernels=f"vLLM {version}",
        )
        # Before there is a socket: who says hello to one is to be served.
        await warm_up(core.llm)
        await engine.reset_prefix_cache()
        shell = EngineShell(settings, bus, lifecycle, core, partial(VllmSteps, core))
        undo.pop_all()
        with ExitStack() as closing:
            closing.callback(scratch.close)
            closing.callback(starter.shutdown)
            closing.callback(shell.close)
            closing.callback(feed.close)
            feed.open(core.mirror.take, core.on_output)
            closing.enter_context(
                MetricsPort(settings.metrics.host, settings.engine.metrics_port, shell.readings)
            )
            await shell.run()


class Start:
    """A start of vLLM, which takes from seconds to minutes, and what ends it before it has ended."""

    def __init__(self) -> None:
        adopt_orphans()
        # vLLM's processes are killed when the thread that started them ends: it lives as long as they do.
        self.thread = ThreadPoolExecutor(1, "vllm")
        self._is_over = threading.Event()

    def give_up(self) -> None:
        """Whatever vLLM is doing: none of its processes is left, and the thread starts no other one. It is
        not waited for, since it may be reading weights."""
        self._is_over.set()
        kill_descendants(tracker_pids(), timeout_s=GIVE_UP_S)
        self.thread.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """In the thread, before a process is started."""
        if self._is_over.is_set():
            raise InternalError("the start of vLLM was given up")


def use_scratch(directory: Path) -> None:
    """All that vLLM's processes make by a name in the temporary directory goes with us: its sockets, where
    its ranks meet. What torch has compiled stays where it is, for the next start."""
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    os.environ["TMPDIR"] = os.environ["VLLM_RPC_BASE_PATH"] = str(directory)
    tempfile.tempdir = None  # asked for anew


def _import_vllm() -> str:
    """Its version. Many seconds, on a machine that is busy."""
    import vllm

    return str(vllm.__version__)


def _has_tokenizer(directory: Path) -> bool:
    """vLLM needs it for grammars alone: text is the gateway's."""
    return any((directory / name).is_file() for name in _TOKENIZERS)


def kind_of(
    version: str,
    block_size: int,
    *,
    has_tokenizer: bool,
    starts_early: bool = False,
    has_adapters: bool = False,
) -> EngineKind:
    """What it says of itself. A whole block is computed again where a receive ends with one: vLLM must have
    the logits of the last token."""
    can = [PREP_RECV, REMOTE_SEND, COMMIT, FIRST_TOKEN, PROMPT_LOGPROBS]
    if starts_early:
        can.append(EARLY_START)
    if has_tokenizer:
        can.append(GRAMMAR)
    if has_adapters:
        can.append(LORA)
    return EngineKind("vllm", version, tuple(can), split_tokens=block_size, recompute_tokens=block_size)


def numerics_of(version: str, dtype: str, revision: str) -> Numerics:
    """A row's bits depend on its batch, so it is not exact."""
    return Numerics(f"vllm-{version}-{dtype}-{revision[:12]}", is_exact=False)


def _limits(
    settings: Settings, config: VllmConfig, directory: Path, num_blocks: int, found: list[FoundAdapter]
) -> Limits:
    return Limits(
        max_model_len=min(config.model_config.max_model_len, MAX_PROMPT_TOKENS),
        vocab_size=config.model_config.get_vocab_size(),
        num_blocks=num_blocks,
        max_waiting=settings.engine.max_waiting,
        eos_token_ids=eos_of(directory, read_json(directory / "config.json")),
        adapters=tuple(each.adapter for each in found),
    )


def _start(
    settings: Settings, front: Front, feed: Feed, start: Start, found: list[FoundAdapter]
) -> tuple[AsyncLLM, VllmConfig, Ready]:
    """Takes from seconds to minutes. Raises :class:`ConfigError` for what vLLM or the connector refuses."""
    from vllm.config import KVTransferConfig
    from vllm.config.kv_events import KVEventsConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    start.check()
    start_tracker()
    # The library that our grammars are written for, unless somebody wants another.
    structured = settings.vllm.arguments.get("structured_outputs_config", {"backend": "guidance"})
    config = config_of(
        settings,
        structured_outputs_config=structured,
        **arguments_for(found, settings.vllm.arguments),
        skip_tokenizer_init=not _has_tokenizer(Path(settings.model.path)),
        kv_transfer_config=KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role="kv_both",
            kv_connector_extra_config=front.extra_config,
        ),
        kv_events_config=KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=feed.endpoint,
            replay_endpoint=feed.replay_endpoint,
        ),
    )
    start.check()
    try:
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        refused = _first(front, Refused)
        if refused is not None:
            path = f"vllm.arguments.{refused.field}"
            raise ConfigError(f"{path}: {refused.detail}", field=path) from error
        raise
    ready = _first(front, Ready)
    if ready is None:
        engine.shutdown(timeout=SHUTDOWN_S)
        raise InternalError("vLLM has started, and its worker has not said where its KV cache is")
    return engine, config, ready


def _first(front: Front, kind: type[Any]) -> Any:
    return next((notice for notice in front.read() if isinstance(notice, kind)), None)
