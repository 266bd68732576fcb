"use strict";
// Draws the run in the page: tiles, charts over the steps, tables. Works offline and uses only uPlot.
const run = JSON.parse(document.getElementById("run").textContent);
const root = document.documentElement;
const color = name => getComputedStyle(root).getPropertyValue(name).trim();

function element(tag, parent, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

function card(parent, title) {
  const made = element("div", parent, undefined, "card");
  if (title) element("h2", made, title);
  return made;
}

const mebibyte = 1024 * 1024;
const short = (value, digits = 5) => value == null ? "-" : Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
  ? value.toExponential(Math.min(digits, 3) - 1) : String(Number(value.toPrecision(digits)));

// The mean of about the last 20 steps, of fewer at the start; steps without a number are skipped.
function smoothed(values) {
  let mean = null, count = 0;
  return values.map(value => {
    if (value == null) return mean;
    count += 1;
    mean = mean == null ? value : mean + Math.max(0.05, 1 / count) * (value - mean);
    return mean;
  });
}

// Refused steps must not flatten the others: they are drawn separately, at most as high as the highest of the others.
const refused = new Set(run.events.filter(event => event.kind === "refused").map(event => event.step));

function applied_only(column) {
  return column.map((value, i) => refused.has(run.columns.step[i]) ? null : value);
}

function refused_only(column) {
  const top = applied_only(column).reduce((most, value) => value == null ? most : Math.max(most, value), -Infinity);
  return column.map((value, i) => {
    if (!refused.has(run.columns.step[i])) return null;
    return top === -Infinity ? value : Math.min(value == null ? top : value, top);
  });
}

const columns = run.columns;
const in_mebibytes = values => values.map(value => value == null ? null : value / mebibyte);
const has = values => values.some(value => value != null);
const charts = [
  { id: "loss", title: "Loss", note: "Mean of the batch before its step; smoothed over about 20 steps. Refused steps are drawn at most as high as the others.", series: [
    { label: "loss", values: applied_only(columns.loss), color: "--faint", width: 1 },
    { label: "smoothed", values: smoothed(applied_only(columns.loss)), color: "--a" },
    { label: "refused", values: refused_only(columns.loss), color: "--bad", points: true }] },
  { id: "learning_rate", title: "Learning rate and batch", series: [
    { label: "learning rate", values: columns.learning_rate, color: "--a" },
    { label: "batch", values: columns.batch, color: "--b", scale: "batch" }] },
  { id: "gradient_norm", title: "Gradient norm", note: "Of the batch's mean gradient, before clipping.", log: true, series: [
    { label: "gradient norm", values: applied_only(columns.gradient_norm), color: "--a" },
    { label: "refused", values: refused_only(columns.gradient_norm), color: "--bad", points: true }] },
  { id: "noise", title: "Gradient noise", log: true, of_the_first: true,
    note: "Noise batch: the batch at which the noise is as large as the gradient, a proxy for the largest useful batch; undefined where the noise hides the gradient.",
    series: [
    { label: "noise batch (samples)", values: columns.noise_batch, color: "--a" },
    { label: "batch", values: columns.batch, color: "--b" }] },
  { id: "memory", title: "Memory (MiB)", series: [
    { label: "measured peak", values: in_mebibytes(columns.peak_bytes), color: "--a" },
    { label: "predicted peak", values: in_mebibytes(columns.predicted_peak_bytes), color: "--b", dash: [6, 4] },
    ...(run.budget_bytes ? [{ label: "budget", values: columns.step.map(() => run.budget_bytes / mebibyte), color: "--bad", width: 1 }] : [])] },
  { id: "time", title: "Time per step (s)", series: [
    { label: "whole step", values: columns.step_seconds, color: "--a", width: 1 },
    { label: "optimizer's update", values: columns.update_seconds, color: "--c", width: 1 },
    { label: "predicted", values: columns.predicted_step_seconds, color: "--b", dash: [6, 4] }] },
];

// Lines over an axis other than the steps, such as the loss along a direction.
const line_colors = ["--a", "--b", "--c", "--bad"];
for (const [i, curves] of run.curves.entries()) {
  charts.push({ id: "curves-" + i, title: curves.title, note: curves.note, x: curves.x, along: curves.along,
    series: curves.lines.map((line, j) => ({ label: line.name, values: line.y, color: line_colors[j % line_colors.length] })) });
}

let drawn = [];

function draw(chart, place) {
  const series = chart.series.filter(each => has(each.values));
  const positive = series.every(each => each.values.every(value => value == null || value > 0));
  const scales = { x: { time: false }, y: chart.log && positive ? { distr: 3 } : {} };
  if (series.some(each => each.scale)) scales.batch = {};
  const axis = extra => ({ stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, ...extra });
  const axes = [axis({}), axis({ size: 64, values: (plot, ticks) => ticks.map(tick => tick == null ? "" : short(tick, 3)) })];
  if (scales.batch) axes.push(axis({ side: 1, scale: "batch", grid: { show: false } }));
  const options = {
    width: place.clientWidth, height: 240, scales, axes, cursor: chart.x ? {} : { sync: { key: "steps" } },
    series: [{ label: chart.along || "step" }, ...series.map(each => ({
      label: each.label, scale: each.scale || "y", stroke: color(each.color), width: each.width || 2, dash: each.dash, spanGaps: true,
      value: (plot, value) => short(value),
      ...(each.points ? { paths: () => null, points: { show: true, size: 7, fill: color(each.color) } } : { points: { show: columns.step.length < 3 } }),
    }))],
  };
  place.replaceChildren();
  drawn.push([new uPlot(options, [chart.x || columns.step, ...series.map(each => each.values)], place), place]);
}

function draw_all() {
  for (const [plot] of drawn) plot.destroy();
  drawn = [];
  for (const chart of charts) if (chart.place) draw(chart, chart.place);
}

function make_charts() {
  const parent = document.getElementById("charts");
  for (const chart of charts) {
    if (!(chart.of_the_first ? chart.series.slice(0, 1) : chart.series).some(each => has(each.values))) continue;
    const place = card(parent, chart.title);
    place.id = "chart-" + chart.id;
    chart.place = element("div", place);
    if (chart.note) element("p", place, chart.note, "note");
  }
}

function make_table(title, heading, rows, note) {
  if (rows.length === 0) return;
  const place = card(document.getElementById("tables"), title);
  const table = element("table", element("div", place, undefined, "scroll"));
  const head = element("tr", element("thead", table));
  for (const name of heading) element("th", head, name);
  const body = element("tbody", table);
  for (const row of rows) {
    const line = element("tr", body);
    for (const cell of row) element("td", line, cell, String(cell).length > 40 ? "long" : undefined);
  }
  if (note) element("p", place, note, "note");
}

function set_theme(theme) {
  root.dataset.theme = theme;
  draw_all();
}

if (run.banner) {
  const banner = document.getElementById("banner");
  banner.textContent = run.banner;
  banner.hidden = false;
}
for (const [name, value] of run.tiles) {
  const tile = element("div", document.getElementById("tiles"), undefined, "card tile");
  element("div", tile, value, "value");
  element("div", tile, name, "name");
}
make_charts();
make_table("Actions of the guard", ["step", "what", "why"], run.events.map(event => [event.step, event.kind, event.text]),
  run.events_left_out ? `${run.events_left_out} more are in metrics.jsonl.` : undefined);
for (const table of run.tables) make_table(table.title, table.heading, table.rows, table.note);
make_table("Settings", ["name", "value"], run.settings);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
set_theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => set_theme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => set_theme(root.dataset.theme === "dark" ? "light" : "dark"));
let pending = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => { for (const [plot, place] of drawn) plot.setSize({ width: place.clientWidth, height: 240 }); });
});
