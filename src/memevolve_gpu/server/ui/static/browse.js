// Units page by page, filtered and sorted.

import { get, post } from "./api.js";
import { badge, day, form, h, into, kindOf, link, number, short, table, tagsOf, textOf } from "./dom.js";

const PAGE = 25;

export async function browse(place, parameters) {
  const { facets } = await post("v1/facets", { field: "type", limit: 50 });
  const results = h("div");
  const run = (given, cursors = []) => {
    history.replaceState(null, "", `#/browse?${new URLSearchParams(given)}`);
    return into(results, page(given, cursors, (next) => run(given, next)));
  };
  place.replaceChildren(
    form([
      { name: "text", label: "Text contains", type: "search", value: parameters.text ?? "" },
      { name: "type", label: "Type", value: parameters.type ?? "", options: [["", "any"], ...facets.map((one) => String(one.value))] },
      { name: "tag", label: "Tag", value: parameters.tag ?? "" },
      { name: "order_by", label: "Order", value: parameters.order_by ?? "-metadata.created_at", options: [
        ["-metadata.created_at", "newest first"], ["", "oldest first"], ["id", "by id"], ["-metadata.score", "by score"]] },
      { name: "filters", label: "More, as JSON", value: parameters.filters ?? "", placeholder: '{"metadata.score": {"gte": 0.5}}' },
    ], "Show", (given) => run(given)),
    results);
  await run({ text: "", type: "", tag: "", order_by: "-metadata.created_at", filters: "", ...parameters });
}

/** The conditions of the form as one filter. Throws an Error for what is no JSON object. */
export function filterOf({ text, type, tag, filters }) {
  const all = [];
  if (text) all.push({ content: { ilike: `%${text.replace(/[\\%_]/g, "\\$&")}%` } });
  if (type) all.push({ type });
  if (tag) all.push({ tags: tag });
  if (filters?.trim()) {
    try {
      all.push(JSON.parse(filters));
    } catch {
      throw new Error('The filter is no JSON. An example: {"metadata.score": {"gte": 0.5}}');
    }
  }
  return all.length > 1 ? { and: all } : all[0] ?? null;
}

async function page(given, cursors, turn) {
  const filters = filterOf(given);
  const asked = { filters: filters && JSON.stringify(filters), order_by: given.order_by, limit: PAGE, after: cursors.at(-1) };
  const [{ units, cursor }, { count }] = await Promise.all([get("v1/units", asked), post("v1/count", { filters })]);
  const first = cursors.length * PAGE;
  return [
    h("p", { role: "status" }, count ? `${number(first + 1)} to ${number(first + units.length)} of ${number(count)} units` : "No unit matches."),
    table("Units", ["Id", "Type", "Content", "Tags", "Created"], units.map((unit) => [
      link(unit.id), kindOf(unit), short(textOf(unit), 140), tagsOf(unit).map((tag) => badge(tag, "tag")),
      day(unit.metadata?.created_at)])),
    h("div", { class: "buttons" },
      h("button", { class: "plain", disabled: !cursors.length, onclick: () => turn(cursors.slice(0, -1)) }, "← Previous"),
      h("button", { class: "plain", disabled: !cursor, onclick: () => turn([...cursors, cursor]) }, "Next →")),
  ];
}
