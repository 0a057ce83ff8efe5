// The `openai` package for Node: the shapes that it parses, and its helpers.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { callText, check, main, MESH, TALKER } from "./checks.mjs";

const open = ({ url }) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const mesh = open(MESH);
const talker = open(TALKER);
const Person = z.object({ name: z.string(), kind: z.enum(["child", "adult"]) });
const City = z.object({ city: z.string() });
const WEATHER = zodFunction({ name: "weather", parameters: City });
const hello = [{ role: "user", content: "hello" }];
const said = (text) => [{ role: "user", content: `say: ${text}` }];

check("models", async () => {
  const ids = [];
  for await (const model of mesh.models.list()) ids.push(model.id);
  assert.deepEqual(ids, [MESH.model]);
});

check("chat, whole and streamed", async () => {
  const asked = { model: TALKER.model, messages: said("12 °C. 日本 😀") };
  const whole = await talker.chat.completions.create(asked);
  assert.equal(whole.choices[0].message.content, "12 °C. 日本 😀");
  let text = "";
  let usage = null;
  const stream = await talker.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, "12 °C. 日本 😀");
  assert.ok(usage.completion_tokens > 0);
});

check("parse: a zod schema, whole and streamed", async () => {
  const asked = {
    model: MESH.model,
    messages: hello,
    response_format: zodResponseFormat(Person, "person"),
  };
  const whole = await mesh.chat.completions.parse(asked);
  Person.parse(whole.choices[0].message.parsed);
  const streamed = await mesh.chat.completions.stream(asked).finalChatCompletion();
  Person.parse(streamed.choices[0].message.parsed);
});

check("tools: required, strict, parsed, whole and streamed", async () => {
  const asked = {
    model: MESH.model,
    messages: hello,
    tools: [WEATHER],
    tool_choice: "required",
    parallel_tool_calls: false,
  };
  for (const answer of [
    await mesh.chat.completions.parse(asked),
    await mesh.chat.completions.stream(asked).finalChatCompletion(),
  ]) {
    const [choice] = answer.choices;
    assert.equal(choice.finish_reason, "tool_calls");
    City.parse(choice.message.tool_calls[0].function.parsed_arguments);
  }
});

check("runTools: calls, results, an answer, whole and streamed", async () => {
  const weather = {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { type: "string" } } },
      parse: JSON.parse,
      function: ({ city }) => `12 in ${city}`,
    },
  };
  for (const stream of [false, true]) {
    const runner = talker.chat.completions.runTools({
      model: TALKER.model,
      messages: said(callText("weather", { city: "Rome" })),
      tools: [weather],
      stream,
    });
    assert.equal(await runner.finalContent(), "The tool said 12 in Rome.");
  }
});

check("completions, streamed", async () => {
  const asked = { model: MESH.model, prompt: "once", max_tokens: 8, stream: true };
  let reason = null;
  for await (const chunk of await mesh.completions.create(asked)) {
    reason = chunk.choices[0].finish_reason ?? reason;
  }
  assert.ok(["length", "stop"].includes(reason));
});

check("responses: whole and streamed", async () => {
  const asked = { model: TALKER.model, input: "say: 12 °C. 日本 😀" };
  assert.equal((await talker.responses.create(asked)).output_text, "12 °C. 日本 😀");
  const final = await talker.responses.stream(asked).finalResponse();
  assert.equal(final.output_text, "12 °C. 日本 😀");
});

check("responses: parse, a zod schema, a tool that is required", async () => {
  const text = { format: zodTextFormat(Person, "person") };
  Person.parse((await mesh.responses.parse({ model: MESH.model, input: "hi", text })).output_parsed);
  const answer = await mesh.responses.parse({
    model: MESH.model,
    input: "hi",
    tools: [zodResponsesFunction({ name: "weather", parameters: City })],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  City.parse(answer.output[0].parsed_arguments);
});

check("errors of its own classes", async () => {
  const asked = { model: MESH.model, messages: hello };
  await assert.rejects(
    mesh.chat.completions.create({ ...asked, temperature: -1 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
  await assert.rejects(
    mesh.chat.completions.create({ ...asked, model: "nobody" }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
});

check("a stream that is aborted", async () => {
  const stream = await mesh.chat.completions.create({
    model: MESH.model,
    messages: hello,
    stream: true,
    max_tokens: 4000,
    ignore_eos: true,
  });
  for await (const chunk of stream) {
    assert.ok(chunk.id);
    break;
  }
  assert.ok(stream.controller.signal.aborted);
});

await main();
