// The page talks to the same public API as every other client.
import { Problem, askForKey, call, capabilities, events, json, key } from "./api.js";
import * as batch from "./batch.js";
import { $, announce, element, seconds } from "./dom.js";
import * as form from "./form.js";
import { samplerLabel, settingsOf } from "./png.js";
import * as start from "./start.js";
import * as strip from "./strip.js";
import * as tray from "./tray.js";

const TERMINAL = ["succeeded", "failed", "cancelled", "expired"];
const FOLLOWED = "darkroom.followed";
let current = null; // {id, request, controller} of the job being followed
let can = null; // see `capabilities`
let retry = null;
let shown = null; // the picture in the tray, or the first of several

function say(text) {
  $("status").textContent = text;
}

function setBusy(busy) {
  $("go").disabled = busy;
  $("stop").hidden = !busy;
  $("print-actions").hidden = busy || !strip.current();
}

// Problems.

function clearProblem() {
  clearInterval(retry);
  $("problem").hidden = true;
  form.clearErrors();
}

// The server's words for programs as a sentence, without what the title says already.
function sentence({ title, message }) {
  const rest = message.toLowerCase().startsWith(`${title.toLowerCase()}: `) ? message.slice(title.length + 2) : message;
  return `${rest[0].toUpperCase()}${rest.slice(1)}${/[.!?]$/.test(rest) ? "" : "."}`;
}

function showProblem(problem, ...extra) {
  const unplaced = form.showErrors(problem.errors || []);
  const isPlaced = problem.errors?.length && !unplaced.length;
  say(isPlaced ? "Please look at the marked field." : "");
  if (isPlaced) return;
  $("problem").replaceChildren(element("strong", { textContent: problem.title }), element("p", { textContent: sentence(problem) }), ...extra);
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" });
}

// The server is full, or lacks something it needs, and says when to come back: count down to that, and come back then if asked to.
function offerRetry(problem, attempt) {
  const until = Date.now() + Math.max(1, problem.retryAfterS) * 1000;
  let isAuto = false;
  const count = element("span", { className: "count" });
  const now = element("button", { type: "button", className: "quiet", textContent: "Try now", onclick: () => develop(attempt) });
  const auto = element("button", { type: "button", className: "go", textContent: "Wait and try by itself", onclick: () => {
    isAuto = !isAuto;
    auto.setAttribute("aria-pressed", String(isAuto));
    auto.textContent = isAuto ? "Waiting for it; stop" : "Wait and try by itself";
    tick();
  } });
  auto.setAttribute("aria-pressed", "false");
  const tick = () => {
    const left = Math.max(0, Math.ceil((until - Date.now()) / 1000));
    const [what, whatNow] = problem.status === 429 ? ["A place comes free", "A place should be free"] : ["It may work again", "It may work again"];
    count.textContent = left ? `${what} in about ${seconds(left)}.` : `${whatNow} now.`;
    if (left) return;
    clearInterval(retry);
    if (isAuto) develop(attempt);
  };
  showProblem(problem, element("div", { className: "actions" }, auto, now, count));
  tick();
  clearInterval(retry);
  retry = setInterval(tick, 1000);
}

// From the form to a print.

function wanted() {
  return { ...form.request(), ...(can?.startsFromPictures ? start.fields() : {}) };
}

function submit(event) {
  event.preventDefault();
  if (current || $("go").disabled) return;
  develop({ request: wanted(), idempotencyKey: crypto.getRandomValues(new Uint32Array(4)).join("-") });
}

// The same attempt may be made again after a refusal: its key makes sure that it becomes one job.
async function develop(attempt) {
  clearProblem();
  setBusy(true);
  say("Asking…");
  let isLaid = false;
  try {
    const accepted = await json("/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json", "Idempotency-Key": attempt.idempotencyKey },
      body: form.bodyOf({ ...attempt.request, mode: "async" }),
    });
    layPaper(attempt.request);
    isLaid = true;
    if (!matchMedia("(min-width: 60rem)").matches) $("tray").scrollIntoView({ block: "nearest" });
    showQueued(accepted.position, accepted.eta_s);
    announce("Accepted. The picture is on its way.");
    await follow(accepted.job_id, attempt.request);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (isLaid) emptyTray();
    setBusy(false);
    if (problem.status === 429 || (problem.status === 503 && problem.retryAfterS)) offerRetry(problem, attempt);
    else showProblem(problem);
    announce(problem.title);
  }
}

function layPaper({ width, height, num_images_per_prompt: count }) {
  const [ownWidth, ownHeight] = form.size();
  strip.choose(null);
  tray.begin(width || ownWidth, height || ownHeight, count || 1);
}

function showQueued(position, etaS) {
  const ahead = position ? `${position} ahead of it` : "Next in the queue";
  say(etaS ? `${ahead} · ready in about ${seconds(etaS)}` : ahead);
}

async function follow(id, request) {
  const controller = new AbortController();
  current = { id, request, controller };
  sessionStorage.setItem(FOLLOWED, JSON.stringify({ id, request: { ...request, init_image: undefined, mask_image: undefined } }));
  batch.own([id]);
  setBusy(true);
  const waiting = setInterval(() => lookAtQueue(id), 2000);
  try {
    for await (const { kind, data } of events(`/jobs/${id}/events?previews=linear`, controller.signal, () => say("The connection broke off; trying again…"))) {
      if (kind === "running") {
        clearInterval(waiting);
        say("In the developer");
      } else if (kind === "progress") {
        clearInterval(waiting);
        tray.progress(data.num_steps ? data.step / data.num_steps : 0, data.step, data.num_steps);
        say(data.eta_s === null ? "In the developer" : `In the developer · about ${seconds(data.eta_s)} left`);
      } else if (kind === "preview") {
        tray.preview(data.index, data.image);
      } else if (TERMINAL.includes(kind)) {
        break;
      }
    }
  } finally {
    clearInterval(waiting);
    current = null;
    batch.own([]);
    tray.end();
  }
  await finish(id, request);
}

async function lookAtQueue(id) {
  try {
    const job = await json(`/jobs/${id}`);
    if (current?.id === id && job.state === "queued") showQueued(job.position, job.eta_s);
  } catch {
    // The stream of events says what became of it.
  }
}

// Until it is known what became of a job, and its pictures are here, a reload takes it up again.
async function finish(id, request) {
  const job = await json(`/jobs/${id}`);
  const images = job.state === "succeeded" ? await Promise.all(job.images.map(fetched)) : [];
  sessionStorage.removeItem(FOLLOWED);
  if (job.state === "succeeded") {
    const manifest = job.manifest;
    const print = {
      id, request: { ...request, seed: request.seed ?? String(job.seed) }, images, at: Date.now(),
      steps: manifest.num_inference_steps, sampler: manifest.sampler, guidance: manifest.guidance_scale,
      took: (new Date(job.finished_at) - new Date(job.created_at)) / 1000, shared: manifest.max_batch_rows,
      bytes: images.reduce((sum, image) => sum + image.blob.size, (request.init_image?.length || 0) + (request.mask_image?.length || 0)),
    };
    await strip.add(print);
    show(print);
    announce("The picture is done.");
  } else {
    tray.clear();
    if (job.state === "failed") showProblem(new Problem(500, { title: "The picture could not be made", detail: job.failure.message }));
    else say(job.state === "cancelled" ? "Cancelled." : "It took too long and was given up.");
    announce(job.state === "failed" ? "The picture could not be made." : $("status").textContent);
  }
  setBusy(false);
}

// A picture as bytes, so that the strip can keep it: from this server, whose key a bucket would not know.
async function fetched({ url, seed, width, height, format }) {
  return { seed, width, height, format, blob: await (await call(`${url}?redirect=false`)).blob() };
}

// Looking at a print.

// Several pictures lie side by side until one is picked, and do again when that is put back.
function show(print, picked = null) {
  clearProblem();
  const images = picked === null ? print.images : [print.images[picked]];
  tray.show(images, print.request.prompt, print.images.length > 1 ? (index) => show(print, picked === null ? index : null) : null);
  const [image] = images;
  shown = image;
  say([
    `seed ${image.seed}`, `${print.steps} steps of ${samplerLabel(print.sampler)}`, `guidance ${print.guidance}`, print.request.init_image && `strength ${print.request.strength}`,
    `${image.width} × ${image.height}`, `${print.took.toFixed(2)} s`,
  ].filter(Boolean).join(" · "));
  $("download").download = `darkroom-${image.seed}.${image.format === "jpeg" ? "jpg" : image.format}`;
  $("use-start").hidden = !can?.startsFromPictures;
  $("print-actions").hidden = !strip.current();
}

function download() {
  const url = URL.createObjectURL(shown.blob);
  $("download").href = url;
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function fillFrom(print, changes = {}) {
  form.fill({ ...print.request, ...changes });
  if (can?.startsFromPictures) await start.restore(print.request);
}

function again(changes) {
  const print = strip.current();
  if (current || !print) return;
  fillFrom(print, changes);
  const { seed, ...rest } = print.request;
  develop({ request: changes ? rest : { ...rest, seed }, idempotencyKey: crypto.getRandomValues(new Uint32Array(4)).join("-") });
}

// What makes the one picture that lies in the tray, where it was picked from several.
const ofShown = () => ($("prints").children.length < strip.current().images.length ? { seed: String(shown.seed), num_images_per_prompt: 1 } : {});

async function copy() {
  const text = form.curlOf({ ...strip.current().request, ...ofShown() });
  try {
    await navigator.clipboard.writeText(text);
    $("copy").textContent = "Copied";
  } catch {
    // Without a secure context there is no clipboard.
    $("problem").replaceChildren(element("strong", { textContent: "The same with curl" }), element("pre", { textContent: text }));
    $("problem").hidden = false;
    getSelection().selectAllChildren($("problem").lastChild);
  }
  setTimeout(() => { $("copy").textContent = "Copy as curl"; }, 1500);
}

async function discard() {
  const next = await strip.discard(strip.current());
  if (next) {
    strip.choose(next);
    return;
  }
  emptyTray();
  $("prompt").focus();
}

function emptyTray() {
  tray.clear();
  say("");
  $("print-actions").hidden = true;
}

// Pictures that come in: by choice, drop or paste.

async function take(file, target) {
  if (!file) return;
  const settings = target === "start" ? null : await settingsOf(file);
  if (settings) {
    form.fill(settings);
    clearProblem();
    say(`Settings restored from ${file.name || "the picture"}.`);
    announce("Settings restored.");
  } else if (can?.startsFromPictures && target !== "settings") {
    if (await start.set(file)) say("The next picture starts from this one.");
    else showProblem(new Problem(0, { title: "That file is no picture this browser can read", detail: "PNG, JPEG and WebP are." }));
  } else {
    showProblem(new Problem(0, { title: "This picture carries no settings", detail: "PNGs made here do, and so do those of other tools that write “parameters”, as long as nobody saved them anew." }));
  }
}

function choose(target) {
  $("file").onchange = () => { take($("file").files[0], target); $("file").value = ""; };
  $("file").click();
}

function setUpIntake() {
  const carriesFile = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const kind of ["dragleave", "drop"]) {
    addEventListener(kind, (event) => { if (kind === "drop" || !event.relatedTarget) document.body.classList.remove("dropping"); });
  }
  addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files[0], $("start").contains(event.target) ? "start" : undefined);
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) { event.preventDefault(); take(file); }
  });
  $("restore").addEventListener("click", () => choose("settings"));
  $("start-choose").addEventListener("click", () => choose("start"));
}

// The server.

// What may be asked for, once the server says.
async function learn() {
  if (!form.card()) form.showCards((await json("/models")).models);
  if (can) return;
  can = await capabilities();
  if (can.startsFromPictures) start.setUp(can);
  if (can.showsBatch) batch.setUp();
}

async function watchHealth() {
  let pauseMs = 2000;
  try {
    const ready = await json("/health/ready");
    await learn();
    const workers = ready.workers === 1 ? "one worker" : `${ready.workers} workers`;
    $("health").textContent = ready.health === "busy" ? "The queue is full" : form.card()?.id || "";
    $("health").append(element("span", { className: "rest", textContent: ` · ${workers}` }));
    pauseMs = form.card() ? 15000 : 2000;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    $("health").textContent = { no_model: "Waiting for a worker…", unauthorized: "Locked" }[problem.code] || problem.title;
  }
  setTimeout(watchHealth, pauseMs);
}

// A job that was under way when the page was left goes on.
async function resume() {
  const followed = sessionStorage.getItem(FOLLOWED);
  if (!followed) return;
  const { id, request } = JSON.parse(followed);
  try {
    const job = await json(`/jobs/${id}`);
    form.fill(request);
    layPaper(request);
    if (TERMINAL.includes(job.state)) await finish(id, request);
    else await follow(id, request);
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 404) sessionStorage.removeItem(FOLLOWED);
    emptyTray();
    setBusy(false);
    if (problem.status !== 404) showProblem(problem);
  }
}

function setUpTheme() {
  const isLight = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark")) === "light";
  const label = () => { $("theme").textContent = isLight() ? "Dark" : "Light"; };
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isLight() ? "dark" : "light";
    localStorage.setItem("darkroom.theme", document.documentElement.dataset.theme);
    label();
  });
  matchMedia("(prefers-color-scheme: light)").addEventListener("change", label);
  label();
}

async function setUp() {
  form.setUp();
  setUpTheme();
  setUpIntake();
  tray.watch();
  $("form").addEventListener("submit", submit);
  $("stop").addEventListener("click", () => {
    if (!current) return;
    say("Cancelling…");
    call(`/jobs/${current.id}`, { method: "DELETE" }).catch((problem) => showProblem(problem));
  });
  $("again").addEventListener("click", () => again());
  $("vary").addEventListener("click", () => again({ seed: "" }));
  $("use").addEventListener("click", async () => { await fillFrom(strip.current(), ofShown()); $("prompt").focus(); });
  $("use-start").addEventListener("click", () => take(shown.blob, "start"));
  $("download").addEventListener("click", download);
  $("copy").addEventListener("click", copy);
  $("forget").addEventListener("click", discard);
  $("key").addEventListener("click", () => askForKey("A new key takes the place of the one in use."));
  $("key").hidden = !key();
  document.addEventListener("strip-cleared", emptyTray);
  await strip.setUp(show);
  await watchHealth();
  await resume();
}

setUp();
