"""The command: flags, whether it is a session or one question, exit codes (0 done, 1 no whole answer, 2 a
flag is wrong, 130 Ctrl-C in one question)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from microserve.services.command.client.flags import endpoint_flags, find_endpoint
from microserve.services.command.shared.flags import WrongFlag
from microserve.services.command.shared.terminal import Failure

if TYPE_CHECKING:
    from microserve.services.command.chat.conversation import Wishes
    from microserve.services.command.client.endpoint import Endpoint


@click.command()
@click.argument("question", nargs=-1)
@click.option("--model", default="", help="Whom to ask.  [default: the first that the server has]")
@click.option("--system", default="", help="The system message.")
@click.option("--strategy", default="", help="How the mesh is to serve (x-microserve-strategy).")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy.  [default: the model's own]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: as many as fit]")
@click.option(
    "--tools",
    "tools_file",
    type=click.Path(path_type=Path),
    help="OpenAI's tools as JSON; you are asked for results.",
)
@click.option("--markdown", "draws", is_flag=True, help="Draw answers, block by block.")
@click.option("--no-history", is_flag=True, help="Keep nothing of what is typed.")
@endpoint_flags
def chat(
    config: str | None,
    assignments: tuple[str, ...],
    url: str | None,
    api_key: str | None,
    question: tuple[str, ...],
    model: str,
    system: str,
    strategy: str,
    temperature: float | None,
    max_tokens: int | None,
    tools_file: Path | None,
    draws: bool,
    no_history: bool,
) -> None:
    """Talk with a model: in this terminal, or one QUESTION, or one from standard input.

    With QUESTION, or where input or output is no terminal, one plain answer is printed. "-" reads standard
    input.
    """
    from microserve.protocol.errors import ConfigError
    from microserve.services.command.chat.conversation import Wishes, read_tools

    endpoint = find_endpoint(url, api_key, config, assignments)
    wishes = Wishes(
        model=model, system=system, strategy=strategy, temperature=temperature, max_tokens=max_tokens
    )
    try:
        endpoint.request("GET", "/", headers={"x-microserve-strategy": strategy or "any"})
        if tools_file is not None:
            wishes.tools = read_tools(tools_file.read_bytes())
    except (ConfigError, OSError) as error:
        raise WrongFlag(f"{tools_file}: {error}" if tools_file is not None else str(error)) from None
    text = " ".join(question)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if text == "-" or (not text and not is_terminal):
        text = sys.stdin.buffer.read().decode(errors="surrogateescape").strip()
        if not text:
            raise WrongFlag("there is no question")
    from microserve.services.command.chat.session import NoServer, typed

    wishes.system = typed(wishes.system)
    try:
        if text:
            sys.exit(_ask_once(endpoint, wishes, typed(text), draws))
        _talk(endpoint, wishes, draws, with_history=not no_history)
    except NoServer as error:
        raise Failure(str(error)) from None


def _ask_once(endpoint: Endpoint, wishes: Wishes, text: str, draws: bool) -> int:
    from microserve.services.command.chat.answer import STOPPED
    from microserve.services.command.chat.conversation import Conversation
    from microserve.services.command.chat.screen import Screen
    from microserve.services.command.chat.session import Server

    server = Server(endpoint)
    try:
        wishes.model = server.choose(wishes.model)
        screen = Screen(is_terminal=sys.stdout.isatty(), draws=draws)
        answer = server.ask(Conversation(wishes), {"role": "user", "content": text}, screen)
    except KeyboardInterrupt:
        return 130
    finally:
        server.close()
    if answer.fault == STOPPED:
        return 130
    return 1 if answer.fault else 0


def _talk(endpoint: Endpoint, wishes: Wishes, draws: bool, *, with_history: bool) -> None:
    from microserve.services.command.chat.conversation import Conversation
    from microserve.services.command.chat.editor import Editor, history_file
    from microserve.services.command.chat.order import ORDERS
    from microserve.services.command.chat.screen import Screen
    from microserve.services.command.chat.session import Server, Session

    server = Server(endpoint)
    try:
        wishes.model = server.choose(wishes.model)
        screen = Screen(is_terminal=True, draws=draws)
        history = history_file() if with_history else None
        with Editor(history, [f"/{name}" for name in ORDERS]) as editor:
            Session(server, Conversation(wishes), screen, editor).run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        server.close()
