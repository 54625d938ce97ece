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
    throw Object.assign(new Error(told.detail ?? `${answer.status} ${answer.statusText}`), { status: answer.status });
  }
  return raw ? answer.blob() : answer.json();
}

const space = (query) => ({ namespace: state.namespace, ...query });

export const get = (path, query = {}) => call("GET", path, { query: space(query) });
export const post = (path, body = {}) => call("POST", path, { body: { namespace: state.namespace, ...body } });
export const postWhole = (path, body) => call("POST", path, { body });
export const change = (method, path, body) => call(method, path, { query: space({}), body });
export const unitPath = (id, rest = "") => `v1/units/${encodeURIComponent(id)}${rest}`;

/** The operation that changed a unit last; null where the history does not keep it. */
export const lastOperation = (id) =>
  get(unitPath(id, "/history")).then(({ versions }) => versions.at(-1)?.operation ?? null, () => null);

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
