// The film strip: past prints, each with the request that made it.
import { $, element } from "./dom.js";
import * as store from "./store.js";

let prints = [];
let chosen = null;
let onChoose = () => {};
const urls = new Map();

function thumb(print) {
  if (!urls.has(print.id)) urls.set(print.id, URL.createObjectURL(print.images[0].blob));
  return urls.get(print.id);
}

function release(id) {
  if (urls.has(id)) URL.revokeObjectURL(urls.get(id));
  urls.delete(id);
}

function frame(print) {
  const button = element("button", { type: "button", title: print.request.prompt, onclick: () => choose(print) },
    element("img", { src: thumb(print), alt: print.request.prompt }));
  button.setAttribute("aria-pressed", String(print === chosen));
  if (print.images.length > 1) button.append(element("span", { className: "many", textContent: `×${print.images.length}` }));
  const item = element("div", { className: "frame" }, button, element("span", { className: "edge", textContent: print.number }));
  item.setAttribute("role", "listitem");
  return item;
}

function draw() {
  $("strip").replaceChildren(...prints.map(frame));
  $("strip-line").textContent = prints.length ? `${prints.length === 1 ? "One print" : `${prints.length} prints`}, kept in this browser alone` : "Prints will line up here, kept in this browser alone";
  $("clear").hidden = prints.length === 0;
}

export const current = () => chosen;

export function choose(print) {
  chosen = print;
  $("strip").querySelectorAll("button").forEach((button, index) => button.setAttribute("aria-pressed", String(prints[index] === print)));
  if (print) onChoose(print);
}

export async function add(print) {
  print.number = (prints[0]?.number || 0) + 1;
  const gone = await store.keep(print, prints);
  gone.forEach(release);
  prints = [print, ...prints].filter((one) => !gone.includes(one.id));
  chosen = print;
  draw();
  $("strip").scrollTo({ left: 0 });
}

// Take a print off the strip; returns the one that lies in its place now, if any does.
export async function discard(print) {
  const index = prints.indexOf(print);
  await store.discard(print.id);
  release(print.id);
  prints = prints.filter((one) => one !== print);
  chosen = null;
  draw();
  return prints[Math.min(index, prints.length - 1)];
}

export async function setUp(chooseListener) {
  onChoose = chooseListener;
  $("clear").addEventListener("click", async () => {
    if ($("clear").dataset.sure !== "yes") {
      $("clear").dataset.sure = "yes";
      $("clear").textContent = "Really clear it?";
      $("clear").addEventListener("blur", () => { delete $("clear").dataset.sure; $("clear").textContent = "Clear the strip"; }, { once: true });
      return;
    }
    await store.clear();
    prints.map((print) => print.id).forEach(release);
    prints = [];
    chosen = null;
    draw();
    $("restore").focus();
    document.dispatchEvent(new Event("strip-cleared"));
  });
  prints = await store.load();
  draw();
}
