// The cluster map: layers of each coordinator as SVG, health of workers and Ollama nodes, requests, events.
//
// The model's `state` is plain data (see sollol_nb/cluster/data.py). Python sends it once; after that it sends JSON
// merge patches (RFC 7396) as custom messages, which are applied to the state here, once for all views. Objects that a
// patch does not touch stay the same objects, so a view redraws only the entries whose object has changed.

const SVG = "http://www.w3.org/2000/svg";
const ALIVE_EVERY_MS = 20000;
const MAX_IN_ORDER = 12; // with more workers, those with a problem come first
const HEALTHY = ["free", "held", "ready"];
const MARKS = { free: "○", held: "●", busy: "◐", ready: "○", cooling: "◐", connecting: "◐", installing: "◐", unknown: "?", absent: "–" };

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
  return Object.entries(entries || {}).sort(([, left], [, right]) => left.n - right.n);
}

// --- drawing helpers -----------------------------------------------------------------------------

function element(tag, attributes = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children.filter((child) => child !== undefined && child !== null));
  return created;
}

function shape(tag, attributes = {}, ...children) {
  const created = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

function percent(share) {
  return `${(100 * share).toFixed(3)}%`;
}

// The colour is set on the object: a strict Content-Security-Policy forbids it in an attribute.
function mark(entry, attributes = {}) {
  const created = element("span", { class: "sollol-mark", ...attributes }, MARKS[entry.state] || "✕");
  created.style.color = entry.color;
  return created;
}

function stateMark(entry) {
  return element("span", {}, mark(entry), ` ${entry.state}`);
}

// A worker of another machine has a name; its endpoint is only where it is reached on this machine.
function named(endpoint, name) {
  return name && name !== endpoint ? `${name} (${endpoint})` : endpoint;
}

function nameCell(endpoint, name, more = "") {
  return element("span", name && name !== endpoint ? { title: endpoint } : {}, `${name || endpoint}${more}`);
}

// --- one coordinator -----------------------------------------------------------------------------

// A row of boxes, each as wide as its share of the whole: {share, color, lines, title}.
function boxes(height, parts) {
  let left = 0;
  return parts.map(({ share, color, lines, title }) => {
    const box = shape("svg", { x: percent(left), y: 0, width: percent(share), height, class: "sollol-box" });
    left += share;
    box.append(shape("title", {}, title));
    box.append(shape("rect", { x: 0.5, y: 0.5, width: "100%", height: height - 1, fill: color }));
    lines.forEach((line, number) => {
      const kind = number ? { "data-keeps": "end" } : { class: "sollol-strong" };
      box.append(shape("text", { x: 6, y: 15 + 14 * number, "data-whole": line, ...kind }, line));
    });
    return box;
  });
}

// Shorten the labels in boxes to the width of their boxes. Addresses differ at their ends, so those are kept.
function fitLabels(root) {
  if (!root.clientWidth) return; // no layout yet; the ResizeObserver calls again
  for (const label of root.querySelectorAll(".sollol-box text")) {
    const width = label.parentNode.width.baseVal.value - 8;
    const { whole, keeps } = label.dataset;
    label.textContent = whole;
    let kept = Math.ceil((whole.length * width) / label.getComputedTextLength());
    while (label.textContent && label.getComputedTextLength() > width) {
      kept -= 1;
      label.textContent = kept < 2 ? "" : keeps === "end" ? `…${whole.slice(-kept)}` : `${whole.slice(0, kept)}…`;
    }
  }
}

function layerMap(coordinator) {
  const segments = inOrder(coordinator.segments);
  const units = segments.reduce((sum, [, segment]) => sum + segment.units, 0);
  const title = (endpoint, { name, layers, weights, kv, ms }) =>
    `${named(endpoint, name)}: layers ${layers}\nweights ${weights} (planned / actual)\nKV cache ${kv} (planned / actual)` +
    (ms === undefined ? "" : `\n${ms} ms of each token`);
  const ports = new Set(segments.map(([endpoint]) => endpoint.split(":").pop()));
  const short = (endpoint) => (ports.size === 1 && segments.length > 6 ? endpoint.replace(/:\d+$/, "") : endpoint);
  const planned = segments.map(([endpoint, segment]) => ({
    share: segment.units / units,
    color: segment.color,
    lines: [segment.layers, segment.name || short(endpoint)],
    title: title(endpoint, segment),
  }));
  const rows = [["planned", 36, planned]];
  if (segments.every(([, segment]) => segment.actual !== undefined)) {
    const actual = segments.map(([endpoint, segment]) => ({
      share: segment.actual / units,
      color: segment.color,
      lines: [`${segment.actual}`],
      title: `${named(endpoint, segment.name)}: the engine placed ${segment.actual} units here`,
    }));
    rows.push(["actual", 20, actual]);
  }
  if (segments.every(([, segment]) => segment.share !== undefined)) {
    const whole = segments.reduce((sum, [, segment]) => sum + segment.share, 0) || 1; // each share is rounded
    const time = segments.map(([endpoint, segment]) => ({
      share: segment.share / whole,
      color: segment.color,
      lines: [`${Math.round(100 * segment.share)} %`],
      title: `${named(endpoint, segment.name)}: ${segment.ms} ms of each token`,
    }));
    rows.push(["time", 20, time]);
  }
  const bars = element("div", { class: "sollol-bars", role: "img", "aria-label": `layers of ${coordinator.model}` });
  for (const [row, height, parts] of rows) {
    bars.append(
      element("span", { class: "sollol-faint" }, row),
      shape("svg", { width: "100%", height, class: `sollol-row-${row}` }, ...boxes(height, parts)),
    );
  }
  return bars;
}

function layerTable(coordinator) {
  const rows = inOrder(coordinator.segments).map(([endpoint, segment]) => [
    nameCell(endpoint, segment.name),
    segment.layers,
    `${segment.units} / ${segment.actual === undefined ? "?" : segment.actual}`,
    segment.weights,
    segment.kv,
    segment.ms === undefined ? "?" : `${segment.ms} ms (${Math.round(100 * segment.share)} %)`,
  ]);
  const labels = ["worker", "layers", "units", "weights", "KV cache", "share of token time"];
  const table = element("table", {}, headRow(labels), ...rows.map((row) => tableRow(row)));
  const note = "planned / actual; units are the model's blocks and its output layer";
  const opened = rows.length <= 4 ? { open: "" } : {};
  const summary = element("summary", {}, "Details");
  return element("details", { class: "sollol-layers", ...opened }, summary, element("div", { class: "sollol-faint" }, note), table);
}

function headRow(labels) {
  return element("tr", {}, ...labels.map((label) => element("th", {}, label)));
}

function tableRow(cells) {
  return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
}

// Why the layers are planned like this: the first reason, which opens to show the others.
function planReasons([first, ...others]) {
  if (!others.length) return element("div", { class: "sollol-why" }, "why: ", described(first));
  const lines = others.map((reason) => element("div", {}, described(reason)));
  return element("details", { class: "sollol-why" }, element("summary", {}, "why: ", described(first)), ...lines);
}

function coordinatorCard(coordinator) {
  const busy = `${coordinator.running}/${coordinator.slots} slots busy, ${coordinator.waiting} waiting`;
  const answer = coordinator.answer && `last answer: ${coordinator.answer}`;
  const { description, token_time: tokenTime, drafts, note } = coordinator;
  const facts = [description, coordinator.standby ? "" : busy, tokenTime, drafts, answer, note];
  const card = element(
    "section",
    { class: "sollol-card" },
    element("div", {}, element("b", { title: coordinator.path || "" }, coordinator.model), ` ${facts.filter(Boolean).join(" · ")}`),
  );
  if ((coordinator.reasons || []).length) card.append(planReasons(coordinator.reasons));
  if (coordinator.advice) card.append(element("div", {}, "⚠ ", described(coordinator.advice.text)));
  if (Object.keys(coordinator.segments || {}).length) card.append(layerMap(coordinator), layerTable(coordinator));
  const local = inOrder(coordinator.local).map(([, part]) => part.description);
  if (local.length) card.append(element("div", { class: "sollol-faint" }, local.join("; ")));
  for (const difference of coordinator.differences || []) {
    card.append(element("div", { class: "sollol-bad" }, `⚠ differs from the plan: ${difference}`));
  }
  return card;
}

function startingCard(model, starting) {
  const progress = starting.share === undefined ? {} : { value: starting.share, max: 1 };
  return element(
    "section",
    { class: "sollol-card" },
    element("div", {}, element("b", {}, model), ` ${starting.description}`),
    element("progress", progress),
  );
}

// --- workers and nodes ---------------------------------------------------------------------------

function sparkline(roundTrips) {
  const probes = Object.keys(roundTrips || {}).map(Number).sort((left, right) => left - right);
  if (!probes.length) return "";
  const times = probes.map((probe) => roundTrips[probe]);
  const longest = Math.max(...times);
  const step = 58 / Math.max(1, times.length - 1);
  const y = (ms) => 15 - (13 * ms) / (longest || 1);
  const points = times.map((ms, index) => `${(1 + index * step).toFixed(1)},${y(ms).toFixed(1)}`);
  const line = shape(
    "svg",
    { width: 60, height: 16, class: "sollol-spark" },
    shape("title", {}, `the last ${times.length} round trips, up to ${longest} ms`),
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

// Commands in a text are in backticks.
function described(text) {
  const parts = text.split("`");
  if (parts.length % 2 === 0) return text;
  return element("span", {}, ...parts.map((part, index) => (index % 2 ? element("code", {}, part) : part)));
}

function workerRow(endpoint, worker) {
  const name = nameCell(endpoint, worker.name, worker.local ? " (local)" : "");
  const lastError = worker.last_error && !["down", "lost"].includes(worker.state) ? `last error: ${worker.last_error}` : "";
  const details = [worker.description, worker.speed, lastError].filter(Boolean).join("; ");
  const protocol = worker.protocol || "";
  const cells = [name, stateMark(worker), sparkline(worker.rtt), memoryBar(worker), protocol, described(details)];
  const row = tableRow(cells);
  row.dataset.endpoint = endpoint;
  row.dataset.state = worker.state;
  return row;
}

function nodeRow(url, node) {
  const row = tableRow([url, stateMark(node), sparkline(node.rtt), node.description, node.answer || ""]);
  row.dataset.endpoint = url;
  row.dataset.state = node.state;
  return row;
}

// How many are in which state, and a mark for each, which shows even 64 of them in one line.
function overview(entries, singular, plural) {
  const counts = {};
  for (const [, entry] of entries) counts[entry.state] = (counts[entry.state] || 0) + 1;
  const states = Object.entries(counts).map(([state, count]) => `${count} ${state}`);
  const marks = entries.map(([name, entry]) => {
    return mark(entry, { title: `${entry.name || name}: ${entry.state}${entry.description ? `, ${entry.description}` : ""}` });
  });
  const total = `${entries.length} ${entries.length === 1 ? singular : plural}`;
  return element("div", {}, element("b", {}, total), `: ${states.join(", ")} `, ...marks);
}

function problemsFirst(entries) {
  const isHealthy = ([, entry]) => Number(HEALTHY.includes(entry.state));
  return [...entries].sort((left, right) => isHealthy(left) - isHealthy(right));
}

// --- the view ------------------------------------------------------------------------------------

// Keeps one element for each entry, in order, and creates a new one only for an entry that has changed.
class Rows {
  constructor(parent, create) {
    this.parent = parent;
    this.create = create;
    this.drawn = new Map();
  }

  draw(entries) {
    const before = this.drawn;
    this.drawn = new Map();
    for (const [key, entry] of entries) {
      const old = before.get(key);
      before.delete(key);
      if (old && old.entry === entry) {
        this.drawn.set(key, old);
        continue;
      }
      const row = this.create(key, entry);
      if (old) {
        keepFolded(old.row, row);
        old.row.replaceWith(row);
      }
      this.drawn.set(key, { entry, row });
    }
    for (const { row } of before.values()) row.remove();
    let previous = null;
    for (const { row } of this.drawn.values()) {
      const next = previous ? previous.nextSibling : this.parent.firstChild;
      if (row !== next) this.parent.insertBefore(row, next);
      previous = row;
    }
  }
}

function keepFolded(oldRow, newRow) {
  for (const after of newRow.querySelectorAll("details")) {
    const before = oldRow.querySelector(`details[class="${after.className}"]`);
    if (before) after.open = before.open;
  }
}

class View {
  constructor(root) {
    this.root = root;
    root.classList.add("sollol-cluster");
    const part = (...children) => {
      const created = element("div", { class: "sollol-part" }, ...children);
      root.append(created);
      return created;
    };
    const table = (labels) => {
      const body = element("tbody");
      const whole = element("table", {}, element("thead", {}, headRow(labels)), body);
      return [element("div", { class: "sollol-scroll" }, whole), body];
    };
    this.totals = part();
    this.coordinators = new Rows(part(), (_, entry) =>
      entry.model ? coordinatorCard(entry) : startingCard(entry.name, entry),
    );
    const [workers, workerBody] = table(["worker", "state", "round trip", "memory", "protocol", "details"]);
    workers.classList.add("sollol-worker-table");
    this.workerOverview = element("div");
    this.workerPart = part(this.workerOverview, workers);
    this.workers = new Rows(workerBody, workerRow);
    const [nodes, nodeBody] = table(["Ollama node", "state", "round trip", "details", "last answer"]);
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
    const { closed, unreachable } = state;
    if (totals !== before.totals || closed !== before.closed || unreachable !== before.unreachable) {
      const reason = closed ? "the router was closed; this is its last state" : unreachable;
      this.totals.title = "failed: ended in an error or at their time limit; stopped requests do not count";
      this.totals.replaceChildren(describeTotals(totals || {}) + (reason ? ` · ${reason}` : ""));
      this.totals.classList.toggle("sollol-bad", Boolean(unreachable) && !closed);
    }
    if (coordinators !== before.coordinators || starting !== before.starting) {
      const loading = Object.entries(starting || {}).map(([name, entry]) => [
        `starting ${name}`,
        this.named(name, entry),
      ]);
      const running = inOrder(coordinators);
      this.coordinators.draw([...loading, ...running]);
      fitLabels(this.root);
      this.coordinators.parent.dataset.empty = loading.length + running.length ? "" : "no coordinator is running";
    }
    if (workers !== before.workers) {
      const entries = inOrder(workers);
      this.workers.draw(entries.length > MAX_IN_ORDER ? problemsFirst(entries) : entries);
      this.workerOverview.replaceChildren(overview(entries, "worker", "workers"));
    }
    if (nodes !== before.nodes) {
      const entries = inOrder(nodes);
      this.nodePart.hidden = !entries.length;
      this.nodes.draw(entries);
      this.nodeOverview.replaceChildren(overview(entries, "Ollama node", "Ollama nodes"));
    }
    if (events !== before.events) {
      const newestFirst = Object.entries(events || {}).sort(([left], [right]) => Number(right) - Number(left));
      this.events.draw(newestFirst);
    }
  }

  // The entry of a starting model with its name added; the same object while the entry stays the same.
  named(name, entry) {
    const known = this.starting.get(name);
    if (known && known.entry === entry) return known.named;
    const named = { ...entry, name };
    this.starting.set(name, { entry, named });
    return named;
  }
}

function describeTotals(totals) {
  const { running = 0, waiting = 0, total = 0, failed = 0 } = totals;
  return `requests: ${running} running, ${waiting} waiting, ${total} total${failed ? `, ${failed} failed` : ""}`;
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
  let scheduled = 0;
  const draw = () => {
    scheduled = 0;
    view.draw(model.get("state") || {});
  };
  const scheduleDraw = () => {
    if (!scheduled) scheduled = requestAnimationFrame(draw);
  };
  const report = (isShown) => {
    try {
      model.send({ view: id, shown: isShown });
    } catch {
      clearInterval(alive); // a saved notebook, without a kernel that could receive it
    }
  };
  const alive = setInterval(() => report(true), ALIVE_EVERY_MS);
  const resized = new ResizeObserver(() => fitLabels(el));
  resized.observe(el);
  draw();
  model.on("change:state", scheduleDraw);
  report(true);
  return () => {
    clearInterval(alive);
    cancelAnimationFrame(scheduled);
    resized.disconnect();
    model.off("change:state", scheduleDraw);
    report(false);
  };
}

export default { initialize, render };
