// Curves over training: loss, learning rate, gradient norm, throughput and whatever else a run wrote each step.

const DENSE_POINTS = 150;

/** One chart for each metric; the validation loss joins the training loss. */
function buildTraining() {
  const parent = document.getElementById("training-charts");
  clearFigures(parent);
  const present = Object.keys(DATA.metrics).filter((name) => runsWith("metrics", name).length);
  const joined = present.includes("loss") ? ["validation_loss"] : [];
  const shown = shownRuns().flatMap((run) => Object.values(RUNS[run].metrics));
  document.getElementById("training-thinning").textContent = thinningText(shown);
  for (const name of present.filter((entry) => !joined.includes(entry))) {
    metricFigure(parent, name, name === "loss" ? [name, ...joined] : [name]);
  }
}

function metricFigure(parent, name, fields) {
  const lines = () =>
    fields.flatMap((field) =>
      runsWith("metrics", field).map((run) => {
        const series = RUNS[run].metrics[field];
        const isMain = field === name;
        return {
          name: isMain ? RUNS[run].name : `${RUNS[run].name} validation`,
          color: runColor(run),
          dash: lineDash(isMain, run, series),
          dots: !isMain,
          thin: series.steps.length > DENSE_POINTS,
          xs: series[state.axis],
          ys: series.values,
          series,
        };
      }),
    );
  const { title, meaning } = DATA.metrics[name];
  addFigure(parent, {
    id: `metric-${name}`,
    title: name === "loss" ? "Loss" : title,
    uses: ["axis", "log"],
    log: ["metrics", name],
    subtitle: () =>
      (meaning || name) + (lines().length > runsWith("metrics", name).length ? ", dotted: validation" : ""),
    draw: (plot, width) =>
      drawLineChart(plot, width, {
        label: `${title} over training`,
        height: 230,
        formatX: (at) => formatPosition(at, state.axis),
        series: lines(),
        x: { title: axisTitle() },
        y: { log: isLog("metrics", name), title: "" },
      }),
    table: () => metricTable(title, lines()),
  });
}

/** Dashes tell runs apart where a line is smooth; in a dense, noisy one they would only add noise. */
function lineDash(isMain, run, series) {
  if (!isMain) return "1 4";
  return series.steps.length > DENSE_POINTS ? "" : runDash(run);
}

/** A row for each point that any run has there; a run's token count stands once where the runs agree on it. */
function metricTable(title, lines) {
  const points = lines.map((line) => new Map(line.series.steps.map((step, point) => [step, point])));
  const steps = [...new Set(lines.flatMap((line) => line.series.steps))].sort((one, other) => one - other);
  const tokensAt = (step) =>
    new Set(
      lines.map((line, index) => line.series.tokens[points[index].get(step)]).filter((count) => count !== undefined),
    );
  return {
    caption: `${title} over training`,
    head: ["step", "tokens", ...lines.map((line) => line.name)],
    rows: steps.map((step) => [
      step.toLocaleString("en-US"),
      [...tokensAt(step)].map(formatExact).join(" / "),
      ...lines.map((line, index) => line.series.values[points[index].get(step)]),
    ]),
  };
}
