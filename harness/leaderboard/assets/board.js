"use strict";
/* A board: standing, history of each variant, KL against recovery. */
const Board = (() => {
  const { el } = Site;
  const FIELDS = ["run", "variant", "method", "state", "rank", "tied", "mean", "low", "high", "recovery", "kl", "klError", "top1", "bits", "kernels", "verdict", "reasons", "scores"];
  const Z = 1.96;
  const STATES = { ranked: "ranked", baseline: "BF16", null: "null", older: "older", "not ranked": "not ranked" };
  const VIEWS = [
    ["standing", "Standing, and not ranked", (row) => row.state !== "older"],
    ["ranked", "Standing only", (row) => row.state !== "older" && row.state !== "not ranked"],
    ["not ranked", "Not ranked only", (row) => row.state === "not ranked"],
    ["all", "Every run", null],
  ];

  /* The rows of a board as objects; a run is {id, suite, name, time}. */
  function rowsOf(board, runs) {
    if (!board.decoded) {
      board.decoded = board.rows.map((values, place) => {
        const row = { place };
        FIELDS.forEach((name, i) => { row[name] = values[i]; });
        row.run = runs[row.run];
        row.reasons = row.reasons.map((i) => board.reasons[i]);
        return row;
      });
    }
    return board.decoded;
  }

  const runLink = (run) => el("a", { href: `#/run/${run.id}` }, run.name);
  const unitOf = (board, i) => board.tasks[i].unit || "share";

  function rank(row) {
    if (row.state === "ranked") {
      const said = row.tied ? `rank ${row.rank}, shared with ${row.tied}` : `rank ${row.rank}`;
      return el("span", { class: "rank", title: said, "aria-label": said }, `${row.rank}${row.tied ? "=" : ""}`);
    }
    return Site.badge(STATES[row.state], row.state === "not ranked" ? "open" : "plain");
  }

  function columns(board) {
    const number = (title, note, value, show, more = {}) => ({ title, note, value, show, isNumber: true, ...more });
    return [
      { title: "Rank", note: "Rows that share a rank are not told apart by their intervals", value: (row) => row.rank, show: rank, isNumber: true, lowFirst: true, className: "rank-cell", words: (row) => STATES[row.state] },
      { title: "Variant", value: (row) => row.variant, show: (row) => variantCell(row), isRowHead: true, words: (row) => `${row.variant} ${row.method} ${row.verdict || ""} ${row.reasons.join(" ")}` },
      number("Mean", "Mean of the tasks in percent, with its 95 % interval", (row) => row.mean, (row) => Site.figure(Site.percent(row.mean), row.mean === null ? "" : `${Site.percent(row.low)}–${Site.percent(row.high)}`)),
      number("Recovery", "Mean over that of BF16 in the same run, in percent", (row) => row.recovery, (row) => Site.percent(row.recovery)),
      number("KL", "KL from BF16, nats a response token", (row) => row.kl, (row) => Site.figure(Site.fixed(row.kl, 3), Site.isNumber(row.klError) ? `±${Site.fixed(row.klError, 3)}` : ""), { lowFirst: true }),
      ...board.tasks.map((task, i) => number(task.name, task.metric, (row) => row.scores[2 * i], (row) => Site.figure(...Site.score(row.scores[2 * i], row.scores[2 * i + 1], unitOf(board, i))))),
      number("Bits/w", "Bits a weight of the checkpoint", (row) => row.bits, (row) => Site.fixed(row.bits, 2), { lowFirst: true }),
      { title: "Run", value: (row) => row.run.name, show: (row) => runLink(row.run) },
    ];
  }

  function variantCell(row) {
    const verdict = row.verdict ? [" ", Site.verdict(row.verdict)] : [];
    const why = row.reasons.length ? el("small", { class: "why" }, row.reasons.length > 2 ? `${row.reasons.slice(0, 2).join("; ")}; and ${row.reasons.length - 2} more` : row.reasons.join("; ")) : null;
    return el("span", { class: "variant" }, el("a", { href: `#/run/${row.run.id}` }, row.variant), ` `, row.method === row.variant ? null : el("small", {}, row.method), ...verdict, why);
  }

  function standing(board, rows) {
    const counts = new Map(VIEWS.map(([name, , keep]) => [name, keep ? rows.filter(keep).length : rows.length]));
    const made = Table.make(columns(board), rows, { caption: `Standing of ${board.suite}, ${board.kernels}`, pageLength: 50, search: "Search", empty: "No row matches" });
    const methods = [...new Set(rows.map((row) => row.method))].sort();
    const show = el("select", { id: "show", onchange: apply }, VIEWS.map(([name, label]) => el("option", { value: name }, `${label} (${Site.count(counts.get(name))})`)));
    const method = el("select", { id: "method", onchange: apply }, el("option", { value: "" }, "All methods"), methods.map((name) => el("option", { value: name }, name)));
    function apply() {
      const keep = VIEWS.find(([name]) => name === show.value)[2];
      made.filter("show", (row) => (!keep || keep(row)) && (!method.value || row.method === method.value));
    }
    apply();
    const controls = el("div", { class: "controls" }, el("label", { for: "show" }, "Rows ", show), el("label", { for: "method" }, "Method ", method));
    return Site.section("Standing", "standing", controls, made.node);
  }

  function measures(board) {
    const tasks = board.tasks.map((task, i) => [task.name, unitOf(board, i), (row) => {
      const [value, error] = [row.scores[2 * i], row.scores[2 * i + 1]];
      return [value, Site.isNumber(error) ? value - Z * error : value, Site.isNumber(error) ? value + Z * error : value];
    }]);
    return [["Mean of the tasks", "share", (row) => [row.mean, row.low, row.high]], ["KL", "nats", (row) => [row.kl, row.kl - Z * (row.klError || 0), row.kl + Z * (row.klError || 0)]], ...tasks];
  }

  function history(board, rows) {
    const names = namesOf(rows);
    const chosen = new Set(names.slice(0, 4));
    const host = el("div", {});
    const all = measures(board);
    const measure = el("select", { id: "measure", onchange: draw }, all.map(([label], i) => el("option", { value: i }, label)));
    const boxes = el("fieldset", { class: "choices" }, el("legend", {}, "Variants"), names.map((name) => {
      const box = el("input", { type: "checkbox", onchange: () => { if (box.checked) chosen.add(name); else chosen.delete(name); draw(); } });
      box.checked = chosen.has(name);
      return el("label", {}, box, " ", name);
    }));
    if (new Set(rows.map((row) => row.run)).size < 2) return Site.section("History", "history", el("p", { class: "dim" }, "One run so far: the history begins with the second."));
    function draw() {
      host.replaceChildren(historyChart(board, rows, names, chosen, all[Number(measure.value)]).figure);
      Chart.refresh();
    }
    draw();
    const note = el("p", { class: "note" }, "The band around a line is its noise: the 95 % interval of each night. A night whose value lies within the band of another is no change. Hollow points are runs that are not ranked.");
    return Site.section("History", "history", noiseFloor(rows), el("div", { class: "controls" }, el("label", { for: "measure" }, "Figure ", measure)), boxes, note, host);
  }

  /* How far BF16 is from itself, asked again with another sampling seed in the same run. */
  function noiseFloor(rows) {
    const pairs = rows.filter((row) => row.state === "null" && Site.isNumber(row.mean)).map((row) => [row, rows.find((other) => other.run === row.run && other.method === "bf16" && (other.state === "baseline" || other.state === "older") && other !== row)]);
    const found = pairs.find(([, base]) => base && Site.isNumber(base.mean));
    if (!found) return null;
    const [again, base] = found;
    return el("p", { class: "note" }, `Noise floor: ${again.variant}, the same weights asked again with another sampling seed, is ${Site.percent(Math.abs(again.mean - base.mean))} points from ${base.variant} in ${again.run.name}.`);
  }

  function historyChart(board, rows, names, chosen, [label, unit, figure]) {
    const runs = [...new Set(rows.map((row) => row.run))].sort((a, b) => (a.name < b.name ? -1 : 1));
    const isTime = runs.every((run) => run.time !== null) && new Set(runs.map((run) => run.time)).size === runs.length;
    if (isTime) runs.sort((a, b) => a.time - b.time);
    const places = new Map(runs.map((run, i) => [run, i]));
    const series = [];
    names.forEach((name, index) => {
      if (!chosen.has(name)) return;
      const empty = () => new Array(runs.length).fill(null);
      const made = { label: name, index, y: empty(), low: empty(), high: empty() };
      const other = { label: `${name}, not ranked`, index, y: empty(), points: true };
      for (const row of rows) {
        if (row.variant !== name) continue;
        const [value, low, high] = figure(row);
        if (!Site.isNumber(value)) continue;
        const at = places.get(row.run);
        if (row.reasons.length) other.y[at] = value;
        else { made.y[at] = value; made.low[at] = low; made.high[at] = high; }
      }
      if (made.y.some(Site.isNumber)) series.push(made);
      if (other.y.some(Site.isNumber)) series.push(other);
    });
    const asText = unit === "share" ? (value) => Site.percent(value) : Site.significant;
    const nights = runs.length === 1 ? "one run" : `${runs.length} runs`;
    return Chart.make({
      title: `${label} of ${board.suite} over its runs`,
      text: `Line chart over ${nights}: ${series.map((each) => `${each.label} last ${asText(each.y.filter(Site.isNumber).at(-1))}`).join("; ")}. The table below has every value.`,
      x: runs.map((run, i) => (isTime ? run.time : i)),
      series, isTime, yText: asText, yLabel: unit === "share" ? "percent" : unit,
      xText: isTime ? null : (i) => runs[i]?.name ?? "",
      names: (i) => runs[i].name,
      heads: ["run", "variant", "ranked", label],
      rows: () => series.flatMap((each) => runs.map((run, i) => [run.name, each.label, each.points ? "no" : "yes", each.y[i]]).filter((row) => Site.isNumber(row[3]))).reverse(),
    });
  }

  /* Variants in the order of the board, BF16 first, so that each has one colour on all charts. */
  function namesOf(rows) {
    const isBase = (row) => (row.method === "bf16" ? 0 : 1);
    return [...new Set([...rows].sort((a, b) => isBase(a) - isBase(b) || a.place - b.place).map((row) => row.variant))];
  }

  function scatter(board, rows) {
    const points = rows.filter((row) => Site.isNumber(row.kl) && Site.isNumber(row.recovery) && row.state !== "older" && !row.reasons.length).sort((a, b) => a.kl - b.kl);
    if (points.length < 2) return null;
    const names = namesOf(rows);
    const series = [...new Set(points.map((row) => row.variant))].map((name) => ({ label: name, index: names.indexOf(name), y: points.map((row) => (row.variant === name ? row.recovery : null)) }));
    const chart = Chart.make({
      title: "KL against recovery, of the rows that stand",
      text: `Scatter chart of ${points.length} variants: ${points.map((row) => `${row.variant} KL ${Site.fixed(row.kl, 3)}, recovery ${Site.percent(row.recovery)} percent`).slice(0, 12).join("; ")}.`,
      x: points.map((row) => row.kl),
      series, isPoints: true, xLabel: "KL from BF16, nats a token", yLabel: "recovery, percent", yText: (value) => Site.percent(value), xText: Site.significant,
      names: (i) => `${points[i].variant}, KL ${Site.fixed(points[i].kl, 3)}`,
      heads: ["variant", "run", "KL", "recovery"],
      rows: () => points.map((row) => [row.variant, row.run.name, Site.fixed(row.kl, 4), row.recovery]),
    });
    return Site.section("KL against recovery", "scatter", el("p", { class: "note" }, "Left and up is better: close to BF16 in its distributions, and in its scores."), chart.figure);
  }

  function protocol(board) {
    const rows = board.tasks.map((task) => [task.name, task.metric ?? Site.DASH, String(task.version ?? Site.DASH), task.scorer ?? Site.DASH, Site.count(task.questions), String(task.repeats ?? Site.DASH), task.judge ? task.judge.path : "none"]);
    const engine = board.tasks.map((task) => task.engine).find(Boolean);
    return el("details", { class: "protocol" }, el("summary", {}, "What makes two rows of this board comparable"),
      el("dl", { class: "facts" },
        ...fact("Model", board.model.path), ...fact("Its fingerprint", el("code", {}, board.model.fingerprint)), ...fact("Kernels", board.kernels),
        ...fact("Engine", Site.record(engine)), ...fact("Board", el("code", {}, board.key))),
      Site.table("Protocol of each task", ["task", "metric", "version", "scorer", "questions", "repeats", "judge"], rows, { text: [1, 3, 6] }),
      el("details", {}, el("summary", {}, "Settings of each task"), Site.record(Object.fromEntries(board.tasks.map((task) => [task.name, { ...task.settings, ...task["model settings"] }])))));
  }

  const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];

  function choice(boards, current, runs, ofFindings) {
    const bySuite = new Map();
    for (const board of boards) bySuite.set(board.suite, [...(bySuite.get(board.suite) || []), board]);
    const groups = [...bySuite].map(([suite, all]) => el("optgroup", { label: suite }, all.map((board) => {
      const isRanked = board.rows.some((row) => row[3] === "ranked");
      const newest = board.rows.map((row) => runs[row[0]].name).reduce((a, b) => (a > b ? a : b));
      const option = el("option", { value: board.key }, `${suite} · ${board.kernels} · ${board.tasks.length} tasks · to ${newest}${isRanked ? "" : " · nothing ranked"}${ofFindings.includes(suite) ? " · findings" : ""}`);
      option.selected = board === current;
      return option;
    })));
    const select = el("select", { id: "board", onchange: () => { location.hash = `#/board/${select.value}`; } }, groups);
    return el("label", { for: "board", class: "board-choice" }, "Board ", select);
  }

  /* The view of a board; `all` is the whole leaderboard. */
  function view(all, board, runs) {
    const rows = rowsOf(board, runs);
    const last = rows.map((row) => row.run).reduce((a, b) => (a.name > b.name ? a : b));
    const n = new Set(rows.map((row) => row.run)).size;
    const head = el("div", { class: "hero" },
      el("div", {}, el("h1", {}, board.suite), el("p", { class: "lead" }, `${board.model.path || "no model"} · ${board.kernels} · ${board.tasks.length} tasks · ${Site.count(n)} ${n === 1 ? "run" : "runs"}, the newest `, runLink(last))),
      choice(all.boards, board, runs, all.findings));
    const note = all.findings.includes(board.suite) ? el("div", { class: "notice" }, el("p", {}, "An experiment about methods, on a small model and made-up tasks. Its scores say nothing beside another board's; what it shows is on the page ", el("a", { href: "#/findings" }, "Findings"), ".")) : null;
    return [head, note, protocol(board), standing(board, rows), history(board, rows), scatter(board, rows)].filter(Boolean);
  }

  return { view, rowsOf };
})();
