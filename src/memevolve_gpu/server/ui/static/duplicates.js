// Pairs of near units: duplicates to delete or merge, and conflicts to settle, each with a preview.

import { change, get, post, unitPath } from "./api.js";
import { badge, confirmed, day, form, h, into, kindOf, link, marked, number, textOf } from "./dom.js";
import { done } from "./unit.js";

const KINDS = { conflict: "contradict each other", same: "say the same", different: "near, but different" };

export async function duplicates(place, _parameters, again) {
  const results = h("div");
  const run = (given) => into(results, listed(given, again));
  const first = { threshold: sessionStorage.getItem("memevolve-threshold") ?? "0.9", count: "2000" };
  place.replaceChildren(
    form([
      { name: "threshold", label: "Least cosine", type: "number", min: 0.5, max: 1, step: 0.01, value: first.threshold },
      { name: "count", label: "Newest units compared", type: "number", min: 2, max: 20000, value: first.count },
    ], "Find pairs", run),
    h("p", { class: "muted" }, "The right cosine depends on the embedding model: go down until unrelated units appear."),
    results);
  await run(first);
}

async function listed({ threshold, count }, again) {
  sessionStorage.setItem("memevolve-threshold", threshold);
  const { pairs, found, compared, total } = await get("ui/api/pairs", { threshold, count });
  return [
    h("p", { role: "status" }, `${number(found)} pairs among ${compared < total ? `the newest ${number(compared)} of ${number(total)}` : number(total)} units`,
      pairs.length < found ? `; the first ${pairs.length} are shown.` : "."),
    h("ul", { class: "pairs" }, pairs.map((pair) => settle(pair, again))),
  ];
}

function settle({ units, cosine, kind, reason, only }, again) {
  const told = h("div");
  const act = (work) => () => into(told, work());
  const side = (unit, i) => h("div", { class: "card" },
    h("p", { class: "line" }, link(unit.id), kindOf(unit), h("span", { class: "muted" }, day(unit.metadata?.created_at))),
    h("p", {}, marked(textOf(unit), only[i])),
    h("button", { class: "plain", "aria-label": `Keep ${unit.id} only`, onclick: act(() => keep(unit, units[1 - i], again)) }, "Keep this one only"));
  return h("li", {},
    h("p", { class: "line" }, badge(KINDS[kind], kind), h("span", { class: "muted" }, `cosine ${number(cosine, 3)} · ${reason}`)),
    h("div", { class: "two" }, units.map(side)),
    h("div", { class: "buttons" }, h("button", { class: "plain", "aria-label": `Merge ${units[0].id} and ${units[1].id}`, onclick: act(() => merge(units, again)) }, "Merge…")),
    told);
}

async function keep(kept, other, again) {
  const sure = await confirmed(`Delete ${other.id}?`, [
    h("h3", {}, "Stays"), h("p", {}, textOf(kept)), h("h3", {}, "Is deleted"), h("p", {}, textOf(other))], "Delete");
  if (sure) {
    await change("DELETE", unitPath(other.id));
    await done(`Deleted ${other.id}.`, other.id, again);
  }
  return [];
}

async function merge(units, again) {
  const asked = { ids: units.map((unit) => unit.id), by: "similarity", similarity_threshold: 0.01, compare: "cosine" };
  const preview = await post("v1/manage/consolidate", { ...asked, dry_run: true });
  if (!preview.units.length) throw new Error("These units cannot be merged: their type, or the user, agent or session in their metadata, differs.");
  const sure = await confirmed("Merge into one unit?", [h("pre", { tabindex: 0 }, JSON.stringify(preview.units[0], null, 2)),
    h("p", { class: "muted" }, "It replaces both. Edit it afterwards to settle what contradicts.")], "Merge", "");
  if (sure) {
    const made = await post("v1/manage/consolidate", asked);
    await done(`Merged into ${made.units[0].id}.`, made.units[0].id, again);
  }
  return [];
}
