// What happened: operations to take back, the feed of changes, and the events of the store.

import { get, post } from "./api.js";
import { badge, h, into, link, moment, number, say, short, table, textOf } from "./dom.js";

const NEWEST = 100;

export async function activity(place, _parameters, again) {
  const places = { Operations: h("div"), Changes: h("div"), Events: h("div") };
  place.replaceChildren(...Object.entries(places).map(([title, inner]) => h("section", {}, h("h2", {}, title), inner)));
  await Promise.all([into(places.Operations, operations(again)), into(places.Changes, changes()), into(places.Events, events())]);
}

/** The newest operations, each with a button to take it back. */
export async function operations(again, limit = 25) {
  const found = await get("v1/operations", { limit });
  const told = h("div");
  const undo = (one) => into(told, post("v1/undo", { operation: one.id }).then(() => { say(`Took back ${one.kind}.`); again(); }));
  return [told, table("Operations, newest first", ["When", "Operation", "Changes", "Action"], found.operations.map((one) => [
    moment(one.at), one.kind, number(one.changes),
    h("button", { class: "plain", "aria-label": `Undo ${one.kind}, operation ${one.id}`, onclick: () => undo(one) }, "Undo")]))];
}

async function changes() {
  const { log } = await get("v1/stats");
  const after = Math.max(log.horizon ?? 0, log.last_seq - NEWEST);
  const found = await get("v1/changes", { after, limit: NEWEST });
  return table("Changes, newest first", ["Number", "Change", "Id", "Content"], found.changes.reverse().map((one) => [
    number(one.seq), badge(one.operation, one.operation), link(one.id), one.unit ? short(textOf(one.unit), 120) : ""]));
}

async function events() {
  const found = await get("v1/events");
  return table("Events, newest first", ["When", "Event", "Details"], found.events.reverse().map(({ kind, at, ...details }) => [
    moment(at), kind, short(JSON.stringify(details.details ?? details), 300)]));
}
