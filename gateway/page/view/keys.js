// Who uses what, and what is left of it.

import { html } from "../vendor/htm-preact.module.js";
import { Share, Table, Trouble, useAnswer } from "../parts.js";
import { number } from "../words.js";

const HEADS = ["key", "requests", "refused", "tokens in", "cached", "tokens out", "streams", "tokens today", "of its budget"];

function rowOf(key) {
  return [key.operator ? `${key.name} (operator)` : key.name, number(key.requests), number(key.refused), number(key.prompt_tokens), number(key.cached_tokens), number(key.output_tokens),
    key.max_streams ? `${number(key.streams)} of ${number(key.max_streams)}` : number(key.streams), number(key.tokens_today),
    key.tokens_per_day ? html`<${Share} of=${Math.min(1, key.tokens_today / key.tokens_per_day)} label=${`of the budget of ${key.name}`} /> of ${number(key.tokens_per_day)}` : "no budget"];
}

export function Keys({ paused }) {
  const said = useAnswer("/view/keys", { everyS: 3, paused });
  const keys = [...(said.body?.keys ?? [])].sort((one, other) => other.prompt_tokens + other.output_tokens - one.prompt_tokens - one.output_tokens);
  return html`
    <h2>Keys</h2>
    <${Trouble} error=${said.error} />
    <p class="quiet">Who uses most comes first. Requests and tokens are since this process began, today's are of all gateways.</p>
    <${Table} label="API keys" heads=${HEADS} rows=${keys.map(rowOf)} empty="this gateway has no keys: whoever reaches it may ask" />
  `;
}
