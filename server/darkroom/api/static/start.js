// A picture to start from, and the mask painted over it: like rubylith, the red film that retouchers cut.
import { $, announce } from "./dom.js";
import { size } from "./form.js";

const FILM = "rgba(232, 52, 28, 0.62)";
// Below this a picture travels without loss.
const LOSSLESS_PX = 384 * 384;
let picture = null;
let strokes = []; // in parts of the canvas, so that they fit every size: {size, erase, points}, {fill} or {film}
let canMask = false;

function canvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

// Cover the canvas with the picture, cut evenly where the sides differ.
function cover(target) {
  const scale = Math.max(target.width / picture.width, target.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  const context = target.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (target.width - width) / 2, (target.height - height) / 2, width, height);
}

const PARTS = { whole: [0, 0, 1, 1], left: [0, 0, .5, 1], right: [.5, 0, .5, 1], top: [0, 0, 1, .5], bottom: [0, .5, 1, .5], middle: [.25, .25, .5, .5] };

function drawMask(target, colour) {
  const { width, height } = target;
  const context = target.getContext("2d");
  context.clearRect(0, 0, width, height);
  for (const stroke of strokes) {
    context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = "#fff";
    if (stroke.film) {
      context.drawImage(stroke.film, 0, 0, width, height);
      continue;
    }
    if (stroke.fill) {
      const [x, y, w, h] = PARTS[stroke.fill];
      context.fillRect(x * width, y * height, w * width, h * height);
      continue;
    }
    const [[x, y]] = stroke.points;
    Object.assign(context, { lineWidth: stroke.size * Math.min(width, height), lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(x * width, y * height);
    for (const [px, py] of stroke.points) context.lineTo(px * width, py * height);
    context.stroke();
  }
  context.globalCompositeOperation = "source-in";
  context.fillStyle = colour;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
}

function show() {
  $("start-empty").hidden = Boolean(picture);
  $("start-set").hidden = !picture;
  if (!picture) return;
  const [width, height] = size();
  const scale = 96 / Math.max(width, height);
  const thumb = $("start-thumb");
  Object.assign(thumb, { width: Math.round(width * scale * 2), height: Math.round(height * scale * 2) });
  cover(thumb);
  const film = canvas(thumb.width, thumb.height);
  drawMask(film, FILM);
  thumb.getContext("2d").drawImage(film, 0, 0);
  $("mask-open").hidden = !canMask;
  $("mask-open").textContent = strokes.length ? "Change the mask" : "Paint a mask";
}

export const isSet = () => Boolean(picture);

export async function set(blob) {
  try {
    picture = await createImageBitmap(blob);
  } catch {
    announce("That file is no picture this browser can read.");
    return false;
  }
  strokes = [];
  show();
  return true;
}

export function clear() {
  picture = null;
  strokes = [];
  show();
}

// The fields of a request that starts from the picture; none without one.
export function fields() {
  if (!picture) return {};
  const [width, height] = size();
  const target = canvas(width, height);
  cover(target);
  const made = { init_image: width * height > LOSSLESS_PX ? target.toDataURL("image/jpeg", 0.95) : target.toDataURL("image/png") };
  const strength = $("strength").value.trim();
  if (strength !== "") made.strength = Number(strength);
  if (strokes.length) {
    const film = canvas(width, height);
    drawMask(film, "#fff");
    const mask = canvas(width, height);
    const context = mask.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.drawImage(film, 0, 0);
    made.mask_image = mask.toDataURL("image/png");
  }
  return made;
}

const blobOf = (dataUrl) => new Blob([Uint8Array.from(atob(dataUrl.split(",").pop()), (letter) => letter.charCodeAt(0))]);

// Take up the picture of an earlier request, and its mask as one stroke.
export async function restore(wanted) {
  if (!wanted.init_image) {
    clear();
    return;
  }
  await set(blobOf(wanted.init_image));
  if (!wanted.mask_image) return;
  const mask = await createImageBitmap(blobOf(wanted.mask_image));
  const film = canvas(mask.width, mask.height);
  const context = film.getContext("2d");
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, film.width, film.height);
  // White is masked: it becomes what the film covers.
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
  context.putImageData(pixels, 0, 0);
  strokes = [{ film }];
  show();
}

function drawEasel() {
  const board = $("mask-canvas");
  cover(board);
  const film = canvas(board.width, board.height);
  drawMask(film, FILM);
  board.getContext("2d").drawImage(film, 0, 0);
  $("mask-undo").disabled = $("mask-clear").disabled = strokes.length === 0;
}

function openEasel() {
  const [width, height] = size();
  const scale = Math.max(1, Math.floor(1024 / Math.max(width, height)));
  Object.assign($("mask-canvas"), { width: width * scale, height: height * scale });
  $("mask-canvas").style.aspectRatio = `${width} / ${height}`;
  drawEasel();
  $("mask-dialog").showModal();
}

function setUpEasel() {
  const board = $("mask-canvas");
  let stroke = null;
  const point = (event) => {
    const box = board.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  board.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    board.setPointerCapture(event.pointerId);
    stroke = { size: Number($("mask-size").value) / 100, erase: $("mask-erase").getAttribute("aria-pressed") === "true", points: [point(event)] };
    strokes.push(stroke);
    drawEasel();
  });
  board.addEventListener("pointermove", (event) => {
    if (!stroke) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) stroke.points.push(point(one));
    drawEasel();
  });
  for (const kind of ["pointerup", "pointercancel"]) board.addEventListener(kind, () => { stroke = null; });
  $("mask-erase").addEventListener("click", (event) => {
    const isErasing = event.target.getAttribute("aria-pressed") === "true";
    event.target.setAttribute("aria-pressed", String(!isErasing));
  });
  $("mask-undo").addEventListener("click", () => { strokes.pop(); drawEasel(); });
  $("mask-clear").addEventListener("click", () => { strokes = []; drawEasel(); });
  $("mask-fill").addEventListener("change", (event) => {
    if (event.target.value) strokes.push({ fill: event.target.value });
    event.target.value = "";
    drawEasel();
  });
  $("mask-dialog").addEventListener("keydown", (event) => {
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) { strokes.pop(); drawEasel(); }
  });
  $("mask-done").addEventListener("click", () => $("mask-dialog").close());
  $("mask-dialog").addEventListener("close", show);
}

export function setUp(capabilities) {
  canMask = capabilities.masks;
  $("start").hidden = false;
  $("start-clear").addEventListener("click", () => { clear(); $("start-choose").focus(); });
  $("mask-open").addEventListener("click", openEasel);
  for (const name of ["width", "height"]) $(name).addEventListener("change", show);
  setUpEasel();
}
