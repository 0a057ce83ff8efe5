// Engines by host: what they do, what their memory is full of, and who can send KV to whom.

import { html, useMemo, useState } from "../vendor/htm-preact.module.js";
import { Chart } from "../chart.js";
import { Bar, Facts, Spark, State, Table, Trouble, useAnswer } from "../parts.js";
import { clock, number, percent, seconds } from "../words.js";

const HEADS = ["engine", "state", "labels", "running", "waiting", "KV blocks", "oldest lease", "its time", "last 15 minutes", "step", "prefill rate", "class"];
const BLOCKS = ["used", "granted", "cached", "free", "quarantined"];
const LANES = ["prefill", "decode", "transfer", "idle"];

// A view counts blocks of grants among the used ones; here each block is in one part.
function blocksOf(load) {
  const granted = Math.min(load.granted_blocks, load.used_blocks);
  const amounts = { used: load.used_blocks - granted, granted, cached: load.cached_blocks, free: load.free_blocks, quarantined: load.quarantined_blocks };
  return BLOCKS.map((name) => [name, amounts[name]]);
}

function Blocks({ load }) {
  const parts = blocksOf(load);
  const words = parts.filter(([, amount]) => amount).map(([name, amount]) => `${number(amount)} ${name}`).join(", ");
  return html`<${Bar} parts=${parts} label=${words || "no blocks"} /><br /><small>${words}${load.grants ? `, ${load.grants} grants open` : ""}</small>`;
}

// What an engine's time of the last seconds went to.
function Lanes({ load }) {
  const parts = LANES.map((name) => [name, load[`${name}_share`]]);
  if (!parts.some(([, share]) => share)) return html`<span class="quiet">not said</span>`;
  const words = parts.filter(([, share]) => share >= 0.005).map(([name, share]) => `${name} ${percent(share)}`).join(", ");
  return html`<${Bar} parts=${parts} label=${`its time: ${words}`} /><br /><small>${words}</small>`;
}

const Legend = ({ name, parts }) =>
  html`<p class="legend">${name}: ${parts.map((part) => html`<span><${Bar} parts=${[[part, 1]]} label="" width=${14} /> ${part}</span> `)}</p>`;

function rowOf(engine, sample) {
  const load = engine.load;
  const state = html`<${State} name=${engine.state} />${engine.detail && html`<br /><small>${engine.detail}</small>`}`;
  const name = html`${engine.id}<br /><small>${engine.model} ${engine.backend} ${engine.backend_version}</small>`;
  const labels = engine.labels.join(", ") || "any";
  const kind = engine.numerics || "–";
  const cells = load
    ? [name, state, labels, number(load.running), number(load.waiting), html`<${Blocks} load=${load} />`,
        load.oldest_lease_s ? seconds(load.oldest_lease_s) : "–", html`<${Lanes} load=${load} />`,
        html`<${Spark} values=${sample?.running} label=${`running at ${engine.id}`} />`,
        seconds(load.decode_step_s), `${number(load.prefill_tokens_per_s)} tokens/s`, kind]
    : [name, state, labels, "–", "–", "–", "–", "–", "–", "–", "–", kind];
  cells.key = engine.id;
  return cells;
}

// Sums over engines of each moment; curves may be of different length, and end now.
function sums(history, field) {
  const length = Math.max(0, ...history.map((each) => each[field].length));
  const total = new Array(length).fill(0);
  for (const each of history) {
    const begin = length - each[field].length;
    each[field].forEach((value, at) => (total[begin + at] += value));
  }
  return total;
}

// Seconds since 1970, running, waiting, KV in use (%).
function curvesOf(mesh) {
  const running = sums(mesh.history, "running");
  const times = running.map((_, at) => mesh.at - (running.length - 1 - at) * mesh.interval_s);
  const usage = sums(mesh.history, "kv_usage").map((value) => (100 * value) / mesh.history.length);
  return { counts: [times, running, sums(mesh.history, "waiting")], usages: [times, usage] };
}

function Charts({ mesh, marks }) {
  const { counts, usages } = useMemo(() => curvesOf(mesh), [mesh]);
  const [times, running, waiting] = counts;
  const usage = usages[1];
  if (running.length < 2) return html`<p class="quiet">no history yet: a value comes every ${mesh.interval_s} s</p>`;
  return html`<div class="charts">
    <${Chart} label="Sequences" names=${["running", "waiting"]} data=${counts} marks=${marks} />
    <${Chart} label="KV in use, %" names=${["mean of engines"]} data=${usages} marks=${marks} />
  </div>
  <details><summary>The same as a table</summary>
    <${Table} label="The mesh's history" heads=${["time", "running", "waiting", "KV in use"]}
      rows=${times.map((at, i) => [clock(at), number(running[i]), number(waiting[i]), percent(usage[i] / 100)]).reverse()} />
  </details>`;
}

function Pairs({ pairs }) {
  const [source, setSource] = useState("");
  const [isOpen, setOpen] = useState(false);
  const sources = [...new Set(pairs.map((pair) => pair.source))];
  const rows = isOpen ? pairs.filter((pair) => !source || pair.source === source).map((pair) => [pair.source, pair.target, pair.heap || html`<span class="quiet">no way</span>`, pair.bytes_per_s ? `${number(pair.bytes_per_s / 1e6)} MB/s` : ""]) : [];
  return html`<details onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary>KV between engines: ${number(pairs.length)} pairs</summary>
    <label for="source">from</label>
    <select id="source" value=${source} onChange=${(event) => setSource(event.currentTarget.value)}>
      <option value="">every engine</option>${sources.map((each) => html`<option value=${each}>${each}</option>`)}
    </select>
    <${Table} label="Heap of each pair" heads=${["from", "to", "heap", "network"]} rows=${rows} />
  </details>`;
}

export function Mesh({ state, paused }) {
  const mesh = useAnswer("/view/mesh", { everyS: 5, paused });
  const control = useAnswer("/view/strategies", { again: state.control_version, paused });
  const engines = [...state.engines.values()].sort((one, other) => one.id.localeCompare(other.id, "en", { numeric: true }));
  const hosts = [...new Set(engines.map((engine) => engine.host))];
  const samples = new Map((mesh.body?.history ?? []).map((each) => [each.engine, each]));
  const loads = engines.map((engine) => engine.load).filter(Boolean);
  const total = (name) => number(loads.reduce((sum, load) => sum + load[name], 0));
  const marks = useMemo(() => (control.body?.history ?? []).map((each) => each.at), [control.body]);
  return html`
    <h2>Mesh</h2>
    <${Trouble} error=${mesh.error} />
    <${Facts} of=${[
      ["engines", `${loads.length} of ${engines.length}`],
      ["requests here", number(state.num_running)],
      ["running", total("running")],
      ["waiting", total("waiting")],
      ["grants open", total("grants")],
      ["index", state.index_alive ? html`<${State} name="ok" />` : html`<${State} name="lost" />`],
    ]} />
    ${mesh.body && html`<${Charts} mesh=${mesh.body} marks=${marks} />`}
    ${!engines.length && html`<p class="quiet">No engine is known here. One joins by <code>microserve engine</code>.</p>`}
    ${engines.length > 0 && html`<${Legend} name="KV blocks" parts=${BLOCKS} /><${Legend} name="Its time" parts=${LANES} />`}
    ${hosts.map((host) => html`<section key=${host}>
      <h3>Host ${host || "unknown"}</h3>
      <${Table} label=${`Engines of ${host || "an unknown host"}`} heads=${HEADS}
        rows=${engines.filter((engine) => engine.host === host).map((engine) => rowOf(engine, samples.get(engine.id)))} />
    </section>`)}
    ${mesh.body?.pairs.length > 0 && html`<${Pairs} pairs=${mesh.body.pairs} />`}
    ${mesh.body && html`<h3>Routers</h3><${Table} label="Routers" heads=${["router", "state", "model", "engines", "requests", "of this gateway"]}
      rows=${mesh.body.routers.map((each) => [each.router_id || each.address, html`<${State} name=${each.alive ? "ready" : "lost"} />`, each.model, number(each.num_engines), `${number(each.num_requests)} of ${number(each.max_requests)}`, number(each.num_own_requests)])} />`}
  `;
}
