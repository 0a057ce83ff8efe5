"""How families of models mark their thoughts and calls: a few lines each, and how a template shows which.

Owns literals only: a pattern at a region's beginning takes a time that grows with the square of a run of
white space, or gives another answer for another cut of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from microserve.gateway.parsing import calls
from microserve.gateway.parsing.calls import Notation
from microserve.gateway.parsing.openness import Openness, Value, Values
from microserve.gateway.parsing.typed import Types
from microserve.gateway.parsing.written.frame import Frame, Gemma, Parameters


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """One way of writing calls."""

    notation: Notation
    opens: tuple[str, ...]
    closes: tuple[str, ...] = ()
    """Without any, a call goes on to the answer's end."""
    stray: tuple[str, ...] = ()
    """Markers around calls, that are nothing by themselves."""
    inner: tuple[str, ...] = ()
    """Markers within a call."""
    kept: tuple[str, ...] = ()
    """Of ``opens``, those that are a part of the call."""
    bare: str = ""
    """An answer that begins with one of these characters is calls as a whole, if it can be read so."""
    values: tuple[Value, ...] = ()
    """Around values, where a call is no JSON as a whole: within one no marker ends the call."""
    id_chars: int = 0
    """Letters and digits of an id, where templates insist on it; 0: OpenAI's form."""
    frame: Frame | None = None
    """None: calls cannot be made to be."""
    each: tuple[str, ...] = ()
    """Ends of the calls of one region."""
    messages: Messages | None = None
    """Calls are messages of an answer that is made of these, thoughts too."""

    def openness(self, types: Mapping[str, Types]) -> Openness:
        """Of one call that is no JSON."""
        return Values(self.values, types)

    def end_of_whole(self, text: str) -> int:
        """Of a region that is cut off: where its last whole call ends; 0 without one."""
        return max((at + len(end) for end in self.each if (at := text.rfind(end)) >= 0), default=0)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """One way of marking what is thought before the answer."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Messages:
    """Harmony: an answer is messages, each with a header that says what it is."""

    opens: tuple[str, ...] = ("<|start|>", "<|channel|>")
    close: str = "<|message|>"
    ends: tuple[str, ...] = ("<|end|>", "<|call|>", "<|return|>")
    inner: tuple[str, ...] = ("<|constrain|>",)
    final: str = "<|channel|>final<|message|>"
    """Before the message that is the answer."""


HARMONY = Messages()

TOOLS: Mapping[str, ToolFamily] = {
    "qwen": ToolFamily(
        calls.qwen,
        ("<tool_call>", "<function="),
        ("</tool_call>",),
        ("</tool_call>",),
        kept=("<function=",),
        values=(Value("<parameter=", "</parameter>"),),
        frame=Frame('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n"),
    ),
    "glm": ToolFamily(
        calls.glm,
        ("<tool_call>",),
        ("</tool_call>",),
        ("</tool_call>",),
        ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        values=(Value("<arg_value>", "</arg_value>", calls.glm_is_json),),
        frame=Frame(
            "<tool_call>",
            ("\n", ""),
            "</tool_call>",
            ("\n", ""),
            parameters=Parameters(
                "<arg_key>",
                ("</arg_key>\n<arg_value>", "</arg_key><arg_value>"),
                ("</arg_key>\n<arg_value>", "</arg_key><arg_value>"),
                "</arg_value>",
                ("\n", ""),
                banned="</arg_value>",
                not_in_names="<>\n",
            ),
        ),
    ),
    "llama": ToolFamily(
        calls.in_python,
        ("<|python_tag|>", "<|python_start|>"),
        ("<|python_end|>",),
        ("<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>"),
        kept=("<|python_tag|>", "<|python_start|>"),
        bare="{[",
        frame=Frame('{"name": "', '", "parameters": ', "}", "; "),
    ),
    "mistral": ToolFamily(
        calls.named_json,
        ("[TOOL_CALLS]",),
        (),
        ("</s>",),
        ("[ARGS]", "[CALL_ID]"),
        id_chars=9,
        frame=Frame("[TOOL_CALLS]", "[ARGS]", between="", needs=("[ARGS]",)),
    ),
    "deepseek": ToolFamily(
        calls.deepseek,
        ("<｜tool▁call▁begin｜>",),
        ("<｜tool▁call▁end｜>",),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
        frame=Frame(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
    ),
    "deepseek_dsml": ToolFamily(
        calls.dsml,
        ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜ calls>"),
        ("</｜DSML｜function_calls>", "</｜DSML｜tool_calls>", "</｜DSML｜ calls>"),
        values=(
            Value('string="true">', "</｜DSML｜"),
            Value('string="false">', "</｜DSML｜", is_json=True),
        ),
        inner=("｜DSML｜",),
        each=("</｜DSML｜invoke>", "</｜DSML｜ invoke>"),
        frame=Frame(
            ('<｜DSML｜invoke name="', '<｜DSML｜ invoke name="'),
            '">\n',
            ("</｜DSML｜invoke>\n", "</｜DSML｜ invoke>\n"),
            "",
            tuple(
                f"{lead}<｜DSML｜{name}>\n"
                for lead in ("", "\n\n")
                for name in ("function_calls", "tool_calls", " calls")
            ),
            tuple(f"</｜DSML｜{name}>" for name in ("function_calls", "tool_calls", " calls")),
            parameters=Parameters(
                ('<｜DSML｜parameter name="', '<｜DSML｜ parameter name="'),
                '" string="true">',
                '" string="false">',
                ("</｜DSML｜parameter>", "</｜DSML｜ parameter>"),
                "\n",
                banned="</｜DSML｜",
                not_in_names='"<>\n',
            ),
        ),
    ),
    "kimi": ToolFamily(
        calls.kimi,
        ("<|tool_call_begin|>",),
        ("<|tool_call_end|>",),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_end|>"),
        ("<|tool_call_argument_begin|>",),
        frame=Frame(
            "<|tool_call_begin|>functions.",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "",
            before="<|tool_calls_section_begin|>",
            after="<|tool_calls_section_end|>",
            numbered=":",
        ),
    ),
    "kimi_xtml": ToolFamily(
        calls.kimi_xtml,
        ("<|open|>call",),
        ("<|close|>call<|sep|>",),
        (
            *(f"<|{mark}|>{name}<|sep|>" for mark in ("open", "close") for name in ("response", "tools")),
            *("<|close|>message<|sep|>", "<|end_of_msg|>"),
        ),
        ("<|open|>", "<|close|>", "<|sep|>"),
        frame=Frame(
            '<|open|>call tool="',
            '"<|sep|>',
            "<|close|>call<|sep|>",
            "",
            "<|open|>tools<|sep|>",
            ("<|close|>tools<|sep|>", "<|close|>tools<|sep|><|close|>message<|sep|>"),
            numbered='" index="',
            lead=("<|open|>response<|sep|>", ""),
            tail="<|close|>response<|sep|>",
            parameters=Parameters(
                '<|open|>argument key="',
                '" type="string"<|sep|>',
                '" type="{kind}"<|sep|>',
                "<|close|>argument<|sep|>",
                "",
                banned="<|close|>argument<|sep|>",
                not_in_names="<>\n",
                is_escaped=True,
            ),
        ),
        values=(
            Value('type="string"<|sep|>', "<|close|>argument<|sep|>"),
            *(
                Value(f'type="{kind}"<|sep|>', "<|close|>argument<|sep|>", is_json=True)
                for kind in ("array", "object")
            ),
        ),
    ),
    "gemma": ToolFamily(
        calls.gemma,
        ("<|tool_call>",),
        ("<tool_call|>",),
        ("<tool_call|>", "<|tool_response>", "<turn|>"),
        ('<|"|>',),
        values=(Value('<|"|>', '<|"|>'),),
        frame=Frame("<|tool_call>call:", "", "<tool_call|>", "", parameters=Gemma('<|"|>')),
    ),
    "gpt_oss": ToolFamily(calls.in_json, (), frame=Frame("", ""), messages=HARMONY),
}
THOUGHTS: Mapping[str, Thoughts | Messages] = {
    "think": Thoughts(("<think>",), ("</think>",)),
    "mistral": Thoughts(("[THINK]", "<think>"), ("[/THINK]", "</think>")),
    "gemma": Thoughts(("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),
    "kimi_xtml": Thoughts(("<|open|>think<|sep|>",), ("<|close|>think<|sep|>",)),
    "gpt_oss": HARMONY,
}
ANCHORS = (
    *(
        "<|im_start|>assistant",
        "<|im_assistant|>assistant<|im_middle|>",
        "<|end_header_id|>",
        "<|header_end|>",
    ),
    *(
        "[/INST]",
        "<｜Assistant｜>",
        "<|assistant|>",
        '<|open|>message role="assistant"<|sep|>',
        "<|turn>model\n",
    ),
    *("<|end|>", "<|return|>", "<tool_response|>"),
)
"""Behind the last of these is what a template has written of the answer itself."""

_TOOL_SIGNS = {
    "kimi_xtml": ("<|open|>", "<|sep|>"),
    "kimi": ("<|tool_call_begin|>",),
    "deepseek_dsml": ("｜DSML｜",),
    "deepseek": ("<｜tool▁call▁begin｜>",),
    "gpt_oss": ("<|channel|>", "<|message|>"),
    "gemma": ("<|tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "glm": ("<tool_call>", "<arg_key>"),
    "qwen": ("<tool_call>",),
    "llama": ("<|start_header_id|>", "tools"),
    "llama ": ("<|header_start|>", "tools"),
}
"""What is in the template of a family; the first whose signs are all there is it."""
_THOUGHT_SIGNS = {
    "kimi_xtml": ("<|open|>", "<|sep|>"),
    "gpt_oss": ("<|channel|>", "<|message|>"),
    "gemma": ("<|channel>",),
    "mistral": ("[THINK]",),
    "think": ("</think>",),
}


def tool_family_of(template: str) -> str | None:
    return _first(_TOOL_SIGNS, template)


def thoughts_of(template: str) -> str | None:
    return _first(_THOUGHT_SIGNS, template)


def _first(table: Mapping[str, tuple[str, ...]], template: str) -> str | None:
    found = (name.strip() for name, signs in table.items() if all(sign in template for sign in signs))
    return next(found, None)
