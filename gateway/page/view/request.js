// One request taken apart: where its time went, and why it went there.

import { html } from "../vendor/htm-preact.module.js";
import { Facts, Table, Trouble, useAnswer } from "../parts.js";
import { day, number, percent, plain, seconds } from "../words.js";

const WIDTH = 1000;

function Strip({ timeline, wall }) {
  const all = wall || 1;
  const words = timeline.map((part) => `${part.name} ${seconds(part.seconds)}`).join(", ");
  return html`<svg class="strip" role="img" aria-label=${`Timeline: ${words}`} viewBox=${`0 0 ${WIDTH} 40`} preserveAspectRatio="none">
    ${timeline.map((part, at) => html`<rect class=${`phase phase-${at % 9}`} x=${(part.begin_s / all) * WIDTH} y="2" width=${Math.max(0.5, (part.seconds / all) * WIDTH)} height="36"><title>${part.name} ${seconds(part.seconds)}</title></rect>`)}
  </svg>`;
}

// Phases one after the other; their sum is the wall time.
export function Timeline({ detail }) {
  const form = detail.request;
  if (!form?.at) return html`<p class="quiet">It still runs: its timeline comes when it has ended.</p>`;
  const sum = detail.timeline.reduce((all, part) => all + part.seconds, 0);
  return html`
    <${Strip} timeline=${detail.timeline} wall=${form.wall_s} />
    <${Table} label="Timeline" heads=${["phase", "where", "begins after", "takes", "of the whole"]}
      rows=${detail.timeline.map((part, at) => [
        html`<svg class="swatch" width="12" height="12" aria-hidden="true"><rect class=${`phase phase-${at % 9}`} width="12" height="12" /></svg> ${part.name}`,
        part.where, seconds(part.begin_s), seconds(part.seconds), percent(part.seconds / (form.wall_s || 1))])}
      foot=${["sum", "wall time " + seconds(form.wall_s), "", html`<span data-sum=${sum} data-wall=${form.wall_s}>${seconds(sum)}</span>`, percent(sum / (form.wall_s || 1))]} />
  `;
}

function Pick({ pick, cached, number: at }) {
  const rows = pick.candidates.map((id, i) => {
    const isChosen = id === pick.chosen;
    const scores = pick.scored.map((each) => `${each.name} ${plain(each.scores[i])} × ${plain(each.weight)}`).join(", ");
    const cells = [html`${isChosen ? html`<strong><span aria-hidden="true">➜</span> ${id}, chosen</strong>` : id}`,
      plain(pick.costs[i]), id in cached ? number(cached[id]) : "–", number(pick.uncached_tokens[i]), number(pick.sequences[i]), scores || "–"];
    cells.mark = isChosen ? "chosen" : "";
    return cells;
  });
  const among = [pick.label ? `label ${pick.label}` : "any label", pick.numerics && `class ${pick.numerics}`, pick.temperature > 0 && `temperature ${plain(pick.temperature)}`].filter(Boolean).join(", ");
  return html`<h5>Pick ${at}, ${seconds(pick.at_s)} after it came: by ${pick.by}, among ${among}</h5>
    <${Table} label=${`Candidates of pick ${at}`} heads=${["engine", "cost", "cached tokens", "to compute", "sequences there", "scores"]} rows=${rows} />
    ${pick.excluded.length > 0 && html`<p>Not wanted: ${pick.excluded.join(", ")}</p>`}`;
}

function coded(coding) {
  if (!coding) return "";
  return `${coding.profile} (${coding.reason}): ${number(coding.raw_nbytes)} bytes as ${number(coding.wire_nbytes)}, predicted ${seconds(coding.predicted_s)}, took ${seconds(coding.observed_s)}`;
}

function Attempt({ attempt, number: at, isLast }) {
  const name = attempt.version ? `${attempt.strategy} v${attempt.version}` : attempt.strategy;
  return html`<section class="attempt">
    <h4>Attempt ${at}: ${name}, ${seconds(attempt.at_s)} after it came${isLast ? "" : ": it failed, and another one followed"}</h4>
    <p>${attempt.engine_id ? `Generated at ${attempt.engine_id}, from token ${number(attempt.begin)} of ${number(attempt.num_tokens)}.` : "It did not come to generating."}
      ${attempt.engine_id && attempt.awaits_first && " A sender sampled the first token."}</p>
    ${attempt.picks.map((pick, i) => html`<${Pick} pick=${pick} cached=${attempt.cached} number=${i + 1} />`)}
    ${attempt.num_picks > attempt.picks.length && html`<p class="quiet">${attempt.num_picks - attempt.picks.length} later picks are not kept</p>`}
    ${attempt.sends.length > 0 && html`<${Table} label=${`KV sent in attempt ${at}`} heads=${["KV from", "to", "tokens", "codec"]}
      rows=${attempt.sends.map((send) => [send.source, send.target, `${number(send.begin)} to ${number(send.end)}`, coded(send.coding)])} />`}
    ${attempt.notes.length > 0 && html`<${Table} label=${`Notes of attempt ${at}`} heads=${["note", "after", "values"]}
      rows=${attempt.notes.map((note) => [note.text, seconds(note.at_s), plain(note.values)])} />`}
    ${attempt.engines.length > 0 && html`<details><summary>Engines as they were seen: ${attempt.engines.length}</summary>
      <${Table} label=${`Engines of attempt ${at}`} heads=${["engine", "labels", "report's age", "own tokens there", "own sequences"]}
        rows=${attempt.engines.map((seen) => [seen.engine_id, plain(seen.labels), seconds(seen.load_age_s), number(seen.own_tokens), number(seen.own_sequences)])} /></details>`}
  </section>`;
}

function Why({ detail }) {
  if (!detail.records.length) {
    const silent = detail.silent.length ? `${detail.silent.join(", ")} did not answer` : "no router remembers it";
    return html`<p class="quiet">${silent}.</p>`;
  }
  return detail.records.map((record) => {
    const before = record.num_attempts - record.attempts.length;
    return html`<section>
      <${Facts} of=${[
        ["asked for", record.strategy || "the default"], ["version", record.version || "built in"], ["attempts", number(record.num_attempts)],
        ["failovers", number(Math.max(0, record.num_attempts - 1))], ["end", record.code || record.reason || "runs"], ["attributes", plain(record.attributes)],
      ]} />
      ${record.is_cut && html`<p class="quiet">It was too long to be kept whole: engines and candidates are left out.</p>`}
      ${record.attempts.map((attempt, at) => html`<${Attempt} attempt=${attempt} number=${before + at + 1} isLast=${at === record.attempts.length - 1} />`)}
    </section>`;
  });
}

export function Detail({ detail }) {
  const form = detail.request;
  return html`
    ${form ? html`
      <${Facts} of=${[
        ["ended", form.at ? day(form.at) : "runs"], ["wall time", seconds(form.wall_s)], ["first token", seconds(form.ttft_s)], ["status", `${form.status || "–"} ${form.code}`],
        ["end", form.finish_reason || "–"], ["tokens in", number(form.prompt_tokens)], ["cached", number(form.cached_tokens)], ["received as KV", number(form.received_tokens)], ["out", number(form.output_tokens)],
        ["strategy", form.strategy_version ? `${form.strategy} v${form.strategy_version}` : form.strategy || "–"], ["share", form.share || "–"], ["engines", form.engines.join(" → ") || "–"],
        ["heaps", plain(form.heaps)], ["moves", number(form.moves)], ["class", form.numerics || "–"], ["exact", plain(form.exact)], ["key", form.key || "–"], ["path", form.path],
      ]} />
      ${(form.why || form.alone) && html`<p>${form.why} ${form.alone && `alone: ${form.alone}`}</p>`}
      <h3>Where its time went</h3>
      <${Timeline} detail=${detail} />`
    : html`<p class="quiet">This gateway does not remember it; routers do.</p>`}
    <h3>Why here</h3>
    <${Why} detail=${detail} />
  `;
}

export function Request({ one, paused }) {
  const said = useAnswer(`/view/requests/${encodeURIComponent(one)}`, { everyS: 5, paused });
  return html`
    <p><a href="#/requests">All requests</a></p>
    <h2>Request <code>${one}</code></h2>
    <${Trouble} error=${said.error} />
    ${said.body && html`<${Detail} detail=${said.body} />`}
  `;
}
