// Calls of the REST routes. The key is kept for this tab only; the namespace goes with every call that takes one.

const ROOT = new URL("../", import.meta.url);
const KEY = "memevolve-key";

export const state = { namespace: "", askKey: async () => null };

/** Call a route; asks for a key once where the server wants one. Throws an Error with the server's explanation. */
async function call(method, path, { query = {}, body, raw = false } = {}) {
  const address = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") address.searchParams.append(name, one);
  }
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(address, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) })
    .catch(() => { throw new Error("The server does not answer. Is it still running?"); });
  if (answer.status === 401) {
    const given = await state.askKey(Boolean(key));
    if (given === null) throw new Error("This server needs a key; reload the page to enter one.");
    sessionStorage.setItem(KEY, given);
    return call(method, path, { query, body, raw });
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.detail ?? `${answer.status} ${answer.statusText}`);
  }
  return raw ? answer.blob() : answer.json();
}

const space = (query) => ({ namespace: state.namespace, ...query });

export const get = (path, query = {}) => call("GET", path, { query: space(query) });
export const post = (path, body = {}) => call("POST", path, { body: { namespace: state.namespace, ...body } });
export const postWhole = (path, body) => call("POST", path, { body });
export const change = (method, path, body) => call(method, path, { query: space({}), body });
export const unitPath = (id, rest = "") => `v1/units/${encodeURIComponent(id)}${rest}`;

/** Take back the operation that changed a unit last. */
export async function undoLast(id) {
  const { versions } = await get(unitPath(id, "/history"));
  const operation = versions.at(-1)?.operation;
  if (!operation) throw new Error(`The history of ${id} is no longer kept, so this cannot be undone.`);
  return post("v1/undo", { operation });
}

/** Save what a route answers as a file. Without a key the browser streams it; else it passes through memory. */
export async function save(path, query, name) {
  const address = new URL(path, ROOT);
  for (const [key, value] of Object.entries(space(query))) if (value) address.searchParams.set(key, value);
  const held = sessionStorage.getItem(KEY) ? URL.createObjectURL(await call("GET", path, { query: space(query), raw: true })) : null;
  const anchor = document.createElement("a");
  anchor.href = held ?? address;
  anchor.download = name;
  anchor.click();
  if (held) setTimeout(() => URL.revokeObjectURL(held), 60_000);
}
