"use strict";
/* Findings: claims, what was measured, and the verdict on each. */
const Findings = (() => {
  const { el } = Site;
  const SENTENCES = [1];
  const VERDICT = "verdict";

  /* The view of the findings; runs: those of the leaderboard, to link to. */
  function view(data, runs) {
    const topics = [...new Set(data.claims.map((claim) => claim.topic))];
    return [
      el("div", { class: "hero" }, el("div", {}, el("h1", {}, "Findings"), el("p", { class: "lead" }, `${data.counted} Claims: `, el("code", {}, data.claims_file)))),
      verdicts(data),
      ...topics.map((topic, i) => Site.section(topic, `topic-${i}`, data.claims.filter((claim) => claim.topic === topic).map((claim) => article(data, claim)))),
      ...data.trajectories.map(trajectory),
      Site.section("How to read this", "method", el("dl", { class: "facts" }, data.method.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]))),
      made(data, runs),
    ];
  }

  function verdicts(data) {
    const rows = data.claims.map((claim) => [el("a", { href: "#/findings", onclick: (event) => { event.preventDefault(); reach(claim.id); } }, claim.text), Site.verdict(claim.verdict), claim.untested || count(data, claim.rows)]);
    return Site.section("Verdicts", "verdicts", Site.table("Claims and their verdicts", ["claim", VERDICT, "comparisons"], rows, { text: SENTENCES.concat(2) }));
  }

  /* Show a claim; its id is text of a record, and is looked for as such. */
  function reach(id) {
    const node = [...document.querySelectorAll("[data-claim]")].find((each) => each.dataset.claim === id);
    node.focus({ preventScroll: true });
    node.scrollIntoView();
  }

  function count(data, rows) {
    const found = rows.map((row) => row[data.heads.indexOf(VERDICT)]);
    return [...new Set(found)].map((verdict) => `${found.filter((each) => each === verdict).length} ${verdict}`).join(", ");
  }

  function article(data, claim) {
    const rows = claim.rows.map((row) => row.map((text, i) => (data.heads[i] === VERDICT ? Site.verdict(text) : text)));
    return el("article", { "data-claim": claim.id, tabindex: -1 },
      el("h3", {}, `${claim.text} `, Site.verdict(claim.verdict)),
      el("p", { class: "note" }, `${claim.source} · `, el("code", {}, claim.id)),
      claim.note ? el("p", { class: "note" }, claim.note) : null,
      claim.untested ? el("p", {}, `Not tested: ${claim.untested}`) : Site.table(`Comparisons of ${claim.id}`, data.heads, rows, { text: SENTENCES }),
      claim.notes.length ? el("ul", {}, claim.notes.map((note) => el("li", {}, note))) : null);
  }

  function trajectory(each) {
    return Site.section(each.title, `trajectory-${each.id}`, el("p", { class: "note" }, `Means over seeds with 95 % intervals, ${each.suite}.`), el("div", { class: "charts" }, each.panels.map((panel) => curve(each, panel).figure)));
  }

  function curve(each, panel) {
    const steps = [...new Set(panel.lines.flatMap(([, points]) => points.map(([tokens]) => tokens)))].sort((a, b) => a - b);
    const places = new Map(steps.map((tokens, i) => [tokens, i]));
    const empty = () => new Array(steps.length).fill(null);
    const lines = panel.lines.map(([label, points], i) => {
      const made = { label, index: i + 1, y: empty(), low: empty(), high: empty() };
      points.forEach(([tokens, value, low, high]) => { const at = places.get(tokens); made.y[at] = value; made.low[at] = low; made.high[at] = high; });
      return made;
    });
    const levels = panel.levels.map(([label, value], i) => ({ label, index: lines.length + 1 + i, y: steps.map(() => value) }));
    const ends = lines.map((line) => { const values = line.y.filter(Site.isNumber); return `${line.label} from ${Site.significant(values[0])} to ${Site.significant(values.at(-1))}`; });
    return Chart.make({
      title: `${panel.name}, ${panel.unit}`, text: `Line chart of ${panel.name} of ${each.suite} along training: ${ends.join("; ")}. The table below has every value.`,
      x: steps, series: [...lines, ...levels], xLabel: "tokens trained", yLabel: panel.unit, height: 260, xText: Site.count, yText: Site.significant, names: (i) => `${Site.count(steps[i])} tokens`,
      heads: ["tokens", "method", panel.name],
      rows: () => [...lines, ...levels].flatMap((line) => steps.map((tokens, i) => [Site.count(tokens), line.label, line.y[i]]).filter((row) => Site.isNumber(row[2]))),
    });
  }

  function made(data, runs) {
    const rows = data.suites.map(([name, file, place, model, weights]) => {
      const found = runs.find((run) => `${run.suite}/${run.name}` === place);
      return [name, el("code", {}, file), found ? el("a", { href: `#/run/${found.id}` }, found.name) : place, model, el("code", {}, weights)];
    });
    return Site.section("Made of", "made", Site.table("Runs that the findings are made of", ["suite", "file", "run", "model", "weights"], rows, { text: [1, 2, 3, 4] }));
  }

  return { view };
})();
