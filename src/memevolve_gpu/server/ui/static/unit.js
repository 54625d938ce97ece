// One unit: content, history, neighbours; edit, delete, undo.

import { change, get, lastOperation, post, unitPath } from "./api.js";
import { badge, confirmed, form, h, into, kindOf, link, markedNew, moment, number, problem, say, short, table, tagsOf, textOf, values } from "./dom.js";

export async function unit(place, { id }, again) {
  const found = await get(unitPath(id)).catch((error) => error);
  const [near, past] = [h("div"), h("div")];
  place.replaceChildren(
    found.status === 404 ? h("p", { class: "muted", role: "alert" }, "There is no such unit here now. What is known of it is below.")
      : found instanceof Error ? problem(found) : body(found, again),
    found instanceof Error ? "" : h("section", {}, h("h2", {}, "Neighbours"), near),
    h("section", {}, h("h2", {}, "History"), past));
  await Promise.all([found instanceof Error || into(near, neighbours(id)), into(past, versions(id, again))]);
}

function body(found, again) {
  const { id, type, tags = [], content, metadata, ...rest } = found;
  const editor = h("div");
  return h("section", {},
    h("p", { class: "line" }, kindOf(found), tagsOf(found).map((tag) => badge(tag, "tag"))),
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
    await done(`Deleted ${found.id}.`, found.id, again);
  }
  return [];
}

/** Show the view again, and say what was done with a button to take it back. */
export async function done(text, id, again) {
  const operation = await lastOperation(id);
  const undo = () => post("v1/undo", { operation }).then(() => { say("Undone."); again(); }, (error) => say(error.message));
  again();
  say(text, operation && undo);
}

function editing(editor, found, again) {
  const structured = found.content !== undefined && typeof found.content !== "string";
  const told = h("div");
  const made = form([
    { name: "content", label: structured ? "Content, as JSON" : "Content", type: "textarea", 
      value: structured ? JSON.stringify(found.content, null, 2) : found.content ?? "" },
    { name: "type", label: "Type", value: String(found.type ?? "") },
    { name: "tags", label: "Tags, with commas between", value: tagsOf(found).join(", ") },
    { name: "metadata", label: "Metadata, as JSON", type: "textarea", value: JSON.stringify(found.metadata ?? {}, null, 2) },
  ], "Save", (given) => into(told, save(found, given, shown, structured, again)),
  h("button", { type: "button", class: "plain", onclick: () => editor.replaceChildren() }, "Cancel"));
  const shown = values(made);
  editor.replaceChildren(made, told);
  made.elements.content.focus();
}

/** Send the fields that were changed, and of the metadata only what differs: what others changed meanwhile stays. */
async function save(found, given, shown, structured, again) {
  const read = {
    content: (text) => (structured ? parsed("Content", text) : text),
    type: (text) => text.trim() || null,
    tags: (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean),
    metadata: (text) => mergePatch(found.metadata ?? {}, parsed("Metadata", text)),
  };
  const changed = Object.keys(read).filter((name) => given[name] !== shown[name]);
  if (!changed.length) return h("p", { class: "muted" }, "Nothing was changed.");
  await change("PATCH", unitPath(found.id), Object.fromEntries(changed.map((name) => [name, read[name](given[name])])));
  await done(`Saved ${found.id}.`, found.id, again);
  return [];
}

function parsed(name, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is no JSON: ${error.message}`);
  }
}

/** The JSON merge patch (RFC 7396) that makes one object of another. */
function mergePatch(old, wanted) {
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  if (!isObject(old) || !isObject(wanted)) return wanted;
  const gone = Object.keys(old).filter((name) => !(name in wanted)).map((name) => [name, null]);
  const different = Object.keys(wanted).filter((name) => JSON.stringify(old[name]) !== JSON.stringify(wanted[name]));
  return Object.fromEntries([...gone, ...different.map((name) => [name, mergePatch(old[name], wanted[name])])]);
}

async function neighbours(id) {
  const found = await get("ui/api/neighbours", { id });
  return table("Nearest units", ["Cosine", "Id", "Type", "Content"], found.neighbours.map((one) => [
    number(one.cosine, 3), link(one.unit.id), kindOf(one.unit), short(textOf(one.unit), 140)]));
}

const versionText = (now, before) =>
  before ? markedNew(short(textOf(now), 400), textOf(before)) : short(textOf(now), 400);

async function versions(id, again) {
  const found = (await get(unitPath(id, "/history"))).versions.reverse();
  const told = h("div");
  const undo = (operation) => into(told, post("v1/undo", { operation }).then(() => { again(); say("Undone."); }));
  return [table("Versions, newest first", ["When", "Change", "Content", "Action"], found.map((one, i) => [
    moment(one.at), one.change, one.unit ? versionText(one.unit, found[i + 1]?.unit) : "(deleted)",
    i === 0 && one.operation ? h("button", { class: "plain", onclick: () => undo(one.operation) }, "Undo this change") : ""])), told];
}
