// What is wrong, if anything is; checks and limits.

import { html } from "../vendor/htm-preact.module.js";
import { Facts, State, Table } from "../parts.js";
import { number, plain } from "../words.js";

export function Health({ state }) {
  const health = state.health;
  const fields = [...new Set(health.checks.flatMap((check) => Object.keys(check)))];
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
    ${fields.length
      ? html`<${Table} label="Self-checks" heads=${fields} rows=${health.checks.map((check) => fields.map((field) => plain(check[field])))} />`
      : html`<p class="quiet">none has been made yet</p>`}
  `;
}
