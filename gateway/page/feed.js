// The state that all views draw: a snapshot and the deltas behind it (gateway/view/feed.py), over a connection that is
// made again whenever it breaks.

import { ask, eventsOf } from "./api.js";

const MAX_ENDED = 1000;
const SILENT_MS = 10000; // the gateway says something twice a second
const FIRST_WAIT_MS = 500;
const MAX_WAIT_MS = 8000;

export class Feed {
  constructor(tell) {
    this.tell = tell; // called when anything has changed
    this.link = "connecting"; // connected, lost, paused, refused
    this.refusal = null;
    this.heardAt = performance.now();
    this.lastId = "";
    this.waitMs = FIRST_WAIT_MS;
    this.state = null;
    this.abort = null;
    this.timer = null;
  }

  get ageS() {
    return (performance.now() - this.heardAt) / 1000;
  }

  start() {
    this.stop("connecting");
    this.run();
  }

  stop(link) {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
    this.set(link);
  }

  set(link, refusal = null) {
    this.link = link;
    this.refusal = refusal;
    this.tell();
  }

  async run() {
    const abort = (this.abort = new AbortController());
    const silence = setInterval(() => this.ageS * 1000 > SILENT_MS && abort.abort(), 1000);
    this.heardAt = this.state ? this.heardAt : performance.now();
    try {
      const headers = this.lastId ? { "last-event-id": this.lastId } : {};
      const opening = setTimeout(() => abort.abort(), SILENT_MS);
      const answer = await ask("/view/feed", { headers, signal: abort.signal }).finally(() => clearTimeout(opening));
      this.heardAt = performance.now();
      for await (const event of eventsOf(answer)) {
        if (this.abort !== abort) return;
        this.heardAt = performance.now();
        this.waitMs = FIRST_WAIT_MS;
        if (event.data) {
          this.apply(JSON.parse(event.data));
          this.lastId = event.id;
        }
        if (this.link !== "connected") this.set("connected");
        else if (event.data) this.tell();
      }
    } catch (error) {
      if (this.abort === abort && error.needsKey) return this.stop("refused"), this.set("refused", error);
    } finally {
      clearInterval(silence);
    }
    if (this.abort !== abort) return; // stopped, or begun anew
    this.set("lost");
    this.timer = setTimeout(() => this.run(), this.waitMs);
    this.waitMs = Math.min(this.waitMs * 2, MAX_WAIT_MS);
  }

  apply(told) {
    if (told.type === "snapshot") {
      this.state = { ...told, engines: new Map(told.engines.map((each) => [each.id, each])) };
      return;
    }
    const state = (this.state = { ...this.state, at: told.at, index_alive: told.index_alive });
    state.control_version = told.control_version;
    state.num_running = told.num_running;
    for (const each of told.engines ?? []) state.engines.set(each.id, each);
    for (const each of told.gone ?? []) state.engines.delete(each);
    if (told.running) state.running = told.running;
    if (told.health) state.health = told.health;
    if (told.ended?.length) state.ended = [...state.ended, ...told.ended].slice(-MAX_ENDED);
  }
}
