"""Who speaks next: questions, orders, answers and results of tools, until the end of the input.

Owns the order of things and what an order does. Ctrl-C ends what runs, an answer or a line, and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.services.command.chat.answer import Answer
from microserve.services.command.chat.conversation import Conversation, Message
from microserve.services.command.chat.editor import Editor
from microserve.services.command.chat.order import NONE, ORDERS, Order, Unknown, help_lines, parse
from microserve.services.command.chat.screen import Screen
from microserve.services.command.chat.stream import answer_to
from microserve.services.command.client.chunk import error_in
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client
from microserve.services.command.shared.terminal import echo


class NoServer(Exception):
    """It cannot be asked, or serves nothing of that name."""


class Server:
    """A client and its loop, for who is not in one: each call runs the loop until it is over."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect())
        self.context_lens: dict[str, int] = {}
        """Tokens, by model; of those that say."""

    async def _connect(self) -> Client:
        return Client(self.endpoint)

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def models(self) -> list[str]:
        """Raises :class:`NoServer`."""
        try:
            status, body = self._runner.run(self._client.fetch("GET", "/v1/models"))
            if status != 200:
                raise NoServer(error_in(body) or f"{self.endpoint.url}/v1/models answered {status}")
            cards = msgspec.json.decode(body)["data"]
            self.context_lens = {
                str(card["id"]): length
                for card in cards
                if isinstance(length := card.get("max_model_len"), int)
            }
            return [str(card["id"]) for card in cards]
        except ConnectionError as error:
            raise NoServer(str(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NoServer(f"{self.endpoint.url}/v1/models does not list models") from None

    def choose(self, wanted: str) -> str:
        """``wanted`` if it is served; empty: the first there is. Raises :class:`NoServer`."""
        names = self.models()
        if not names:
            raise NoServer(f"{self.endpoint.url} serves no model")
        if wanted and wanted not in names:
            raise NoServer(f"no model {wanted!r} (there are: {', '.join(names)})")
        return wanted or names[0]

    def ask(self, conversation: Conversation, question: Message | None, screen: Screen) -> Answer:
        """Shown, and in the conversation."""
        body = conversation.body(question)
        answer = self._runner.run(answer_to(self._client, body, conversation.wishes.strategy, screen.show))
        conversation.answered(question, answer)
        screen.finish(answer)
        return answer


class Session:
    """At a terminal."""

    def __init__(self, server: Server, conversation: Conversation, screen: Screen, editor: Editor) -> None:
        self._server = server
        self._conversation = conversation
        self._screen = screen
        self._editor = editor

    def run(self) -> None:
        """Until ``/quit`` or the end of the input."""
        wishes = self._conversation.wishes
        self._screen.note(f"{wishes.model} at {self._server.endpoint.url}; /help; Ctrl-D ends")
        while True:
            try:
                text = typed(self._editor.read())
                if not text.strip():
                    continue
                self._editor.keep(text)
                match parse(text):
                    case Order("quit"):
                        return
                    case Order() as order:
                        self._obey(order)
                    case Unknown(name, meant):
                        hint = f"; did you mean /{meant}?" if meant else "; /help lists them"
                        self._screen.problem(f"no order /{name}{hint}")
                    case str(question):
                        self._talk({"role": "user", "content": question})
            except EOFError:
                echo()
                return
            except KeyboardInterrupt:
                echo()
            except UnicodeDecodeError:
                self._screen.problem("what was typed is not text in this terminal's encoding")
            except (NoServer, ConfigError) as error:
                self._screen.problem(str(error))

    def _talk(self, question: Message | None) -> None:
        """A question, and the results of what is called meanwhile."""
        answer = self._server.ask(self._conversation, question, self._screen)
        while answer.calls and not answer.fault:
            if not self._results_of(answer):
                self._conversation.undo()
                self._screen.note("(without a result of its tools: the question is taken back)")
                return
            answer = self._server.ask(self._conversation, None, self._screen)

    def _results_of(self, answer: Answer) -> bool:
        """False: there is none."""
        try:
            for call in answer.calls.values():
                result = typed(self._editor.read(f"{_prompt(call.name)}= "))
                self._conversation.tool_result(call.id, result)
        except (EOFError, KeyboardInterrupt):
            echo()
            return False
        return True

    # --- orders ------------------------------------------------------------------------------------

    def _obey(self, order: Order) -> None:
        doing: dict[str, Callable[[str], None]] = {
            "help": lambda _: echo("\n".join(help_lines())),
            "model": self._model,
            "system": lambda text: self._wish("system", text, str),
            "strategy": lambda text: self._wish("strategy", text, _strategy),
            "temperature": lambda text: self._wish("temperature", text, _temperature),
            "max_tokens": lambda text: self._wish("max_tokens", text, _max_tokens),
            "clear": self._clear,
            "undo": self._undo,
            "retry": self._retry,
            "save": self._save,
            "load": self._load,
            "tokens": self._tokens,
            "markdown": self._markdown,
        }
        assert doing.keys() | {"quit"} == ORDERS.keys()
        try:
            doing[order.name](order.argument)
        except OSError as error:
            self._screen.problem(f"{order.argument}: {error.strerror}")

    def _wish(self, name: str, text: str, read: Callable[[str], Any]) -> None:
        """Show, set, or take back."""
        wishes = self._conversation.wishes
        if text:
            default = msgspec.structs.asdict(type(wishes)())[name]
            setattr(wishes, name, default if text == NONE else read(text))
        value = getattr(wishes, name)
        self._screen.note(f"{name}: {value if value not in (None, '') else '(not set)'}")

    def _model(self, name: str) -> None:
        if name:
            self._conversation.wishes.model = self._server.choose(name)
        for each in self._server.models():
            echo(f"{'*' if each == self._conversation.wishes.model else ' '} {each}")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._screen.note("(forgotten)")

    def _undo(self, _: str) -> None:
        question = self._conversation.undo()
        self._screen.note(f"(taken back: {_short(question)})" if question else "(nothing to take back)")

    def _retry(self, _: str) -> None:
        question = self._conversation.undo()
        if question is None:
            return self._screen.note("(nothing to ask again)")
        self._screen.note(f"> {_short(question)}")
        return self._talk(question)

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("/save FILE")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(os.path.expanduser(path), flags, 0o600), "wb") as file:
            file.write(self._conversation.saved())
        self._screen.note(f"({len(self._conversation.messages)} messages in {path})")

    def _load(self, path: str) -> None:
        if not path:
            raise ConfigError("/load FILE")
        with open(os.path.expanduser(path), "rb") as file:
            self._conversation.load(file.read())
        self._screen.note(f"({len(self._conversation.messages)} messages)")
        self._conversation.wishes.model = self._server.choose(self._conversation.wishes.model)

    def _tokens(self, _: str) -> None:
        chat = self._conversation
        used = chat.num_prompt_tokens + chat.num_answer_tokens
        context = self._server.context_lens.get(chat.wishes.model)
        of = f" of {context} that fit" if context else ""
        self._screen.note(
            f"last: prompt {chat.num_prompt_tokens} + answer {chat.num_answer_tokens} = {used}{of}; "
            f"in all: {chat.num_all_tokens}"
        )

    def _markdown(self, _: str) -> None:
        self._screen.draws = not self._screen.draws
        self._screen.note(
            f"answers are {'drawn block by block' if self._screen.draws else 'shown as they come'}"
        )


def typed(text: str) -> str:
    """As it can be sent: what was no character is the sign for that."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _strategy(text: str) -> str:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"{text!r} is not the name of a strategy")
    return text


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise ConfigError(f"temperature is a number from 0 to 2, not {text!r}")
    return value


def _max_tokens(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"max_tokens is a number of at least 1, not {text!r}")
    return int(text)


def _short(question: Message) -> str:
    text = " ".join(str(question.get("content")).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _prompt(name: str) -> str:
    """A tool's name where readline prints it: nothing there escapes."""
    return "".join(each for each in name if each.isprintable())
