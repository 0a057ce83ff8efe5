"""The book of work in flight: whatever requests do, it is the sum of what is open, and zero at the end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microserve.protocol.messages.engine import EngineLoad
from microserve.services.router.engines.load import Account, Load, LoadBook

ENGINES = st.sampled_from(["a", "b", "c"])
PURPOSES = st.sampled_from(["stream", "send 1", "send 2"])


class LoadMachine(RuleBasedStateMachine):
    """Against a naive model: a list of open accounts, each with its own two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoadBook()
        self.accounts: list[Account] = []
        self.tokens: list[dict[tuple[str, str], int]] = []
        self.sequences: list[set[str]] = []
        self.transfers: list[dict[str, tuple[str, str, int]]] = []
        self.open: list[bool] = []

    @rule()
    def open_account(self) -> None:
        self.accounts.append(self.book.open())
        self.tokens.append({})
        self.sequences.append(set())
        self.transfers.append({})
        self.open.append(True)

    @precondition(lambda self: self.accounts)
    @rule(data=st.data(), engine=ENGINES, purpose=PURPOSES, count=st.integers(0, 5000))
    def reserve_prefill(self, data: st.DataObject, engine: str, purpose: str, count: int) -> None:
        i = data.draw(st.integers(0, len(self.accounts) - 1))
        self.accounts[i].reserve_prefill(engine, purpose, count)
        if self.open[i]:
            self.tokens[i][engine, purpose] = count

    @precondition(lambda self: self.accounts)
    @rule(data=st.data(), engine=ENGINES, purpose=PURPOSES)
    def release_prefill(self, data: st.DataObject, engine: str, purpose: str) -> None:
        i = data.draw(st.integers(0, len(self.accounts) - 1))
        self.accounts[i].release_prefill(engine, purpose)
        self.tokens[i].pop((engine, purpose), None)

    @precondition(lambda self: self.accounts)
    @rule(data=st.data(), engine=ENGINES, reserve=st.booleans())
    def sequence(self, data: st.DataObject, engine: str, reserve: bool) -> None:
        i = data.draw(st.integers(0, len(self.accounts) - 1))
        if reserve:
            self.accounts[i].reserve_sequence(engine)
            if self.open[i]:
                self.sequences[i].add(engine)
        else:
            self.accounts[i].release_sequence(engine)
            self.sequences[i].discard(engine)

    @precondition(lambda self: self.accounts)
    @rule(data=st.data(), ends=st.tuples(ENGINES, ENGINES), count=st.integers(1, 5000))
    def begin_transfer(self, data: st.DataObject, ends: tuple[str, str], count: int) -> None:
        i = data.draw(st.integers(0, len(self.accounts) - 1))
        name = f"send {len(self.transfers[i])} {count}"
        if name not in self.transfers[i]:
            self.accounts[i].begin_transfer(name, *ends, count)
            if self.open[i]:
                self.transfers[i][name] = (*ends, count)

    @precondition(lambda self: any(self.transfers))
    @rule(data=st.data())
    def end_transfer(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from([i for i, table in enumerate(self.transfers) if table]))
        name = data.draw(st.sampled_from(sorted(self.transfers[i])))
        for _ in range(2):  # a second end has no effect
            self.accounts[i].end_transfer(name)
        del self.transfers[i][name]

    @precondition(lambda self: self.accounts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.accounts) - 1))
        self.accounts[i].close()
        self.open[i] = False
        self.tokens[i].clear()
        self.sequences[i].clear()
        self.transfers[i].clear()

    @invariant()
    def the_book_is_the_sum(self) -> None:
        self.book.check_integrity()
        for engine in "abc":
            tokens = sum(n for table in self.tokens for (e, _), n in table.items() if e == engine)
            sequences = sum(engine in table for table in self.sequences)
            load = self.book.load(engine, EngineLoad())
            assert load == Load(tokens, sequences)
            sends = [send for table in self.transfers for send in table.values()]
            assert load.transfer_tokens == sum(n for a, b, n in sends if engine in (a, b))

    def teardown(self) -> None:
        for account in self.accounts:
            account.close()
        assert self.book.is_zero


TestLoad = LoadMachine.TestCase


@given(st.integers(0, 3), st.sampled_from(["return", "raise", "cancel", "timeout"]))
def test_no_way_out_of_a_request_leaks(steps: int, way: str) -> None:
    book = LoadBook()

    async def request() -> None:
        with book.open() as account:
            for step in range(steps):
                account.reserve_prefill("a", f"send {step}", 100)
                account.reserve_sequence("b")
                await asyncio.sleep(0)
            if way == "raise":
                raise ValueError
            if way in ("cancel", "timeout"):
                await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(request())
        for _ in range(steps + 2):
            await asyncio.sleep(0)
        if way == "timeout":
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await task
        elif way == "cancel":
            task.cancel()
        with suppress(ValueError, asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert book.is_zero


def test_what_the_engine_reports_counts_when_it_is_more() -> None:
    book = LoadBook()
    reported = EngineLoad(num_running=2, num_waiting=1, queued_prefill_tokens=500)
    with book.open() as account:
        account.reserve_prefill("a", "stream", 700)
        account.reserve_sequence("a")
        assert book.load("a", reported) == Load(700, 3)
    assert book.load("a", reported) == Load(500, 3)


def test_what_only_the_engine_can_say_is_as_it_says() -> None:
    reported = EngineLoad(num_running=2, free_blocks=7, prefill_tokens_per_s=900.0, decode_step_s=0.05)
    load = LoadBook().load("a", reported)
    assert (load.running, load.free_blocks) == (2, 7)
    assert (load.prefill_tokens_per_s, load.decode_step_s) == (900.0, 0.05)
    assert load == Load(0, 2), "which is no reason to prefer it"


def test_less_prefill_work_comes_before_fewer_sequences() -> None:
    assert Load(0, 9) < Load(1, 0) < Load(1, 2)


def test_what_is_admitted_counts_as_unplaced_until_its_prefill_is_placed() -> None:
    book = LoadBook()
    with book.open(700) as one, book.open(50) as two:
        assert book.unplaced_tokens == 750
        one.reserve_sequence("a")  # a grant is asked for: who computes is not yet known
        assert book.unplaced_tokens == 750
        one.reserve_prefill("b", "send 1", 600)
        assert book.unplaced_tokens == 50
        two.reserve_prefill("b", "stream", 0)
        assert (book.unplaced_tokens, book.own("b")) == (0, Load(600, 1))
        assert book.own("a") == Load(0, 1)
        book.check_integrity()
    with book.open(10):
        assert book.unplaced_tokens == 10
    assert book.is_zero


def test_equal_prompts_count_once_on_an_engine() -> None:
    book = LoadBook()
    accounts = [book.open(800, prompt=7) for _ in range(4)]
    other = book.open(100, prompt=8)
    assert book.unplaced_tokens == 900
    assert book.shares("a", 7) and book.shares("b", 7) and not book.shares("a", 9)
    for account in accounts:
        account.reserve_sequence("a")
        account.reserve_prefill("a", "stream", 800)
    other.reserve_prefill("a", "stream", 100)
    assert book.own("a") == Load(900, 5)
    assert book.shares("a", 7) and not book.shares("b", 7)
    accounts[1].reserve_prefill("b", "stream", 800)  # another engine has to compute it too
    assert book.own("b") == Load(800, 1)
    accounts[0].release_prefill("a", "stream")
    assert not book.shares("a", 7)
    assert book.own("a") == Load(100, 5)
    book.check_integrity()
    for account in (*accounts, other):
        account.close()
        book.check_integrity()
    assert book.is_zero


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["open", "prefill", "release", "sequence", "leave", "close"]),
            ENGINES,
            PURPOSES,
            st.integers(0, 300),
            st.sampled_from([None, 1, 2]),
        ),
        max_size=60,
    )
)
def test_equal_prompts_never_leave_the_book_different_from_its_accounts(
    operations: list[tuple[int, str, str, str, int, int | None]],
) -> None:
    book = LoadBook()
    accounts: dict[int, Account] = {}
    for number, name, engine, purpose, count, prompt in operations:
        if name == "open" and number not in accounts:
            accounts[number] = book.open(count, prompt)
        account = accounts.get(number)
        if account is None:
            continue
        match name:
            case "prefill":
                account.reserve_prefill(engine, purpose, count)
            case "release":
                account.release_prefill(engine, purpose)
            case "sequence":
                account.reserve_sequence(engine)
            case "leave":
                account.release_sequence(engine)
            case "close":
                account.close()
                del accounts[number]
        book.check_integrity()
    for account in accounts.values():
        account.close()
    book.check_integrity()
    assert book.is_zero
