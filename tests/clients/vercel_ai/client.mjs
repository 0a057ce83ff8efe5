// The Vercel AI SDK, by its provider for compatible servers and by its provider for OpenAI, chat and responses.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { callText, check, main, MESH, TALKER } from "./checks.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;

const compatible = ({ url, model }, more = {}) =>
  createOpenAICompatible({ name: "microserve", baseURL: `${url}/v1`, apiKey: "none", ...more })(model);
const openai = ({ url }) => createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const all = (server) => [
  compatible(server, structured),
  openai(server).chat(server.model),
  openai(server).responses(server.model),
];
const structured = { supportsStructuredOutputs: true, includeUsage: true };
const meshes = all(MESH);
const talkers = all(TALKER);
const Person = z.object({ name: z.string(), kind: z.enum(["child", "adult"]) });
const weather = tool({
  description: "The weather in a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `12 in ${city}`,
});
const once = { maxRetries: 0 };

check("generateText and streamText, usage", async () => {
  for (const model of talkers) {
    const whole = await generateText({ model, prompt: "say: Hello.", ...once });
    assert.equal(whole.text, "Hello.");
    assert.ok(whole.usage.outputTokens > 0);
    const streamed = streamText({ model, prompt: "say: Hello.", ...once });
    let text = "";
    for await (const part of streamed.textStream) text += part;
    assert.equal(text, "Hello.");
    assert.equal(await streamed.finishReason, "stop");
    assert.ok((await streamed.usage).outputTokens > 0);
  }
});

check("tools: calls, results, an answer, whole and streamed", async () => {
  for (const model of talkers) {
    const asked = {
      model,
      prompt: `say: I look.${callText("weather", { city: "Rome" })}`,
      tools: { weather },
      stopWhen: stepCountIs(3),
      ...once,
    };
    const whole = await generateText(asked);
    assert.equal(whole.text, "The tool said 12 in Rome.");
    assert.deepEqual(whole.steps[0].toolCalls.map((call) => call.input), [{ city: "Rome" }]);
    const streamed = streamText(asked);
    await streamed.consumeStream();
    assert.equal((await streamed.steps).at(-1).text, "The tool said 12 in Rome.");
  }
});

check("toolChoice: required and named", async () => {
  for (const model of meshes) {
    for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
      const answer = await generateText({ model, prompt: "hi", tools: { weather }, toolChoice, ...once });
      assert.equal(answer.toolCalls[0].toolName, "weather");
      assert.equal(answer.toolCalls[0].invalid, undefined);
    }
  }
});

check("generateObject, streamObject, Output.object", async () => {
  for (const model of meshes) {
    Person.parse((await generateObject({ model, schema: Person, prompt: "hi", ...once })).object);
    const streamed = streamObject({ model, schema: Person, prompt: "hi", ...once });
    let last;
    for await (const partial of streamed.partialObjectStream) last = partial;
    Person.parse(last);
    const output = Output.object({ schema: Person });
    Person.parse((await generateText({ model, output, prompt: "hi", ...once })).output);
    const choices = { output: "enum", enum: ["sun", "rain"] };
    const { object } = await generateObject({ model, ...choices, prompt: "hi", ...once });
    assert.ok(["sun", "rain"].includes(object));
  }
});

check("thoughts", async () => {
  const model = compatible(TALKER, {
    ...structured,
    transformRequestBody: (body) => ({ ...body, chat_template_kwargs: { enable_thinking: true } }),
  });
  const whole = await generateText({ model, prompt: "say: hm</think>Yes.", ...once });
  assert.deepEqual([whole.text, whole.reasoningText], ["Yes.", "hm"]);
  const streamed = streamText({ model, prompt: "say: hm</think>Yes.", ...once });
  await streamed.consumeStream();
  assert.deepEqual([await streamed.text, await streamed.reasoningText], ["Yes.", "hm"]);
});

check("errors say what is wrong", async () => {
  for (const model of meshes) {
    await assert.rejects(
      generateText({ model, prompt: "hi", topP: 3, ...once }),
      (error) => error.statusCode === 400 && error.message.includes("top_p"),
    );
  }
});

await main();
