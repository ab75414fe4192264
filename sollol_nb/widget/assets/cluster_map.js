// The cluster map: problems with what fixes them, a card for each model, rows of workers and Ollama nodes, events.
//
// The model's `state` is plain data (see sollol_nb/cluster/data.py); what is drawn is its `cards`. Python sends it once;
// after that it sends JSON merge patches (RFC 7396) as custom messages, which are applied to the state here, once for
// all views. Objects that a patch does not touch stay the same objects, so a view redraws only what has changed.

const ALIVE_EVERY_MS = 20000;
const TIMES_EVERY_MS = 10000;
const MAX_WITHOUT_STRIP = 12; // more workers than this are also shown as a strip of marks

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

// --- models --------------------------------------------------------------------------------------

function layerBars(card) {
  const box = (segment, share, lines) => ({ share, color: segment.color, lines, title: segment.tooltip || segment.name });
  const planned = card.segments.map((segment) => box(segment, segment.share, [segment.layers, segment.worker]));
  const rows = [boxRow("planned", "layers", planned)];
  if (card.segments.some((segment) => segment.actual_share !== undefined)) {
    const actual = card.segments.map((segment) => box(segment, segment.actual_share || 0, [segment.units]));
    rows.push(boxRow("actual", "actual", actual));
  }
  if (card.segments.every((segment) => segment.time_share !== undefined)) {
    const time = card.segments.map((segment) => {
      return box(segment, segment.time_share, [`${Math.round(100 * segment.time_share)} %`]);
    });
    rows.push(boxRow("time", "time", time));
  }
  return element("div", { class: "sollol-bars" }, ...rows.flat());
}

function layerTable(segments) {
  const labels = { name: "Worker", layers: "Layers", units: "Units", weights: "Weights", kv: "KV cache", time: "Per token" };
  const shown = Object.keys(labels).filter((name) => segments.some((segment) => segment[name]));
  const heads = shown.map((name) => element("th", { role: "columnheader", scope: "col" }, labels[name]));
  const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads));
  const rows = segments.map((segment) => {
    const swatch = element("span", { class: "sollol-swatch", "aria-hidden": "true" });
    swatch.style.backgroundColor = segment.color;
    const cells = shown.map((name) => {
      if (name === "name") return element("th", { role: "rowheader", scope: "row", title: segment.tooltip }, swatch, segment.name);
      return element("td", { role: "cell", "data-label": labels[name] }, segment[name] || "");
    });
    return element("tr", { role: "row" }, ...cells);
  });
  const body = element("tbody", { role: "rowgroup" }, ...rows);
  return element("table", { class: "sollol-layers", role: "table", "aria-label": "layers by worker" }, head, body);
}

function modelCard(key, card) {
  const title = element("span", { class: "sollol-name", title: card.tooltip }, card.title);
  const section = element("section", { class: "sollol-card", "aria-label": card.title, "data-model": card.title });
  section.append(element("div", { class: "sollol-card-head" }, title, pill(card.pill)));
  section.append(figures(card.figures));
  if (card.note) section.append(element("div", { class: "sollol-faint" }, card.note));
  if (card.pill.text === "loading" || card.progress !== undefined) {
    const share = card.progress === undefined ? {} : { value: card.progress, max: 1 };
    section.append(element("progress", { "aria-label": `loading ${card.title}`, ...share }));
  }
  const segments = card.segments || [];
  if (segments.length) section.append(layerBars(card));
  const more = [];
  if (segments.length) more.push(layerTable(segments));
  for (const reason of card.why || []) more.push(element("div", { class: "sollol-why" }, described(reason)));
  if ((card.facts || []).length) {
    const facts = card.facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
    more.push(element("dl", { class: "sollol-facts" }, ...facts));
  }
  if (more.length) section.append(element("details", { class: "sollol-more" }, element("summary", {}, "Details"), ...more));
  return section;
}

function figures(texts) {
  const parts = (texts || []).map((text) => element("span", {}, text));
  return parts.length ? element("div", { class: "sollol-figures" }, ...parts) : "";
}

// --- workers and nodes ---------------------------------------------------------------------------

function row(key, entry, { name, ...cells }) {
  const head = element("th", { role: "rowheader", scope: "row" }, name);
  const others = Object.entries(cells).map(([kind, cell]) => element("td", { role: "cell", class: `sollol-${kind}` }, cell));
  const about = { role: "row", "data-endpoint": key, "data-state": entry.pill.text, class: `sollol-is-${entry.pill.role}` };
  return element("tr", about, head, ...others);
}

// What is loaded or who holds it, and further facts.
function use(main, title, facts) {
  const first = main ? element("span", { class: "sollol-strong", title: title }, main) : "";
  const text = facts.filter(Boolean).join(" · ");
  return element("span", { title: text || undefined }, first, first && text ? " · " : "", described(text));
}

function workerRow(key, worker, roundTrips) {
  const name = element("span", { title: worker.tooltip || worker.name }, worker.name);
  const last = worker.detail ? { detail: use(worker.held_by, undefined, [worker.detail]) } : { use: use(worker.held_by, undefined, []) };
  const trip = sparkline(roundTrips, worker.round_trip);
  return row(key, worker, { name, state: pill(worker.pill), memory: memoryBar(worker), trip, ...last });
}

function nodeRow(key, node, roundTrips) {
  const name = element("span", { title: key }, node.name);
  const detail = use((node.loaded || []).join(", "), node.tooltip, [...(node.figures || []), node.detail]);
  return row(key, node, { name, state: pill(node.pill), trip: sparkline(roundTrips, node.round_trip), detail });
}

// A table of rows. Columns without any content are left out.
class Table {
  constructor(parent, title, labels, draw) {
    this.summary = element("h2", { class: "sollol-heading" }, title);
    this.strip = element("div", { class: "sollol-strip" });
    this.body = element("tbody", { role: "rowgroup" });
    this.heads = labels.map((label) => element("th", { role: "columnheader", scope: "col" }, label));
    const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...this.heads));
    this.table = element("table", { role: "table", "aria-label": title }, head, this.body);
    this.table.classList.add("sollol-rows");
    this.folds = element("div");
    this.part = element("div", { class: "sollol-part" }, this.summary, this.strip, this.table, this.folds);
    parent.append(this.part);
    this.title = title;
    this.rows = new Rows(this.body, draw);
    this.drawRow = draw;
    this.folded = new Map();
  }

  draw(entries, summary, folds) {
    this.part.hidden = !entries.length;
    this.summary.replaceChildren(...headed(summary || this.title));
    const open = entries.filter(([, entry]) => !entry.fold);
    this.rows.draw(open);
    this.table.hidden = !open.length;
    this.drawFolds(entries, folds || {});
    this.strip.replaceChildren(...(entries.length > MAX_WITHOUT_STRIP ? entries.map(mark) : []));
    this.heads.forEach((_, index) => {
      const isEmpty = [...this.body.rows].every((each) => !each.cells[index].textContent);
      this.table.classList.toggle(`sollol-without-${index + 1}`, isEmpty);
    });
  }

  drawFolds(entries, folds) {
    for (const [key, text] of Object.entries(folds)) {
      let fold = this.folded.get(key);
      if (!fold) {
        const summary = element("summary");
        const body = element("tbody", { role: "rowgroup" });
        const table = element("table", { role: "table", "aria-label": text, class: "sollol-rows" }, body);
        const reached = { class: "sollol-scroll", tabindex: "0", role: "region", "aria-label": text };
        const details = element("details", { class: "sollol-fold" }, summary, element("div", reached, table));
        this.folds.append(details);
        fold = { details, summary, rows: new Rows(body, this.drawRow) };
        this.folded.set(key, fold);
      }
      const inside = entries.filter(([, entry]) => entry.fold === key);
      const roles = new Set(inside.map(([, entry]) => entry.pill.role));
      fold.summary.replaceChildren(...(roles.size === 1 ? [icon(roles.has("bad") ? "lost" : "info", ...roles)] : []), text);
      fold.rows.draw(inside);
    }
    for (const [key, { details }] of this.folded) {
      if (key in folds) continue;
      details.remove();
      this.folded.delete(key);
    }
  }
}

// "4 workers: 3 held, 1 down": what is counted is the heading.
function headed(text) {
  const [first, ...rest] = text.split(": ");
  return [first, rest.length ? element("span", { class: "sollol-faint" }, rest.join(": ")) : ""];
}

function mark([key, entry]) {
  const title = `${entry.name || key}: ${entry.pill.text}`;
  return element("span", { class: `sollol-mark sollol-is-${entry.pill.role}`, title });
}

// --- problems and events -------------------------------------------------------------------------

function eventLine(key, event) {
  const text = described(event.text);
  const count = event.count > 1 ? element("span", { class: "sollol-count" }, `×${event.count}`) : "";
  const line = [icon(event.icon, event.role), element("span", { class: "sollol-event-text" }, text, count && " ", count), timeOf(event.at)];
  const about = { "data-kind": event.kind, class: "sollol-event" };
  const messages = event.messages || [];
  if (messages.length < 2) return element("div", about, ...line);
  const each = messages.map((message) => element("div", {}, described(message)));
  return element("details", { ...about, class: `sollol-event sollol-event-${key}` }, element("summary", {}, ...line), ...each);
}

// --- the view ------------------------------------------------------------------------------------

class View {
  constructor(root, send) {
    this.root = root;
    this.send = send; // asks the kernel to fix something; undefined where there is none
    root.classList.add("sollol-cluster");
    const part = (title, name, more = {}) => {
      const body = element("div", more);
      const heading = title ? element("h2", { class: "sollol-heading" }, title) : "";
      const whole = element("div", { class: `sollol-part ${name}` }, heading, body);
      root.append(whole);
      return [whole, body];
    };
    [this.summaryPart, this.summary] = part("", "sollol-summary");
    const [problemPart, problems] = part("", "sollol-problems", { role: "list", "aria-label": "problems" });
    const [modelPart, models] = part("", "sollol-models");
    this.parts = { problems: problemPart, models: modelPart };
    this.problems = new Rows(problems, (key, problem) => this.problem(key, problem));
    this.models = new Rows(models, modelCard);
    this.workers = new Table(root, "Workers", ["Worker", "State", "Memory", "Round trip", "Used by"], workerRow);
    this.workers.part.classList.add("sollol-workers");
    this.nodes = new Table(root, "Ollama nodes", ["Ollama node", "State", "Round trip", "Loaded"], nodeRow);
    this.nodes.part.classList.add("sollol-nodes");
    [this.parts.invitations, this.invitations] = part("", "sollol-invitations");
    const log = { class: "sollol-log", role: "group", "aria-label": "events", tabindex: "0" };
    const [eventPart, events] = part("Events", "sollol-events", log);
    this.parts.events = eventPart;
    this.events = new Rows(events, eventLine);
    this.state = {};
  }

  draw(state) {
    const before = this.state;
    this.state = state;
    const { closed, unreachable } = state;
    const cards = state.cards || {};
    const old = before.cards || {};
    const isNew = (name) => cards[name] !== old[name];
    const reason = closed ? "the router was closed; this is its last state" : unreachable;
    this.summary.replaceChildren(...[cards.summary, reason].filter(Boolean).join(" · "));
    this.summaryPart.hidden = !cards.summary && !reason;
    this.summary.classList.toggle("sollol-bad", Boolean(unreachable) && !closed);
    for (const name of ["problems", "models", "events"]) {
      if (isNew(name)) this[name].draw(inOrder(cards[name]));
      this.parts[name].hidden = !Object.keys(cards[name] || {}).length;
    }
    if (isNew("workers") || isNew("folds") || state.workers !== before.workers) {
      this.workers.draw(withTrips(cards.workers, state.workers), cards.workers_summary, cards.folds);
    }
    if (isNew("nodes") || state.nodes !== before.nodes) {
      this.nodes.draw(withTrips(cards.nodes, state.nodes), cards.nodes_summary);
    }
    this.parts.invitations.hidden = !(cards.invitations || []).length;
    if (isNew("invitations")) {
      this.invitations.replaceChildren(...(cards.invitations || []).map((text) => element("div", {}, described(text))));
    }
  }

  problem(key, { text, command, action, role = "bad", details }) {
    const body = element("div", { class: "sollol-problem-text" }, element("span", {}, described(text)));
    const buttons = element("div", { class: "sollol-buttons" });
    if (action && this.send) {
      buttons.append(this.button(action.label, text, command.startsWith("%") ? command : "", { fix: key }, "sollol-main"));
      if (action.name === "replan") buttons.append(this.button("Compare", text, "", { compare: key }));
    }
    if (command && !(action && this.send && command.startsWith("%"))) { // else the button does it
      body.append(element("code", { class: "sollol-command" }, command));
      buttons.append(copyButton(command));
    }
    if (details) {
      const lines = details.map((line) => element("div", {}, described(line)));
      body.append(element("details", { class: "sollol-each" }, element("summary", {}, "Show each"), ...lines));
    }
    const sign = icon(role === "bad" ? "warning" : "info", role);
    return element("div", { class: `sollol-problem sollol-is-${role}`, role: "listitem" }, sign, body, buttons);
  }

  button(label, about, title, message, kind = "") {
    const said = { "aria-label": `${label}: ${about}`, title: title || undefined };
    const button = element("button", { type: "button", class: `sollol-button ${kind}`, ...said }, label);
    button.addEventListener("click", () => {
      button.disabled = true; // the state changes soon; if it does not, it can be tried again
      setTimeout(() => { button.disabled = false; }, 3000);
      this.send(message);
    });
    return button;
  }

  tellTimes() {
    for (const time of this.root.querySelectorAll("time")) tellTime(time);
  }
}

function withTrips(rows, entries) {
  return inOrder(rows).map(([key, entry]) => [key, entry, ((entries || {})[key] || {}).rtt]);
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
  const send = (message) => {
    try {
      model.send(message);
      return true;
    } catch {
      return false; // a saved notebook, without a kernel that could receive it
    }
  };
  const view = new View(el, model.get("can_fix") ? send : undefined);
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
    if (!send({ view: id, shown: isShown })) clearInterval(alive);
  };
  const alive = setInterval(() => report(true), ALIVE_EVERY_MS);
  const controls = completeControls(el);
  const times = setInterval(() => view.tellTimes(), TIMES_EVERY_MS);
  draw();
  model.on("change:state", scheduleDraw);
  report(true);
  return () => {
    clearInterval(alive);
    clearInterval(times);
    controls.disconnect();
    cancelAnimationFrame(scheduled);
    model.off("change:state", scheduleDraw);
    report(false);
  };
}

export default { initialize, render };
