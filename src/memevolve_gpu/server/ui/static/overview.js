// How full, how good and how fast the store is, and what to do next.

import { get, post, postWhole } from "./api.js";
import { h, into, moment, number, percent, say, size, table } from "./dom.js";

export async function overview(place, _parameters, again) {
  const [health, stats] = await Promise.all([get("v1/health"), get("v1/stats")]);
  const backups = await get("v1/backups").then((found) => found.backups, () => null);
  const types = h("div");
  const maintain = async () => {
    const done = await postWhole("v1/maintain");
    say(done.actions.length ? `Maintenance: ${done.actions.join(", ")}.` : `Nothing was due: ${done.reason}.`);
    again();
  };
  place.replaceChildren(
    h("section", { class: "cards", "aria-label": "State" }, cards(health, stats, backups)),
    h("section", {}, h("h2", {}, "What to do next"), advice(health, backups),
      h("button", { class: "plain", onclick: (event) => into(event.target.nextSibling, maintain()) }, "Do the maintenance that is due"),
      h("div")),
    h("section", {}, h("h2", {}, "Types"), types));
  await into(types, post("v1/facets", { field: "type", limit: 20 }).then(({ facets }) =>
    table("Units by type", ["Type", "Units", "Share"], facets.map((one) => [
      h("a", { href: `#/browse?type=${encodeURIComponent(one.value)}` }, String(one.value)), number(one.count),
      meter(one.count / facets[0].count, `share of ${one.value}`)]))));
}

const meter = (share, label) => h("progress", { max: 1, value: Math.min(1, share || 0), "aria-label": label });

function card(title, value, note, share) {
  return h("div", { class: "card" }, h("h2", {}, title), h("p", { class: "figure" }, value),
    share !== undefined && meter(share, title), h("p", { class: "muted" }, note));
}

function cards(health, stats, backups) {
  const { latency, index, device } = stats;
  const recall = stats.probed_recall ?? health.training_quality_score;
  const newest = backups?.[0];
  return [
    card("Units", number(health.current_count), health.max_units ? `of ${number(health.max_units)} allowed` : "no limit",
      health.max_units ? health.current_count / health.max_units : undefined),
    card("Memory", `${number(health.memory_usage_mb, 1)} MiB`,
      health.max_memory_mb ? `of ${number(health.max_memory_mb)} MiB allowed · ${number(health.disk_mb, 1)} MiB on disk` : "",
      health.max_memory_mb ? health.memory_usage_mb / health.max_memory_mb : undefined),
    card("Recall", percent(recall),
      stats.probed_recall === null || stats.probed_recall === undefined ? "by the last check of the index" : "measured on searches of this process"),
    card("Latency", latency?.searches ? `${number(latency.p50_ms, 2)} ms` : "–",
      latency?.searches ? `median of ${number(latency.searches)} searches · p95 ${number(latency.p95_ms, 2)} · p99 ${number(latency.p99_ms, 2)} ms`
        : "no searches yet"),
    card("Index", index?.kind ?? "–", `${health.performance_status ?? ""} · ${index?.reason ?? ""}`),
    card("Device", device?.name ?? device?.device ?? "–", device?.reason ?? ""),
    card("Last backup", newest ? moment(newest.at) : "none", newest ? `${newest.name} · ${size(newest.bytes)}`
      : backups ? "in the server's folder of backups" : "your key may not list backups"),
    card("Changes", number(stats.log?.last_seq), `${number(health.index_lag)} not yet in the index`),
  ];
}

function advice(health, backups) {
  const told = [...(health.recommendations ?? [])];
  if (health.damage) told.unshift(`The store is damaged: ${JSON.stringify(health.damage)}. Run memevolve-store check.`);
  if (health.near_limit) told.push(h("span", {}, "The store is nearly full. ", h("a", { href: "#/manage" }, "Prune or forget units"), "."));
  const old = backups?.[0] && Date.now() / 1000 - backups[0].at > 86_400;
  if (backups && (!backups.length || old)) {
    told.push(h("span", {}, old ? "The newest backup is older than a day. " : "There is no backup yet. ", h("a", { href: "#/backup" }, "Make one"), "."));
  }
  return told.length ? h("ul", {}, told.map((one) => h("li", {}, one))) : h("p", { class: "good" }, "✓ Nothing needs to be done.");
}
