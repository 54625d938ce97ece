// One unit: content, history, neighbours; edit, delete, undo.

import { change, get, post, undoLast, unitPath } from "./api.js";
import { badge, confirmed, form, h, into, link, moment, number, problem, say, short, table, textOf } from "./dom.js";

export async function unit(place, { id }, again) {
  const found = await get(unitPath(id)).catch((error) => error);
  const [near, past] = [h("div"), h("div")];
  place.replaceChildren(
    found instanceof Error ? problem(found) : body(found, again),
    found instanceof Error ? "" : h("section", {}, h("h2", {}, "Neighbours"), near),
    h("section", {}, h("h2", {}, "History"), past));
  await Promise.all([found instanceof Error || into(near, neighbours(id)), into(past, versions(id, again))]);
}

function body(found, again) {
  const { id, type, tags = [], content, metadata, ...rest } = found;
  const editor = h("div");
  return h("section", {},
    h("p", { class: "line" }, type && badge(type), tags.map((tag) => badge(tag, "tag"))),
    h("div", { class: "content" }, textOf(found)),
    h("details", {}, h("summary", {}, "Metadata and other fields"),
      h("pre", { tabindex: 0 }, JSON.stringify({ ...rest, metadata }, null, 2))),
    h("div", { class: "buttons" },
      h("button", { onclick: () => editing(editor, found, again) }, "Edit"),
      h("button", { class: "danger", onclick: () => into(editor, remove(found, again)) }, "Delete")),
    editor);
}

async function remove(found, again) {
  const sure = await confirmed("Delete this unit?", [h("p", {}, short(textOf(found), 300)),
    h("p", { class: "muted" }, "Its history is kept for some days, so it can be brought back.")], "Delete");
  if (sure) {
    await change("DELETE", unitPath(found.id));
    done(`Deleted ${found.id}.`, found.id, again);
  }
  return [];
}

/** Show the view again, and say what was done with a button to take it back. */
export function done(text, id, again) {
  again();
  say(text, () => undoLast(id).then(() => { say("Undone."); again(); }, (error) => say(error.message)));
}

function editing(editor, found, again) {
  const plain = found.content === undefined || typeof found.content === "string";
  const told = h("div");
  const made = form([
    { name: "content", label: plain ? "Content" : "Content, as JSON", type: "textarea",
      value: plain ? found.content ?? "" : JSON.stringify(found.content, null, 2) },
    { name: "type", label: "Type", value: found.type ?? "" },
    { name: "tags", label: "Tags, with commas between", value: (found.tags ?? []).join(", ") },
    { name: "metadata", label: "Metadata, as JSON", type: "textarea", value: JSON.stringify(found.metadata ?? {}, null, 2) },
  ], "Save", (given) => into(told, save(found, given, plain, again)),
  h("button", { type: "button", class: "plain", onclick: () => editor.replaceChildren() }, "Cancel"));
  editor.replaceChildren(made, told);
  made.elements.content.focus();
}

async function save(found, given, plain, again) {
  const wanted = {
    content: plain ? given.content : parsed("Content", given.content),
    type: given.type.trim() || null,
    tags: given.tags.split(",").map((tag) => tag.trim()).filter(Boolean),
    metadata: parsed("Metadata", given.metadata),
  };
  const changes = mergePatch(found, wanted);
  if (!Object.keys(changes).length) return h("p", { class: "muted" }, "Nothing was changed.");
  await change("PATCH", unitPath(found.id), changes);
  done(`Saved ${found.id}.`, found.id, again);
  return [];
}

function parsed(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is no JSON: ${error.message}`);
  }
}

/** Only what differs, so that a change that others made to other fields stays (RFC 7396). */
export function mergePatch(old, wanted) {
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const changes = {};
  for (const [name, value] of Object.entries(wanted)) {
    const before = old[name] ?? (Array.isArray(value) ? [] : isObject(value) ? {} : null);
    if (isObject(before) && isObject(value)) {
      const gone = Object.keys(before).filter((key) => !(key in value)).map((key) => [key, null]);
      const inner = { ...mergePatch(before, value), ...Object.fromEntries(gone) };
      if (Object.keys(inner).length) changes[name] = inner;
    } else if (JSON.stringify(before) !== JSON.stringify(value)) changes[name] = value;
  }
  return changes;
}

async function neighbours(id) {
  const found = await get("ui/api/neighbours", { id });
  return table("Nearest units", ["Cosine", "Id", "Type", "Content"], found.neighbours.map((one) => [
    number(one.cosine, 3), link(one.unit.id), one.unit.type && badge(one.unit.type), short(textOf(one.unit), 140)]));
}

async function versions(id, again) {
  const found = (await get(unitPath(id, "/history"))).versions.reverse();
  const told = h("div");
  const undo = (operation) => into(told, post("v1/undo", { operation }).then(() => { again(); say("Undone."); }));
  return [table("Versions, newest first", ["When", "Change", "Content", "Action"], found.map((one, i) => [
    moment(one.at), one.change, one.unit ? short(textOf(one.unit), 200) : "(deleted)",
    i === 0 && one.operation ? h("button", { class: "plain", onclick: () => undo(one.operation) }, "Undo this change") : ""])), told];
}
