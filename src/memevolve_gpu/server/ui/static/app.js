// The frame: views by the address after #, the namespace, the theme, the key.

import { get, state } from "./api.js";
import { h, problem } from "./dom.js";
import { activity } from "./activity.js";
import { backup } from "./backup.js";
import { browse } from "./browse.js";
import { duplicates } from "./duplicates.js";
import { manage } from "./manage.js";
import { map } from "./map.js";
import { overview } from "./overview.js";
import { search } from "./search.js";
import { unit } from "./unit.js";

const VIEWS = {
  overview: ["Overview", overview], search: ["Search", search], browse: ["Browse", browse], map: ["Map", map],
  duplicates: ["Duplicates", duplicates], manage: ["Manage", manage], activity: ["Activity", activity],
  backup: ["Backup", backup], unit: [null, unit],
};
const THEMES = { auto: "light dark", light: "light", dark: "dark" };
const main = document.getElementById("main");
let asking = null;

async function show(event) {
  const [name, query] = (location.hash.slice(2) || "overview").split("?");
  if (location.hash === "#main") return main.focus();
  const [title, view] = VIEWS[name] ?? VIEWS.overview;
  const parameters = Object.fromEntries(new URLSearchParams(query));
  const heading = h("h1", {}, title ?? parameters.id ?? "");
  const place = h("div", { class: "view", "aria-busy": "true" });
  document.title = `${heading.textContent} · memory`;
  for (const one of document.querySelectorAll("nav a")) {
    const here = one.getAttribute("href") === `#/${name}`;
    if (here) one.setAttribute("aria-current", "page"); else one.removeAttribute("aria-current");
  }
  main.replaceChildren(heading, place);
  if (event) {
    main.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
  try {
    await view(place, parameters, () => show());
  } catch (error) {
    place.replaceChildren(problem(error));
  }
  place.removeAttribute("aria-busy");
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("memevolve-theme", name);
  const button = document.getElementById("theme");
  button.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[name];
  button.setAttribute("aria-label", `Theme: ${name}. Change it`);
}

function askKey(again) {
  return (asking ??= new Promise((resolve) => {
    const field = h("input", { type: "password", id: "key", autocomplete: "off", required: true });
    const dialog = h("dialog", { "aria-labelledby": "key-title" },
      h("h2", { id: "key-title" }, "API key"),
      h("form", { method: "dialog", class: "fields" },
        h("p", {}, again ? "The server refuses this key. Enter another." : "This server asks for a key.",
          " It is kept until this tab is closed. ", h("code", {}, "memevolve-store keys add NAME"), " makes one."),
        h("label", {}, h("span", {}, "Key"), field), h("div", { class: "buttons" }, h("button", { value: "yes" }, "Use this key"))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      resolve(dialog.returnValue === "yes" ? field.value.trim() : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  }));
}
function frame() {
  document.getElementById("views").append(...Object.entries(VIEWS).filter(([, [title]]) => title)
    .map(([name, [title]]) => h("li", {}, h("a", { href: `#/${name}` }, title))));
  const themes = Object.keys(THEMES);
  const kept = localStorage.getItem("memevolve-theme");
  setTheme(themes.includes(kept) ? kept : "auto");
  document.getElementById("theme").addEventListener("click", () =>
    setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]));
  const field = document.getElementById("namespace");
  field.value = state.namespace = sessionStorage.getItem("memevolve-namespace") ?? "";
  field.addEventListener("change", () => {
    state.namespace = field.value.trim();
    sessionStorage.setItem("memevolve-namespace", state.namespace);
    show();
  });
  field.addEventListener("focus", async () => {
    const { namespaces } = await get("v1/namespaces", { namespace: "" }).catch(() => ({ namespaces: [] }));
    document.getElementById("namespaces").replaceChildren(
      ...namespaces.map((one) => h("option", { value: one.path.join("/") }, `${one.count} units`)));
  });
}

state.askKey = askKey;
frame();
window.addEventListener("hashchange", show);
show();
