"""``GenerateRequest``: what is to be generated, said in the core's own words.

Owns the type. It goes through a pipe as JSON where a helper has read the body, and is equal to what it was.
Nothing in it is one API's own, but the names by which its client called things: an error names those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from microserve.gateway.grammar.asked import Asked
from microserve.gateway.text.options import SHOWN_BY_DEFAULT, TextOptions

MAX_CHOICES = 256
"""Prompts times ``n`` of one HTTP request."""

Role = Literal["system", "user", "assistant", "tool"]
Mode = Literal["auto", "required", "named"]


class Call(msgspec.Struct, omit_defaults=True):
    """A call of a tool that the assistant has made."""

    id: str
    name: str
    arguments: dict[str, Any]


class Turn(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One message of a conversation; all parts of its text are one."""

    role: Role
    content: str | None
    """None: of a turn of calls and nothing else."""
    name: str | None = None
    tool_call_id: str | None = None
    """Of a tool: the call that this is the result of."""
    thought: str = ""
    calls: list[Call] = []


class TemplateOption(msgspec.Struct):
    """The client's value for a variable of the chat template."""

    value: Any
    field: str
    """By which it was asked for."""
    is_hint: bool = False
    """Where the template does not look at it, the client is told, and not refused."""


class Conversation(msgspec.Struct, tag="conversation", omit_defaults=True):
    """One prompt: what the model's chat template makes of these."""

    turns: list[Turn]
    options: dict[str, TemplateOption] = {}
    """By the variable's name."""
    continues: bool = False
    """The answer goes on with the text of the last turn."""
    folds_system: bool = False
    """Where a template takes no ``system`` but the first turn, later ones are the user's."""


class Texts(msgspec.Struct, tag="texts", omit_defaults=True):
    """Prompts as they are."""

    texts: list[str]
    add_special_tokens: bool = True
    """Those that the tokenizer puts around a text."""


class Ids(msgspec.Struct, tag="ids"):
    """Prompts that are token ids already."""

    prompts: list[list[int]]


Prompt = Conversation | Texts | Ids


class SamplingWish(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How tokens are to be chosen; None: as the model's defaults say. Each is within its field's bounds."""

    max_tokens: int | None = None
    is_max_cut: bool = False
    """Of ``max_tokens`` that the context has no room for, there are as many as fit."""
    default_max_tokens: int | None = None
    """Where ``max_tokens`` is not said, and never too many for the context; None: as many as fit."""
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1 and 0 are both "off"."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    """Any 64 bits, signed."""
    logprobs: int | None = None
    """None: none; else beside each token's own those of so many others."""
    prompt_logprobs: int | None = None
    """Likewise, of the prompt's own tokens."""
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that an answer may call."""

    parameters: dict[str, Any] | None
    """JSON Schema of its arguments, an object; None: nothing is said of them."""
    is_strict: bool
    """A call must fit the schema as it is."""
    field: str
    """Where the schema came from."""


class ToolUse(msgspec.Struct, omit_defaults=True):
    """Tools that an answer may call; a request without any has none of these."""

    shown: list[dict[str, Any]]
    """As templates expect them: ``{"type": "function", "function": {"name", "description", "parameters"}}``,
    each with a name of its own and ``parameters`` that are an object if there are any."""
    callable: list[str]
    """Names; fewer than are shown where the client says so."""
    mode: Mode = "auto"
    one_only: bool = False
    """At most one call."""
    schema_field: str = "function.parameters"
    """Of a tool, as the client wrote it: where its schema is."""

    def functions(self) -> dict[str, Function]:
        """What may be called, by name, in the order of :attr:`callable`."""
        at_of = {tool["function"]["name"]: at for at, tool in enumerate(self.shown)}
        return {name: self._function(at_of[name]) for name in self.callable}

    def _function(self, at: int) -> Function:
        function = self.shown[at]["function"]
        field = f"tools[{at}].{self.schema_field}"
        return Function(function.get("parameters"), bool(function.get("strict")), field)

    @property
    def must_match(self) -> bool:
        """Does the client ask for what only a grammar can promise?"""
        return self.mode != "auto" or any(each.is_strict for each in self.functions().values())


class GenerateRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request of a client, with all its choices."""

    model: str
    prompt: Prompt
    """Empty where it has become token ids elsewhere."""
    sampling: SamplingWish = msgspec.field(default_factory=SamplingWish)
    n: int = 1
    """Choices of each prompt."""
    best_of: int | None = None
    """So many are generated, and the ``n`` likeliest are told; None: as many as are told."""
    shows_prompt: bool = False
    """Every choice begins with its prompt, and so do its tokens' log-probabilities."""
    names_by_id: bool = False
    """Beside log-probabilities a token is told by its id, not by its text."""
    stop: list[str] = []
    stream: bool = False
    shows_usage: bool = False
    """Of a stream: its tokens are told at the end."""
    text: TextOptions = SHOWN_BY_DEFAULT
    truncate_prompt_tokens: int | None = None
    """Of longer prompts the last so many are kept; -1: as many as leave room for the output."""
    gives_way: int = 0
    """By so much less important than its key's requests are."""
    grammar: Asked | None = None
    """What the answer's text must be; not yet checked."""
    hides_thoughts: bool = False
    """The client does not want to see what the model thinks."""
    tools: ToolUse | None = None
    salt: str = ""
    """Requests of others share no prefix cache with those of the same salt."""
    labels: dict[str, Any] = {}
    """``attributes.FIELDS`` and ``metadata``, as the client wrote them: they change no token."""
    warnings: list[str] = []
    """What was asked for and is not done as asked, in the client's words."""
    echo: dict[str, Any] = {}
    """What the API's own format is to tell again; nobody else looks at it."""
    context: bytes = b""
    """Of an API that keeps answers: what is kept of the question, in the API's own form."""
    names: dict[str, str] = {}
    """Fields that its client calls otherwise than they are called here; ``prompt`` is what becomes it."""

    @property
    def num_generated(self) -> int:
        """Choices of each prompt, told or not."""
        return self.best_of or self.n

    def name_of(self, field: str) -> str:
        """The client's name of it."""
        return self.names.get(field, field)

    def drop_prompt(self) -> None:
        """What is as large as a body has done its work; of which kind it was, stays."""
        prompt = self.prompt
        if isinstance(prompt, Conversation):
            self.prompt = Conversation([], continues=prompt.continues)
        else:
            self.prompt = Ids([])
