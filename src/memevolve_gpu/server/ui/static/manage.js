// Operations on the whole memory: a dry run first, then the same for real, then undo.

import { get, post } from "./api.js";
import { confirmed, form, h, into, kindOf, link, number, short, table, textOf } from "./dom.js";
import { operations } from "./activity.js";
import { filterOf } from "./browse.js";
import { done } from "./unit.js";

const SHOWN = 50;
const NOTES = {
  conflict_count: (count) => `${count} contradictions are left alone; see Duplicates`,
  undated: (count) => `${count} units without a readable time are not deleted by age`,
};
const real = (value) => (value === "" ? undefined : Number(value));

const OPERATIONS = {
  prune: {
    title: "Prune", about: "Delete units by age, number or type. With a type alone, all of that type go.",
    fields: [
      { name: "max_age", label: "Older than, in days", type: "number", min: 0, step: "any" },
      { name: "max_count", label: "Keep the newest", type: "number", min: 0 },
      { name: "type", label: "Only this type" },
      { name: "filters", label: "Only these, as JSON", placeholder: '{"tags": "git"}' },
    ],
    body: ({ max_age, max_count, type, filters }) => ({ criteria: {
      ...(max_age && { max_age: Number(max_age) }), ...(max_count && { max_count: Number(max_count) }),
      ...(type && { type }), ...(filters.trim() && { filters: filterOf({ filters }) }),
    } }),
  },
  deduplicate: {
    title: "Deduplicate", about: "Of units that say the same, keep one. Contradictions are left alone; see Duplicates.",
    fields: [
      { name: "similarity_threshold", label: "Least cosine", type: "number", min: 0.01, max: 1, step: 0.01, value: "0.75" },
      { name: "keep", label: "Keep", options: [["newest", "the newest"], ["oldest", "the oldest"], ["longest", "the longest"], ["accessed", "the one read most"]] },
    ],
    body: ({ similarity_threshold, keep }) => ({ similarity_threshold: real(similarity_threshold), keep }),
  },
  consolidate: {
    title: "Consolidate", about: "Merge units of one type that are similar into one unit.",
    fields: [{ name: "similarity_threshold", label: "Least cosine", type: "number", min: 0.01, max: 1, step: 0.01, value: "0.85" }],
    body: ({ similarity_threshold }) => ({ by: "similarity", similarity_threshold: real(similarity_threshold) }),
  },
  forget: {
    title: "Forget", about: "Delete the units that are used least.",
    fields: [
      { name: "strategy", label: "Which first", options: [["lru", "read longest ago"], ["lfu", "read least often"], ["random", "at random"]] },
      { name: "count", label: "How many", type: "number", min: 1, placeholder: "a tenth of all" },
    ],
    body: ({ strategy, count }) => ({ strategy, count: real(count) }),
  },
};

export async function manage(place, _parameters, again) {
  const past = h("div");
  place.replaceChildren(
    h("div", { class: "columns wide" }, Object.entries(OPERATIONS).map(([name, operation]) => panel(name, operation, again))),
    h("section", {}, h("h2", {}, "Newest operations"), past));
  await into(past, operations(again, 8));
}

function panel(name, { title, about, fields, body }, again) {
  const result = h("div");
  const dry = (given) => into(result, trial(name, title, () => body(given), again));
  const made = form(fields, `Dry run: ${title.toLowerCase()}`, dry);
  made.addEventListener("input", () => result.replaceChildren()); // what was shown no longer says what would be done
  return h("section", { class: "card", "aria-label": title }, h("h2", {}, title), h("p", { class: "muted" }, about), made, result);
}

async function trial(name, title, bodyOf, again) {
  const body = bodyOf();
  const found = await post(`v1/manage/${name}`, { ...body, dry_run: true });
  const notes = Object.entries(found.notes).filter(([key, value]) => NOTES[key] && value).map(([key, value]) => NOTES[key](number(value)));
  if (!found.count) return h("p", { role: "status" }, "Nothing would be changed.", notes.length ? ` (${notes.join(", ")})` : "");
  const what = name === "consolidate" ? `merge units into ${number(found.count)}` : `delete ${number(found.count)} units`;
  const units = name === "consolidate" ? found.units.slice(0, SHOWN)
    : Object.values((await post("v1/units/get", { ids: found.ids.slice(0, SHOWN) })).units);
  return [
    h("p", { role: "status" }, `Would ${what}.`, notes.length ? ` ${notes.join(", ")}` : ""),
    h("button", { class: "danger", onclick: (event) => into(event.target.nextSibling, perform(name, title, body, what, again)) },
      `${title}: ${what}`), h("div"),
    table(`What ${name} would change`, [name === "consolidate" ? "Merged from" : "Id", "Type", "Content"], units.map((unit) => [
      name === "consolidate" ? sources(unit) : link(unit.id), kindOf(unit), short(textOf(unit), 120)])),
    found.count > SHOWN && h("p", { class: "muted" }, `The first ${SHOWN} are shown.`),
  ];
}

const sources = (unit) => h("span", {}, (unit.metadata?.consolidated_from ?? []).map((id) => [link(id), " "]));

async function perform(name, title, body, what, again) {
  const sure = await confirmed(`${title}?`, h("p", {}, `This will ${what}, in one transaction. It can be undone while the history keeps it.`), title);
  if (!sure) return [];
  const found = await post(`v1/manage/${name}`, body);
  const id = found.ids[0] ?? found.units[0]?.id;
  if (id) await done(`${title}: ${number(found.count)} units.`, id, again);
  else again();
  return [];
}
