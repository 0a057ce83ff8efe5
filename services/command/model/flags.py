"""What ``--model`` may be: a directory, or a name at the Hub; and how a fetch is shown and fails."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import Failure

if TYPE_CHECKING:
    from microserve.protocol.settings.settings import Settings
    from microserve.services.local.view import View

Command = TypeVar("Command", bound=Callable[..., Any])


def model_flags(text: str) -> Callable[[Command], Command]:
    """``--model DIR|ORG/NAME`` and ``--revision REVISION``, which the command is given as one ``model``."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def call(*args: Any, model: str | None, revision: str | None, **kwargs: Any) -> Any:
            if revision is not None:
                with told():
                    from microserve.services.local.hub.name import with_revision

                    model = with_revision(model, revision)
            return command(*args, model=model, **kwargs)

        named = click.option("--model", metavar="DIR|ORG/NAME[@REVISION]", help=text)
        at = click.option("--revision", help="Branch, tag or commit of that name.  [default: main]")
        return named(at(call))  # type: ignore[return-value]

    return add


def with_model(settings: Settings, *, weights: bool) -> Settings:
    """With a directory for ``model.path``, fetched if need be; ``weights``: False for a tokenizer alone."""
    from microserve.protocol.errors import ConfigError
    from microserve.services.local.hub.name import local_model

    try:
        if not settings.model.path or local_model(settings.model.path) is not None:
            return settings
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    with told() as view:
        from microserve.services.local.hub.resolve import resolve

        return resolve(settings, os.environ, view.progress, weights=weights)


@contextmanager
def told() -> Iterator[View]:
    """Where progress is shown; what goes wrong is told in its words, as click's exception."""
    from microserve.protocol.errors import ConfigError
    from microserve.services.local.demo.model import FetchFailed
    from microserve.services.local.hub.name import HubError
    from microserve.services.local.view import make_view

    view = make_view(as_json=False, stderr=True)
    try:
        yield view
    except ConfigError as error:
        raise WrongFlag(str(error)) from None
    except (FetchFailed, HubError) as error:
        raise Failure(str(error)) from None
    finally:
        view.close()
