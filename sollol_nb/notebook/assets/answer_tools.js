// Copy buttons for answers and their code blocks, as an anywidget module whose model is never displayed.
//
// A model carries the text of one answer, and is closed as soon as the page has read it, so that no saved notebook
// holds it. The first one installs an observer for the whole page; it finds answers by their class names. All that
// is added to the page is made here; an answer's text only ever goes to the clipboard. `toClipboard` comes before this
// file (`clipboard.js` of the widget).

const CODE = "sollol-code";
const ANSWER = "sollol-answer";
const OUTPUT = ".jp-RenderedMarkdown, .jp-RenderedHTML, .jp-RenderedHTMLCommon, .rendered_html";
const KEPT_TEXTS = 100;
const DONE_MS = 1600;

// Of JupyterLab's colours for code, in its two themes, those with less than AA's contrast on the shade of a block:
// a part of the text's colour is mixed in. A property cannot be made of itself, so a block hands each to its pre.
const FAINT = ["atom", "number", "def", "variable-3", "comment", "meta", "qualifier", "bracket", "tag", "quote",
  "link", "error", "hr"];
const named = (name) => `--jp-mirror-editor-${name}-color`;
const HANDED = FAINT.map((name) => `--sollol-${name}: var(${named(name)});`).join(" ");
const CLEAR = FAINT.map((name) =>
  `${named(name)}: color-mix(in srgb, var(--sollol-${name}) 70%, var(--jp-content-font-color0, currentColor));`).join(" ");

const STYLE = `
.sollol-block { position: relative; ${HANDED} }
.sollol-block > pre { ${CLEAR} border-radius: 6px; padding: 8px 12px !important; margin: .6em 0 !important;
  background: var(--jp-cell-editor-background, rgba(128, 128, 128, .1)) !important; overflow-x: auto; }
.sollol-block > pre code { background: transparent !important; }
.sollol-block > .sollol-copy { position: absolute; top: 4px; right: 4px; opacity: 0; }
.sollol-block:hover > .sollol-copy, .sollol-block > .sollol-copy:focus-visible,
.sollol-block > .sollol-copy.sollol-done { opacity: 1; }
@media (hover: none) { .sollol-block > .sollol-copy { opacity: 1; } }
:is(${OUTPUT}):has(.${ANSWER}, .${CODE}) a { text-decoration: underline; }
.sollol-foot { display: flex; align-items: flex-start; gap: 8px; }
.sollol-foot > :first-child { flex: 1; min-width: 0; }
.sollol-copy { display: inline-flex; align-items: center; gap: 4px; padding: 2px 6px; border: 1px solid var(--jp-border-color1, #bdbdbd);
  border-radius: 4px; font: 11px var(--jp-ui-font-family, system-ui, sans-serif); line-height: 16px;
  color: var(--jp-ui-font-color1, #222); background: var(--jp-layout-color1, #fff); cursor: pointer; white-space: nowrap; }
.sollol-copy:hover { background: var(--jp-layout-color2, #eee); }
.sollol-copy:focus-visible { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 1px; }
.sollol-copy svg { width: 13px; height: 13px; fill: none; stroke: currentColor; stroke-width: 1.5; }
`;

const ICONS = {
  copy: "M5.5 5.5h8v8h-8z M10.5 5.5v-3h-8v8h3",
  done: "M3 8.5l3.5 3.5L13 4.5",
};

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function copyButton(what, read) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "sollol-copy";
  const show = (name, text, label) => {
    button.replaceChildren(icon(name), text);
    button.setAttribute("aria-label", label);
    button.title = label;
    button.classList.toggle("sollol-done", name === "done");
  };
  const begin = () => show("copy", "Copy", `Copy ${what}`);
  begin();
  button.addEventListener("click", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    try {
      await toClipboard(read());
      show("done", "Copied", `Copied ${what}`);
    } catch {
      show("copy", "Not copied", "The browser does not allow copying; select the text instead");
    }
    setTimeout(begin, DONE_MS);
  });
  return button;
}

// What a person reads of an answer, where its source is not known: all but folds and the footer.
function shownText(output) {
  const parts = [...output.children].filter((part) => !part.matches("details, .sollol-foot"));
  return parts.map((part) => (part.matches(".sollol-block") ? part.querySelector("pre") : part).innerText.trim())
    .filter(Boolean).join("\n\n");
}

function decorate(mark, texts) {
  const output = mark.closest(OUTPUT) ?? mark.parentElement;
  for (const pre of output.querySelectorAll("pre")) {
    if (pre.parentElement.classList.contains("sollol-block")) continue;
    const block = document.createElement("div");
    block.className = "sollol-block";
    pre.replaceWith(block);
    block.append(pre, copyButton("code", () => pre.textContent.replace(/\n$/, "")));
  }
  if (!mark.classList.contains(ANSWER) || mark.parentElement.classList.contains("sollol-foot")) return;
  const foot = document.createElement("div");
  foot.className = "sollol-foot";
  const alone = mark.parentElement.matches("p") && mark.parentElement.childNodes.length === 1;
  (alone ? mark.parentElement : mark).replaceWith(foot);
  const key = [...mark.classList].find((name) => name.startsWith(`${ANSWER}-`));
  foot.append(mark, copyButton("answer", () => texts.get(key) ?? shownText(output)));
}

function decorateAll(root, texts) {
  const marks = `.${ANSWER}, .${CODE}`;
  if (root.matches?.(marks)) decorate(root, texts);
  for (const mark of root.querySelectorAll?.(marks) ?? []) decorate(mark, texts);
}

// Once for each page, whatever module of whatever answer comes first.
function installed() {
  const place = Symbol.for("sollol_nb.answer_tools");
  if (window[place]) return window[place];
  const texts = new Map();
  const style = document.createElement("style");
  style.textContent = STYLE;
  document.head.append(style);
  new MutationObserver((changes) => {
    for (const change of changes) for (const node of change.addedNodes) decorateAll(node, texts);
  }).observe(document.body, { childList: true, subtree: true });
  decorateAll(document.body, texts);
  window[place] = texts;
  return texts;
}

function initialize({ model }) {
  const texts = installed();
  const key = model.get("key");
  if (key) {
    texts.set(`${ANSWER}-${key}`, model.get("text"));
    if (texts.size > KEPT_TEXTS) texts.delete(texts.keys().next().value);
  }
  model.send({ read: true });
}

export default { initialize };
