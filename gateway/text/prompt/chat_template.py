"""A model's chat template: messages -> prompt text, by sandboxed jinja2, without transformers.

Owns the jinja environment that published templates expect. Templates come with the model; messages come from
clients and are data only. A template is a program, and the sandbox bounds neither its time nor its memory
(even compiling evaluates its constants): a gateway only reads one, and has it run by a helper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from microserve.protocol.errors import ConfigError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_CHARS = 1 << 20
REFUSED = "the model's chat template refused the messages"
"""How it begins what is said of such messages."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: marks the assistant's text for training; plain here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja2's own filter escapes ``<`` and ``&`` for HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One template and the special tokens that it may name; compiled when it is first rendered."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], with_tools: ChatTemplate | None = None
    ) -> None:
        """``with_tools``: goes for conversations that have tools. Raises :class:`ConfigError` for what is no
        template."""
        self._with_tools = with_tools
        self._environment = environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._check()

    def _check(self) -> None:
        """What can be said without running anything of it."""
        try:
            if len(self.source) > MAX_TEMPLATE_CHARS:
                raise jinja2.TemplateError(f"it has more than {MAX_TEMPLATE_CHARS} characters")
            parsed = self._environment.parse(self.source)
            for kind, known in (
                (jinja2.nodes.Filter, self._environment.filters),
                (jinja2.nodes.Test, self._environment.tests),
            ):
                for node in parsed.find_all(kind):
                    if node.name not in known:
                        raise jinja2.TemplateError(f"there is no {kind.__name__.lower()} {node.name!r}")
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the model's chat template is broken: {error}", field="model.path") from None

    def knows(self, name: str) -> bool:
        """Does it name this variable? What it does not, changes nothing."""
        return re.search(rf"\b{re.escape(name)}\b", self.sources) is not None

    @property
    def sources(self) -> str:
        """All that it is made of."""
        return self.source if self._with_tools is None else f"{self.source}\n{self._with_tools.sources}"

    @cached_property
    def _template(self) -> jinja2.Template:
        return self._environment.from_string(self.source)

    @classmethod
    def of_model(cls, directory: str | Path) -> ChatTemplate | None:
        """As :meth:`load`, with all that it needs read from the model's directory."""
        root = Path(directory)
        config = read_json(root / "tokenizer_config.json")
        return cls.load(root, config, special_tokens(read_json(root / "special_tokens_map.json") | config))

    @classmethod
    def load(
        cls, directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> ChatTemplate | None:
        """From ``chat_template.jinja``, else from ``tokenizer_config.json``; None if the model has none."""
        file = directory / TEMPLATE_FILE
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special_tokens)
        source = config.get("chat_template")
        if isinstance(source, list):
            # Several named ones, e.g. one for tool use; "default" is the plain conversation.
            named = {str(entry.get("name")): entry.get("template") for entry in source}
            source, for_tools = named.get("default"), named.get("tool_use")
            if isinstance(source, str) and isinstance(for_tools, str):
                return cls(source, special_tokens, cls(for_tools, special_tokens))
        return cls(source, special_tokens) if isinstance(source, str) else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, ending where the assistant's answer begins. ``options``: the template's own variables,
        and ``documents`` and ``add_generation_prompt`` (true unless it says otherwise).

        Raises :class:`InvalidRequest` when the template refuses the messages.
        """
        if tools and self._with_tools is not None:
            return self._with_tools.render(messages, tools, options)
        variables: dict[str, Any] = {"add_generation_prompt": True, "documents": None}
        variables |= {**self._special_tokens, **(options or {}), "messages": messages, "tools": tools or None}
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is a program: it may raise anything
            raise InvalidRequest(f"{REFUSED}: {error}", field="messages") from None


def read_json(file: Path) -> dict[str, Any]:
    """The map in ``file``; empty without one. Raises :class:`ConfigError`."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}", field="model.path") from None
    return content if isinstance(content, dict) else {}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names that templates use; a value is the text, or an added token's description with ``content``."""
    found: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
