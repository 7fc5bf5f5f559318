// The developer bath: blank paper under the safelight, the picture that comes up on it, and the light going on.
import { $, element, isMotionReduced } from "./dom.js";

const MAX_ZOOM = 8;
const GAP_PX = 20;
const BORDER = 0.05;
let shape = null; // {width, height, count} of what lies in the tray
const urls = new Set();

function release() {
  for (const url of urls) URL.revokeObjectURL(url);
  urls.clear();
}

// As large as the tray allows, small pictures at most eightfold and by a whole factor if there is room for one.
function layOut() {
  if (!shape) return;
  const { width, height, count } = shape;
  const box = $("prints").getBoundingClientRect();
  let best = 0;
  for (let columns = 1; columns <= count; columns += 1) {
    const rows = Math.ceil(count / columns);
    const room = (side, cells) => (side - GAP_PX * (cells - 1)) / cells;
    const fit = Math.min(room(box.width, columns) / width, room(box.height, rows) / height) / (1 + 2 * BORDER);
    if (fit > best) { best = fit; $("prints").style.setProperty("--columns", columns); }
  }
  const zoom = Math.min(best, MAX_ZOOM);
  $("prints").style.setProperty("--picture-width", `${Math.floor(width * zoom)}px`);
  $("prints").style.setProperty("--picture-height", `${Math.floor(height * zoom)}px`);
  $("prints").style.setProperty("--border", `${Math.max(6, Math.round(Math.min(width, height) * zoom * BORDER))}px`);
}

function layPaper(width, height, count) {
  shape = { width, height, count };
  $("empty").hidden = true;
  $("prints").replaceChildren(...Array.from({ length: count }, () => {
    const sheet = paper();
    sheet.append(element("span", { className: "emulsion" }));
    return sheet;
  }));
  layOut();
}

const emulsion = (index) => $("prints").children[index]?.firstChild;

// Lay one picture over those that came up before, and let them go once it has.
function lay(index, source, alt) {
  const sheet = emulsion(index);
  if (!sheet) return null;
  const image = element("img", { alt, src: source });
  const earlier = [...sheet.children];
  image.addEventListener("load", () => {
    // Enlarged so far, a small draft would show its pixels.
    image.style.setProperty("--blur", `${0.6 * Math.max(0, image.width / image.naturalWidth - 1)}px`);
    image.classList.add("up");
    setTimeout(() => earlier.forEach((one) => one.remove()), isMotionReduced() ? 0 : 700);
  });
  image.addEventListener("error", () => image.remove());
  sheet.append(image);
  return image;
}

export function clear() {
  shape = null;
  release();
  $("tray").classList.remove("developing");
  $("prints").replaceChildren();
  $("empty").hidden = false;
}

export function begin(width, height, count) {
  release();
  layPaper(width, height, count);
  $("tray").classList.add("developing");
  $("tray").setAttribute("aria-busy", "true");
  $("tray").style.setProperty("--done", 0);
}

export function progress(done, step, steps) {
  $("tray").style.setProperty("--done", done);
  $("progress").hidden = $("timer").hidden = false;
  $("progress").value = done;
  $("timer-step").textContent = step;
  $("timer-steps").textContent = `of ${steps}`;
}

export function preview(index, base64) {
  lay(index, `data:image/jpeg;base64,${base64}`, "The picture so far")?.classList.add("draft");
}

// The light goes on; nothing more will change.
export function end() {
  $("tray").classList.remove("developing");
  $("tray").removeAttribute("aria-busy");
  $("progress").hidden = $("timer").hidden = true;
}

const paper = (onPick, index) => (onPick
  ? element("button", { type: "button", className: "paper", onclick: () => onPick(index) })
  : element("figure", { className: "paper" }));

function changePaper(index, onPick) {
  const earlier = $("prints").children[index];
  const made = paper(onPick, index);
  earlier.replaceWith(made);
  made.append(earlier.firstChild);
}

// `images` is [{width, height, blob}]; `onPick` is told which one is picked from the tray, if any may be.
export function show(images, alt, onPick) {
  end();
  const [{ width, height }] = images;
  const isSame = shape && shape.count === images.length && shape.width === width && shape.height === height;
  if (!isSame) layPaper(width, height, images.length);
  images.forEach((image, index) => {
    const source = URL.createObjectURL(image.blob);
    urls.add(source);
    lay(index, source, images.length > 1 ? `${alt} (${index + 1} of ${images.length})` : alt);
    changePaper(index, onPick);
  });
}

export const watch = () => new ResizeObserver(layOut).observe($("prints"));
