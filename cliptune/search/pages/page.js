"use strict";
// Asks as one types, and shows the answer to the newest question alone.
const byId = (id) => document.getElementById(id);
const query = byId("query"), file = byId("file"), asked = byId("asked"), status = byId("status");
const results = byId("results"), more = byId("more"), card = byId("card");
const firstTop = Number(document.body.dataset.top), maxTop = Number(document.body.dataset.maxTop);
// the page's words, in its language; {0}, {1}, ... are values
const words = Object.fromEntries([...byId("words").content.children].map((each) => [each.dataset.key, each.textContent]));
const say = (key, ...values) => words[key].replace(/\{(\d)\}/g, (_, index) => values[index]);
const DELAY = 150; // milliseconds without a key before a text is looked for

let top_ = firstTop;     // how many images are asked for
let ask = null;          // the question that is shown: top -> [address, options]
let pending = null;      // what breaks off the request that is under way
let timer = 0;

// `about`: what was asked, as a key of the words and a value
async function run(question, about) {
  clearTimeout(timer);
  if (pending) pending.abort(); // an answer that comes late would be to another question
  const own = pending = new AbortController();
  ask = question;
  results.classList.add("stale");
  try {
    const [address, options] = question(top_);
    const start = performance.now();
    const response = await fetch(address, { ...options, signal: own.signal });
    const answer = await response.json();
    if (own !== pending) return;
    if (!response.ok) throw new Error(answer.error);
    show(answer, about, Math.round(performance.now() - start));
  } catch (error) {
    if (own !== pending || error.name === "AbortError") return;
    results.replaceChildren();
    more.hidden = true;
    status.textContent = error instanceof TypeError ? say("none") : error.message;
  } finally {
    if (own === pending) results.classList.remove("stale");
  }
}

function show(answer, about, milliseconds) {
  results.replaceChildren(...answer.results.map(toCard));
  more.hidden = answer.results.length < top_ || top_ >= maxTop;
  more.onclick = () => { top_ = Math.min(2 * top_, maxTop); run(ask, about); };
  const number = answer.results.length === 1 ? say("image") : say("images", answer.results.length);
  const found = say(about[0], number, about[1], milliseconds);
  status.textContent = answer.note ? `${found} ${say("cut", answer.note)}` : found;
}

function toCard(found) {
  const item = card.content.cloneNode(true).firstElementChild;
  const link = item.querySelector("a"), image = item.querySelector("img"), name = item.querySelector(".name");
  link.href = `/images/${found.image}/large`;
  image.src = `/images/${found.image}/small`;
  image.alt = found.path;
  image.onerror = () => link.classList.add("gone");
  item.querySelector(".score").textContent = found.score.toFixed(3);
  name.title = found.path;
  // a long path breaks behind its folders
  name.append(...found.path.split(/(?<=\/)/).flatMap((part) => [part, document.createElement("wbr")]));
  const like = item.querySelector(".like");
  like.setAttribute("aria-label", say("more", found.path));
  like.onclick = () => askLike(found);
  return item;
}

function askText() {
  const text = query.value.trim();
  if (!text) { clear(); return; }
  top_ = firstTop;
  asked.hidden = true;
  run((top) => [`/search?${new URLSearchParams({ query: text, top })}`, {}], ["text", text]);
}

function askLike(found) {
  top_ = firstTop;
  showAsked(`/images/${found.image}/small`, found.path);
  run((top) => [`/like/${found.image}?top=${top}`, {}], ["like", found.path]);
  window.scrollTo({ top: 0 });
}

function askImage(blob) {
  top_ = firstTop;
  const name = blob.name || say("pasted");
  showAsked(URL.createObjectURL(blob), name);
  run((top) => [`/search?top=${top}`, { method: "POST", body: blob }], ["like", name]);
}

function showAsked(address, name) {
  const image = asked.querySelector("img");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.src = address;
  asked.querySelector("span").textContent = name;
  asked.hidden = false;
  query.value = "";
}

function clear() {
  clearTimeout(timer);
  if (pending) pending.abort();
  pending = ask = null;
  results.replaceChildren();
  results.classList.remove("stale");
  status.textContent = query.value = file.value = "";
  asked.hidden = more.hidden = true;
}

query.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(askText, DELAY); });
query.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.isComposing) askText(); });
file.addEventListener("change", () => { if (file.files[0]) askImage(file.files[0]); file.value = ""; });
asked.querySelector("button").addEventListener("click", () => { clear(); query.focus(); });

document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files[0]) askImage(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) { event.preventDefault(); askImage(event.clipboardData.files[0]); }
});
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "/" && document.activeElement !== query) {
    event.preventDefault();
    query.select();
  } else if (event.key === "Escape") {
    clear();
    query.focus();
  } else if (step && document.activeElement !== query) {
    const links = [...results.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement.closest(".card")?.querySelector("a"));
    links[at + step]?.focus();
  }
});
