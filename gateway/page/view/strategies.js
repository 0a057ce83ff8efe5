// What serves under which name, how it fares beside what it would replace, and who changed it.

import { html } from "../vendor/htm-preact.module.js";
import { Facts, State, Table, Trouble, useAnswer } from "../parts.js";
import { day, mean, number, percent, plain, seconds } from "../words.js";

const version = (of) => (of ? `v${of.version} ${of.digest.slice(0, 8)}` : "–");
const parameters = (of) => plain(of?.parameters ?? {});

function entryRow(entry) {
  return [entry.strategy, entry.stable ? version(entry.stable) : "built in", parameters(entry.stable), version(entry.canary), entry.canary ? percent(entry.share) : "–",
    version(entry.shadow), entry.shadow ? percent(entry.shadow_share) : "–", entry.ramp ? `${entry.ramp.shares.map(percent).join(", ")}${entry.ramp.paused ? ", paused" : ""}` : "–"];
}

function scoreRow(score) {
  return [score.version ? `${score.strategy} v${score.version}` : score.strategy, score.share, score.engine_id || "all", number(score.num_requests), plain(score.failures),
    number(score.num_mistakes), mean(score.ttft), mean(score.tpot), mean(score.jct), score.prompt_tokens ? percent(score.cached_tokens / score.prompt_tokens) : "–"];
}

function shadowRow(router, shadow) {
  return [`${shadow.strategy} v${shadow.version}`, router.router_id, number(shadow.num_decisions), number(shadow.num_agreed), number(shadow.num_errors),
    `${seconds(shadow.ttft_s)} against ${seconds(shadow.served_ttft_s)}`, `${number(shadow.computed_tokens)} against ${number(shadow.served_computed_tokens)}`];
}

function routerRow(router) {
  const faults = router.faults.map((fault) => `${fault.strategy} v${fault.version}: ${fault.reason}`).join("; ");
  return [router.router_id, number(router.version), router.default_strategy || "–", router.serves.map((each) => (each.version ? `${each.strategy} v${each.version}` : each.strategy)).join(", ") || "–",
    faults ? html`<span class="wrong"><span aria-hidden="true">✕</span> ${faults}</span>` : "none"];
}

const changeRow = (each) => [number(each.version), day(each.at), each.kind, each.strategy || each.engine, each.kind === "publish" || each.kind === "share" ? percent(each.share) : plain(each.labels), each.who.slice(0, 12), each.reason || "–"];

export function Strategies({ state, paused }) {
  const said = useAnswer("/view/strategies", { everyS: 5, again: state.control_version, paused });
  const body = said.body;
  if (!body) return html`<h2>Strategies</h2><${Trouble} error=${said.error} />`;
  const shadows = body.routers.flatMap((router) => router.shadows.map((shadow) => shadowRow(router, shadow)));
  return html`
    <h2>Strategies</h2>
    <${Trouble} error=${said.error} />
    <${Facts} of=${[["control state", `version ${body.version}`], ["its log", body.durable ? html`<${State} name="ok" /> on disk` : "in memory alone"]]} />
    <h3>Under control</h3>
    <${Table} label="Strategies under control" heads=${["strategy", "stable", "parameters", "canary", "its share", "shadow", "its share", "ramp"]} rows=${body.entries.map(entryRow)} empty="nothing is published: routers serve what they came with" />
    <h3>How they fare</h3>
    <p class="quiet">Geometric means, and in brackets what holds them 95 times in 100.</p>
    <${Table} label="How strategies fare" heads=${["strategy", "as", "engine", "requests", "failures", "mistakes", "first token", "per token", "whole", "cached"]} rows=${body.scores.map(scoreRow)} empty="no router has served anything yet" />
    ${shadows.length > 0 && html`<h3>Shadows</h3><${Table} label="Shadows" heads=${["shadow", "router", "decisions", "agreed", "errors", "first token, predicted", "tokens to compute"]} rows=${shadows} />`}
    ${body.ramps.length > 0 && html`<h3>Ramps</h3><${Table} label="Ramps" heads=${Object.keys(body.ramps[0])} rows=${body.ramps.map((ramp) => Object.values(ramp).map(plain))} />`}
    <h3>Routers</h3>
    <${Table} label="Routers" heads=${["router", "applied", "default", "serves", "faults"]} rows=${body.routers.map(routerRow)} />
    <h3>Changes</h3>
    <p class="quiet">Those of the last 15 minutes are marks on the mesh's charts.</p>
    <${Table} label="Changes, the newest first" heads=${["version", "when", "what", "of", "share or labels", "who", "why"]} rows=${body.history.map(changeRow)} empty="nothing has been changed" />
  `;
}
