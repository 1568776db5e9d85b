"use strict";
/* What every view uses: data that scripts hand over, elements, figures as text, the theme.
   Text of runs enters the page through text nodes alone. */
const Site = (() => {
  const data = new Map();
  const waiting = new Map();

  /* A data script calls this with its name and one JSON text. */
  function put(name, json) {
    data.set(name, JSON.parse(json));
    (waiting.get(name) || []).forEach((done) => done(data.get(name)));
    waiting.delete(name);
  }

  /* The data of a run: loaded by adding its script, once. `failed` is called where the file is not there. */
  function load(id, done, failed) {
    const name = `run:${id}`;
    if (data.has(name)) return done(data.get(name));
    const isAsked = waiting.has(name);
    waiting.set(name, [...(waiting.get(name) || []), done]);
    if (isAsked) return undefined;
    const script = document.createElement("script");
    script.src = `data/runs/${id}.js`;
    script.onerror = () => { waiting.delete(name); script.remove(); failed(); };
    document.head.append(script);
    return undefined;
  }

  /* An element with attributes (on…: a listener; class, text and others) and children: nodes, or text that becomes text. */
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : String(value));
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  const DASH = "–";
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : DASH);
  const percent = (value, digits = 1) => (isNumber(value) ? (100 * value).toFixed(digits) : DASH);
  const count = (value) => (isNumber(value) ? value.toLocaleString("en-US") : DASH);
  const significant = (value) => (isNumber(value) ? Number(value.toPrecision(4)).toString() : DASH);

  /* A score as [value, error], both text: shares in percent, other figures as they are. */
  function score(value, stderr, unit) {
    const isShare = (unit || "share") === "share";
    const error = isNumber(stderr) ? `±${isShare ? percent(stderr) : significant(stderr)}` : "";
    return [isShare ? percent(value) : significant(value), isNumber(value) ? error : ""];
  }

  const date = (seconds) => (isNumber(seconds) ? new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ") : "");

  /* A value and, smaller beside it, its error. */
  function figure(value, stderr) {
    return el("span", { class: "figure" }, value, stderr ? el("small", {}, ` ${stderr}`) : null);
  }

  /* A labelled state such as a verdict; the colour is only decoration. */
  function badge(text, kind = "plain") {
    return el("span", { class: `badge ${kind}` }, text);
  }

  const KINDS = { GO: "good", PASS: "good", "NO-GO": "bad", FAIL: "bad", INCONCLUSIVE: "open", ranked: "good", accepted: "good", agrees: "good", disagrees: "bad", "cannot tell": "open" };
  const verdict = (text) => badge(text, KINDS[text] || "plain");

  /* Nested records as definition lists; long lists are folded. */
  function record(value) {
    if (value === null || value === undefined || value === "") return el("span", { class: "dim" }, DASH);
    if (Array.isArray(value)) {
      if (!value.length) return el("span", { class: "dim" }, "none");
      if (value.every((each) => typeof each !== "object" || each === null)) return document.createTextNode(value.join(", "));
      return el("ol", { class: "records" }, value.map((each) => el("li", {}, record(each))));
    }
    if (typeof value === "object") {
      const pairs = Object.entries(value).filter(([, each]) => each !== null);
      if (!pairs.length) return el("span", { class: "dim" }, DASH);
      return el("dl", { class: "record" }, pairs.map(([key, each]) => el("div", {}, el("dt", {}, key), el("dd", {}, record(each)))));
    }
    return document.createTextNode(typeof value === "boolean" ? (value ? "yes" : "no") : String(value));
  }

  /* A plain table: heads, and rows of cells (text or nodes) whose first is the row's head; columns in `text` hold sentences. */
  function table(caption, heads, rows, { text = [] } = {}) {
    const kind = (i) => (i === 0 ? "left" : text.includes(i) ? "text" : "num");
    const head = el("tr", {}, heads.map((title, i) => el("th", { scope: "col", class: kind(i) }, title)));
    const body = rows.map((cells) => el("tr", {}, cells.map((cell, i) => (i ? el("td", { class: kind(i) }, cell) : el("th", { scope: "row" }, cell)))));
    const made = el("table", {}, el("caption", { class: "hidden" }, caption), el("thead", {}, head), el("tbody", {}, body));
    return el("div", { class: "wide", role: "region", "aria-label": caption, tabindex: 0 }, made);
  }

  function section(title, id, ...children) {
    return el("section", { "aria-labelledby": id }, el("h2", { id }, title), ...children);
  }

  const THEMES = ["system", "light", "dark"];
  function stored() {
    try { return localStorage.getItem("leaderboard-theme") || "system"; } catch { return "system"; }
  }

  /* system, light or dark; views that draw listen to "themechange". */
  function setTheme(name) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try { localStorage.setItem("leaderboard-theme", name); } catch { /* a browser may forbid it for files */ }
    document.dispatchEvent(new Event("themechange"));
  }
  if (THEMES.includes(stored()) && stored() !== "system") document.documentElement.dataset.theme = stored();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("themechange")));

  return {
    put, load, el, DASH, isNumber, fixed, percent, count, significant, score, date, figure, badge, verdict, record, table, section,
    THEMES, stored, setTheme, get: (name) => data.get(name),
  };
})();
