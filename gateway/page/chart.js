// A chart over time by uPlot, with changes of strategies as marks. It is for the eye: its words and the tables beside it say
// the same.

import { html, useEffect, useRef } from "./vendor/htm-preact.module.js";

const HEIGHT = 150;

const minute = (at) => new Date(at * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function options(width, names, marks) {
  const axis = { stroke: () => colour("--ink"), grid: { stroke: () => colour("--line") }, ticks: { stroke: () => colour("--line") } };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    axes: [{ ...axis, size: 28, space: 70, incrs: [60, 120, 300, 600], values: (_, times) => times.map(minute) }, { ...axis, size: 50 }],
    series: [{}, ...names.map((name, at) => ({ label: name, stroke: () => colour(`--curve-${at + 1}`), width: 2, dash: at ? [6, 3] : [] }))],
    hooks: {
      draw: [
        (plot) => {
          const { ctx, bbox } = plot;
          ctx.save();
          ctx.strokeStyle = colour("--ink");
          ctx.setLineDash([2, 3]);
          for (const at of marks.current) {
            const x = plot.valToPos(at, "x", true);
            if (x < bbox.left || x > bbox.left + bbox.width) continue;
            ctx.beginPath();
            ctx.moveTo(x, bbox.top);
            ctx.lineTo(x, bbox.top + bbox.height);
            ctx.stroke();
          }
          ctx.restore();
        },
      ],
    },
  };
}

// `data`: seconds since 1970, then the values of each name; `marks`: seconds likewise.
export function Chart({ label, names, data, marks = [] }) {
  const place = useRef(null);
  const plot = useRef(null);
  const marked = useRef(marks);
  marked.current = marks;
  useEffect(() => {
    const made = (plot.current = new window.uPlot(options(place.current.clientWidth || 300, names, marked), data, place.current));
    const watch = new ResizeObserver(() => made.setSize({ width: place.current?.clientWidth || 300, height: HEIGHT }));
    watch.observe(place.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => made.redraw();
    scheme.addEventListener("change", redraw);
    return () => {
      watch.disconnect();
      scheme.removeEventListener("change", redraw);
      made.destroy();
    };
  }, [names.join()]);
  useEffect(() => plot.current?.setData(data), [data, marks]);
  return html`<figure class="chart">
    <figcaption>${label}: ${names.map((name, at) => html`<span class=${`key key-${at + 1}`}>${at ? "┅" : "━"} ${name}</span> `)}</figcaption>
    <div ref=${place} aria-hidden="true"></div>
  </figure>`;
}
