// The form: what it asks for, the model's card that fills it in, and a word beside each field that is wrong.
import { key } from "./api.js";
import { $, element, pairWithSlider } from "./dom.js";
import { samplerLabel } from "./png.js";

const NUMBERS = ["num_inference_steps", "guidance_scale", "width", "height"];
const FIELDS = ["prompt", "negative_prompt", "model", ...NUMBERS, "sampler", "sigma_schedule", "seed", "num_images_per_prompt", "strength"];
const PLACES = [...FIELDS, "init_image", "mask_image"];
let cards = [];
let clipSkip = 0; // has no field, but a picture's settings may carry it

const number = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

export const card = () => cards.find((one) => one.id === $("model").value) || cards[0];

export const size = () => [Number($("width").value) || card()?.width || 64, Number($("height").value) || card()?.height || 64];

// Only the fields that say something, so that the model's own defaults do the rest. A seed stays text, see `bodyOf`.
export function request() {
  const wanted = { prompt: $("prompt").value };
  if ($("negative_prompt").value) wanted.negative_prompt = $("negative_prompt").value;
  if (cards.length > 1) wanted.model = $("model").value;
  for (const name of NUMBERS) {
    const text = $(name).value.trim();
    if (text !== "") wanted[name] = number(text);
  }
  for (const name of ["sampler", "sigma_schedule"]) if ($(name).value) wanted[name] = $(name).value;
  if ($("weighted").checked) wanted.prompt_syntax = "weighted";
  if (clipSkip && clipSkip <= card()?.max_clip_skip) wanted.clip_skip = clipSkip;
  if ($("seed").value.trim()) wanted.seed = $("seed").value.trim();
  if ($("num_images_per_prompt").value !== "1") wanted.num_images_per_prompt = number($("num_images_per_prompt").value);
  return wanted;
}

// A request as JSON, with the seed as a number however large it is.
export function bodyOf(wanted) {
  const { seed, ...rest } = wanted;
  const text = JSON.stringify(rest);
  if (seed === undefined) return text;
  const written = /^\d+$/.test(seed) ? BigInt(seed) : JSON.stringify(seed);
  return `${text.slice(0, -1)}${text === "{}" ? "" : ","}"seed":${written}}`;
}

export function curlOf(wanted) {
  const body = bodyOf({ ...wanted, prompt: wanted.prompt || "an astronaut riding a horse" }).replaceAll("'", "'\\''");
  // The key itself is not for shell histories.
  const shown = key() ? '  -H "Authorization: Bearer $DARKROOM_API_KEY" \\\n' : "";
  return `curl ${location.origin}/generate \\\n${shown}  -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n  -d '${body}' -o picture.png`;
}

// Fill the form in with a request; what it leaves out falls back to the model's card.
export function fill(wanted) {
  if (wanted.model && cards.some((one) => one.id === wanted.model)) $("model").value = wanted.model;
  showCard(true);
  const values = { negative_prompt: "", seed: "", num_images_per_prompt: 1, ...wanted };
  $("weighted").checked = wanted.prompt_syntax === "weighted";
  clipSkip = wanted.clip_skip || 0;
  for (const name of FIELDS) {
    if (name === "model" || values[name] === undefined) continue;
    // A sampler that this model does not offer is not chosen.
    const field = $(name);
    if (field.tagName !== "SELECT" || [...field.options].some((one) => one.value === values[name])) field.value = values[name];
  }
  settled();
}

// Show a model's card. What was typed before the first card arrived stays, unless `overwrite`.
function showCard(overwrite) {
  const chosen = card();
  if (!chosen) return;
  for (const name of NUMBERS) if (overwrite || !$(name).value) $(name).value = chosen[name];
  for (const name of ["width", "height"]) {
    Object.assign($(name), { step: chosen.size_multiple, min: chosen.size_multiple, max: chosen[`max_${name}`] });
  }
  $("sampler").replaceChildren(...chosen.samplers.map((name) => new Option(samplerLabel(name), name, name === chosen.sampler, name === chosen.sampler)));
  $("sigma_schedule").replaceChildren(new Option("the model’s own", ""), ...chosen.sigma_schedules.map((name) => new Option(name, name)));
  $("examples").replaceChildren(...chosen.example_prompts.slice(0, 3).map((text) => element("button", {
    type: "button", textContent: text, onclick: () => { $("prompt").value = text; $("form").requestSubmit(); },
  })));
  settled();
}

export function showCards(models) {
  cards = models;
  $("model").replaceChildren(...cards.map((one) => new Option(one.id)));
  $("model-field").hidden = cards.length < 2;
  showCard(false);
}

function settled() {
  for (const name of ["num_inference_steps", "guidance_scale", "strength"]) $(`${name}-range`).value = $(name).value;
  summarise();
}

function summarise() {
  const [width, height] = size();
  $("settings-line").textContent = [
    `${width} × ${height}`, `${$("num_inference_steps").value} steps`, samplerLabel($("sampler").value),
    $("seed").value && `seed ${$("seed").value}`, Number($("num_images_per_prompt").value) > 1 && `${$("num_images_per_prompt").value} pictures`,
  ].filter(Boolean).join(" · ");
}

export function clearErrors() {
  for (const name of PLACES) {
    $(`${name}-error`).hidden = true;
    $(name)?.removeAttribute("aria-invalid");
  }
}

// Put each error beside its field and go to the first; returns those that have no field here.
export function showErrors(errors) {
  const placed = errors.filter((error) => PLACES.includes(error.field));
  for (const { field, value, accepted } of placed) {
    $(`${field}-error`).textContent = value === "''" || value === "nothing" ? `This wants ${accepted}.` : `This takes ${accepted}; it was given ${value}.`;
    $(`${field}-error`).hidden = false;
    $(field)?.setAttribute("aria-invalid", "true");
  }
  const first = placed.map((error) => $(error.field)).find(Boolean);
  if (first && $("settings").contains(first)) $("settings").open = true;
  first?.focus();
  if (placed.length) $(`${placed[0].field}-error`).scrollIntoView({ block: "nearest" });
  return errors.filter((error) => !placed.includes(error));
}

export function setUp() {
  for (const name of ["num_inference_steps", "guidance_scale", "strength"]) pairWithSlider($(name), $(`${name}-range`));
  $("model").addEventListener("change", () => showCard(true));
  $("form").addEventListener("input", summarise);
  $("swap").addEventListener("click", () => {
    [$("width").value, $("height").value] = [$("height").value, $("width").value];
    $("form").dispatchEvent(new Event("input"));
  });
  $("dice").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    summarise();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  // On a phone the settings are one line until they are asked for.
  $("settings").open = matchMedia("(min-width: 60rem)").matches;
}
