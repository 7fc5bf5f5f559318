// Text from the network is only ever set as text.

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What a screen reader should hear; the visible status changes too often for that.
export function announce(text) {
  $("announce").textContent = text;
}

export function seconds(value) {
  if (value < 1) return "a moment";
  if (value < 90) return `${Math.round(value)} s`;
  return `${Math.round(value / 60)} min`;
}

// Both read and write one number: a field to type in and a slider beside it.
export function pairWithSlider(field, slider) {
  field.addEventListener("input", () => { if (field.value !== "") slider.value = field.value; });
  slider.addEventListener("input", () => {
    field.value = slider.value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  });
}

export const isMotionReduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
