// The cluster map: layers of each coordinator as SVG, health of workers and Ollama nodes, requests, events.
//
// The model's `state` is plain data (see sollol_nb/cluster/data.py). Python sends it once; after that custom
// messages bring JSON merge patches (RFC 7396), which are applied to the state here, once for all views. A patch
// leaves what it does not touch as the same object, so a view redraws only what is not the same object any more.

const SVG = "http://www.w3.org/2000/svg";
const ALIVE_EVERY_MS = 20000;
const MOST_IN_ORDER = 12; // of more workers, those that are not well come first
const WELL = ["free", "held", "ready"];
const MARKS = { free: "○", held: "●", busy: "◐", ready: "○", cooling: "◐", unknown: "?", absent: "–" };

// --- state ---------------------------------------------------------------------------------------

export function patched(state, patch) {
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const after = { ...state };
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete after[key];
    else after[key] = isObject(value) ? patched(isObject(after[key]) ? after[key] : {}, value) : value;
  }
  return after;
}

function inOrder(entries) {
  return Object.entries(entries || {}).sort(([, one], [, other]) => one.n - other.n);
}

// --- drawing helpers -----------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function percent(part) {
  return `${(100 * part).toFixed(3)}%`;
}

function stateMark(node) {
  const mark = element("span", { class: "sollol-mark", style: `color: ${node.color}` }, MARKS[node.state] || "✕");
  return element("span", {}, mark, ` ${node.state}`);
}

// --- one coordinator -----------------------------------------------------------------------------

// A row of boxes, each a part of the whole: {part, color, lines, title}.
function boxes(y, height, parts) {
  let at = 0;
  return parts.map(({ part, color, lines, title }) => {
    const box = shape("svg", { x: percent(at), y, width: percent(part), height, class: "sollol-box" });
    at += part;
    box.append(shape("title", {}, title));
    box.append(shape("rect", { x: 0.5, y: 0.5, width: "100%", height: height - 1, fill: color }));
    lines.forEach((line, number) => {
      const kind = number ? { "data-keeps": "end" } : { class: "sollol-strong" };
      box.append(shape("text", { x: 6, y: 15 + 14 * number, "data-whole": line, ...kind }, line));
    });
    return box;
  });
}

// Shorten the words in boxes to what their boxes' width holds. Addresses differ at their ends, so these stay.
function fitWords(root) {
  if (!root.clientWidth) return; // not laid out yet; the ResizeObserver tells when it is
  for (const words of root.querySelectorAll(".sollol-box text")) {
    const room = words.parentNode.width.baseVal.value - 8;
    const { whole, keeps } = words.dataset;
    words.textContent = whole;
    let kept = Math.ceil((whole.length * room) / words.getComputedTextLength());
    while (words.textContent && words.getComputedTextLength() > room) {
      kept -= 1;
      words.textContent = kept < 2 ? "" : keeps === "end" ? `…${whole.slice(-kept)}` : `${whole.slice(0, kept)}…`;
    }
  }
}

function layerMap(coordinator) {
  const segments = inOrder(coordinator.segments);
  const units = segments.reduce((sum, [, one]) => sum + one.units, 0);
  const title = (place, one) =>
    `${place}: layers ${one.layers}\nweights ${one.weights} (planned / actual)\nKV cache ${one.kv} (planned / actual)` +
    (one.ms === undefined ? "" : `\n${one.ms} ms of each token`);
  const ports = new Set(segments.map(([place]) => place.split(":").pop()));
  const name = (place) => (ports.size === 1 && segments.length > 6 ? place.replace(/:\d+$/, "") : place);
  const planned = segments.map(([place, one]) => ({
    part: one.units / units,
    color: one.color,
    lines: [one.layers, name(place)],
    title: title(place, one),
  }));
  const rows = [["planned", 36, planned]];
  if (segments.every(([, one]) => one.actual !== undefined)) {
    const actual = segments.map(([place, one]) => ({
      part: one.actual / units,
      color: one.color,
      lines: [`${one.actual}`],
      title: `${place}: the engine placed ${one.actual} units here`,
    }));
    rows.push(["placed", 20, actual]);
  }
  if (segments.every(([, one]) => one.part !== undefined)) {
    const whole = segments.reduce((sum, [, one]) => sum + one.part, 0) || 1; // each is rounded
    const time = segments.map(([place, one]) => ({
      part: one.part / whole,
      color: one.color,
      lines: [`${Math.round(100 * one.part)} %`],
      title: `${place}: ${one.ms} ms of each token`,
    }));
    rows.push(["time", 20, time]);
  }
  const bars = element("div", { class: "sollol-bars", role: "img", "aria-label": `layers of ${coordinator.model}` });
  for (const [name, height, parts] of rows) {
    bars.append(
      element("span", { class: "sollol-faint" }, name),
      shape("svg", { width: "100%", height, class: `sollol-row-${name}` }, ...boxes(0, height, parts)),
    );
  }
  return bars;
}

function layerTable(coordinator) {
  const rows = inOrder(coordinator.segments).map(([place, one]) => [
    place,
    one.layers,
    `${one.units} / ${one.actual === undefined ? "?" : one.actual}`,
    one.weights,
    one.kv,
    one.ms === undefined ? "?" : `${one.ms} ms (${Math.round(100 * one.part)} %)`,
  ]);
  const heads = ["worker", "layers", "units", "weights", "KV cache", "of a token"];
  const table = element("table", {}, headRow(heads), ...rows.map((row) => tableRow(row)));
  const note = element("div", { class: "sollol-faint" }, "planned / actual");
  const opened = rows.length <= 4 ? { open: "" } : {};
  return element("details", opened, element("summary", {}, "figures"), note, table);
}

function headRow(words) {
  return element("tr", {}, ...words.map((word) => element("th", {}, word)));
}

function tableRow(cells) {
  return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
}

function coordinatorCard(coordinator) {
  const busy = `${coordinator.running}/${coordinator.slots} running, ${coordinator.waiting} waiting`;
  const answer = coordinator.answer && `last answer: ${coordinator.answer}`;
  const facts = [coordinator.words, busy, coordinator.time, answer, coordinator.note];
  const card = element(
    "section",
    { class: "sollol-card" },
    element("div", {}, element("b", {}, coordinator.model), ` ${facts.filter(Boolean).join(" · ")}`),
  );
  if (Object.keys(coordinator.segments || {}).length) card.append(layerMap(coordinator), layerTable(coordinator));
  const local = inOrder(coordinator.local).map(([, one]) => one.words);
  if (local.length) card.append(element("div", { class: "sollol-faint" }, local.join("; ")));
  for (const difference of coordinator.differences || []) {
    card.append(element("div", { class: "sollol-bad" }, `⚠ differs from the plan: ${difference}`));
  }
  return card;
}

function startingCard(model, starting) {
  const known = starting.share === undefined ? {} : { value: starting.share, max: 1 };
  return element(
    "section",
    { class: "sollol-card" },
    element("div", {}, element("b", {}, model), ` ${starting.words}`),
    element("progress", known),
  );
}

// --- workers and nodes ---------------------------------------------------------------------------

function sparkline(roundTrips) {
  const looks = Object.keys(roundTrips || {}).map(Number).sort((one, other) => one - other);
  if (!looks.length) return "";
  const times = looks.map((look) => roundTrips[look]);
  const most = Math.max(...times);
  const step = 58 / Math.max(1, times.length - 1);
  const points = times.map((ms, at) => `${(1 + at * step).toFixed(1)},${(15 - (13 * ms) / (most || 1)).toFixed(1)}`);
  const line = shape(
    "svg",
    { width: 60, height: 16, class: "sollol-spark" },
    shape("title", {}, `round trips of the last looks, up to ${most} ms`),
    shape("polyline", { points: points.join(" ") }),
  );
  return element("span", {}, line, ` ${times[times.length - 1]} ms`);
}

function memoryBar(worker) {
  if (worker.used === undefined) return "";
  const bar = shape(
    "svg",
    { width: 60, height: 10, class: "sollol-memory" },
    shape("rect", { x: 0.5, y: 0.5, width: 59, height: 9, class: "sollol-all" }),
    shape("rect", { x: 1, y: 1, width: (58 * worker.used).toFixed(1), height: 8, class: "sollol-used" }),
  );
  return element("span", {}, bar, ` ${worker.free} free of ${worker.total}`);
}

function workerRow(endpoint, worker) {
  const name = `${endpoint}${worker.local ? " (local)" : ""}`;
  const lost = worker.last_error && worker.state !== "down" ? `last: ${worker.last_error}` : "";
  const words = [worker.words, lost].filter(Boolean).join("; ");
  const protocol = worker.protocol || "";
  const cells = [name, stateMark(worker), sparkline(worker.rtt), memoryBar(worker), protocol, words];
  const row = tableRow(cells);
  row.dataset.endpoint = endpoint;
  row.dataset.state = worker.state;
  return row;
}

function nodeRow(url, node) {
  const row = tableRow([url, stateMark(node), sparkline(node.rtt), node.words, node.answer || ""]);
  row.dataset.endpoint = url;
  row.dataset.state = node.state;
  return row;
}

// How many are in which state, and one mark for each: all of 64 at a glance.
function overview(entries, one, many) {
  const counts = {};
  for (const [, entry] of entries) counts[entry.state] = (counts[entry.state] || 0) + 1;
  const words = Object.entries(counts).map(([state, count]) => `${count} ${state}`);
  const marks = entries.map(([name, entry]) => {
    const title = `${name}: ${entry.state}${entry.words ? `, ${entry.words}` : ""}`;
    return element("span", { class: "sollol-mark", style: `color: ${entry.color}`, title }, MARKS[entry.state] || "✕");
  });
  const total = `${entries.length} ${entries.length === 1 ? one : many}`;
  return element("div", {}, element("b", {}, total), `: ${words.join(", ")} `, ...marks);
}

function unwellFirst(entries) {
  const isWell = ([, entry]) => Number(WELL.includes(entry.state));
  return [...entries].sort((one, other) => isWell(one) - isWell(other));
}

// --- the view ------------------------------------------------------------------------------------

// Keeps one element for each entry, in order, and makes those anew whose entry has changed.
class Rows {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.drawn = new Map();
  }

  draw(entries) {
    const before = this.drawn;
    this.drawn = new Map();
    for (const [key, entry] of entries) {
      const known = before.get(key);
      before.delete(key);
      if (known && known.entry === entry) {
        this.drawn.set(key, known);
        continue;
      }
      const made = this.make(key, entry);
      if (known) {
        keepOpened(known.made, made);
        known.made.replaceWith(made);
      }
      this.drawn.set(key, { entry, made });
    }
    for (const { made } of before.values()) made.remove();
    let previous = null;
    for (const { made } of this.drawn.values()) {
      const wanted = previous ? previous.nextSibling : this.parent.firstChild;
      if (made !== wanted) this.parent.insertBefore(made, wanted);
      previous = made;
    }
  }
}

function keepOpened(before, after) {
  const old = before.querySelector("details");
  const made = after.querySelector("details");
  if (old && made) made.open = old.open;
}

class View {
  constructor(root) {
    this.root = root;
    root.classList.add("sollol-cluster");
    const part = (...children) => {
      const made = element("div", { class: "sollol-part" }, ...children);
      root.append(made);
      return made;
    };
    const table = (heads) => {
      const body = element("tbody");
      const whole = element("table", {}, element("thead", {}, headRow(heads)), body);
      return [element("div", { class: "sollol-scroll" }, whole), body];
    };
    this.totals = part();
    this.coordinators = new Rows(part(), (_, one) => (one.model ? coordinatorCard(one) : startingCard(one.name, one)));
    const [workers, workerBody] = table(["worker", "state", "round trip", "memory", "protocol", "about"]);
    this.workerOverview = element("div");
    this.workerPart = part(this.workerOverview, workers);
    this.workers = new Rows(workerBody, workerRow);
    const [nodes, nodeBody] = table(["Ollama node", "state", "round trip", "about", "last answer"]);
    this.nodeOverview = element("div");
    this.nodePart = part(this.nodeOverview, nodes);
    this.nodes = new Rows(nodeBody, nodeRow);
    const log = element("div", { class: "sollol-log", role: "log" });
    part(element("b", {}, "events"), log);
    this.events = new Rows(log, (_, event) => {
      const at = element("span", { class: "sollol-faint" }, event.at);
      return element("div", { "data-kind": event.kind }, at, ` ${event.message}`);
    });
    this.state = {};
    this.starting = new Map();
  }

  draw(state) {
    const before = this.state;
    this.state = state;
    const { totals, coordinators, starting, workers, nodes, events } = state;
    if (totals !== before.totals || state.closed !== before.closed) {
      const closed = state.closed ? " · the router was closed; this is its last state" : "";
      this.totals.replaceChildren(totalsWords(totals || {}) + closed);
    }
    if (coordinators !== before.coordinators || starting !== before.starting) {
      const loading = Object.entries(starting || {}).map(([name, one]) => [`starting ${name}`, this.named(name, one)]);
      const running = inOrder(coordinators);
      this.coordinators.draw([...loading, ...running]);
      fitWords(this.root);
      this.coordinators.parent.dataset.empty = loading.length + running.length ? "" : "no coordinator is running";
    }
    if (workers !== before.workers) {
      const entries = inOrder(workers);
      this.workers.draw(entries.length > MOST_IN_ORDER ? unwellFirst(entries) : entries);
      this.workerOverview.replaceChildren(overview(entries, "worker", "workers"));
    }
    if (nodes !== before.nodes) {
      const entries = inOrder(nodes);
      this.nodePart.hidden = !entries.length;
      this.nodes.draw(entries);
      this.nodeOverview.replaceChildren(overview(entries, "Ollama node", "Ollama nodes"));
    }
    if (events !== before.events) {
      const newestFirst = Object.entries(events || {}).sort(([one], [other]) => Number(other) - Number(one));
      this.events.draw(newestFirst);
    }
  }

  // A starting model with its name; the same object as long as nothing has changed.
  named(name, one) {
    const known = this.starting.get(name);
    if (known && known.of === one) return known.entry;
    const entry = { ...one, name };
    this.starting.set(name, { of: one, entry });
    return entry;
  }
}

function totalsWords(totals) {
  const { running = 0, waiting = 0, asked = 0, failed = 0 } = totals;
  return `requests: ${running} running, ${waiting} waiting, ${asked} asked${failed ? `, ${failed} failed` : ""}`;
}

// --- anywidget -----------------------------------------------------------------------------------

function initialize({ model }) {
  const onMessage = (message) => {
    if (message && message.patch) model.set("state", patched(model.get("state") || {}, message.patch));
  };
  model.on("msg:custom", onMessage);
  return () => model.off("msg:custom", onMessage);
}

function render({ model, el }) {
  const view = new View(el);
  const id = crypto.randomUUID ? crypto.randomUUID() : `${Math.random()}`;
  let waiting = 0;
  const draw = () => {
    waiting = 0;
    view.draw(model.get("state") || {});
  };
  const drawSoon = () => {
    if (!waiting) waiting = requestAnimationFrame(draw);
  };
  // Without a kernel (a saved notebook) there is nobody to tell.
  const tell = (isHere) => {
    try {
      model.send({ view: id, here: isHere });
    } catch {
      clearInterval(alive);
    }
  };
  const alive = setInterval(() => tell(true), ALIVE_EVERY_MS);
  const resized = new ResizeObserver(() => fitWords(el));
  resized.observe(el);
  draw();
  model.on("change:state", drawSoon);
  tell(true);
  return () => {
    clearInterval(alive);
    cancelAnimationFrame(waiting);
    resized.disconnect();
    model.off("change:state", drawSoon);
    tell(false);
  };
}

export default { initialize, render };
