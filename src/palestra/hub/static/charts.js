"use strict";
// Curves and ledgers. Every chart also has its numbers as a table, and a sentence for those who do not see it.
const Charts = (() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (i) => style(`--c${i % 8}`);
  const state = { byTime: false, marks: [], plots: new Map() };

  const format = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 0.001) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  };
  const clock = (seconds) => {
    if (seconds === null || seconds === undefined) return "–";
    const s = Math.round(seconds);
    if (Math.abs(s) < 60) return `${s} s`;
    if (Math.abs(s) < 3600) return `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")} min`;
    return `${Math.floor(s / 3600)}:${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} h`;
  };

  const matches = (pattern, name) => {
    if (!pattern.includes("*")) return pattern === name;
    const [head, tail] = [pattern.slice(0, pattern.indexOf("*")), pattern.slice(pattern.indexOf("*") + 1)];
    return name.length >= head.length + tail.length && name.startsWith(head) && name.endsWith(tail);
  };

  // One x for all: series have values where they have any.
  const joined = (series, origin) => {
    const xs = new Set();
    const maps = series.map((one) => {
      const known = new Map();
      one.steps.forEach((step, i) => {
        const x = state.byTime ? one.times[i] - (one.origin ?? origin) : step;
        xs.add(x);
        known.set(x, one.values[i]);
      });
      return known;
    });
    const x = [...xs].sort((a, b) => a - b);
    return [x, ...maps.map((known) => x.map((at) => (known.has(at) ? known.get(at) : null)))];
  };

  const drawMarks = (origin) => (plot) => {
    const shown = new Set([...document.querySelectorAll("#marks input:checked")].map((box) => box.value));
    const context = plot.ctx;
    const colors = { restart: style("--bad"), warning: style("--warn"), publish: style("--c7"), checkpoint: style("--c2") };
    context.save();
    context.beginPath();
    context.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    context.clip();
    for (const mark of state.marks) {
      if (!shown.has(mark.kind)) continue;
      const x = Math.round(plot.valToPos(state.byTime ? mark.time - origin : mark.step, "x", true));
      context.strokeStyle = colors[mark.kind];
      context.globalAlpha = mark.kind === "publish" ? 0.35 : 0.8;
      context.lineWidth = devicePixelRatio;
      context.setLineDash(mark.kind === "publish" ? [] : [4 * devicePixelRatio, 3 * devicePixelRatio]);
      context.beginPath();
      context.moveTo(x, plot.bbox.top);
      context.lineTo(x, plot.bbox.top + plot.bbox.height);
      context.stroke();
    }
    context.restore();
  };

  const axes = (xFormat) => {
    const base = { stroke: style("--dim"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 }, font: "11px system-ui, sans-serif" };
    return [
      { ...base, values: (_, ticks) => ticks.map(xFormat), size: 28, space: 60 },
      { ...base, values: (_, ticks) => ticks.map(format), size: 54, space: 32 },
    ];
  };

  const sentence = (label, series) => {
    const said = series.map((one) => {
      const n = one.values.length;
      return `${one.label}: ${format(one.values[0])} at ${one.steps[0]}, ${format(one.values[n - 1])} at ${one.steps[n - 1]}, ` +
        `lowest ${format(Math.min(...one.values))}, highest ${format(Math.max(...one.values))}`;
    });
    return `${label}. ${said.join(". ")}`;
  };

  const fillTable = (figure, series) => {
    const place = figure.querySelector(".numbers .scroll");
    const details = figure.querySelector(".numbers");
    const fill = () => {
      if (!details.open) return;
      const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
      const table = document.createElement("table");
      const row = (cells, kind, section) => {
        const tr = section.insertRow();
        for (const text of cells) {
          const cell = document.createElement(kind);
          cell.textContent = text;
          cell.className = "num";
          tr.append(cell);
        }
      };
      row(["step", ...series.map((one) => one.label)], "th", table.createTHead());
      const body = table.createTBody();
      const known = series.map((one) => new Map(one.steps.map((step, i) => [step, one.values[i]])));
      for (const step of steps) row([step, ...known.map((map) => (map.has(step) ? String(map.get(step)) : "–"))], "td", body);
      place.replaceChildren(table);
    };
    details.ontoggle = fill;
    fill();
  };

  // What all names of a chart begin and end with says nothing in its legend.
  const shortened = (series) => {
    if (series.length < 2) return series;
    const names = series.map((one) => one.label);
    let head = names[0].lastIndexOf("/") + 1;
    while (head > 0 && !names.every((name) => name.startsWith(names[0].slice(0, head)))) head = names[0].lastIndexOf("/", head - 2) + 1;
    const tail = names.every((name) => name.endsWith("_tasks")) ? "_tasks".length : 0;
    return series.map((one) => ({ ...one, label: one.label.slice(head, one.label.length - tail) }));
  };

  const draw = (figure, all, origin) => {
    const series = shortened(all);
    const plotPlace = figure.querySelector(".plot");
    figure.hidden = series.length === 0;
    if (figure.hidden) return;
    plotPlace.setAttribute("aria-label", sentence(figure.dataset.label, series));
    fillTable(figure, series);
    const key = series.map((one) => one.label).join("|") + state.byTime;
    const data = joined(series, origin);
    const known = state.plots.get(figure);
    if (known && known.key === key) {
      known.plot.setData(data);
      return;
    }
    if (known) known.plot.destroy();
    const few = data[0].length < 40;
    const options = {
      width: plotPlace.clientWidth || 380, height: 180,
      cursor: { sync: { key: "step" }, points: { size: 7 }, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: axes(state.byTime ? clock : format),
      series: [
        { label: state.byTime ? "time" : "step", value: (_, x) => (x === null ? "last" : state.byTime ? clock(x) : String(x)) },
        ...series.map((one, i) => ({
          label: one.label, stroke: color(one.color ?? i), width: 1.75, spanGaps: true, dash: one.dash,
          value: (plot, value, i, at) => format(at === null ? lastOf(plot.data[i]) : value), points: { show: one.values.length < 3 || (few && one.values.length < data[0].length), size: 5 },
        })),
      ],
      hooks: { draw: [drawMarks(origin)] },
    };
    state.plots.set(figure, { key, plot: new uPlot(options, data, plotPlace) });
  };

  const lastOf = (values) => { for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null) return values[i]; return null; };

  const originOf = (curves) => Math.min(...curves.flatMap((one) => one.times.slice(0, 1)));

  const update = async () => {
    const place = document.getElementById("charts");
    if (!place) return;
    if (place.dataset.compare) return compare(place);
    const [found, marks] = await Promise.all([fetchJson(place.dataset.curves), fetchJson(place.dataset.marks)]);
    state.marks = marks.marks;
    const origin = found.curves.length ? originOf(found.curves) : 0;
    for (const figure of place.querySelectorAll("[data-chart]")) {
      const patterns = figure.dataset.chart.split(",");
      const series = patterns.flatMap((pattern) => found.curves.filter((one) => matches(pattern, one.name)))
        .map((one) => ({ ...one, label: one.name }));
      draw(figure, series, origin);
    }
  };

  const compare = async (place) => {
    const found = await fetchJson(place.dataset.compare);
    for (const figure of place.querySelectorAll("[data-chart]")) {
      const patterns = figure.dataset.chart.split(",");
      const series = found.curves.flatMap((run, number) => run.curves
        .filter((one) => patterns.some((pattern) => matches(pattern, one.name)))
        .map((one, i) => ({ ...one, label: patterns.some((p) => p.includes("*")) ? `${run.run} ${one.name}` : run.run,
          color: number, dash: i ? [6, 3] : undefined, origin: originOf(run.curves) })));
      draw(figure, series, 0);
    }
    document.querySelectorAll(".swatch[data-series]").forEach((swatch) => { swatch.style.background = color(Number(swatch.dataset.series)); });
  };

  const fetchJson = async (address) => {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
    return answer.json();
  };

  // --- the time ledger as stacked shares

  const QUIET = new Set(["idle", "wait_for_batch", "wait_for_weights", "wait_for_load", "wait"]);
  // One cause has one colour, whatever process it is of.
  const COLORS = { generate: 0, forward_backward: 0, work: 0, warmup: 1, start: 7, load: 7, publish: 3, stage: 3, batch: 2, optimizer: 2, read_batch: 6, plan: 6, checkpoint: 4, probe: 4, export: 4, restart: 1, lost: 1 };
  const causeColor = (cause, number) => (QUIET.has(cause) ? style("--idle") : style(`--b${COLORS[cause] ?? (5 + number) % 8}`));

  const ledger = async () => {
    for (const place of document.querySelectorAll("[data-ledger]")) {
      const found = await fetchJson(place.dataset.ledger);
      const bands = found.bands.slice(0, Number(place.dataset.most));
      place.replaceChildren(...bands.map(() => document.createElement("figure")));
      bands.forEach((band, i) => drawBand(place.children[i], band));
    }
  };

  const drawBand = (figure, band) => {
    figure.className = "band";
    const caption = document.createElement("figcaption");
    const plotPlace = document.createElement("div");
    caption.textContent = band.process;
    plotPlace.className = "plot";
    plotPlace.setAttribute("role", "img");
    const causes = Object.keys(band.seconds);
    const main = causes.filter((cause) => band.seconds[cause] >= 0.005 * band.wall_s).slice(0, 8);
    const said = main.map((cause) => `${cause} ${Math.round((100 * band.seconds[cause]) / band.wall_s)} %`).join(", ");
    plotPlace.setAttribute("aria-label", `Time of ${band.process}: ${said}`);
    figure.append(caption, plotPlace);
    const busy = [...main.filter((cause) => !QUIET.has(cause)), ...main.filter((cause) => QUIET.has(cause))];
    const x = band.times.slice(0, -1).map((time) => time - band.times[0]);
    x.push(band.times[band.times.length - 1] - band.times[0]);
    let upto = x.map(() => 0);
    const stacked = busy.map((cause) => {
      const shares = [...band.shares[cause], band.shares[cause][band.shares[cause].length - 1]];
      upto = upto.map((sum, i) => sum + shares[i]);
      return upto;
    });
    const order = [...busy.keys()].reverse(); // the highest is drawn first, the others over it
    const stepped = uPlot.paths.stepped({ align: 1 });
    const options = {
      width: plotPlace.clientWidth || 600, height: 112,
      cursor: { sync: { key: "ledger" }, points: { show: false }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { range: [0, 1] } },
      axes: (() => { const both = axes(clock); both[1].values = (_, ticks) => ticks.map((tick) => `${Math.round(100 * tick)} %`); both[1].space = 24; return both; })(),
      series: [
        { label: "time", value: (_, value) => clock(value) },
        ...order.map((number) => ({
          label: busy[number], fill: causeColor(busy[number], number), stroke: causeColor(busy[number], number), width: 0,
          paths: stepped, points: { show: false },
          value: (_, __, ___, at) => (at === null ? `${Math.round((100 * band.seconds[busy[number]]) / band.wall_s)} %`
            : `${Math.round(100 * (band.shares[busy[number]][at] ?? 0))} %`),
        })),
      ],
    };
    new uPlot(options, [x, ...order.map((number) => stacked[number])], plotPlace);
  };

  const redraw = () => {
    for (const { plot } of state.plots.values()) plot.destroy();
    state.plots.clear();
    return Promise.all([update(), ledger()]);
  };
  const resize = () => {
    for (const [figure, { plot }] of state.plots) plot.setSize({ width: figure.querySelector(".plot").clientWidth, height: 180 });
  };
  const toggleAxis = () => {
    state.byTime = !state.byTime;
    document.getElementById("axis")?.setAttribute("aria-pressed", String(state.byTime));
    return update();
  };
  const repaint = () => { for (const { plot } of state.plots.values()) plot.redraw(false); };

  return { update, ledger, redraw, resize, toggleAxis, repaint, format, fetchJson };
})();
