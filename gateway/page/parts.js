// What several views are made of: tables, states, bars, curves. A chart never stands without its numbers.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.module.js";
import { askJson } from "./api.js";
import { number, percent } from "./words.js";

export const MAX_ROWS = 100;

const SHAPES = { ready: "●", ok: "●", draining: "◐", refused: "▲", lost: "✕", wrong: "✕" };

// A state by shape and word; its colour says nothing that these do not.
export const State = ({ name }) =>
  html`<span class=${`state state-${name}`}><span aria-hidden="true">${SHAPES[name] ?? "■"}</span> ${name}</span>`;

// A column's head; one that rows can be ordered by is a button, and says whether they are: { text, isOrder, order }.
function Head({ head }) {
  if (typeof head === "string") return html`<th scope="col">${head}</th>`;
  return html`<th scope="col" aria-sort=${head.isOrder ? "descending" : "none"}><button type="button" class="order" onClick=${head.order}>${head.text}<span aria-hidden="true">${head.isOrder ? " ▼" : ""}</span></button></th>`;
}

// Rows under heads, of which MAX_ROWS are drawn; it scrolls by itself where the window is narrow, by keyboard too.
export function Table({ label, heads, rows, empty = "none", more = 0, foot = null }) {
  const shown = rows.slice(0, MAX_ROWS);
  const left = rows.length - shown.length + more;
  return html`<div class="scroll" role="region" aria-label=${label} tabindex="0">
    <table>
      <caption class="hidden">${label}</caption>
      <thead><tr>${heads.map((head) => html`<${Head} head=${head} />`)}</tr></thead>
      <tbody>
        ${shown.length
          ? shown.map(
              (cells) => html`<tr key=${cells.key ?? null} class=${cells.mark ?? ""}>
                ${cells.map((cell, at) => (at ? html`<td>${cell}</td>` : html`<th scope="row">${cell}</th>`))}
              </tr>`,
            )
          : html`<tr><td colspan=${heads.length} class="quiet">${empty}</td></tr>`}
      </tbody>
      ${foot && html`<tfoot><tr>${foot.map((cell, at) => (at ? html`<td>${cell}</td>` : html`<th scope="row">${cell}</th>`))}</tr></tfoot>`}
    </table>
    ${left > 0 && html`<p class="quiet">${number(left)} more are not drawn; filter to see them.</p>`}
  </div>`;
}

// Fields of one thing.
export const Facts = ({ of }) =>
  html`<dl class="facts">${of.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

// Parts of a whole beside one another: [name, amount]; the words say the same.
export function Bar({ parts, label, width = 160, height = 14 }) {
  const all = parts.reduce((sum, [, amount]) => sum + amount, 0) || 1;
  let at = 0;
  return html`<svg class="bar" role=${label ? "img" : null} aria-label=${label || null} aria-hidden=${label ? null : "true"} viewBox=${`0 0 ${width} ${height}`} width=${width} height=${height} preserveAspectRatio="none">
    ${parts.map(([name, amount]) => {
      const x = at;
      at += (amount / all) * width;
      return html`<rect class=${`part part-${name}`} x=${x} y="0" width=${Math.max(0, at - x - 0.5)} height=${height}><title>${name}</title></rect>`;
    })}
  </svg>`;
}

export function Share({ of, label }) {
  return html`<span class="share"><${Bar} parts=${[["used", of], ["free", 1 - of]]} label=${`${label} ${percent(of)}`} width=${60} /> ${percent(of)}</span>`;
}

// A curve of some values, the newest at the right.
export function Spark({ values, label, width = 100, height = 20 }) {
  if (!values?.length) return html`<span class="quiet">–</span>`;
  const top = Math.max(...values, 1e-9);
  const step = width / Math.max(1, values.length - 1);
  const points = values.map((value, at) => `${(at * step).toFixed(1)},${(height - 1 - (value / top) * (height - 2)).toFixed(1)}`).join(" ");
  return html`<svg class="spark" role="img" aria-label=${`${label}: now ${number(values.at(-1))}, at most ${number(top < 1e-6 ? 0 : top)}`} viewBox=${`0 0 ${width} ${height}`} width=${width} height=${height}>
    <polyline points=${points} />
  </svg>`;
}

// What a path of /view says: asked at once, again every so many seconds, and whenever `path` or `again` changes. While the
// page is paused it stands. An empty path asks nothing.
export function useAnswer(path, { everyS = 0, again = 0, paused = false } = {}) {
  const [answer, setAnswer] = useState({ path: "", body: null, error: null });
  const told = useRef(null);
  useEffect(() => {
    if (!path || (paused && told.current === path)) return undefined;
    let timer = null;
    let over = false;
    const look = async () => {
      try {
        const body = await askJson(path);
        told.current = path;
        if (!over) setAnswer({ path, body, error: null });
      } catch (error) {
        // What was there stays, and is called old.
        if (!over) setAnswer((last) => ({ path, body: last.path === path ? last.body : null, error }));
      }
      if (!over && everyS && !paused) timer = setTimeout(look, everyS * 1000);
    };
    look();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [path, everyS, again, paused]);
  return answer.path === path ? answer : { body: null, error: null };
}

export const Trouble = ({ error }) =>
  error && html`<p class="trouble"><span aria-hidden="true">▲</span> not up to date: ${error.message}</p>`;
