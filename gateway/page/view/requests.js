// Requests that run, and the last or slowest of a quarter of an hour, by filter.

import { html, useState } from "../vendor/htm-preact.module.js";
import { MAX_ROWS, Table, Trouble, useAnswer } from "../parts.js";
import { clock, number, seconds } from "../words.js";

const HEADS = ["request", "ended", "wall time", "first token", "tokens in (cached)", "out", "strategy", "engines", "end", "key"];
const ORDERS = { newest: "newest first", slowest: "slowest first", first_token: "slowest first token" };
const ORDERED_BY = { ended: "newest", "wall time": "slowest", "first token": "first_token" };
const EVERY_S = 5;

export const addressOf = (form) => `#/requests/${encodeURIComponent(form.id || form.http_id)}`;

function rowOf(form) {
  const end = form.code || form.finish_reason || (form.at ? String(form.status) : "runs");
  const cells = [
    html`<a href=${addressOf(form)}>${form.http_id || form.id}</a>`,
    form.at ? clock(form.at) : `runs for ${seconds(form.age_s)}`,
    seconds(form.wall_s),
    seconds(form.ttft_s),
    `${number(form.prompt_tokens)} (${number(form.cached_tokens)})`,
    number(form.output_tokens),
    form.strategy_version ? `${form.strategy} v${form.strategy_version} ${form.share}` : form.strategy || "–",
    form.engines.join(" → ") || "–",
    form.code ? html`<span class="wrong"><span aria-hidden="true">✕</span> ${end}</span>` : end,
    form.key || "–",
  ];
  cells.key = `${form.id}/${form.at}`;
  return cells;
}

const Field = ({ name, label, value, set, ...more }) =>
  html`<div><label for=${`by-${name}`}>${label}</label><input id=${`by-${name}`} value=${value} maxlength="200" onChange=${(event) => set(name, event.currentTarget.value.trim())} ...${more} /></div>`;

export function Requests({ state, paused }) {
  const [query, setQuery] = useState({ order: "newest", limit: "100" });
  const set = (name, value) => setQuery((last) => ({ ...last, [name]: value }));
  // The newest of all are in the feed; the gateway is asked for others only.
  const chosen = Object.entries(query).filter(([, value]) => value);
  const heads = HEADS.map((text) => {
    const order = ORDERED_BY[text];
    return order ? { text, isOrder: query.order === order, order: () => set("order", order) } : text;
  });
  const isPlain = chosen.length === 2 && query.order === "newest";
  const said = useAnswer(isPlain ? "" : `/view/requests?${new URLSearchParams(chosen)}`, { everyS: EVERY_S, paused });
  const ended = isPlain ? [...state.ended].reverse() : said.body?.ended;
  return html`
    <h2>Requests</h2>
    <h3>Running: ${number(state.num_running)}</h3>
    <${Table} label="Requests that run" heads=${HEADS} rows=${state.running.map(rowOf)} empty="none runs" more=${Math.max(0, state.num_running - state.running.length)} />
    <h3>Of the last 15 minutes</h3>
    <form class="filter" onSubmit=${(event) => event.preventDefault()}>
      <div><label for="by-order">order</label>
        <select id="by-order" value=${query.order} onChange=${(event) => set("order", event.currentTarget.value)}>
          ${Object.entries(ORDERS).map(([name, words]) => html`<option value=${name}>${words}</option>`)}
        </select></div>
      <${Field} name="min_s" label="at least, s" value=${query.min_s ?? ""} set=${set} inputmode="decimal" />
      <${Field} name="key" label="key" value=${query.key ?? ""} set=${set} />
      <${Field} name="strategy" label="strategy" value=${query.strategy ?? ""} set=${set} />
      <${Field} name="engine" label="engine" value=${query.engine ?? ""} set=${set} />
      <${Field} name="code" label="error (any: of any)" value=${query.code ?? ""} set=${set} />
    </form>
    <${Trouble} error=${said.error} />
    ${said.body && html`<p class="quiet">${number(ended.length)} are as asked for, of ${number(said.body.num_kept)} that are kept</p>`}
    ${ended && html`<${Table} label="Requests that have ended" heads=${heads} rows=${ended.slice(0, MAX_ROWS).map(rowOf)} more=${Math.max(0, ended.length - MAX_ROWS)} empty="none has ended, or none is as asked for" />`}
  `;
}
