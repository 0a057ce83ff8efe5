"""Probes of ``client.chat.completions``: conversations, their sampling, and fields that are for others."""

from __future__ import annotations

from typing import Any

from tests.gateway.probes.probe import SAYS, USER, Bench, probe

HEAD = "<|im_start|>assistant\n"


@probe("`chat.completions.create`")
def plain(bench: Bench) -> None:
    reply = bench.chat()
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SAYS, "stop")
    assert choice.message.refusal is None and choice.logprobs is None
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == "tiny"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert bench.prompt().endswith(f"<|im_start|>user\nhi<|im_end|>\n{HEAD}")


@probe("`stream=True`")
def stream(bench: Bench) -> None:
    chunks = list(bench.chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAYS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)


@probe('`stream_options={"include_usage": True}`')
def usage_of_a_stream(bench: Bench) -> None:
    *chunks, last = bench.chat(stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens > 0


@probe("`stream_options` without `stream`", refused=400, param="stream_options")
def usage_of_no_stream(bench: Bench) -> None:
    bench.chat(stream_options={"include_usage": True})


@probe("`chat.completions.stream(...)`, the helper")
def stream_helper(bench: Bench) -> None:
    with bench.client.chat.completions.stream(model="tiny", messages=USER) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == SAYS


@probe("`n=3`")
def several(bench: Bench) -> None:
    reply = bench.chat(n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {SAYS}


@probe("`n` with `stream`")
def several_streamed(bench: Bench) -> None:
    texts = ["", ""]
    for chunk in bench.chat(n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [SAYS, SAYS]


@probe("`n=0`", refused=400, param="n")
def none_at_all(bench: Bench) -> None:
    bench.chat(n=0)


@probe("`stop`, a text or a list")
def stop(bench: Bench) -> None:
    for wish in ("lo", ["nothing", "lo"]):
        choice = bench.chat(stop=wish).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Hel", "stop")


@probe("`seed` with `temperature` and `top_p`")
def seed(bench: Bench) -> None:
    reply = bench.chat(seed=-7, temperature=0.5, top_p=0.9)
    sampling = bench.asked().message.sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9) and reply.system_fingerprint
    first = sampling.seed
    bench.chat(seed=-7)
    assert bench.asked().message.sampling.seed == first


@probe("`temperature=-1`", refused=400, param="temperature")
def too_cold(bench: Bench) -> None:
    bench.chat(temperature=-1)


@probe("`logprobs=True, top_logprobs=2`")
def logprobs(bench: Bench) -> None:
    content = bench.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == SAYS
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)


@probe("`logprobs` with `stream`")
def logprobs_of_a_stream(bench: Bench) -> None:
    chunks = [chunk.choices[0] for chunk in bench.chat(logprobs=True, stream=True)]
    tokens = [token for each in chunks if each.logprobs for token in each.logprobs.content]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == SAYS


@probe("`top_logprobs` without `logprobs`", refused=400, param="top_logprobs")
def top_without(bench: Bench) -> None:
    bench.chat(top_logprobs=2)


@probe("`top_logprobs=99`", refused=400, param="top_logprobs")
def too_many_logprobs(bench: Bench) -> None:
    bench.chat(logprobs=True, top_logprobs=99)


@probe("`logit_bias`")
def logit_bias(bench: Bench) -> None:
    bench.chat(logit_bias={"65": -100, "66": 5})
    assert bench.asked().message.sampling.logit_bias == {65: -100.0, 66: 5.0}


@probe("`logit_bias` beyond 100", refused=400, param="logit_bias")
def logit_bias_too_large(bench: Bench) -> None:
    bench.chat(logit_bias={"65": 101})


@probe("`presence_penalty` and `frequency_penalty`")
def penalties(bench: Bench) -> None:
    bench.chat(presence_penalty=-2, frequency_penalty=1.5)
    sampling = bench.asked().message.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 1.5)


@probe("`max_completion_tokens`, and `max_tokens`")
def bounds(bench: Bench) -> None:
    for name in ("max_completion_tokens", "max_tokens"):
        assert bench.chat(**{name: 20}).choices
        assert bench.asked().message.sampling.max_tokens == 20


@probe("a context that is too long", refused=400, param="max_completion_tokens")
def too_long(bench: Bench) -> None:
    bench.chat(max_completion_tokens=100_000)


@probe("the roles `system` and `developer`")
def developer(bench: Bench) -> None:
    for role in ("system", "developer"):
        bench.chat(messages=[{"role": role, "content": "short"}, *USER])
        assert bench.prompt().startswith("<|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nhi")


@probe("a role that there is not", refused=400, param="messages[0].role")
def unknown_role(bench: Bench) -> None:
    bench.chat(messages=[{"role": "oracle", "content": "hi"}])


@probe("content in parts of type `text`")
def parts(bench: Bench) -> None:
    bench.chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    )
    assert "<|im_start|>user\na\nb<|im_end|>" in bench.prompt()


@probe("an image", refused=400, param="messages[0].content[0].type")
def image(bench: Bench) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    bench.chat(messages=[{"role": "user", "content": [part]}])


@probe("audio or a file as input", refused=400, param="messages[0].content[0].type")
def sound(bench: Bench) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    bench.chat(messages=[{"role": "user", "content": [part]}])


@probe("no messages", refused=400, param="messages")
def empty(bench: Bench) -> None:
    bench.chat(messages=[])


@probe("`name` of a message")
def name(bench: Bench) -> None:
    assert bench.chat(messages=[{"role": "user", "content": "hi", "name": "ada"}]).choices


@probe("an answer goes back as it came (`message.model_dump()`)")
def echoed(bench: Bench) -> None:
    message: Any = bench.chat().choices[0].message
    raw = bench.client.chat.completions.with_raw_response.create(
        model="tiny", messages=[*USER, message.model_dump(), *USER]
    )
    assert "x-microserve-warning" not in raw.headers
    assert f"{HEAD}{SAYS}<|im_end|>" in bench.prompt()
    assert bench.chat(messages=[*USER, message, *USER]).choices


@probe("the assistant's `content: None`, and a `refusal`")
def null_content(bench: Bench) -> None:
    refused: Any = {"role": "assistant", "content": None, "refusal": "no"}
    bench.chat(messages=[*USER, refused, *USER])
    assert f"{HEAD}<|im_end|>" in bench.prompt()


@probe("`user`, `safety_identifier` and `prompt_cache_key`")
def labels(bench: Bench) -> None:
    bench.chat(user="u", safety_identifier="s", prompt_cache_key="k")
    assert bench.asked().message.attributes == {"user": "u"}


@probe("`metadata`")
def metadata(bench: Bench) -> None:
    assert bench.chat(metadata={"run": "7"}).choices


@probe("`store=True`")
def store(bench: Bench) -> None:
    raw = bench.client.chat.completions.with_raw_response.create(model="tiny", messages=USER, store=True)
    assert "store" in raw.headers["x-microserve-warning"] and raw.parse().choices
    assert bench.chat(store=False).choices


@probe("a stored answer (`chat.completions.retrieve`)", refused=404)
def stored(bench: Bench) -> None:
    bench.client.chat.completions.retrieve("chatcmpl-1")


@probe("`service_tier`, told in the answer")
def service_tier(bench: Bench) -> None:
    assert bench.chat().service_tier is None
    assert bench.chat(service_tier="auto").service_tier == "default"
    assert {chunk.service_tier for chunk in bench.chat(service_tier="priority", stream=True)} == {"default"}


@probe('`service_tier="flex"`')
def flex(bench: Bench) -> None:
    usual = (bench.chat(), bench.asked().message.priority)[1]
    assert bench.chat(service_tier="flex").service_tier == "flex"
    assert bench.asked().message.priority < usual


@probe("`reasoning_effort`, for a model that knows it")
def reasoning_effort(bench: Bench) -> None:
    bench.chat(reasoning_effort="low")
    assert bench.prompt().endswith(f"{HEAD}low")


@probe('`verbosity="low"`, for a model that does not know it', refused=400, param="verbosity")
def verbosity(bench: Bench) -> None:
    assert bench.chat(verbosity="medium").choices
    bench.chat(verbosity="low")


@probe('`modalities=["text"]`')
def text_only(bench: Bench) -> None:
    assert bench.chat(modalities=["text"]).choices


@probe('`modalities=["text", "audio"]`', refused=400, param="modalities")
def spoken(bench: Bench) -> None:
    bench.chat(modalities=["text", "audio"])


@probe("`audio`", refused=400, param="audio")
def audio(bench: Bench) -> None:
    bench.chat(audio={"voice": "alloy", "format": "wav"})


@probe("`web_search_options`", refused=400, param="web_search_options")
def web_search(bench: Bench) -> None:
    bench.chat(web_search_options={})


@probe("`moderation`", refused=400, param="moderation")
def moderation(bench: Bench) -> None:
    bench.chat(moderation={"model": "omni-moderation-latest"})


@probe("`prediction`")
def prediction(bench: Bench) -> None:
    raw = bench.client.chat.completions.with_raw_response.create(
        model="tiny", messages=USER, prediction={"type": "content", "content": "Hello"}
    )
    assert "prediction" in raw.headers["x-microserve-warning"] and raw.parse().choices


@probe("a thought, as `reasoning_content`", says="<think>\nhm\n</think>\n\nyes")
def thought(bench: Bench) -> None:
    reply = bench.chat()
    message = reply.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("yes", "hm")
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


@probe("vLLM's fields in `extra_body`")
def extra_body(bench: Bench) -> None:
    fields = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True}
    bench.chat(extra_body={**fields, "stop_token_ids": [65]})
    sampling = bench.asked().message.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.stop_token_ids == (65,)


@probe('`extra_body={"continue_final_message": True}`')
def go_on(bench: Bench) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    bench.chat(messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert bench.prompt().endswith(f"{HEAD}Well, ")


@probe("an answer that goes on with a thought that was begun", says=" then\n</think>\n\nyes")
def go_on_thinking(bench: Bench) -> None:
    for begun in ("<think>\nso", "<think>\n" + "so " * 150):
        messages = [*USER, {"role": "assistant", "content": begun}]
        reply = bench.chat(messages=messages, extra_body={"continue_final_message": True})
        message = reply.choices[0].message
        assert (message.content, message.model_extra["reasoning"]) == ("yes", " then")


@probe("`continue_final_message` with `add_generation_prompt`", refused=400, param="continue_final_message")
def go_on_and_begin(bench: Bench) -> None:
    bench.chat(extra_body={"continue_final_message": True, "add_generation_prompt": True})


@probe("`include_stop_str_in_output` and `skip_special_tokens`")
def stop_shown(bench: Bench) -> None:
    wish = {"include_stop_str_in_output": True}
    assert bench.chat(stop="lo", extra_body=wish).choices[0].message.content == "Hello"
    shown = bench.complete(extra_body={**wish, "skip_special_tokens": False}).choices[0].text
    assert shown == f"{SAYS}<|im_end|>"


@probe("`truncate_prompt_tokens`")
def truncated(bench: Bench) -> None:
    bench.chat(extra_body={"truncate_prompt_tokens": 4})
    assert len(bench.asked().tokens) == 4


@probe("`priority`, which gives way")
def priority(bench: Bench) -> None:
    usual = (bench.chat(), bench.asked().message.priority)[1]
    bench.chat(extra_body={"priority": 2})
    assert bench.asked().message.priority == usual - 2


@probe("`priority` below 0", refused=400, param="priority")
def pushing(bench: Bench) -> None:
    bench.chat(extra_body={"priority": -1})


@probe("a field that nobody knows")
def unknown(bench: Bench) -> None:
    raw = bench.client.chat.completions.with_raw_response.create(
        model="tiny", messages=USER, extra_body={"favourite_colour": "blue"}
    )
    assert "favourite_colour" in raw.headers["x-microserve-warning"] and raw.parse().choices


@probe("`chat_template` of the request's own", refused=400, param="chat_template")
def own_template(bench: Bench) -> None:
    bench.chat(extra_body={"chat_template": "{{ messages }}"})


@probe("a field of the wrong type", refused=400, param="max_tokens")
def wrong_type(bench: Bench) -> None:
    bench.chat(max_tokens="many")


@probe("text of all kinds, and what a model writes of it")
def unicode(bench: Bench) -> None:
    text = "\N{SNOWMAN} \u65e5\u672c \U0001f9d1\u200d\U0001f680 \u0000 <|im_end|>"
    bench.chat(messages=[{"role": "user", "content": text}])
    assert f"user\n{text}<|im_end|>" in bench.prompt()
