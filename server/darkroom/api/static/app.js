"use strict";
// The page talks to the same public API as every other client. Text from the network is only ever set as textContent.

const $ = (id) => document.getElementById(id);
const fieldNames = ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "sampler", "seed", "width", "height", "num_images_per_prompt", "model"];
const terminal = ["succeeded", "failed", "cancelled", "expired"];
let cards = [];
let current = null; // {id, source} of the job being followed

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function card() {
  return cards.find((one) => one.id === $("model").value) || cards[0];
}

// What the form asks for: only the fields that say something, so that the model's own defaults do the rest.
function request() {
  const body = { prompt: $("prompt").value };
  if ($("negative_prompt").value) body.negative_prompt = $("negative_prompt").value;
  if (cards.length > 1) body.model = $("model").value;
  for (const name of ["num_inference_steps", "guidance_scale", "width", "height", "seed"]) {
    const text = $(name).value.trim();
    if (text !== "") body[name] = Number.isFinite(Number(text)) ? Number(text) : text;
  }
  if ($("sampler").value) body.sampler = $("sampler").value;
  if ($("num_images_per_prompt").value !== "1") body.num_images_per_prompt = Number($("num_images_per_prompt").value);
  return body;
}

function showCurl() {
  const body = JSON.stringify({ ...request(), prompt: $("prompt").value || "a red fox in the snow" });
  const quoted = body.replaceAll("'", "'\\''");
  $("curl").textContent = `curl ${location.origin}/generate \\\n  -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n  -d '${quoted}' -o picture.png`;
}

// Fill the form in from the model's card. What was typed before the first card arrived stays.
function showCard(overwrite) {
  const chosen = card();
  if (!chosen) return;
  for (const name of ["num_inference_steps", "guidance_scale", "width", "height"]) {
    if (overwrite || !$(name).value) $(name).value = chosen[name];
  }
  for (const name of ["width", "height"]) {
    Object.assign($(name), { step: chosen.size_multiple, min: chosen.size_multiple, max: chosen[`max_${name}`] });
  }
  $("sampler").replaceChildren(...chosen.samplers.map((name) => element("option", { value: name, textContent: name, selected: name === chosen.sampler })));
  $("examples").replaceChildren(...(chosen.example_prompts || []).slice(0, 5).map((text) =>
    element("button", { type: "button", textContent: text, onclick: () => { $("prompt").value = text; showCurl(); $("form").requestSubmit(); } })));
  showCurl();
}

async function loadModels() {
  const reply = await fetch("/models");
  if (!reply.ok) return;
  cards = (await reply.json()).models;
  $("model").replaceChildren(...cards.map((one) => element("option", { value: one.id, textContent: one.id })));
  $("model-field").hidden = cards.length < 2;
  showCard(false);
}

async function watchHealth() {
  let pause = 2000;
  try {
    const reply = await fetch("/health/ready");
    const body = await reply.json();
    if (reply.ok) {
      if (cards.length === 0) await loadModels();
      const names = cards.map((one) => one.id).join(", ");
      $("health").textContent = body.health === "busy" ? "The queue is full; new work has to wait." : names;
      pause = 15000;
    } else {
      $("health").textContent = body.code === "no_model" ? "Waiting for a worker…" : `${body.title}.`;
    }
  } catch {
    $("health").textContent = "The server does not answer.";
  }
  setTimeout(watchHealth, pause);
}

function clearProblem() {
  $("problem").hidden = true;
  for (const name of fieldNames) {
    $(name).removeAttribute("aria-invalid");
    $(`${name}-error`).hidden = true;
  }
}

function showProblem(title, detail, errors = []) {
  let unplaced = errors.length === 0;
  let first = null;
  for (const error of errors) {
    const line = fieldNames.includes(error.field) ? $(`${error.field}-error`) : null;
    if (!line) { unplaced = true; continue; }
    line.textContent = `Expected ${error.accepted}.`;
    line.hidden = false;
    $(error.field).setAttribute("aria-invalid", "true");
    first = first || $(error.field);
  }
  if (first) first.focus();
  if (unplaced) {
    $("problem").replaceChildren(element("strong", { textContent: `${title}.` }), element("p", { textContent: detail }));
    $("problem").hidden = false;
  }
  $("status").textContent = first && !unplaced ? "Please look at the marked fields." : "";
}

function setBusy(busy) {
  $("go").disabled = busy;
  $("stop").hidden = !busy;
  $("progress").hidden = !busy;
  $("progress").removeAttribute("value");
  $("tray").setAttribute("aria-busy", String(busy));
}

function showLatent(body) {
  const latent = element("div", { className: "latent" });
  latent.style.aspectRatio = `${body.width || 1} / ${body.height || 1}`;
  $("empty").hidden = true;
  $("pictures").replaceChildren(latent);
}

function showPictures(job) {
  const seconds = (new Date(job.finished_at) - new Date(job.created_at)) / 1000;
  $("pictures").replaceChildren(...job.images.map((image) => {
    const picture = element("img", { src: image.url, alt: job.manifest.prompt, width: image.width, height: image.height });
    if (image.width < 256) {
      const zoom = Math.max(1, Math.floor((job.images.length > 1 ? 192 : 384) / image.width));
      Object.assign(picture, { className: "small", width: image.width * zoom, height: image.height * zoom });
    }
    return element("figure", {}, picture, element("figcaption", {},
      element("button", { type: "button", textContent: `seed ${image.seed}`, title: "Use this seed again", onclick: () => { $("seed").value = image.seed; showCurl(); } }),
      element("a", { href: image.url, download: `darkroom-${image.seed}.${image.format}`, textContent: "Save" })));
  }));
  $("empty").hidden = true;
  $("status").textContent = `${job.manifest.num_inference_steps} steps of ${job.manifest.sampler} in ${seconds.toFixed(2)} s`;
}

function remember(job) {
  const thumb = element("button", { type: "button", title: job.manifest.prompt, onclick: () => { clearProblem(); showPictures(job); } },
    element("img", { src: job.images[0].url, alt: job.manifest.prompt }));
  $("sheet").prepend(thumb);
  while ($("sheet").children.length > 24) $("sheet").lastChild.remove();
}

async function finish(id) {
  if (!current || current.id !== id) return;
  current.source.close();
  current = null;
  setBusy(false);
  try {
    const job = await (await fetch(`/jobs/${id}`)).json();
    if (job.state === "succeeded") {
      showPictures(job);
      remember(job);
    } else {
      $("pictures").replaceChildren();
      $("empty").hidden = false;
      if (job.state === "failed") showProblem("The picture could not be made", job.failure.message);
      else $("status").textContent = job.state === "cancelled" ? "Cancelled." : "It took too long and was given up.";
    }
  } catch {
    showProblem("The server does not answer", "The job is safe; reload the page in a moment.");
  }
}

function follow(id) {
  const source = new EventSource(`/jobs/${id}/events`);
  current = { id, source };
  source.addEventListener("running", () => { $("status").textContent = "In the developer…"; });
  source.addEventListener("progress", (event) => {
    const { step, num_steps: steps } = JSON.parse(event.data);
    $("progress").value = steps ? step / steps : 0;
    $("status").textContent = `Step ${step} of ${steps}`;
    const latent = document.querySelector(".latent");
    if (latent) latent.style.setProperty("--done", String(steps ? step / steps : 0));
  });
  for (const kind of terminal) source.addEventListener(kind, () => finish(id));
  source.onerror = async () => {
    if (source.readyState === EventSource.CLOSED) await finish(id);
    else $("status").textContent = "The connection broke off; trying again…";
  };
}

async function submit(event) {
  event.preventDefault();
  if (current || $("go").disabled) return;
  clearProblem();
  const body = request();
  setBusy(true);
  $("status").textContent = "Asking…";
  try {
    const reply = await fetch("/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json", "Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-") },
      body: JSON.stringify({ ...body, mode: "async" }),
    });
    const answer = await reply.json();
    if (!reply.ok) {
      setBusy(false);
      showProblem(answer.title, answer.detail, answer.errors);
      return;
    }
    $("status").textContent = answer.position ? `${answer.position} ahead in the queue` : "In the queue…";
    showLatent(body);
    $("tray").scrollIntoView({ block: "nearest" });
    follow(answer.job_id);
  } catch {
    setBusy(false);
    showProblem("The server does not answer", "Please try again in a moment.");
  }
}

$("form").addEventListener("submit", submit);
$("form").addEventListener("input", showCurl);
$("model").addEventListener("change", () => showCard(true));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("stop").addEventListener("click", () => { if (current) fetch(`/jobs/${current.id}`, { method: "DELETE" }).catch(() => {}); });
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("curl"));
    $("copy").textContent = "Selected";
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});
showCurl();
watchHealth();
