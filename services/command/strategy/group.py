"""The group ``microserve strategy``: all of its commands, in one place."""

from __future__ import annotations

import click

from microserve.services.command.strategy.change import promote, retire, rollback, set_
from microserve.services.command.strategy.check import check
from microserve.services.command.strategy.new import new
from microserve.services.command.strategy.publish import publish
from microserve.services.command.strategy.view.compare import compare
from microserve.services.command.strategy.view.look import history, list_, show


@click.group()
def strategy() -> None:
    """Write and check strategies, change how a running mesh serves by them, try them on a share."""


for each in (new, check, publish, set_, promote, rollback, retire, list_, show, compare, history):
    strategy.add_command(each)
