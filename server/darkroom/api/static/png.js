// The settings that a picture carries: our own record, or the `parameters` text that other tools write.
import { parse } from "./api.js";

const SAMPLERS = {
  "DDPM": "ddpm", "DDIM": "ddim", "Euler": "euler", "Euler a": "euler_a", "Heun": "heun", "DPM++ 2M": "dpmpp_2m",
  "DPM++ 2M SDE": "dpmpp_2m_sde", "UniPC": "unipc", "LCM": "lcm",
};
const MAX_TEXT_BYTES = 1 << 20;

export const samplerLabel = (name) => Object.keys(SAMPLERS).find((label) => SAMPLERS[label] === name) || name;

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const reader = stream.getReader();
  const parts = [];
  for (let total = 0; total < MAX_TEXT_BYTES;) {
    const { value, done } = await reader.read();
    if (done) break;
    parts.push(value);
    total += value.length;
  }
  await reader.cancel();
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// The text chunks of a PNG by keyword; none for what is no PNG or is cut short.
export async function textChunks(buffer) {
  const texts = {};
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return texts;
  const latin1 = new TextDecoder("latin1");
  const utf8 = new TextDecoder();
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    const kind = latin1.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    at += 12 + length;
    if (!["tEXt", "zTXt", "iTXt"].includes(kind) || length > MAX_TEXT_BYTES) continue;
    const split = data.indexOf(0);
    if (split < 1) continue;
    const keyword = latin1.decode(data.subarray(0, split));
    try {
      if (kind === "tEXt") texts[keyword] = latin1.decode(data.subarray(split + 1));
      if (kind === "zTXt") texts[keyword] = latin1.decode(await inflate(data.subarray(split + 2)));
      if (kind === "iTXt") {
        const language = data.indexOf(0, split + 3);
        const start = data.indexOf(0, language + 1) + 1;
        const content = data.subarray(start);
        texts[keyword] = utf8.decode(data[split + 1] ? await inflate(content) : content);
      }
    } catch {
      // A chunk that cannot be unpacked says nothing; the others may.
    }
  }
  return texts;
}

// A value may be quoted as JSON; commas within quotes separate nothing.
const PAIR = /\s*([\w ]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g;

export function parseInfotext(text) {
  const lines = text.trim().split("\n");
  const last = lines.at(-1);
  const values = {};
  if (/\bSteps: \d/.test(last)) {
    lines.pop();
    for (const [, name, raw] of last.matchAll(PAIR)) {
      let value = raw.trim();
      if (value.startsWith('"')) {
        try { value = JSON.parse(value); } catch { /* left as it is written */ }
      }
      values[name.trim()] = value;
    }
  }
  const negative = lines.findIndex((line) => line.startsWith("Negative prompt:"));
  const request = { prompt: lines.slice(0, negative < 0 ? undefined : negative).join("\n").trim() };
  if (negative >= 0) request.negative_prompt = lines.slice(negative).join("\n").slice("Negative prompt:".length).trim();
  const set = (field, value) => { if (value !== undefined && !Number.isNaN(value)) request[field] = value; };
  const number = (name) => (name in values ? Number(values[name]) : undefined);
  set("num_inference_steps", number("Steps"));
  set("guidance_scale", number("CFG scale"));
  if (/^\d+$/.test(values.Seed || "")) request.seed = values.Seed;
  const size = /^(\d+)x(\d+)$/.exec(values.Size || "");
  if (size) Object.assign(request, { width: Number(size[1]), height: Number(size[2]) });
  // Older tools write the schedule behind the sampler's name.
  const [, sampler, suffix] = /^(.*?)(?: (Karras|Exponential))?$/.exec(values.Sampler || "");
  if (SAMPLERS[sampler]) request.sampler = SAMPLERS[sampler];
  const schedule = (values["Schedule type"] || suffix || "").toLowerCase();
  if (["simple", "karras", "exponential"].includes(schedule)) request.sigma_schedule = schedule;
  if (values.Model) request.model = values.Model;
  set("strength", number("Denoising strength"));
  if (number("Clip skip") > 1) request.clip_skip = number("Clip skip") - 1;
  const isBracketed = /[()[\]]|\bBREAK\b/.test(`${request.prompt} ${request.negative_prompt || ""}`);
  if (isBracketed && values.Emphasis !== "None") request.prompt_syntax = "weighted";
  return request;
}

export function parseRecord(text) {
  try {
    const record = parse(text);
    return record && typeof record.request === "object" ? record.request : null;
  } catch {
    return null;
  }
}

// The request a picture was made by, or null.
export async function settingsOf(file) {
  const texts = await textChunks(await file.arrayBuffer());
  if (texts.darkroom) {
    const request = parseRecord(texts.darkroom);
    if (request) return request;
  }
  return texts.parameters ? parseInfotext(texts.parameters) : null;
}
