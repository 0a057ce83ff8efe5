// What scripts for Node have in common: as the Python one beside it.

const { MICROSERVE_MESH, MICROSERVE_TALKER } = process.env;

export const MESH = { url: MICROSERVE_MESH, model: "leaning" };
export const TALKER = { url: MICROSERVE_TALKER, model: "talker" };

const checks = [];

/** `name`: what is tried, as docs/clients.md says it. */
export function check(name, body) {
  checks.push([name, body]);
}

/** A call as the model writes it. */
export function callText(name, args) {
  return `<tool_call>\n${JSON.stringify({ name, arguments: args })}\n</tool_call>`;
}

/** All of them; one that fails does not hide the next. */
export async function main() {
  let failed = 0;
  for (const [name, body] of checks) {
    try {
      await body();
      console.log(`ok ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED ${name}\n${error?.stack ?? error}`, error?.cause ?? "");
    }
  }
  process.exit(failed ? 1 : 0);
}
