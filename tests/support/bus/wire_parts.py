"""Samples of the structures that messages hold; every field has a value of its own, as in wire_samples.py."""

from __future__ import annotations

from microserve.protocol.messages import engine as actions
from microserve.protocol.messages import index as membership
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.check import PairCheck
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.kv.coding import Coding, Decoding
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.kv.grant import Grant, HeapAddress
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, packed
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams

HEAP = HeapAddress(kind="shm", host="boot", pid=70_000, fd=9, nbytes=1 << 33, incarnation=1 << 61)
DOOR = HeapAddress(kind="tcp", host="b", pid=71_000, fd=0, nbytes=7, incarnation=1 << 60, door=b"tcp://a:4")
GEOMETRY = Geometry("bfloat16", "o1", 16, 30, 3, 64, "fp8", "default theta=10000", "d1")
ADAPTER = Adapter(name="a1", revision="ar1")
DECODING = Decoding(codecs=["kv1:zstd"], queued_s=0.5, ns_per_byte=1.5)
CODING = Coding(
    profile="p1",
    raw_nbytes=1 << 21,
    wire_nbytes=1 << 20,
    encode_s=0.25,
    predicted_s=1.25,
    observed_s=1.5,
    link_bytes_per_s=2.5e6,
    is_lossy=True,
    reason="model",
)
GRANT = Grant(
    grant_id="g1",
    engine_id="e1",
    incarnation=1 << 61,
    slot=3,
    generation=4,
    matched=16,
    end=40,
    blocks=[7, 300],
    block_size=16,
    layout_hash="l1",
    heap=HEAP,
    lease_s=30.5,
    numerics="n1",
    geometry=GEOMETRY,
    doors=[DOOR],
    adapter=ADAPTER,
    decoding=DECODING,
)
SAMPLING = SamplingParams(
    max_tokens=17,
    min_tokens=2,
    temperature=0.5,
    top_p=0.75,
    top_k=40,
    min_p=0.25,
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=1.5,
    logit_bias={50: -2.5},
    seed=1 << 40,
    logprobs=3,
    stop_token_ids=(2, 9),
    ignore_eos=True,
    grammar=Grammar(kind="regex", text="[ab]+", after_token_ids=(7, 8)),
    prompt_logprobs=5,
)
INFO = actions.EngineInfo(
    engine_id="e1",
    incarnation=1 << 61,
    address="tcp://a:1",
    events_address="tcp://a:2",
    replay_address="tcp://a:3",
    model="m",
    labels=["decode"],
    block_size=16,
    num_blocks=2048,
    num_layers=30,
    max_model_len=8192,
    vocab_size=49152,
    eos_token_ids=[0, 2],
    layout_hash="l1",
    heap="shm",
    wire_version=1,
    curve_key="k",
    revision="r1",
    numerics=Numerics("n2", is_exact=True),
    backend="native",
    backend_version="0.2",
    can=["prep_recv", "commit"],
    geometry=GEOMETRY,
    heaps=["shm", "tcp"],
    split_tokens=8,
    recompute_tokens=2,
    events_open=True,
    adapters=[ADAPTER],
    cluster="c1",
)
HOST = HostFacts(1.5e9, 12, 1024, 65_536, 1 << 26, 1 << 25)
LOAD = actions.EngineLoad(
    progress=1 << 34,
    num_steps=2,
    num_running=3,
    num_waiting=4,
    num_grants=5,
    queued_prefill_tokens=6,
    free_blocks=7,
    cached_blocks=8,
    quarantined_blocks=9,
    prefill_tokens_per_s=10.5,
    decode_step_s=0.125,
    draining=True,
    max_num_seqs=64,
    prefill_rate_age_s=0.75,
    mean_output_tokens=20.5,
    prefill_share=0.375,
    max_num_batched_tokens=512,
    granted_blocks=11,
    oldest_lease_s=1.25,
    decode_share=0.25,
    transfer_share=0.125,
    idle_share=0.25,
    links=[actions.LinkGoodput(engine_id="e2", bytes_per_s=1.25e6)],
)
PROMPT = packed(3, 1, [PromptLogprob(-0.5, 2, ((11, -0.25),)), PromptLogprob(-1.5, 1, ((12, -1.5),))])
LOGPROB = actions.TokenLogprob(logprob=-0.5, top=[(11, -0.25), (12, -1.5)])
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TIMINGS = actions.Timings(queued_s=0.5, arrival_s=1.5, prefill_s=2.5, decode_s=3.5, transfer_s=4.5)
USAGE = actions.Usage(
    prompt_tokens=40, cached_tokens=16, received_tokens=20, output_tokens=5, num_preemptions=1
)
FINISHED = actions.Finished(
    reason="error",
    usage=USAGE,
    timings=TIMINGS,
    code="internal",
    detail="d",
    stop_token_id=2,
    numerics=Numerics("n3", is_exact=True),
)
DELTA = actions.Delta(
    request_id="r1",
    offset=4,
    token_ids=[11, 49_151],
    logprobs=[LOGPROB],
    finished=FINISHED,
    prompt=PROMPT,
)
PHASES = serving.Phases(
    total_s=36.0,
    routed_s=1.0,
    granted_s=2.0,
    prefilled_s=3.0,
    transferred_s=4.0,
    admitted_s=5.0,
    first_token_s=10.0,
    decoded_s=11.0,
)
ENDED = serving.Ended(
    reason="error",
    usage=USAGE,
    phases=PHASES,
    strategy="balanced",
    engines=["e1", "e2"],
    code="cache_full",
    detail="d",
    field="f",
    retry_after_s=1.5,
    stop_token_id=2,
    strategy_version=3,
    numerics=Numerics("n4", is_exact=True),
    why="w",
    capped_to=9,
    share="canary",
    num_moves=2,
    alone="a",
    heaps=["shm"],
)
OUTPUT = serving.Output(
    request_id="r1",
    offset=4,
    token_ids=[11],
    logprobs=[LOGPROB],
    ended=ENDED,
    numerics=Numerics("n5", is_exact=True),
    served=serving.Served(strategy="balanced", strategy_version=3, engines=["e1"]),
    prompt=PROMPT,
)
MEMBER = membership.Member(info=INFO, load=LOAD)
LIFE = 1 << 60

CHECK = PairCheck(
    source="e1",
    target="e2",
    outcome="differs",
    differs="cached",
    compared="bits",
    code="c",
    number=7,
    took_s=0.5,
    num_tokens=90,
    age_s=2.5,
    router_id="r1",
)
