// The page's data and what the reader has chosen to see of it.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const ANALYSES = DATA.analyses;

const state = {
  axis: "steps", // or "tokens"
  hidden: new Set(), // indices of runs, then of analyses
  statistic: Object.keys(DATA.fields).find((name) => RUNS.some((run) => run.layers[name])) ?? null,
  log: {}, // by field or metric name, where it differs from the field's own
  position: Infinity, // on the axis; charts show each run at its last point up to here
  pins: [], // further positions kept beside it
  tables: false,
};

/** Indices of the runs on show. */
function shownRuns() {
  return RUNS.map((_, index) => index).filter((index) => !state.hidden.has(index));
}

/** Runs on show that have the field, in `kind`: "layers", "vectors" or "metrics". */
function runsWith(kind, name) {
  return shownRuns().filter((run) => RUNS[run][kind][name]);
}

/** Whether a field is drawn on a logarithmic axis; kind is "fields" or "metrics". */
function isLog(kind, name) {
  return state.log[`${kind}/${name}`] ?? DATA[kind][name].log;
}

function setLog(kind, name, value) {
  state.log[`${kind}/${name}`] = value;
}

/** Where the slider can stand: every point of the chosen statistic that a shown run has, in increasing order. */
function positions() {
  const all = new Set();
  for (const run of runsWith("layers", state.statistic))
    RUNS[run].layers[state.statistic][state.axis].forEach((at) => all.add(at));
  return [...all].sort((one, other) => one - other);
}

/** Index of the point that a series shows at a position. */
function pointAt(series, position) {
  return indexAtOrBefore(series[state.axis], position);
}

function axisTitle() {
  return state.axis === "steps" ? "step" : "tokens";
}

/** A sentence on series that are shown with fewer points than were written, empty if there are none. */
function thinningText(all) {
  const thinned = all.filter((series) => series.steps.length < series.total);
  if (!thinned.length) return "";
  const longest = thinned.reduce((one, other) => (other.total > one.total ? other : one));
  const [shown, total] = [longest.steps.length, longest.total].map((count) => count.toLocaleString("en-US"));
  return (
    `Long series are thinned (here ${shown} of ${total} steps): points are left out, never averaged, and the first, ` +
    "the last, every line’s extremes and the largest spikes between them stay."
  );
}
