// The status page: the widget's map (cluster_map.js), fed by the gateway's events instead of a kernel.
//
// The browser's own reconnection is not used: it gives up after an error response, and waits for ever for a
// gateway that has stopped without closing its connections.

import map from "./cluster_map.js";

const SILENT_MS = 15000; // the gateway sends an event at least every 5 s
const RETRY_MS = [500, 1000, 2000, 4000];

// The part of a widget's model that the map needs. There is no kernel, so messages to it are dropped.
class Model {
  constructor() {
    this.values = {};
    this.listeners = [];
  }
  get(name) {
    return this.values[name];
  }
  set(name, value) {
    this.values[name] = value;
    this.emit(`change:${name}`);
  }
  on(event, listener) {
    this.listeners.push({ event, listener });
  }
  off(event, listener) {
    this.listeners = this.listeners.filter((known) => known.event !== event || known.listener !== listener);
  }
  emit(event, ...values) {
    for (const known of [...this.listeners]) if (known.event === event) known.listener(...values);
  }
  send() {}
}

const model = new Model();
const cluster = document.getElementById("cluster");
const notice = document.getElementById("notice");
const connection = document.getElementById("connection");
let source = null;
let silent = 0;
let retry = 0;
let failures = 0;
let seenAt = null;

function heard() {
  clearTimeout(silent);
  silent = setTimeout(lost, SILENT_MS);
  seenAt = new Date();
  if (failures || connection.textContent !== "live") {
    failures = 0;
    connection.textContent = "live";
    notice.hidden = true;
    cluster.classList.remove("outdated");
  }
}

function lost() {
  disconnect();
  connection.textContent = "not connected";
  const shown = seenAt ? ` This is the state of ${seenAt.toLocaleTimeString()}.` : "";
  const text = `The gateway does not answer; trying again.${shown}`;
  if (notice.textContent !== text) notice.textContent = text; // a screen reader says it once
  notice.hidden = false;
  cluster.classList.add("outdated");
  retry = setTimeout(connect, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]);
  failures += 1;
}

function disconnect() {
  clearTimeout(silent);
  clearTimeout(retry);
  if (source) source.close();
  source = null;
}

function connect() {
  disconnect();
  source = new EventSource("cluster");
  silent = setTimeout(lost, SILENT_MS);
  source.onerror = lost;
  source.addEventListener("alive", heard);
  source.addEventListener("end", connect);
  source.addEventListener("state", (event) => {
    model.set("state", JSON.parse(event.data));
    heard();
  });
  source.addEventListener("patch", (event) => {
    model.emit("msg:custom", { patch: JSON.parse(event.data) });
    heard();
  });
}

// A hidden page keeps no connection: a browser has only six for each address.
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));

map.initialize({ model });
map.render({ model, el: cluster });
if (!document.hidden) connect();
