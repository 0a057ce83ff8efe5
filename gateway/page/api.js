// What the page asks of its gateway: with the operator's key, which the tab keeps and nobody else.

const KEY = "microserve.key";

export const keyOfTab = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

// An answer that is an error, in the gateway's own words.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

export async function ask(path, options = {}) {
  const key = keyOfTab();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  let message = `the gateway answers ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // no envelope: the status says it
  }
  throw new Refused(answer.status, message);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// Server-sent events of an answer, as {id, data}; comments come as {}, so that silence can be told from rest.
export async function* eventsOf(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = {};
        for (const line of part.split("\n")) {
          if (line.startsWith("id: ")) event.id = line.slice(4);
          else if (line.startsWith("data: ")) event.data = line.slice(6);
        }
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
