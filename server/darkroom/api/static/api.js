// The server's public API, as every other client uses it: calls with the key that was given, and event streams by
// fetch, because EventSource cannot send a key.
import { $ } from "./dom.js";

const KEY = "darkroom.key";
let asking = null;
let isDeclined = false;

export class Problem extends Error {
  constructor(status, document, retryAfterS) {
    super(document.detail || "Nothing more is known.");
    Object.assign(this, { status, retryAfterS, title: document.title, code: document.code, errors: document.errors || [] });
  }
}

export const key = () => sessionStorage.getItem(KEY) || localStorage.getItem(KEY);

export function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-text").textContent = reason;
    $("key-input").value = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "use" ? $("key-input").value.trim() : "";
      isDeclined = !given;
      if (given) {
        sessionStorage.removeItem(KEY);
        localStorage.removeItem(KEY);
        ($("key-keep").checked ? localStorage : sessionStorage).setItem(KEY, given);
      }
      resolve(Boolean(given));
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

function send(path, options) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  // With credentials left out a refusal does not make the browser ask for a password in a window of its own.
  return fetch(path, { ...options, headers, credentials: "omit" });
}

// The reply of a call that went well. Throws a Problem with status 0 when there is no reply at all.
export async function call(path, options = {}) {
  for (;;) {
    let reply;
    try {
      reply = await send(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, { title: "The server does not answer", detail: "It may be starting. Nothing you typed is lost.", code: "unreachable" });
    }
    if (reply.ok) return reply;
    const document = await reply.json().catch(() => ({ title: `The server answered ${reply.status}`, code: "unknown" }));
    if (reply.status === 401) {
      $("key").hidden = false;
      // Who has said "not now" is asked again only when they ask for something themselves.
      const mayAsk = !isDeclined || options.method;
      if (mayAsk && await askForKey(key() ? "That key does not fit. Whoever runs this darkroom can give you another." : "Whoever runs it can give you a key.")) continue;
    }
    throw new Problem(reply.status, document, Number(reply.headers.get("Retry-After-Ms")) / 1000 || Number(reply.headers.get("Retry-After")) || 0);
  }
}

// Seeds go beyond what a JavaScript number holds: such a one stays text.
export const parse = (text) => JSON.parse(text.replace(/"seed":\s*(\d{16,})/g, '"seed":"$1"'));

export const json = async (path, options) => parse(await (await call(path, options)).text());

const pause = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
});

// {kind, data} of each event of a stream, taken up again where it broke off until the caller leaves or `signal` aborts.
// `onBreak` is told when it breaks off. Throws the Problem of a stream that there is not.
export async function* events(path, signal, onBreak = () => {}) {
  let last = null;
  let waitMs = 250;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      const reply = await call(path, { headers, signal, cache: "no-store" });
      for await (const event of parsed(reply.body)) {
        waitMs = 250;
        if (event.id) last = event.id;
        yield { kind: event.event, data: JSON.parse(event.data) };
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
      onBreak();
    }
    await pause(waitMs, signal);
    waitMs = Math.min(2 * waitMs, 4000);
  }
}

async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const event = {};
        for (const line of block.split(/\r?\n/)) {
          const [, name, content] = /^(\w+): ?(.*)$/.exec(line) || [];
          if (name) event[name] = name in event ? `${event[name]}\n${content}` : content;
        }
        if (event.data !== undefined) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// What this server can do beyond the first release, as its own description says.
export async function capabilities() {
  const document = await json("/openapi.json");
  const fields = document.components.schemas.GenerateRequest.properties;
  return { startsFromPictures: "init_image" in fields, masks: "mask_image" in fields, showsBatch: "/batch" in document.paths };
}
