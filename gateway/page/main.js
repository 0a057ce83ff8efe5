// The page: who may see it, which view is open, what is wrong, and whether what is shown is of now.

import { html, render, useEffect, useMemo, useReducer, useRef, useState } from "./vendor/htm-preact.module.js";
import { keepKey, keyOfTab } from "./api.js";
import { Feed } from "./feed.js";
import { CheckLight, Health } from "./view/health.js";
import { Keys } from "./view/keys.js";
import { Mesh } from "./view/mesh.js";
import { Request } from "./view/request.js";
import { Requests } from "./view/requests.js";
import { Strategies } from "./view/strategies.js";
import { Try } from "./view/try.js";

const TABS = { mesh: Mesh, requests: Requests, strategies: Strategies, keys: Keys, health: Health, try: Try };
const NAMES = Object.keys(TABS);
const STALE_S = 3;

// "#/requests/ID": the tab, and what of it.
function routeOf(hash) {
  const [name, ...rest] = hash.replace(/^#\//, "").split("/");
  let one = rest.join("/");
  try {
    one = decodeURIComponent(one);
  } catch {
    // not ours: as it stands
  }
  return { tab: NAMES.includes(name) ? name : "mesh", one };
}

function useRoute() {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const look = () => setHash(location.hash);
    addEventListener("hashchange", look);
    return () => removeEventListener("hashchange", look);
  }, []);
  return routeOf(hash);
}

// Left and right, Home and End move among tabs, as in every list of tabs.
function Tabs({ open }) {
  const move = (event) => {
    const at = NAMES.indexOf(open);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: NAMES.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const name = NAMES[(to + NAMES.length) % NAMES.length];
    location.hash = `#/${name}`;
    document.getElementById(`tab-${name}`).focus();
  };
  return html`<div class="tabs" role="tablist" aria-label="Views" onKeyDown=${move}>
    ${NAMES.map(
      (name) => html`<button type="button" role="tab" id=${`tab-${name}`} aria-selected=${String(name === open)} aria-controls="view"
        tabindex=${name === open ? 0 : -1} onClick=${() => (location.hash = `#/${name}`)}>${name}</button>`,
    )}
  </div>`;
}

function KeyForm({ refusal, onKey }) {
  const field = useRef(null);
  const send = (event) => {
    event.preventDefault();
    onKey(field.current.value.trim());
  };
  return html`<main class="asking">
    <h1>MicroServe</h1>
    <form onSubmit=${send}>
      <p role="alert">${keyOfTab() ? refusal.message : "This gateway has keys: what the page shows is for an operator's."}</p>
      <label for="key">API key of an operator</label>
      <input id="key" ref=${field} type="password" autocomplete="off" required />
      <button type="submit">Open</button>
      <p class="quiet">This tab keeps it until it is closed; it goes to this gateway alone.</p>
    </form>
  </main>`;
}

const LINKS = { connecting: "connecting", connected: "live", lost: "connection lost, trying again", paused: "paused" };

function Link({ feed }) {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    const timer = setInterval(again, 1000);
    return () => clearInterval(timer);
  }, []);
  const isOld = feed.link !== "paused" && feed.ageS > STALE_S;
  // The age is not said aloud each second: only that the link has changed is.
  return html`<span class=${`link link-${feed.link}`}><span role="status">${LINKS[feed.link]}</span>${isOld && html` <span class="stale">stale ${Math.floor(feed.ageS)} s</span>`}</span>`;
}

function Alarms({ health }) {
  const alarms = health?.alarms ?? [];
  if (!alarms.length) return null;
  return html`<section class="alarms" aria-label="What is wrong now">
    <a href="#/health"><span aria-hidden="true">▲</span> ${alarms.length} ${alarms.length > 1 ? "alarms" : "alarm"}: ${alarms[0].name} ${alarms[0].subject}</a>
  </section>`;
}

function App() {
  const [, draw] = useReducer((count) => count + 1, 0);
  const feed = useMemo(() => {
    let isAsked = false; // one picture for all that comes before it
    return new Feed(() => {
      if (isAsked) return;
      isAsked = true;
      requestAnimationFrame(() => {
        isAsked = false;
        draw();
      });
    });
  }, []);
  const route = useRoute();
  useEffect(() => {
    feed.start();
    return () => feed.stop("paused");
  }, []);
  useEffect(() => {
    document.title = `${route.one || route.tab} · MicroServe`;
  }, [route.tab, route.one]);
  if (feed.link === "refused") {
    const enter = (key) => {
      keepKey(key);
      feed.start();
    };
    return html`<${KeyForm} refusal=${feed.refusal} onKey=${enter} />`;
  }
  const paused = feed.link === "paused";
  const View = route.tab === "requests" && route.one ? Request : TABS[route.tab];
  const leave = () => {
    keepKey("");
    location.reload();
  };
  return html`
    <header>
      <h1>MicroServe</h1>
      <${Link} feed=${feed} />
      ${feed.state && html`<${CheckLight} health=${feed.state.health} at=${feed.state.at} />`}
      <button type="button" aria-pressed=${String(paused)} onClick=${() => (paused ? feed.start() : feed.stop("paused"))}>Pause</button>
      ${keyOfTab() && html`<button type="button" onClick=${leave}>Forget key</button>`}
      <${Tabs} open=${route.tab} />
    </header>
    <${Alarms} health=${feed.state?.health} />
    <main id="view" role="tabpanel" aria-labelledby=${`tab-${route.tab}`} tabindex="-1">
      ${feed.state
        ? html`<${View} key=${`${route.tab}/${route.one}`} one=${route.one} state=${feed.state} paused=${paused} />`
        : html`<p class="quiet">nothing has been heard yet</p>`}
    </main>
  `;
}

render(html`<${App} />`, document.getElementById("app"));
