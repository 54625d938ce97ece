// Backups, export, and how to restore.

import { get, postWhole, save } from "./api.js";
import { form, h, into, moment, say, size, table } from "./dom.js";
import { filterOf } from "./browse.js";

export async function backup(place) {
  const [list, told, exported] = [h("div"), h("div"), h("div")];
  const listed = () => into(list, get("v1/backups").then(({ backups }) =>
    table("Backups, newest first", ["Name", "When", "Size"], backups.map((one) => [one.name, moment(one.at), size(one.bytes)]))));
  const make = async ({ name }) => {
    const made = await postWhole("v1/backup", { name: name.trim() || null });
    say(`Made the backup ${made.name}, ${size(made.bytes)}.`);
    await listed();
  };
  place.replaceChildren(
    h("section", {}, h("h2", {}, "Backups"), h("p", { class: "muted" }, "One file as of one moment, in the server's folder of backups. The store stays in use."),
      form([{ name: "name", label: "Name", placeholder: "the time of now" }], "Make a backup", (given) => into(told, make(given))), told, list),
    h("section", {}, h("h2", {}, "Export"), h("p", { class: "muted" }, "The units of the namespace as JSON lines; import reads them again."),
      form([
        { name: "type", label: "Type", placeholder: "any" },
        { name: "filters", label: "More, as JSON", placeholder: '{"tags": "git"}' },
        { name: "vectors", label: "Vectors", options: [["", "without"], ["true", "with"]] },
      ], "Export", (given) => into(exported, download(given))), exported),
    h("section", {}, h("h2", {}, "Restore"),
      h("p", {}, "A restore replaces the whole store, so it is not done from here. Stop the server and every other process that has the store open, then:"),
      h("pre", { tabindex: 0 }, "memevolve-store restore BACKUPS/NAME.db --store PREFIX\nmemevolve-store check --store PREFIX\nmemevolve-store serve --store PREFIX"),
      h("p", {}, "It verifies the backup first and keeps the old store under another name. One unit that was deleted or changed by mistake is brought back by ",
        h("a", { href: "#/activity" }, "Undo"), ", without a restore.")));
  await listed();
}

async function download(given) {
  const filters = filterOf(given);
  await save("v1/export", { filters: filters && JSON.stringify(filters), vectors: given.vectors }, "memory.jsonl");
  return h("p", { role: "status" }, "The browser is saving memory.jsonl.");
}
