// What the cluster map is made of: pills, bars, sparklines, icons and rows. All text is set as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  added: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13Zm.7 3.3v2.5h2.5v1.4H8.7v2.5H7.3V8.7H4.8V7.3h2.5V4.8Z",
  removed: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13ZM4.8 7.3h6.4v1.4H4.8Z",
  ready: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13Zm3 4.6-3.7 4.4-2.4-2.2.9-1 1.4 1.3 2.8-3.3Z",
  warning: "M8 1.2.8 14h14.4Zm-.7 4.6h1.4v4H7.3Zm0 5.2h1.4v1.4H7.3Z",
  changed: "M8 2a6 6 0 0 1 6 6h-1.6A4.4 4.4 0 0 0 8 3.6V2ZM2 8a6 6 0 0 0 6 6v-1.6A4.4 4.4 0 0 1 3.6 8Z",
  lost: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13Zm2.1 3.4 1 1L9 8l2.1 2.1-1 1L8 9l-2.1 2.1-1-1L7 8 4.9 5.9l1-1L8 7Z",
  loading: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13Zm.7 3v4.2l-3 2.3-.9-1.1 2.5-1.9V4.5Z",
  info: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13ZM7.3 4.3h1.4v1.5H7.3Zm0 2.7h1.4v4.7H7.3Z",
};

function element(tag, attributes = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) created.setAttribute(name, value);
  created.append(...children.filter((child) => child !== undefined && child !== null && child !== ""));
  return created;
}

function shape(tag, attributes = {}, ...children) {
  const created = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

function icon(name, role) {
  const path = shape("path", { d: ICONS[name] || ICONS.info });
  return shape("svg", { class: `sollol-icon sollol-is-${role}`, viewBox: "0 0 16 16", "aria-hidden": "true" }, path);
}

function pill({ text, role }) {
  return element("span", { class: `sollol-pill sollol-is-${role}` }, text);
}

// Commands in a text are in backticks.
function described(text) {
  const parts = text.split("`");
  if (parts.length % 2 === 0) return text;
  return element("span", {}, ...parts.map((part, index) => (index % 2 ? element("code", {}, part) : part)));
}

function copyButton(text) {
  const button = element("button", { type: "button", class: "sollol-button", "aria-label": `Copy ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await toClipboard(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it, then Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return button;
}

// --- figures ---------------------------------------------------------------------------------------

// The last round trips by number of the probe, and the newest one as text.
function sparkline(roundTrips, text) {
  const probes = Object.keys(roundTrips || {}).map(Number).sort((left, right) => left - right);
  if (!probes.length) return text || "";
  const times = probes.map((probe) => roundTrips[probe]);
  const longest = Math.max(...times);
  const step = 46 / Math.max(1, times.length - 1);
  const y = (ms) => 14 - (12 * ms) / (longest || 1);
  const points = times.map((ms, index) => `${(1 + index * step).toFixed(1)},${y(ms).toFixed(1)}`);
  const label = `the last ${times.length} round trips, up to ${longest} ms`;
  const parts = [shape("title", {}, label), shape("polyline", { points: points.join(" ") })];
  const line = shape("svg", { viewBox: "0 0 48 16", class: "sollol-spark", role: "img", "aria-label": label }, ...parts);
  const last = element("span", { class: "sollol-figure" }, text || `${times[times.length - 1]} ms`);
  return element("span", { class: "sollol-times" }, times.length > 1 ? line : "", last);
}

function memoryBar({ used, memory: text }) {
  if (used === undefined) return text || "";
  const full = element("span", { class: used > 0.9 ? "sollol-full" : "" });
  full.style.width = `${Math.round(100 * used)}%`; // a strict Content-Security-Policy forbids it in an attribute
  const bar = element("span", { class: "sollol-bar", "aria-hidden": "true", title: text }, full);
  return element("span", { class: "sollol-room" }, bar, element("span", { class: "sollol-figure" }, text));
}

// A row of boxes, each as wide as its share of the whole: {share, color, lines, title}.
function boxRow(kind, label, parts) {
  const whole = parts.reduce((sum, { share }) => sum + share, 0) || 1; // each share is rounded
  const boxes = parts.map(({ share, color, lines, title }) => {
    const texts = lines.map((line, number) => element("span", { class: number ? tailed(line) : "sollol-strong" }, bdi(line)));
    const box = element("span", { class: "sollol-box", title }, ...texts);
    box.style.flexGrow = share / whole;
    box.style.backgroundColor = color;
    return box;
  });
  const said = `${label}: ${parts.map(({ title }) => title.split("\n").join(", ")).join("; ")}`;
  const bar = element("div", { class: `sollol-row-${kind}`, role: "img", "aria-label": said }, ...boxes);
  return [element("span", { class: "sollol-faint", "aria-hidden": "true" }, label), bar];
}

// Addresses differ at their ends, so a box that is too narrow cuts off their beginning.
function tailed(text) {
  return /[:.]\d+$/.test(text) ? "sollol-tail" : "";
}

function bdi(text) {
  return element("bdi", { dir: "ltr" }, text);
}

// --- times -----------------------------------------------------------------------------------------

function ago(seconds) {
  if (seconds < 10) return "now";
  if (seconds < 60) return `${Math.floor(seconds / 10) * 10} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

function tellTime(time) {
  time.textContent = ago(Date.now() / 1000 - Number(time.dataset.at));
}

function timeOf(at) {
  const date = new Date(1000 * at);
  const time = element("time", { datetime: date.toISOString(), title: date.toLocaleString(), "data-at": at });
  tellTime(time);
  return time;
}

// --- rows ------------------------------------------------------------------------------------------

// Keeps one element for each entry, in order, and creates a new one only for an entry that has changed. An entry is
// its key and what its element is drawn from.
class Rows {
  constructor(parent, create) {
    this.parent = parent;
    this.create = create;
    this.drawn = new Map();
  }

  draw(entries) {
    const before = this.drawn;
    this.drawn = new Map();
    for (const [key, ...parts] of entries) {
      const old = before.get(key);
      before.delete(key);
      if (old && old.parts.every((part, index) => part === parts[index])) {
        this.drawn.set(key, old);
        continue;
      }
      const row = this.create(key, ...parts);
      if (old) {
        keepFolded(old.row, row);
        old.row.replaceWith(row);
      }
      this.drawn.set(key, { parts, row });
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

// --- controls of ipywidgets --------------------------------------------------------------------------

// The controls below the map lack what the keyboard and screen readers need: headers that open a panel become buttons,
// and sliders get the name that stands beside them.
function completeControls(el) {
  const complete = (box) => {
    for (const header of box.querySelectorAll(".jupyter-widget-Collapse-header")) {
      const isOpen = header.parentNode.classList.contains("jupyter-widget-Collapse-open");
      const name = header.textContent.trim(); // without the character that draws its arrow
      setAll(header, { role: "button", tabindex: "0", "aria-label": name, "aria-expanded": String(isOpen) });
      header.onkeydown = (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        header.click();
      };
    }
    for (const slider of box.querySelectorAll(".widget-slider, .jupyter-widget-slider")) {
      const name = (slider.querySelector("label") || slider).textContent;
      for (const handle of slider.querySelectorAll("[role=slider]")) setAll(handle, { "aria-label": name });
      for (const readout of slider.querySelectorAll("[contenteditable]")) {
        setAll(readout, { role: "textbox", "aria-label": `${name}, as a number` });
      }
    }
  };
  const changes = new MutationObserver(([{ target }]) => complete(target.closest(".sollol-widget") || el));
  const placed = new ResizeObserver(() => {
    const box = el.closest(".sollol-widget");
    if (!box) return;
    box.dataset.lmSuppressShortcuts = "true"; // else Enter on a button of it starts to edit the cell in JupyterLab
    placed.disconnect();
    complete(box);
    changes.observe(box, { subtree: true, childList: true, attributes: true, attributeFilter: ["class", "contenteditable"] });
  });
  placed.observe(el);
  return { disconnect: () => [placed, changes].forEach((observer) => observer.disconnect()) };
}

function setAll(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
}
