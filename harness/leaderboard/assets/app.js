"use strict";
/* Addresses to views: #/ and #/board/<key>, #/run/<id>, #/findings, #/rule, #/left-out. */
(() => {
  const { el } = Site;
  const all = Site.get("leaderboard");
  const main = document.getElementById("main");
  const theme = document.getElementById("theme");

  if (!all) {
    main.replaceChildren(el("h1", {}, "No data"), el("p", {}, "data/leaderboard.js is not there, or cannot be read. Build the site again: harness leaderboard results/"));
    return;
  }
  const runs = all.runs.map(([id, suite, name, time]) => ({ id, suite, name, time }));
  const left = document.getElementById("left-out-link");
  const nOut = all.left_out.length + all.invalidated.length;
  const findings = Site.get("findings");
  document.getElementById("findings-link").hidden = !findings;
  left.textContent = `Left out (${nOut})`;

  function home() {
    if (!all.boards.length) return [el("h1", {}, "Leaderboard"), el("p", {}, "No run yet. Run a suite, then build the site again."), ...rule(), ...leftOut()];
    return board(all.boards.reduce((a, b) => (isBetter(b, a) ? b : a)).key);
  }

  /* Boards with ranks first, those that findings are made of last, then the newest run. */
  function isBetter(a, b) {
    const isOfFindings = (each) => all.findings.includes(each.suite);
    if (isOfFindings(a) !== isOfFindings(b)) return isOfFindings(b);
    const isRanked = (each) => each.rows.some((row) => row[3] === "ranked");
    if (isRanked(a) !== isRanked(b)) return isRanked(a);
    const newest = (each) => each.rows.map((row) => runs[row[0]].name).reduce((x, y) => (x > y ? x : y));
    return newest(a) > newest(b);
  }

  function board(key) {
    const found = all.boards.find((each) => each.key === key);
    return found ? [...Board.view(all, found, runs), ...rule(), ...leftOut()] : missing("There is no such board. It may have been built from other runs.");
  }

  function run(id) {
    const found = runs.find((each) => each.id === id);
    if (!found) return missing("There is no such run in this leaderboard.");
    const rows = all.boards.flatMap((each) => Board.rowsOf(each, runs).filter((row) => row.run.id === id).map((row) => ({ ...row, board: each.key })));
    const gone = all.invalidated.find(([suite, name]) => suite === found.suite && name === found.name);
    const context = { rows, accepted: all.accepted[found.suite] === found.name, invalidated: gone ? gone[2] : null };
    Site.load(id, (data) => { if (location.hash === `#/run/${id}`) show(Run.view(data, context), data.run); },
      () => show(missing("The data of this run are not beside the page. Build the site again: harness leaderboard results/"), "Run"));
    return null;
  }

  function found() {
    return findings ? Findings.view(findings, runs) : missing("There are no findings in these results. Make them: harness findings suites/windtunnel/claims.toml");
  }

  const missing = (text) => [el("h1", {}, "Not found"), el("p", {}, text), el("p", {}, el("a", { href: "#/" }, "To the leaderboard"))];

  function rule() {
    return [Site.section("How rows are ranked", "rule", el("ul", { class: "rule" }, all.rule.map((text) => el("li", {}, text))))];
  }

  function leftOut() {
    const out = all.left_out.map(([place, reason]) => el("li", {}, el("code", {}, place), ` ${reason}`));
    const gone = all.invalidated.map(([suite, name, reason]) => el("li", {}, el("code", {}, `${suite}/${name}`), ` invalidated: ${reason}`));
    const parts = out.length + gone.length ? [el("p", { class: "note" }, "Never ranked, never averaged over."), el("ul", { class: "left-out" }, out, gone)] : [el("p", { class: "dim" }, "Nothing.")];
    return [Site.section("Left out", "left-out", ...parts)];
  }

  function show(nodes, title) {
    document.title = title ? `${title} – Leaderboard` : "Leaderboard";
    main.replaceChildren(...nodes.filter(Boolean));
    main.dataset.address = location.hash;
    Chart.refresh();
  }

  function route(isFirst) {
    const [, kind, name] = location.hash.split("/");
    if (kind === "rule" || kind === "left-out") {
      if (!document.getElementById(kind)) show(home());
      const target = document.getElementById(kind);
      target.tabIndex = -1;
      target.focus();
      return target.scrollIntoView();
    }
    const nodes = kind === "run" ? run(name) : kind === "board" ? board(name) : kind === "findings" ? found() : home();
    if (nodes) show(nodes, kind === "board" ? nodes[0].querySelector?.("h1")?.textContent : kind === "findings" ? "Findings" : "");
    scrollTo(0, 0);
    if (!isFirst) main.focus({ preventScroll: true });
    return undefined;
  }

  function nameTheme() { theme.textContent = `Theme: ${Site.stored()}`; }
  theme.addEventListener("click", () => {
    Site.setTheme(Site.THEMES[(Site.THEMES.indexOf(Site.stored()) + 1) % Site.THEMES.length]);
    nameTheme();
  });
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  nameTheme();
  addEventListener("hashchange", () => route(false));
  route(true);
  document.documentElement.dataset.ready = "yes";
})();
