// The rows in the bath, as the workers tell it: one bar for each, as high as it is far, lit when it is in this tick.
import { events } from "./api.js";
import { $, element } from "./dom.js";

let jobs = [];
let stream = null;
const bars = new Map();

function draw(workers) {
  const rows = workers.flatMap((worker, index) => worker.rows.map((row) => ({ ...row, id: `${index}:${row.row}` })));
  const ids = new Set(rows.map((row) => row.id));
  for (const [id, bar] of bars) if (!ids.has(id)) { bar.remove(); bars.delete(id); }
  for (const row of rows) {
    if (!bars.has(row.id)) bars.set(row.id, $("batch-rows").appendChild(element("i")));
    const bar = bars.get(row.id);
    bar.className = `${row.state}${row.job_id ? " own" : ""}`;
    bar.style.setProperty("--done", row.num_steps ? row.step / row.num_steps : 0);
  }
  const inTick = rows.filter((row) => row.state === "in_tick").length;
  const own = rows.filter((row) => row.job_id).length;
  const line = rows.length ? [
    `${rows.length} ${rows.length === 1 ? "picture" : "pictures"} in the bath`, `${inTick} in this tick`, own && own < rows.length && `${own} yours`,
  ].filter(Boolean).join(" · ") : "The bath is still";
  $("batch-line").textContent = line;
  $("batch-rows").setAttribute("aria-label", line);
}

async function follow() {
  stream?.abort();
  if (document.hidden) return;
  const own = stream = new AbortController();
  try {
    for await (const { kind, data } of events(`/batch${jobs.map((id, index) => `${index ? "&" : "?"}job_id=${id}`).join("")}`, own.signal)) {
      if (kind === "batch") draw(data.workers);
    }
  } catch {
    // A view that the server does not give is no loss to anything else on the page.
    $("batch").hidden = true;
  }
}

// Which jobs are this page's own: their rows are shown as such.
export function own(ids) {
  jobs = ids;
  if (stream) follow();
}

export function setUp() {
  $("batch").hidden = false;
  draw([]);
  document.addEventListener("visibilitychange", follow);
  follow();
}
