"use strict";
/* The page of one run: scores, flips, verdict, training, configuration, provenance. */
const Run = (() => {
  const { el } = Site;

  /* context: {run, rows: its rows on boards, accepted, invalidated: reason or null}. */
  function view(data, context) {
    const reasons = [...new Set(context.rows.flatMap((row) => row.reasons))];
    const states = [Site.badge(data.status, data.status === "complete" ? "plain" : "open")];
    if (data.verdict) states.push(Site.verdict(data.verdict[""]));
    if (context.accepted) states.push(Site.badge("accepted release", "good"));
    if (context.invalidated) states.push(Site.badge("invalidated", "bad"));
    const why = reasons.length ? el("div", { class: "notice" }, el("p", {}, "Not ranked, in whole or in part:"), el("ul", {}, reasons.map((reason) => el("li", {}, reason)))) : null;
    const back = context.rows.length ? `#/board/${context.rows[0].board}` : "#/";
    return [
      el("p", { class: "crumbs" }, el("a", { href: back }, `← ${data.suite}`)),
      el("div", { class: "hero" }, el("div", {}, el("h1", {}, data.run), el("p", { class: "lead" }, `${data.suite} · ${data.model.path}`)), el("p", { class: "states" }, states)),
      why, scores(data), verdicts(data), flips(data), training(data), diagnostics(data), settings(data), provenance(data),
    ].filter(Boolean);
  }

  function scores(data) {
    const primary = data.tasks.filter((row) => row.is_primary);
    const names = data.variants.map((variant) => variant.name);
    const heads = ["variant", ...tasksOf(data)];
    const rows = names.map((name) => [name, ...heads.slice(1).map((task) => {
      const row = primary.find((each) => each.variant === name && each.task === task);
      return row ? Site.figure(...Site.score(row.value, row.stderr, row.unit)) : Site.DASH;
    })]);
    const others = data.tasks.map((row) => [row.task, row.variant, row.metric, Site.figure(...Site.score(row.value, row.stderr, row.unit)), `${Site.count(row.n_scored)} of ${Site.count(row.n_total)}`, String(row.repeats ?? Site.DASH), Site.percent(row.incomplete_rate), Site.percent(row.truncated_rate), Site.fixed(row.mean_tokens, 1), row.kernels ? row.kernels.linear || Site.DASH : "unknown", (row.flags || []).join(", ") || "none"]);
    return Site.section("Scores", "scores", Site.table("Scores of every variant", heads, rows),
      fold("Every metric, with counts", () => Site.table("Every metric", ["task", "variant", "metric", "value", "scored", "repeats", "incomplete %", "cut %", "tokens", "kernel", "flags"], others)));
  }

  const tasksOf = (data) => [...new Set(data.tasks.map((row) => row.task))];

  function verdicts(data) {
    if (!data.verdict) return null;
    const parts = (data.verdicts || []).map((each) => el("article", {},
      el("h3", {}, `${each.candidate} against ${each.baseline ?? "nothing"} `, Site.verdict(each.verdict)),
      el("ul", {}, (each.reasons || []).map((reason) => el("li", {}, reason))),
      each.checks.length ? Site.table(`Checks of ${each.candidate}`, ["check", "tier", "verdict", "reasons"], each.checks.map((check) => [check.name, check.tier ?? Site.DASH, Site.verdict(check.verdict), (check.reasons || []).join("; ")]), { text: [1, 2, 3] }) : null));
    return Site.section("Verdict", "verdict", ...parts);
  }

  function flips(data) {
    const note = el("p", { class: "note" }, "Questions whose mean score changed from BF16 to a variant. Questions are named by the beginning of their digest; the site holds no text of them.");
    if (!data.flips.length) return Site.section("Flips", "flips", el("p", { class: "dim" }, data.baseline ? "This run has no scores by question." : "This run has no BF16 variant."));
    const rows = data.flips.map((each) => [`${each.task}: ${each.variant}`, Site.count(each.n), Site.count(each.worse), Site.count(each.better)]);
    const lists = () => el("div", {}, data.flips.filter((each) => each.worse + each.better).map((each) => el("div", { class: "digests" }, el("h3", {}, `${each.task}: ${each.variant}`), digests("worse", each.worse, each.worse_questions), digests("better", each.better, each.better_questions))));
    return Site.section("Flips", "flips", note, Site.table("Questions that changed", ["task: variant", "questions", "worse", "better"], rows), fold("Which questions", lists));
  }

  function digests(word, n, found) {
    if (!n) return null;
    const rest = n > found.length ? ` and ${Site.count(n - found.length)} more` : "";
    return el("p", {}, `${Site.count(n)} ${word}: `, found.flatMap((digest) => [el("code", {}, digest), " "]), rest);
  }

  const CURVES = [["loss", "loss", "nats a token"], ["kl", "KL", "nats a token"], ["ce", "CE", "nats a token"], ["validation_kl", "validation KL", "nats a token"], ["validation_ce", "validation CE", "nats a token"], ["lr", "learning rate", ""]];

  function training(data) {
    if (!data.training.length) return null;
    const names = data.variants.map((variant) => variant.name);
    const wide = data.training.filter((each) => each.mean_over_steps > 1).map((each) => `${each.variant}: each point is the mean of ${each.mean_over_steps} steps`);
    const charts = CURVES.filter(([key]) => data.training.some((each) => each.curves[key])).map(([key, label, unit]) => curve(data, names, key, label, unit).figure);
    return Site.section("Training", "training", el("p", { class: "note" }, ["Loss of a variant is what it is trained on: CE for QAT, KL for QAD; two losses are not compared.", ...wide].join(" ")), el("div", { class: "charts" }, charts));
  }

  function curve(data, names, key, label, unit) {
    const found = data.training.filter((each) => each.curves[key]);
    const steps = [...new Set(found.flatMap((each) => each.curves[key].steps))].sort((a, b) => a - b);
    const places = new Map(steps.map((step, i) => [step, i]));
    const series = found.map((each) => {
      const y = new Array(steps.length).fill(null);
      each.curves[key].steps.forEach((step, i) => { y[places.get(step)] = each.curves[key].values[i]; });
      return { label: each.variant, index: names.indexOf(each.variant), y };
    });
    const ends = series.map((each) => { const values = each.y.filter(Site.isNumber); return `${each.label} from ${Site.significant(values[0])} to ${Site.significant(values.at(-1))}`; });
    return Chart.make({
      title: label, text: `Line chart of ${label} over ${steps.at(-1)} steps: ${ends.join("; ")}.`, x: steps, series, xLabel: "step", yLabel: unit, height: 240, xText: (step) => String(step), yText: Site.significant,
      names: (i) => `step ${steps[i]}`, heads: ["step", "variant", label],
      rows: () => series.flatMap((each) => steps.map((step, i) => [step, each.label, each.y[i]]).filter((row) => Site.isNumber(row[2]))),
    });
  }

  function diagnostics(data) {
    if (!data.diagnostics.length) return null;
    const rows = data.diagnostics.map((row) => [row.variant, Site.figure(Site.fixed(row.kl, 4), Site.isNumber(row.kl_stderr) ? `±${Site.fixed(row.kl_stderr, 4)}` : ""), Site.fixed(row.kl_p99, 2), Site.fixed(row.ce, 3), Site.fixed(row.ppl, 2), Site.percent(row.top1), Site.percent(row.saturated_share, 3), row.kernels ? row.kernels.linear : Site.DASH]);
    return Site.section("Divergence from BF16", "diagnostics", Site.table("Divergence of each variant on response tokens", ["variant", "KL", "99th", "CE", "perplexity", "top-1 %", "saturated %", "kernel"], rows));
  }

  function settings(data) {
    const variants = Object.fromEntries(data.variants.map((variant) => [variant.name, { ...variant.settings, ...variant.size }]));
    return Site.section("Configuration", "configuration", ...Object.entries(data.configuration).filter(([, value]) => value !== null).map(([name, value]) => fold(name, () => Site.record(value))), fold("variants", () => Site.record(variants)), fold("data, as it was read", () => Site.record(data.data)));
  }

  function provenance(data) {
    const stages = () => Site.table("Stages", ["stage", "kind", "key", "seconds", "device", "imported"], data.stages.map(([label, kind, key, seconds, device, isImported]) => [label, kind, el("code", {}, key), Site.fixed(seconds, 1), device ?? Site.DASH, isImported ? "yes" : "no"]));
    return Site.section("Provenance", "provenance", Site.record(data.provenance), fold(`stages (${data.stages.length})`, stages));
  }

  /* Something long, made when it is first opened. */
  function fold(title, make) {
    const node = el("details", {}, el("summary", {}, title));
    node.addEventListener("toggle", () => { if (node.open && node.children.length === 1) node.append(make()); });
    return node;
  }

  return { view };
})();
