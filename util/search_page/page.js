"use strict";
// The search page of serve.py. All text is set as text, never as HTML: captions may hold anything.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MOST_BOXES = 8; // of a picture, the strongest
const AT_ONCE = 12; // images of one request for attention
let info = null;
let masks = 0; // how many were made: their names must differ
let search = null; // of the last search: {query, words, cards, controller}
let word = null; // the number of the word that is looked at now
let pinned = null; // the number of the word that stays
let uploadAddress = null; // of the picture in the dialog
let captionsController = null;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function say(text, bad = false, where = "status") {
  $(where).textContent = text;
  $(where).classList.toggle("bad", bad);
}

function count(n, what) {
  return `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
}

// The server

async function ask(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  let answer = null;
  try {
    answer = await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (reply.ok && answer) return answer;
  const said = answer?.error ?? "it gave no reason";
  const plain = { 413: "That is too large", 503: "The server is busy", 504: "That took too long" };
  throw new Error(`${plain[reply.status] ?? "The server refused this"}: ${said}.`);
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

function ranking() {
  const stages = document.querySelector("[name=stages]:checked").value;
  const topk = +$("topk").value;
  return { topk, shortlist: Math.max(topk, +$("shortlist").value), stages };
}

function inWords(milliseconds) {
  const names = { encode: "reading the query", first: "first stage", exact: "exact scores" };
  const parts = Object.entries(milliseconds).map(
    ([name, value]) => `${names[name] ?? name} ${value.toFixed(1)} ms`);
  return parts.join(", ");
}

function total(milliseconds) {
  return Object.values(milliseconds).reduce((sum, value) => sum + value, 0);
}

function scoresOf({ score, first }) {
  const more = first === null ? "" : `, first\u00a0stage\u00a0${first.toFixed(3)}`;
  return `score\u00a0${score.toFixed(3)}${more}`;
}

// Pictures and the regions on them

function picture(shown) {
  const [width, height] = shown.size;
  const frame = make("span", { className: "picture" });
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  if (shown.photo) {
    const photo = make("img", { src: `/photos/${shown.image}`, alt: `Image ${shown.id}` });
    photo.loading = "lazy";
    photo.addEventListener("error", () => {
      photo.remove();
      svg.prepend(...placeholder(shown));
    });
    frame.append(photo);
  } else {
    frame.append(make("span", { className: "unseen", textContent: `Image ${shown.id}, no photo` }));
    svg.append(...placeholder(shown));
  }
  const regions = draw("g", {});
  svg.append(regions);
  frame.append(svg);
  return { frame, regions };
}

function placeholder(shown) {
  const [width, height] = shown.size;
  const paper = draw("rect", { class: "paper", x: 0, y: 0, width, height });
  const outlines = (shown.boxes ?? []).map((box) => draw("rect", { class: "outline", ...corners(box) }));
  const place = { x: width / 2, y: height / 2, "font-size": Math.min(width, height) / 5 };
  const number = draw("text", place);
  number.textContent = shown.image;
  return [paper, ...outlines, number];
}

function corners([left, top, right, bottom]) {
  return { x: left, y: top, width: Math.max(right - left, 0), height: Math.max(bottom - top, 0) };
}

// The strongest region, and others that have half as much again as an equal share, drawn as opaque
// as their weights are large; the rest of the picture is in the dark.
function light(card, weights) {
  card.regions.replaceChildren();
  if (!weights) return;
  const { boxes, placed } = card.attention;
  if (!placed && card.shown.photo) return; // a grid is no place of a photo
  const order = weights.map((weight, region) => [weight, region]).sort((a, b) => b[0] - a[0]);
  const most = Math.max(order[0]?.[0] ?? 0, 1e-9);
  const all = { x: 0, y: 0, width: "100%", height: "100%" };
  const mask = draw("mask", { id: `mask${(masks += 1)}` });
  mask.append(draw("rect", { fill: "white", ...all }));
  card.regions.append(mask, draw("rect", { class: "dark", mask: `url(#mask${masks})`, ...all }));
  for (const [weight, region] of order.slice(0, MOST_BOXES).reverse()) {
    const part = weight / most;
    if (part < 1 && weight < 1.5 / weights.length) continue;
    const box = corners(boxes[region]);
    mask.append(draw("rect", { fill: "black", "fill-opacity": part.toFixed(3), ...box }));
    card.regions.append(draw("rect", { class: "region", "stroke-opacity": part.toFixed(3), ...box }));
  }
}

// The attention of the images that still lack it; each image is asked for once.
async function fetchAttention(of, cards) {
  const missing = cards.filter((card) => !card.attention && !card.asked);
  for (const card of missing) card.asked = true;
  for (let start = 0; start < missing.length; start += AT_ONCE) {
    const some = missing.slice(start, start + AT_ONCE);
    const images = some.map((card) => card.shown.image);
    try {
      const body = { query: of.query, images };
      const answer = await post("/api/attention", body, of.controller.signal);
      answer.images.forEach((attention, k) => { some[k].attention = attention; });
    } catch (error) {
      for (const card of missing.slice(start)) card.asked = false; // the next look asks again
      if (error.name !== "AbortError") say(error.message, true);
      return;
    }
    if (of === search) show();
  }
}

// What is looked at now: a word on all images, or else the whole sentence on one of them.
function show() {
  if (!search || !info.attention) return;
  const row = word ?? pinned;
  [...$("words").querySelectorAll("button")].forEach((button, k) => {
    button.classList.toggle("shown", k === row);
    button.setAttribute("aria-pressed", k === pinned);
  });
  for (const card of search.cards) {
    const weights = card.attention?.weights;
    if (!weights) light(card, null);
    else if (row !== null) light(card, weights[row]);
    else light(card, card.active ? mean(weights) : null);
  }
}

function mean(rows) {
  return rows[0]?.map((_, k) => rows.reduce((sum, row) => sum + row[k], 0) / rows.length) ?? [];
}

function look(row) {
  word = row;
  if (row !== null) fetchAttention(search, search.cards);
  show();
}

function lookAt(card, active) {
  card.active = active;
  if (active && info.attention) fetchAttention(search, [card]);
  show();
}

function watch(element, change) {
  element.addEventListener("pointerenter", () => change(true));
  element.addEventListener("pointerleave", () => change(element.matches(":focus-visible")));
  element.addEventListener("focus", () => change(true));
  element.addEventListener("blur", () => change(false));
}

// A sentence finds images

async function find(query) {
  search?.controller.abort();
  const controller = new AbortController();
  const mine = { query, cards: [], controller };
  const again = search?.query === query;
  search = mine;
  word = pinned = null;
  const asked = ranking();
  if (!again) document.querySelectorAll("output").forEach((output) => { output.textContent = ""; });
  $("found").setAttribute("aria-busy", "true");
  say("Searching …");
  await ready;
  try {
    const answer = await post("/api/search", { query, ...asked }, controller.signal);
    if (search !== mine) return;
    showImages(mine, answer, asked.stages);
  } catch (error) {
    if (error.name === "AbortError" || search !== mine) return;
    $("found").hidden = true;
    say(error.message, true);
  } finally {
    if (search === mine) $("found").removeAttribute("aria-busy");
  }
}

function showImages(mine, answer, stages) {
  const time = total(answer.milliseconds);
  document.querySelector(`[data-of=${stages}]`).textContent = `${time.toFixed(1)} ms`;
  $("times").textContent = `Time: ${inWords(answer.milliseconds)}.`;
  $("notes").textContent = answer.notes.join(" ");
  $("results-heading").textContent = `Images for “${mine.query}”`;
  $("words").replaceChildren(...(info.attention ? answer.words.map(wordButton) : []));
  mine.cards = answer.results.map(card);
  $("results").replaceChildren(...mine.cards.map((one) => make("li", {}, one.button)));
  $("found").hidden = false;
  if ($("results").getBoundingClientRect().top > innerHeight / 2) $("status").scrollIntoView();
  say(`${count(answer.results.length, "image")} found in ${time.toFixed(0)} ms. ${answer.notes.join(" ")}`);
}

function wordButton(text, k) {
  const button = make("button", { type: "button", textContent: text });
  button.setAttribute("aria-pressed", "false");
  watch(button, (on) => look(on ? k : null));
  button.addEventListener("click", () => {
    pinned = pinned === k ? null : k;
    look(pinned === null ? null : k);
  });
  return make("li", {}, button);
}

function card(shown, k) {
  const { frame, regions } = picture(shown);
  const name = make("span", { className: "name", textContent: shown.id });
  name.setAttribute("aria-hidden", "true"); // the picture has it
  const button = make("button", { type: "button", className: "card" }, frame,
    make("span", { className: "text" },
      make("span", { className: "rank", textContent: `Rank ${k + 1}` }), name,
      make("span", { className: "scores", textContent: scoresOf(shown) })));
  button.setAttribute("aria-haspopup", "dialog");
  const made = { shown, frame, regions, button, active: false };
  watch(button, (on) => lookAt(made, on));
  button.addEventListener("click", () => captionsOf(shown));
  return made;
}

// An image finds captions

function openDialog(title, frame) {
  captionsController?.abort();
  captionsController = new AbortController();
  $("captions-heading").textContent = title;
  $("captions-picture").replaceChildren(frame);
  $("captions-list").replaceChildren();
  say("Searching captions …", false, "captions-status");
  if (!$("captions").open) $("captions").showModal();
  return captionsController.signal;
}

async function captionsOf(shown) {
  const signal = openDialog(`Captions for image ${shown.id}`, picture(shown).frame);
  const address = `/api/captions?${new URLSearchParams({ image: shown.image, ...ranking() })}`;
  await showCaptions(ask(address, { signal }), signal);
}

async function showCaptions(asking, signal) {
  try {
    const answer = await asking;
    if (signal.aborted) return;
    const found = answer.results.length;
    const said = found
      ? `${count(found, "caption")}, the best first. Time: ${inWords(answer.milliseconds)}.`
      : "This data set has no captions.";
    say(said, false, "captions-status");
    $("captions-list").replaceChildren(...answer.results.map(captionItem));
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true, "captions-status");
  }
}

function captionItem(found) {
  const item = make("li", {}, make("div", { className: "caption", textContent: found.text }),
    make("span", { className: "scores", textContent: scoresOf(found) }));
  if (found.own) item.append(make("span", { className: "own", textContent: "This is one of its own captions." }));
  return item;
}

async function upload(file) {
  if (!info?.uploads) {
    say(info ? $("no-upload").textContent : "The page has not started yet.", true);
    return;
  }
  if (!file.type.startsWith("image/")) {
    say(`${file.name} is not a picture.`, true);
    return;
  }
  if (file.size > info.upload_bytes) {
    const most = (info.upload_bytes / 2 ** 20).toLocaleString("en");
    say(`${file.name} is too large: at most ${most} MiB.`, true);
    return;
  }
  say("");
  if (uploadAddress) URL.revokeObjectURL(uploadAddress);
  uploadAddress = URL.createObjectURL(file);
  const photo = make("img", { src: uploadAddress, alt: `Your picture ${file.name}` });
  const signal = openDialog(`Captions for ${file.name}`, make("span", { className: "picture" }, photo));
  const options = { method: "POST", headers: { "content-type": file.type }, body: file, signal };
  await showCaptions(ask(`/api/upload?${new URLSearchParams(ranking())}`, options), signal);
}

// The start

function listen() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const query = $("query").value.trim();
    if (query) find(query);
    else say("Type a sentence first.", true);
  });
  for (const id of ["stages", "shortlist", "topk"])
    $(id).addEventListener("change", () => { if (search) find(search.query); });
  $("close").addEventListener("click", () => $("captions").close());
  $("captions").addEventListener("click", (event) => {
    if (event.target === $("captions")) $("captions").close(); // beside the panel
  });
  $("captions").addEventListener("close", () => captionsController?.abort());
  $("picture").addEventListener("change", (event) => {
    if (event.target.files[0]) upload(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault(); // else the browser would open the file instead of this page
    $("upload").classList.add("over");
  });
  addEventListener("dragleave", () => $("upload").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("upload").classList.remove("over");
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
}

function describe() {
  const about = [`${count(info.images, "image")} and ${count(info.captions, "caption")} of ` +
    `${info.data}, ${info.split}, searched with ${info.model}.`];
  if (!info.photos) about.push("No photos are there: images are drawn as their number and boxes.");
  else if (info.photos < info.images) about.push(`${count(info.photos, "photo")} are there.`);
  $("about").textContent = about.join(" ");
  $("words-help").textContent = info.attention
    ? "Point at a word, tap it or reach it with Tab to see the regions that it attends to in each " +
      "image; a click keeps it. Point at an image to see what the whole sentence attends to."
    : `No regions can be shown for words: ${info.why_no_attention}.`;
  $("words-heading").hidden = $("words").hidden = !info.attention;
  const exact = document.querySelector('input[name="stages"][value="exact"]');
  exact.disabled = !info.exact;
  if (!info.exact) exact.parentElement.querySelector("small").textContent = "too many images here";
  $("drop").hidden = !info.uploads;
  $("no-upload").hidden = info.uploads;
  $("no-upload").textContent = `Off, because ${info.why_no_uploads}.`;
  for (const text of info.examples) {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => { $("query").value = text; find(text); });
    $("examples").append(button);
  }
  $("examples").hidden = !info.examples.length;
}

async function start() {
  listen();
  try {
    info = await ask("/api/info");
    describe();
  } catch (error) {
    say(error.message, true);
  }
}

const ready = start();
