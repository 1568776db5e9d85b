"use strict";
/* Charts over uPlot: each in a figure with a text of what it shows, a key, a readout and its data as a table. */
const Chart = (() => {
  const { el } = Site;
  const COLOURS = 8;
  const DASHES = [[], [8, 4], [3, 3], [10, 3, 3, 3]];
  const live = new Set();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (index) => css(`--series-${index % COLOURS}`);
  const alpha = (hex, share) => hex + Math.round(255 * share).toString(16).padStart(2, "0");

  /* x: ascending numbers. series: {label, index, y, low, high, points}, y with null where there is none. */
  function make({ title, text, x, series, xLabel, yLabel, isTime = false, isPoints = false, height = 300, xText, yText, heads, rows, names }) {
    const holder = el("div", { class: "canvas", role: "img", "aria-label": text });
    const readout = el("p", { class: "readout", "aria-hidden": "true" }, "Point at the chart to read it.");
    const key = el("ul", { class: "key" }, series.map((each) => {
      const swatch = el("span", { class: each.points ? "swatch hollow" : "swatch", "aria-hidden": "true" });
      swatch.dataset.index = each.index % COLOURS;
      return el("li", {}, swatch, each.label);
    }));
    const more = el("details", { class: "chart-data" }, el("summary", {}, "Data of this chart as a table"));
    more.addEventListener("toggle", () => {
      if (!more.open || more.children.length > 1) return;
      const columns = heads.map((head, i) => ({ title: head, value: (row) => row[i], isNumber: i >= heads.length - (series.length ? 1 : 0), isRowHead: i === 0, show: (row) => (Site.isNumber(row[i]) ? Site.significant(row[i]) : row[i] ?? Site.DASH) }));
      more.append(Table.make(columns, rows(), { caption: title, pageLength: 25 }).node);
    });
    const figure = el("figure", {}, el("figcaption", {}, title), key, holder, readout, more);
    const drawn = { figure, holder, plot: null, draw: null };
    drawn.draw = () => {
      if (drawn.plot) drawn.plot.destroy();
      const width = Math.max(240, holder.clientWidth);
      drawn.plot = new uPlot(options({ width, height: width < 480 ? Math.round(height * 0.9) : height, x, series, xLabel, yLabel, isTime, isPoints, xText, yText, readout, names }), columns(x, series), holder);
    };
    live.add(drawn);
    return drawn;
  }

  /* The values as uPlot wants them: x, each series, then the bounds of each band. */
  function columns(x, series) {
    const banded = series.filter((each) => each.low);
    return [x, ...series.map((each) => each.y), ...banded.flatMap((each) => [each.high, each.low])];
  }

  function options(chart) {
    const { series, isPoints } = chart;
    const ink = css("--dim"), line = css("--line");
    const banded = series.filter((each) => each.low);
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 22 };
    const drawn = series.map((each) => ({
      label: "series",
      stroke: colour(each.index),
      width: isPoints || each.points ? 0 : 2,
      dash: DASHES[Math.floor(each.index / COLOURS) % DASHES.length],
      paths: isPoints || each.points ? () => null : undefined,
      spanGaps: true,
      points: { show: isPoints || each.points || each.y.filter((value) => value !== null).length <= 60, size: isPoints ? 9 : 6, fill: each.points ? css("--page") : colour(each.index), stroke: colour(each.index), width: 1.5 },
    }));
    const bounds = banded.flatMap(() => [0, 1].map(() => ({ label: "bound", width: 0, stroke: "transparent", points: { show: false }, spanGaps: true })));
    return {
      width: chart.width,
      height: chart.height,
      legend: { show: false },
      cursor: { points: { size: 8 }, drag: { x: !isPoints, y: false } },
      padding: [10, 12, 0, 0],
      tzDate: (seconds) => uPlot.tzDate(new Date(1000 * seconds), "UTC"),
      scales: { x: { time: chart.isTime, range: chart.isTime ? undefined : padded }, y: { range: padded } },
      axes: [
        { ...axis, size: 32, label: chart.xLabel, space: 90, values: (u, ticks) => ticks.map(chart.xText || (chart.isTime ? (t) => Site.date(t).slice(0, 10) : Site.significant)) },
        { ...axis, label: chart.yLabel, size: 58, values: chart.yText && ((u, ticks) => ticks.map(chart.yText)) },
      ],
      series: [{ label: "x" }, ...drawn, ...bounds],
      bands: banded.map((each, i) => {
        const upper = 1 + series.length + 2 * i;
        return { series: [upper, upper + 1], fill: alpha(colour(each.index), 0.16) };
      }),
      hooks: { setCursor: [(u) => read(u, chart)] },
    };
  }

  function padded(u, low, high) {
    if (low === null || high === null) return [0, 1];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    return [low - room, high + room];
  }

  function read(u, { series, readout, names, xText, yText, isTime, x }) {
    const at = u.cursor.idx;
    if (at === null || at === undefined) return;
    const where = names ? names(at) : isTime ? Site.date(x[at]) : xText ? xText(x[at]) : Site.significant(x[at]);
    const values = series.filter((each) => Site.isNumber(each.y[at])).map((each) => `${each.label} ${yText ? yText(each.y[at]) : Site.significant(each.y[at])}`);
    readout.textContent = `${where}: ${values.join(", ") || Site.DASH}`;
  }

  /* Draw what is on the page, let go of what is not. */
  function refresh() {
    for (const drawn of [...live]) {
      if (drawn.figure.isConnected) drawn.draw();
      else if (drawn.plot) { drawn.plot.destroy(); live.delete(drawn); }
    }
  }
  let timer = 0;
  addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(refresh, 120); });
  document.addEventListener("themechange", refresh);

  return { make, refresh };
})();
