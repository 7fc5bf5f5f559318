// Past prints, kept in this browser alone: bounded by number and by bytes, the oldest go first.

const MAX_PRINTS = 60;
const MAX_BYTES = 64 << 20;

const settled = (asked) => new Promise((resolve, reject) => {
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => reject(asked.error);
});

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("darkroom", 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("prints", { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return opened;
}

async function prints(mode) {
  return (await database()).transaction("prints", mode).objectStore("prints");
}

// Newest first. A browser that keeps nothing (a private window, a full disk) has an empty strip.
export async function load() {
  try {
    return (await settled((await prints("readonly")).getAll())).sort((one, other) => other.at - one.at);
  } catch {
    return [];
  }
}

// Keep a print; returns the ids of those that had to go.
export async function keep(print, earlier) {
  const gone = [];
  let bytes = 0;
  [print, ...earlier].forEach((one, index) => {
    bytes += one.bytes;
    if (index >= MAX_PRINTS || (index > 0 && bytes > MAX_BYTES)) gone.push(one.id);
  });
  try {
    const store = await prints("readwrite");
    for (const id of gone) store.delete(id);
    await settled(store.put(print));
  } catch {
    // It is on the strip for as long as the page is open.
  }
  return gone;
}

export async function discard(id) {
  try {
    await settled((await prints("readwrite")).delete(id));
  } catch {
    // Nothing was kept.
  }
}

export async function clear() {
  try {
    await settled((await prints("readwrite")).clear());
  } catch {
    // Nothing was kept.
  }
}
