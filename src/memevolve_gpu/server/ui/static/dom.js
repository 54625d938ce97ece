// Elements and formats. Every text becomes a text node, so a unit can never bring markup.

/** Make an element; attributes that begin with "on" are listeners, and null or false ones are left out. */
export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  fill(made, attributes, children);
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(made, attributes, children);
  return made;
}

function fill(made, attributes, children) {
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
}

export const link = (id) => h("a", { href: `#/unit?id=${encodeURIComponent(id)}`, class: "id" }, id);
export const badge = (text, kind = "") => h("span", { class: `badge ${kind}` }, text);
const plain = (value) => (typeof value === "string" ? value : JSON.stringify(value));
export const textOf = (unit) => plain(unit?.content || unit?.query || unit?.reasoning || "");
export const kindOf = (unit) => unit?.type && badge(plain(unit.type));
export const tagsOf = (unit) => [unit.tags ?? []].flat().map(plain);
export const short = (text, most = 180) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

const parts = (text) => text.split(/([\p{L}\p{N}\p{M}_]+)/u);
const bare = (word) => word.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

/** The text with some of its words marked; the words are in lower case and without accents. */
export function marked(text, words) {
  const wanted = new Set(words);
  return parts(text).map((part) => (wanted.has(bare(part)) ? h("mark", {}, part) : part));
}

/** The text with those words marked that another text lacks. */
export function markedNew(text, other) {
  const known = new Set(parts(other).map(bare));
  return parts(text).map((part, i) => (i % 2 && !known.has(bare(part)) ? h("mark", {}, part) : part));
}

export function table(caption, heads, rows) {
  if (!rows.length) return h("p", { class: "muted" }, "Nothing to show.");
  const head = h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)));
  const body = rows.map((cells) =>
    h("tr", {}, cells.map((cell, i) => h("td", { "data-head": heads[i] }, cell ?? "–"))));
  const made = h("table", {}, h("caption", { class: "unseen" }, caption), h("thead", {}, head), h("tbody", {}, body));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, made);
}

/** A form of labelled fields: {name, label, type, value, options}. `send` takes their values by name. */
export function form(fields, action, send, ...more) {
  const made = h("form", { class: "fields", novalidate: true }, fields.map(labelled),
    h("div", { class: "buttons" }, h("button", { type: "submit" }, action), more));
  made.addEventListener("submit", (event) => {
    event.preventDefault();
    send(values(made));
  });
  return made;
}

export const values = (made) =>
  Object.fromEntries([...made.elements].filter((one) => one.name).map((one) => [one.name, one.value]));

function labelled({ name, label, options, type = "text", value = "", ...more }) {
  const control = options
    ? h("select", { name }, options.map((one) => {
        const [of, text] = Array.isArray(one) ? one : [one, one];
        return h("option", { value: of, selected: of === value }, text);
      }))
    : type === "textarea"
      ? h("textarea", { name, value, rows: 6, spellcheck: "false", ...more })
      : h("input", { name, type, value, autocomplete: "off", ...more });
  return h("label", {}, h("span", {}, label), control);
}

/** Ask in a modal dialog; resolves to whether the reader agreed. */
export function confirmed(title, content, action, kind = "danger") {
  return new Promise((resolve) => {
    const made = h("dialog", { "aria-labelledby": "dialog-title" },
      h("h2", { id: "dialog-title" }, title), h("div", { class: "preview" }, content),
      h("form", { method: "dialog", class: "buttons" },
        h("button", { value: "no", class: "plain" }, "Cancel"), h("button", { value: "yes", class: kind }, action)));
    made.addEventListener("close", () => {
      made.remove();
      resolve(made.returnValue === "yes");
    });
    document.body.append(made);
    made.showModal();
  });
}

/** Say what was done, with a button to take it back where there is one. */
export function say(text, undo = null) {
  const button = undo && h("button", { class: "plain", onclick: () => { clear(); undo(); } }, "Undo");
  const clear = () => document.getElementById("toast").replaceChildren();
  document.getElementById("toast").replaceChildren(
    h("div", {}, h("span", {}, text), button, h("button", { class: "plain", "aria-label": "Close", onclick: clear }, "✕")));
}

export const problem = (error) => h("p", { class: "problem", role: "alert" }, error.message);

/** Fill an element with what a promise brings, or with its error. */
export async function into(place, promise) {
  place.setAttribute("aria-busy", "true");
  if (!place.childNodes.length) place.replaceChildren(h("p", { class: "muted" }, "Loading…"));
  try {
    const found = await promise;
    place.replaceChildren(...[found].flat(3).filter(Boolean));
  } catch (error) {
    place.replaceChildren(problem(error));
  }
  place.removeAttribute("aria-busy");
}

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });
export const score = (value) => (value > 0 && value < 0.001 ? "< 0.001" : number(value, 3));
export const percent = (value) => (value === null || value === undefined ? "–" : `${number(value * 100, 1)} %`);
export const day = (text) => h("time", {}, String(text ?? "–").slice(0, 10));
export const moment = (seconds) =>
  seconds ? new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC" : "–";
export function size(bytes) {
  const power = bytes > 0 ? Math.min(4, Math.floor(Math.log2(bytes) / 10)) : 0;
  return `${number(bytes / 1024 ** power, power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
