"""The table of rights is whole, and is that of WIRE.md."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from microserve.protocol.errors import NotPermitted, error_for
from microserve.protocol.messages import engine, index, router
from microserve.protocol.messages.strategy import control
from microserve.protocol.security import rights
from microserve.protocol.security.rights import RIGHTS, Entrance, Role
from tests.test_packaging import ROOT

STATED = [Role.INDEX, Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR]


def name_of(action: Any) -> str:
    return action if isinstance(action, str) else f"`{action.__name__}`"


def test_every_message_that_is_sent_to_a_bound_socket_has_its_row() -> None:
    requests = [
        *get_args(engine.EngineRequest),
        *get_args(router.RouterRequest),
        *get_args(index.IndexRequest),
    ]
    assert set(requests) == {action for action in RIGHTS if not isinstance(action, str)}


def test_the_table_is_that_of_the_contract() -> None:
    text = (ROOT / "protocol/WIRE.md").read_text().partition("### 9.1")[2].partition("\n##")[0]
    header, _, *rows = re.findall(r"^\|(.+)\|$", text, re.M)
    assert [each.strip() for each in header.split("|")][1:] == [str(role) for role in STATED]
    said = {
        cells[0].strip(): {role for role, cell in zip(STATED, cells[1:], strict=True) if "yes" in cell}
        for cells in (row.split("|") for row in rows)
    }
    assert said == {name_of(action): set(roles) for action, roles in RIGHTS.items()}


@pytest.mark.parametrize("action", RIGHTS, ids=name_of)
def test_a_service_of_no_stated_role_may_all_but_change_and_who_has_no_keys_everything(
    action: Any,
) -> None:
    assert rights.may(frozenset({Role.SERVICE}), action) == (action is not control.Change)
    assert rights.may(rights.EVERYBODY, action)
    assert not rights.may(rights.NOBODY, action)


def test_a_key_with_two_roles_has_the_rights_of_both() -> None:
    both = frozenset({Role.ENGINE, Role.OPERATOR})
    assert rights.may(both, index.Register) and rights.may(both, control.Change)
    assert not rights.may(both, router.Generate)


def test_what_is_refused_names_the_action_and_the_role() -> None:
    with pytest.raises(NotPermitted, match="Change is not for engine and gateway"):
        rights.check(frozenset({Role.GATEWAY, Role.ENGINE}), control.Change)
    assert isinstance(error_for("not_permitted", "no"), NotPermitted)


@pytest.mark.parametrize(
    ("entrance", "admitted"),
    [
        (Entrance.ENGINE, {Role.INDEX, Role.ROUTER, Role.OPERATOR}),
        (Entrance.EVENTS, {Role.INDEX, Role.ROUTER, Role.OPERATOR}),
        (Entrance.REPLAY, {Role.INDEX, Role.ROUTER, Role.OPERATOR}),
        (Entrance.ROUTER, {Role.GATEWAY}),
        (Entrance.INDEX, {Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR}),
        (Entrance.ANY, set(STATED)),
    ],
)
def test_a_socket_lets_in_whom_it_has_something_for(entrance: Entrance, admitted: set[Role]) -> None:
    assert {role for role in STATED if rights.may_enter(frozenset({role}), entrance)} == admitted
    assert rights.may_enter(frozenset({Role.SERVICE}), entrance)
    assert not rights.may_enter(rights.NOBODY, entrance)
