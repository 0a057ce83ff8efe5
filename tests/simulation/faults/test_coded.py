"""Worlds in which KV goes by a codec keep every promise, torn, lost and bent payloads among their faults."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from microserve.kvcache.grant.decoding import LaneDecoder
from microserve.kvcache.grant.payload import Bytes, LayerRows
from microserve.kvcache.words import count_of
from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.coded import coded
from microserve.services.simulation.faults.scenario import draw

SEEDS = 60


@pytest.mark.slow
def test_every_promise_holds_in_worlds_with_codecs() -> None:
    broken = {}
    num_complete = num_payloads = num_torn = 0
    for seed in range(SEEDS):
        verdict = run_seed(seed, scenario=coded(draw(seed)))
        num_complete += verdict.outcomes["length"] + verdict.outcomes["stop"]
        num_payloads += verdict.faults["payload"]
        num_torn += verdict.faults["torn write"] + verdict.faults["bent write"]
        if verdict.violations:
            broken[seed] = verdict.violations[:3]
    assert broken == {}
    assert num_complete > 100 and num_payloads > 100 and num_torn > 10


@pytest.mark.slow
def test_a_payload_that_counts_before_it_is_decoded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: what has arrived counts."""

    def arrived(decoder: LaneDecoder, layer: int) -> int:
        word = decoder._heap.load(int(decoder._arrivals[layer]))
        return count_of(word, decoder._grant.generation) or 0

    monkeypatch.setattr(LaneDecoder, "decoded", arrived)
    monkeypatch.setattr(LaneDecoder, "advance", lambda decoder: False)
    verdicts = (run_seed(seed, scenario=coded(draw(seed))) for seed in range(SEEDS))
    violations = [line for verdict in verdicts for line in verdict.violations]
    assert any("taken for whole that were not" in line for line in violations), "a tag gives it away"


@pytest.mark.slow
def test_an_encoder_that_takes_another_layer_s_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the payload is whole, tags and sums are right, and its rows are another layer's."""
    gather = LayerRows.gather

    def first(self: LayerRows, layer: int, blocks: Sequence[int], num_tokens: int) -> tuple[Bytes, Bytes]:
        return gather(self, 0, blocks, num_tokens)

    monkeypatch.setattr(LayerRows, "gather", first)
    verdicts = (run_seed(seed, scenario=coded(draw(seed))) for seed in range(SEEDS))
    assert any("wrong tokens" in line for verdict in verdicts for line in verdict.violations)
