"""What a router says of a strategy, as an author's mistake; and what is no mistake of the author's."""

from __future__ import annotations

import pytest

from microserve.services.simulation.trial.blame import Told, blame, file_of
from microserve.services.simulation.trial.dry_run import try_strategy
from tests.support.router.hostile_strategies import HEAD

SERVE = "    yield mesh.pick(None, request).start_generate(request)\n"


CASES = {
    "wrong-yield": [
        ("    for tokens in mesh.pick(None, request).start_generate(request): yield tokens\n", "`async for`"),
        ("    yield await mesh.pick(None, request).start_generate(request)\n", "without `await`"),
    ],
    "raises": [
        ("    1 / mesh.load(mesh.pick(None, request)).uncached_tokens\n" + SERVE, "0 as long as nothing"),
        ("    mesh.state['count'] += 1\n" + SERVE, "mesh.state.setdefault"),
    ],
    "swallowed-cancellation": [("    asyncio.create_task(deaf())\n" + SERVE, "tasks behind")],
    "nobodys-label": [
        ("    mesh.pick('nobody', request, strict=True)\n" + SERVE, "no engine with the label")
    ],
}


@pytest.mark.parametrize(
    ("mistake", "body", "says"), [(name, *each) for name in CASES for each in CASES[name]]
)
def test_the_sentence_says_what_mends_it(mistake: str, body: str, says: str) -> None:
    deaf = "async def deaf():\n    while True:\n        try: await asyncio.sleep(1)\n"
    deaf += "        except asyncio.CancelledError: pass\n\n"
    source = HEAD.replace("@strategy", deaf + "@strategy") + body
    trial = try_strategy("mine", source, {}, [["prefill"], ["decode"]])
    assert [each.mistake for each in trial.found] == [mistake], trial.found
    assert says in trial.found[0].text
    assert trial.found[0].line, trial.found


def test_refusing_on_purpose_is_worth_a_note_and_no_mistake() -> None:
    refuse = "    from microserve.services.router.authoring import QueueFull\n"
    refuse += "    if request.num_tokens > 2000: raise QueueFull('too long', retry_after_s=1.0)\n"
    trial = try_strategy("mine", HEAD + refuse + SERVE, {}, [[], []])
    assert trial.found == []
    assert any("refused: too long, with prompts of up to 8192 tokens" in note for note in trial.notes)


def test_a_strict_label_that_a_lost_engine_bore_is_no_mistake() -> None:
    body = "    yield mesh.pick('big', request, strict=True).start_generate(request)\n"
    trial = try_strategy("mine", HEAD + body, {}, [["small"], ["big"]])
    assert trial.found == []
    assert any("no engine with the label 'big'" in note for note in trial.notes)


def test_a_place_of_others_is_no_place() -> None:
    sources = {"__init__.py": "x = 1\n"}
    found = blame(Told("ValueError: boo", "asyncio/tasks.py:3"), sources, file_of)
    assert (found.file, found.line, found.text.startswith("ValueError: boo: ")) == ("", 0, True)
