"use strict";
// One page for a server and for a file: in a file, all that can be looked at is in #data.

const data = document.getElementById("data");
const file = data && JSON.parse(data.textContent);
// the palette of Okabe and Ito, which people with colour blindness can distinguish; more experts get hues
const COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#777777"];
const ROUTED = "as routed";
const $ = (id) => document.getElementById(id);
let state, image, asked = {}, turn = 0;

const colour = (expert, count) => expert < 0 ? "transparent"
  : count <= COLOURS.length ? COLOURS[expert] : `hsl(${360 * expert / count} 70% 50%)`;

function element(tag, text, className) {  // text is never read as markup
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const breakable = (name) => name.replaceAll("_", "_\u200b");  // where a long name may break

function say(text, error = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", error);
}

const thumbnailOf = (id) => file ? file.thumbnails[id] : `thumbnail/${id}`;

function thumbnails(into, ids, empty) {
  into.replaceChildren();
  if (!ids.length) into.append(element("p", empty));
  for (const id of ids) {
    const { label, predicted } = state.images[id];
    const button = element("button");
    button.type = "button";
    button.dataset.image = id;
    const picture = element("img");
    picture.src = thumbnailOf(id);
    picture.alt = `image ${id}`;
    picture.loading = "lazy";
    const words = label === null ? `mostly ${predicted}` : label === predicted ? label : `${label}, taken for ${predicted}`;
    button.append(picture, element("span", breakable(words)));
    button.disabled = Boolean(file) && !(id in file.looks);
    button.addEventListener("click", () => {
      choose(id);
      $("image-title").scrollIntoView();
    });
    into.append(button);
  }
}

async function ask() {
  const over = Object.fromEntries(Object.entries(asked).filter(([, what]) => what !== ROUTED));
  if (file) {
    const plain = file.looks[image], [layer] = Object.keys(over);
    return { ...plain, overruled: layer ? file.looks[`${image}|${layer}|${over[layer]}`] : null };
  }
  const query = new URLSearchParams({ overrule: JSON.stringify(over) });
  if (typeof image === "number") query.set("image", image);
  const response = await fetch(`look?${query}`, { method: "POST", body: typeof image === "number" ? undefined : image });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function look() {
  const mine = ++turn;
  say("Looking ...");
  try {
    const found = await ask();
    if (mine !== turn) return;  // another image was chosen meanwhile
    say("");
    prediction($("plain"), found.plain);
    if (found.overruled) prediction($("overruled"), found.overruled);
    else $("overruled").replaceChildren(element("p", "Overrule a layer below.", "none"));
    routes(found.overruled ?? found.plain, found.seen);
    if (typeof image === "number") $("shown").src = found.seen;  // larger than its thumbnail
    thumbnails($("nearest"), found.nearest, "There is no other image.");
  } catch (error) {
    if (mine !== turn) return;
    say(error instanceof TypeError ? "The server does not answer: start vimoe explore again." : error.message, true);
    // what is there is of another image
    document.querySelectorAll("#plain, #overruled, #nearest, .chosen").forEach((each) => each.replaceChildren());
  }
}

function prediction(into, found) {
  into.replaceChildren();
  const { classes, areas, picture } = found.prediction;
  if (picture) {
    const drawn = element("img");
    drawn.src = picture;
    drawn.alt = "predicted mask over the image";
    into.append(drawn);
  }
  // an object gives names that are numbers first, in their order
  const rows = classes ? classes.map((each) => [each.name, each.probability])
    : Object.entries(areas).sort((a, b) => b[1] - a[1]).slice(0, 8);
  for (const [name, share] of rows) {
    const row = element("div", undefined, "row"), bar = element("div", undefined, "bar"), part = element("i");
    part.style.width = `${100 * share}%`;
    bar.append(part);
    const words = element("span", breakable(name), "name");
    if (name in state.colours) words.prepend(swatch(state.colours[name]));
    row.append(words, element("span", share < 0.0005 ? "< 0.1%" : `${(100 * share).toFixed(1)}%`, "number"), bar);
    into.append(row);
  }
}

function swatch(shade) {
  const made = element("i", undefined, "swatch");
  made.style.background = shade;
  return made;
}

function chip(expert, experts, text) {
  const made = element("span", text, "chip");
  made.style.borderColor = expert < 0 ? "var(--line)" : colour(expert, experts);
  return made;
}

function routes(found, seen) {
  for (const layer of state.layers) {
    const into = $("layers").querySelector(`[data-layer="${CSS.escape(layer.name)}"] .chosen`);
    into.replaceChildren();
    const { chosen, map, extent } = found.layers[layer.name] ?? {};
    for (const [expert, gate] of chosen ?? [])
      into.append(chip(expert, layer.experts, `expert ${expert}, gate ${gate.toFixed(2)}`));
    if (chosen && !chosen.length) into.append(chip(-1, layer.experts, "no expert"));
    if (map && map.length) drawMap(into, map, extent, seen, layer.experts);
    else if (map) into.append(element("span", "Of the tokens that the head reads there is no patch.", "none"));
  }
}

function drawMap(into, map, [width, height], seen, experts) {  // over the image, which it may exceed by padding
  const place = element("div", undefined, "map"), canvas = element("canvas"), below = element("img");
  const rows = map.length, columns = map[0].length;
  below.src = seen;
  below.alt = "";
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.width = `${100 * width}%`;
  canvas.style.height = `${100 * height}%`;
  canvas.setAttribute("role", "img");
  const context = canvas.getContext("2d"), counts = {};
  map.forEach((row, y) => row.forEach((expert, x) => {
    counts[expert] = (counts[expert] ?? 0) + 1;
    context.fillStyle = colour(expert, experts);
    context.fillRect(x, y, 1, 1);
  }));
  canvas.setAttribute("aria-label", "expert of each patch");
  const legend = element("div", undefined, "legend");
  for (const [expert, count] of Object.entries(counts).sort((a, b) => b[1] - a[1])) {
    const who = expert < 0 ? "no expert" : `expert ${expert}`;
    legend.append(chip(Number(expert), experts, `${who}: ${(100 * count / rows / columns).toFixed(0)}%`));
  }
  place.append(below, canvas);
  into.append(place, legend);
}

function choose(id) {
  image = id;
  const { label } = state.images[id];
  $("shown").src = thumbnailOf(id);
  $("shown").alt = `validation image ${id}`;
  $("label").textContent = label === null ? "" : `Class: ${label}`;
  look();
}

function chooseFile(given) {
  if (!given) return;
  image = given;
  URL.revokeObjectURL($("shown").src);
  $("shown").src = URL.createObjectURL(given);
  $("shown").alt = "your image";
  $("label").textContent = given.name;
  look();
}

function layerRows() {
  for (const layer of state.layers) {
    const row = element("div", undefined, "layer"), label = element("label", "Let it do ");
    row.dataset.layer = layer.name;
    const select = element("select");
    select.setAttribute("aria-label", `${layer.name}: let it do`);
    layer.switches.forEach((what) => select.append(new Option(what, what)));
    select.addEventListener("change", () => {
      if (file) document.querySelectorAll("#layers select").forEach((each) => {
        if (each !== select) each.value = ROUTED;  // a file has one layer overruled at a time
      });
      asked = file ? { [layer.name]: select.value } : { ...asked, [layer.name]: select.value };
      look();
    });
    label.append(select);
    const by = layer.routing === "image" ? "one choice for an image" : "one choice for a patch";
    row.append(element("span", `${layer.name} (${by})`, "title"), element("div", undefined, "chosen"), label);
    $("layers").append(row);
  }
}

function gallery() {
  const layer = $("gallery-layer").value, expert = Number($("gallery-expert").value);
  thumbnails($("gallery"), state.seen_most[layer][expert] ?? [], "No image of validation goes there.");
}

function galleryOf() {
  const layer = state.layers.find((each) => each.name === $("gallery-layer").value);
  $("gallery-expert").replaceChildren();
  for (let e = 0; e < layer.experts; e++) $("gallery-expert").append(new Option(e, e));
  gallery();
}

async function begin() {
  try {
    state = file ?? await (await fetch("state")).json();
  } catch {
    say("The server does not answer: start vimoe explore again.", true);
    return;
  }
  document.body.classList.toggle("static", Boolean(file));
  $("run").textContent = state.run;
  layerRows();
  state.layers.forEach((layer) => $("gallery-layer").append(new Option(layer.name, layer.name)));
  $("gallery-layer").addEventListener("change", galleryOf);
  $("gallery-expert").addEventListener("change", gallery);
  $("shown").addEventListener("load", () => { $("shown").hidden = false; });
  $("shown").addEventListener("error", () => { $("shown").hidden = true; });  // a file that is no image
  $("file").addEventListener("change", (event) => chooseFile(event.target.files[0]));
  $("reset").addEventListener("click", () => {
    asked = {};
    document.querySelectorAll("#layers select").forEach((each) => { each.value = ROUTED; });
    look();
  });
  if (!file) for (const kind of ["dragover", "drop", "dragleave"]) document.addEventListener(kind, (event) => {
    event.preventDefault();  // beside the box too, where the browser would leave the page to show the file
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") chooseFile(event.dataTransfer.files[0]);
  });
  galleryOf();
  thumbnails($("all"), state.images.map(({ id }) => id), "Validation has no image.");
  if (state.images.length) choose(0);
}

begin();
