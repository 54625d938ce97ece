// One question, three searches side by side, and why each unit was found.

import { get, post } from "./api.js";
import { form, h, into, kindOf, link, marked, number, score, short, textOf } from "./dom.js";

const MODES = { semantic: "By meaning", keyword: "By words", hybrid: "Both" };

export async function search(place, parameters) {
  const results = h("div", { class: "columns" });
  const run = (given) => {
    history.replaceState(null, "", `#/search?${new URLSearchParams(given)}`);
    if (given.query.trim()) return into(results, found(given));
  };
  place.replaceChildren(
    form([
      { name: "query", label: "Question or words", type: "search", value: parameters.query ?? "", required: true },
      { name: "type", label: "Type", value: parameters.type ?? "", placeholder: "any" },
      { name: "top_k", label: "Results", type: "number", min: 1, max: 50, value: parameters.top_k ?? "5" },
    ], "Search", run),
    results);
  if (parameters.query) await run({ query: parameters.query, type: parameters.type ?? "", top_k: parameters.top_k ?? "5" });
}

async function found({ query, type, top_k }) {
  const asked = { query, top_k: Number(top_k) || 5, filters: type ? { type } : null, record: false };
  const modes = Object.keys(MODES);
  const answers = await Promise.all(modes.map((mode) =>
    post("v1/search", { ...asked, mode }).then((answer) => answer.hits, (error) => error)));
  const ids = [...new Set(answers.flatMap((hits) => (hits instanceof Error ? [] : hits.map((hit) => hit.id))))];
  const { why } = ids.length ? await get("ui/api/why", { query, id: ids.slice(0, 100) }) : { why: {} };
  const rank = (id, i) => (answers[i] instanceof Error ? -1 : answers[i].findIndex((hit) => hit.id === id));
  return modes.map((mode, i) => h("section", { "aria-label": MODES[mode] }, h("h2", {}, MODES[mode]),
    answers[i] instanceof Error ? h("p", { class: "problem" }, answers[i].message)
      : answers[i].length ? h("ol", { class: "hits" }, answers[i].map((hit) => card(hit, why[hit.id] ?? {}, modes
        .map((other, j) => j !== i && rank(hit.id, j) >= 0 && `${MODES[other].toLowerCase()} #${rank(hit.id, j) + 1}`).filter(Boolean))))
        : h("p", { class: "muted" }, "Nothing was found.")));
}

function card(hit, why, elsewhere) {
  const words = why.words ?? [];
  return h("li", { class: "card" },
    h("div", { class: "line" }, link(hit.id), kindOf(hit.unit), h("span", { class: "score" }, score(hit.score))),
    h("p", {}, marked(short(textOf(hit.unit)), words)),
    h("details", {}, h("summary", {}, "Why was it found?"),
      h("dl", {}, [
        ["Score here", number(hit.score, 6)],
        ["Cosine with the question", number(why.cosine, 4)],
        ["Score of its words (BM25)", why.keyword_score !== null ? number(why.keyword_score, 6) : words.length ? "not among the best 100" : "no common word"],
        ["Common words", words.join(", ") || "none"],
        ...Object.entries(hit.why ?? {}).map(([name, value]) => [name.replaceAll("_", " "), number(value, 6)]),
        ["Also found", elsewhere.join(", ") || "only here"],
      ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))));
}
