// The page of `segvit serve`: sends a picture, shows what comes back. No state is kept anywhere but here.

const element = (id) => document.getElementById(id);
const [file, picture, labels, opacity] = ["file", "picture", "labels", "opacity"].map(element);

let model = null; // of /model
let shown = null; // the picture at hand: {source, answer, url, maps}
let running = new AbortController();

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

const pngOf = (base64) => new Blob([bytesOf(base64)], { type: "image/png" });
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;
const percent = (share) => (share < 0.001 ? "<0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);

// What the server answers; its one line where it refuses.
async function ask(address, source, fields, signal) {
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  form.append("image", source, "picture");
  let response;
  try {
    response = await fetch(address, { method: "POST", body: form, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer");
  }
  const answer = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function complain(error) {
  if (error.name === "AbortError") return;
  element("error").textContent = error.message;
  element("status").textContent = "";
}

async function load(image, url) {
  image.src = url;
  await image.decode();
}

// A picture

async function take(source) {
  running.abort();
  const { signal } = (running = new AbortController());
  element("error").textContent = "";
  element("status").textContent = `Working on ${source.name || "the picture"} (${megabytes(source.size)}) …`;
  element("result").classList.add("old");
  try {
    if (model && source.size > model.limits.bytes) {
      throw new Error(`the file has ${megabytes(source.size)}, more than ${megabytes(model.limits.bytes)}`);
    }
    await show(source, signal);
    element("status").textContent = `${source.name || "Picture"}: ${shown.answer.width} × ${shown.answer.height} pixels`;
  } catch (error) {
    complain(error);
    if (error.name === "AbortError") return;
  }
  element("result").classList.remove("old");
}

async function show(source, signal) {
  const own = URL.createObjectURL(source);
  const local = new Image();
  const seen = await load(local, own).then(() => true, () => false); // TIFFs and arrays are not
  const begin = performance.now();
  let answer = await ask("predict", source, [["include", "colors"], ...(seen ? [] : [["include", "picture"]])], signal);
  if (seen && (local.naturalWidth !== answer.width || local.naturalHeight !== answer.height)) {
    answer = await ask("predict", source, [["include", "colors,picture"]], signal);
  }
  const whole = performance.now() - begin;
  const url = answer.picture ? URL.createObjectURL(pngOf(answer.picture)) : own;
  const colors = await createImageBitmap(pngOf(answer.colors));
  await load(picture, url);
  signal.throwIfAborted();
  if (shown) URL.revokeObjectURL(shown.url);
  if (url !== own) URL.revokeObjectURL(own);
  shown = { source, answer, url, maps: new Map() };
  labels.width = answer.width;
  labels.height = answer.height;
  for (const one of [picture, labels]) one.style.setProperty("--ratio", answer.width / answer.height);
  labels.getContext("2d", { willReadFrequently: true }).drawImage(colors, 0, 0);
  const listed = answer.classes.slice(0, 5).map(({ name, share }) => `${name} ${percent(share)}`);
  labels.setAttribute("aria-label", `Label map: ${listed.join(", ")}${answer.classes.length > 5 ? ", and others" : ""}`);
  element("result").querySelector(".view").classList.toggle("small", answer.width < 400);
  list(answer.classes);
  time(answer.times, whole);
  element("similarity").hidden = true;
  element("result").hidden = false;
}

function list(classes) {
  const entries = classes.map(({ index, name, color, share }) => {
    const chip = make("span", { className: "chip" });
    chip.style.background = color;
    const entry = make(
      "button",
      { type: "button", disabled: !model?.similarity },
      chip,
      make("span", { className: "name", textContent: name }),
      make("span", { className: "share", textContent: percent(share) }),
    );
    entry.dataset.index = index;
    entry.setAttribute("aria-pressed", "false");
    entry.addEventListener("click", () => explain(index));
    return make("li", {}, entry);
  });
  element("legend").replaceChildren(...entries);
  if (model && !model.similarity) {
    element("hint").textContent = "This model's decoder has no similarity maps.";
  }
}

function time(times, whole) {
  const { total, ...parts } = times;
  parts["other"] = total - Object.values(parts).reduce((sum, value) => sum + value, 0);
  parts["sending"] = whole - total;
  const rows = Object.entries({ ...parts, "in all": whole }).map(([name, value]) => {
    const bar = make("div");
    bar.style.width = `${Math.min(100, (100 * Math.max(0, value)) / whole)}%`;
    return make(
      "tr",
      {},
      make("th", { scope: "row", textContent: name }),
      make("td", { className: "bar", ariaHidden: "true" }, ...(name === "in all" ? [] : [bar])),
      make("td", { textContent: `${Math.max(0, value).toFixed(value < 9.95 ? 1 : 0)} ms` }),
    );
  });
  element("times").tBodies[0].replaceChildren(...rows);
}

// A class

async function explain(index) {
  const { source, maps, answer } = shown;
  const name = answer.classes.find((entry) => entry.index === index).name;
  for (const entry of element("legend").querySelectorAll("button")) {
    entry.setAttribute("aria-pressed", String(Number(entry.dataset.index) === index));
  }
  element("error").textContent = "";
  element("similarity-title").textContent = `Similarity maps: ${name}`;
  element("panels").classList.add("old");
  element("similarity").hidden = false;
  try {
    if (!maps.has(index)) {
      element("status").textContent = `Similarity maps of ${name} …`;
      maps.set(index, await ask("similarity", source, [["class", name]], running.signal));
      if (shown.maps === maps) element("status").textContent = `Similarity maps of ${name} are shown below.`;
    }
    const chosen = element("legend").querySelector('[aria-pressed="true"]');
    if (shown.maps !== maps || Number(chosen?.dataset.index) !== index) return;
    const figures = maps.get(index).panels.map(({ title, note, range, picture }) =>
      make(
        "figure",
        {},
        make("img", { src: `data:image/png;base64,${picture}`, alt: `${name}: ${title}` }),
        make("figcaption", {}, title, ...[note, range].filter(Boolean).map((text) => make("span", { textContent: text }))),
      ),
    );
    element("panels").replaceChildren(...figures);
    element("similarity").scrollIntoView({ block: "nearest", behavior: "smooth" });
  } catch (error) {
    complain(error);
  }
  element("panels").classList.remove("old");
}

labels.addEventListener("click", (event) => {
  if (!model?.similarity) return;
  const box = labels.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) * labels.width) / box.width);
  const y = Math.floor(((event.clientY - box.top) * labels.height) / box.height);
  const [red, green, blue] = labels.getContext("2d").getImageData(x, y, 1, 1).data;
  const color = `#${[red, green, blue].map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  const found = shown.answer.classes.find((entry) => entry.color === color);
  if (found) explain(found.index);
});

// Opacity, downloads

function fade() {
  labels.style.opacity = opacity.value / 100;
  element("percent").textContent = `${opacity.value} %`;
}
opacity.addEventListener("input", fade);
fade();

function save(blob, kind) {
  const stem = (shown.source.name || "picture").replace(/\.[^.]*$/, "");
  const link = make("a", { href: URL.createObjectURL(blob), download: `${stem}_${kind}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

element("save-labels").addEventListener("click", () => save(pngOf(shown.answer.labels), "labels"));
element("save-overlay").addEventListener("click", () => {
  const canvas = make("canvas", { width: labels.width, height: labels.height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = opacity.value / 100;
  context.drawImage(labels, 0, 0);
  canvas.toBlob((blob) => save(blob, "overlay"), "image/png");
});

// Pictures come by choice, by drop, by paste

file.addEventListener("change", () => {
  if (file.files.length) take(file.files[0]);
  file.value = ""; // the same one may be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [dropped] = event.dataTransfer.files;
  if (dropped) take(dropped);
  else complain(new Error("what was dropped is not a file"));
});
document.addEventListener("paste", (event) => {
  const [pasted] = event.clipboardData.files;
  if (pasted) take(pasted);
});

const response = await fetch("model").catch(() => null);
if (response?.ok) {
  model = await response.json();
  element("model").textContent = `${model.name}: ${model.classes.length} classes`;
}
