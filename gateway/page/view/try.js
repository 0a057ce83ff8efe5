// A prompt under any strategy, with its timeline beside the answer.

import { html, useEffect, useRef, useState } from "../vendor/htm-preact.module.js";
import { ask, askJson, eventsOf } from "../api.js";
import { useAnswer } from "../parts.js";
import { seconds } from "../words.js";
import { Detail } from "./request.js";

const MAX_WAIT_MS = 10000; // for its account, which comes a moment after the answer

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function detailOf(id, signal) {
  const end = performance.now() + MAX_WAIT_MS;
  for (;;) {
    try {
      const detail = await askJson(`/view/requests/${encodeURIComponent(id)}`, { signal });
      if (detail.request?.at || performance.now() > end) return detail;
    } catch (error) {
      if (error.status !== 404 || performance.now() > end) throw error;
    }
    await sleep(150);
  }
}

export function Try({ state, paused }) {
  const strategies = useAnswer("/view/strategies", { again: state.control_version, paused });
  const models = useAnswer("/v1/models");
  const [shown, setShown] = useState({ text: "", note: "", detail: null });
  const [abort, setAbort] = useState(null);
  const form = useRef(null);
  const last = useRef(null);
  last.current = abort;
  useEffect(() => () => last.current?.abort(), []);
  const names = new Set((strategies.body?.routers ?? []).flatMap((router) => router.serves.map((each) => each.strategy)));
  for (const entry of strategies.body?.entries ?? []) names.add(entry.strategy);

  const send = async (event) => {
    event.preventDefault();
    const given = new FormData(form.current);
    const control = new AbortController();
    setAbort(control);
    setShown({ text: "", note: "asked", detail: null });
    const strategy = given.get("strategy").trim();
    const body = { model: given.get("model"), messages: [{ role: "user", content: given.get("prompt") }], max_tokens: Number(given.get("max_tokens")) || 64, stream: true };
    const headers = { "content-type": "application/json", ...(strategy ? { "x-microserve-strategy": strategy } : {}) };
    const begin = performance.now();
    try {
      const answer = await ask("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: control.signal });
      const id = answer.headers.get("x-request-id");
      let text = "";
      for await (const { data } of eventsOf(answer)) {
        if (!data || data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        text += chunk.choices?.[0]?.delta?.content ?? "";
        setShown({ text, note: "answers", detail: null });
      }
      const note = `answered within ${seconds((performance.now() - begin) / 1000)} as this browser saw it`;
      setShown({ text, note, detail: null });
      const detail = await detailOf(id, control.signal);
      setShown({ text, note, detail });
    } catch (error) {
      const note = control.signal.aborted ? "stopped" : `failed: ${error.message}`;
      setShown((was) => ({ ...was, note }));
    }
    setAbort(null);
  };

  return html`
    <h2>Try a prompt</h2>
    <div class="beside">
      <section>
        <form ref=${form} class="try" onSubmit=${send}>
          <label for="model">model</label>
          <select id="model" name="model">${(models.body?.data ?? []).map((each) => html`<option value=${each.id}>${each.id}</option>`)}</select>
          <label for="strategy">strategy (empty: the default)</label>
          <input id="strategy" name="strategy" list="strategies" maxlength="128" autocomplete="off" />
          <datalist id="strategies">${[...names].sort().map((name) => html`<option value=${name} />`)}</datalist>
          <label for="max_tokens">tokens at most</label>
          <input id="max_tokens" name="max_tokens" type="number" min="1" max="4096" value="64" />
          <label for="prompt">prompt</label>
          <textarea id="prompt" name="prompt" rows="5" required></textarea>
          <p>
            <button type="submit" disabled=${Boolean(abort) || !models.body}>Ask</button>
            <button type="button" disabled=${!abort} onClick=${() => abort?.abort()}>Stop</button>
          </p>
        </form>
        <h3>Answer</h3>
        <pre class="answer" tabindex="0" role="region" aria-label="Answer">${shown.text}</pre>
        <p role="status">${shown.note}</p>
      </section>
      <section>
        ${shown.detail ? html`<${Detail} detail=${shown.detail} />` : html`<p class="quiet">Its timeline comes here when it has ended.</p>`}
      </section>
    </div>
  `;
}
