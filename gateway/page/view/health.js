// What is wrong, if anything is; self-checks and limits.

import { html } from "../vendor/htm-preact.module.js";
import { Facts, State, Table } from "../parts.js";
import { clock, number, plain, seconds } from "../words.js";

export function Health({ state }) {
  const health = state.health;
  const heads = ["pair", "result", "compared", "made", "took", "tokens", "router"];
  return html`
    <h2>Health</h2>
    ${health.alarms.length
      ? html`<${Table} label="Alarms" heads=${["alarm", "whose", "what it says"]} rows=${health.alarms.map((alarm) => [html`<span class="wrong"><span aria-hidden="true">▲</span> ${alarm.name}</span>`, alarm.subject, alarm.text])} />`
      : html`<p><${State} name="ok" />: nothing is known to be wrong.</p>`}
    <${Facts} of=${[
      ["gateway", health.draining ? html`<${State} name="draining" />` : html`<${State} name=${health.ready ? "ready" : "lost"} />`],
      ["version", health.version],
      ["index", state.index_alive ? html`<${State} name="ok" />` : html`<${State} name="lost" />`],
      ...Object.entries(health.limits).map(([name, value]) => [name.replaceAll("_", " "), number(value)]),
    ]} />
    <h3>Self-checks</h3>
    ${health.checks.length
      ? html`<${Table} label="Self-checks" heads=${heads} rows=${health.checks.map(cells)} />`
      : html`<p class="quiet">none has been made yet</p>`}
  `;
}

function cells(check) {
  const pair = check.target ? `${check.source} → ${check.target}` : check.source;
  const result = { equal: html`<${State} name="ok" />`, differs: html`<${State} name="wrong" />: ${check.differs}` };
  const told = result[check.outcome] ?? `${check.outcome}: ${check.code}`;
  return [pair, told, check.compared, clock(check.at), seconds(check.took_s), number(check.tokens), plain(check.router)];
}

// Of all pairs together: one that differs is wrong, whatever the others say.
export function CheckLight({ health, at }) {
  const checks = health?.checks ?? [];
  const last = Math.max(...checks.filter((check) => check.outcome !== "unfinished").map((check) => check.at));
  if (!Number.isFinite(last)) return html`<span class="quiet">self-check: none yet</span>`;
  const isWrong = checks.some((check) => check.outcome === "differs");
  const age = `${Math.max(0, Math.floor(at - last))} s ago`;
  return html`<span>self-check: <${State} name=${isWrong ? "wrong" : "ok"} /> <span class="quiet">${age}</span></span>`;
}
