// A sample of the memory on a plane. Points are reached by the mouse and by the arrow keys.

import { get } from "./api.js";
import { form, h, into, kindOf, link, number, percent, svg } from "./dom.js";

const COLOURS = 10;

export async function map(place) {
  const drawn = h("div");
  const run = (given) => into(drawn, get("ui/api/map", { count: given.count, clusters: given.clusters }).then((found) => draw(found, given.colour)));
  place.replaceChildren(
    form([
      { name: "colour", label: "Colour by", options: [["cluster", "cluster"], ["type", "type"]], value: "cluster" },
      { name: "clusters", label: "Clusters", type: "number", min: 1, max: 10, value: "6" },
      { name: "count", label: "Most units", type: "number", min: 10, max: 3000, value: "1000" },
    ], "Draw", run),
    drawn);
  await run({ colour: "cluster", clusters: 6, count: 1000 });
}

function draw({ points, clusters, shown, total }, colour) {
  if (!points.length) return h("p", { class: "muted" }, "There are no units yet.");
  const groups = colour === "type" ? byType(points)
    : clusters.map((one, i) => ({ name: one.words.join(", ") || `cluster ${i + 1}`, size: one.size, holds: (point) => point.cluster === i }));
  const group = (point) => groups.findIndex((one) => one.holds(point)) % COLOURS;
  const about = h("div", { class: "card about", "aria-live": "polite" }, h("p", { class: "muted" }, "Choose a point: click, or focus the map and use the arrow keys; Enter opens the unit."));
  const marks = points.map((point) => svg("circle", { cx: point.x * 100, cy: -point.y * 100, r: 1.6, class: `dot c${group(point)}` }));
  let chosen = null;
  const choose = (i) => {
    if (chosen !== null) marks[chosen].classList.remove("chosen");
    chosen = i;
    marks[i].classList.add("chosen");
    marks[i].parentNode.append(marks[i]);
    const point = points[i];
    about.replaceChildren(h("p", { class: "line" }, link(point.id), kindOf(point)), h("p", {}, point.text),
      h("p", { class: "muted" }, `cluster: ${clusters[point.cluster].words.join(", ")}`));
  };
  const plane = svg("svg", { viewBox: "-104 -104 208 208", tabindex: 0, role: "application", "aria-label": `Map of ${points.length} units. Arrow keys choose a unit, Enter opens it.` }, svg("g", {}, marks));
  marks.forEach((mark, i) => mark.addEventListener("click", () => choose(i)));
  plane.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (event.key === "Enter" && chosen !== null) location.hash = `#/unit?id=${encodeURIComponent(points[chosen].id)}`;
    if (!way) return;
    event.preventDefault();
    choose(chosen === null ? 0 : next(points, chosen, way));
  });
  const legend = h("ul", { class: "legend" }, groups.map((one, i) =>
    h("li", {}, svg("svg", { viewBox: "-2 -2 4 4", class: "swatch", "aria-hidden": "true" }, svg("circle", { r: 1.8, class: `dot c${i % COLOURS}` })), ` ${one.name} (${number(one.size)})`)));
  return [h("div", { class: "plot" }, plane, h("div", {}, about, legend)),
    h("p", { class: "muted" }, `${number(points.length)} of ${number(total)} units, by the two directions in which they differ most; the plane shows ${percent(shown)} of the variance.`)];
}

function byType(points) {
  const sizes = new Map();
  for (const point of points) sizes.set(point.type, (sizes.get(point.type) ?? 0) + 1);
  return [...sizes].sort((a, b) => b[1] - a[1]).map(([type, size]) => ({ name: type ?? "no type", size, holds: (point) => point.type === type }));
}

/** The nearest point that lies mostly in that direction; the same point where there is none. */
function next(points, from, [dx, dy]) {
  let [best, least] = [from, Infinity];
  points.forEach((point, i) => {
    const [x, y] = [point.x - points[from].x, point.y - points[from].y];
    const along = x * dx + y * dy;
    const across = Math.abs(x * dy - y * dx);
    if (i !== from && along > 0 && across <= along && along + across < least) [best, least] = [i, along + across];
  });
  return best;
}
