// Statistics against depth and over training: lines by layer, heat maps, and small charts of everything.

const BY_DEPTH_HEIGHT = 300;
const SMALL_HEIGHT = 200;

function heatMapHeight(rows) {
  return Math.min(420, Math.max(210, rows * 16));
}

function statisticTitle(name) {
  return name === "out_var" ? "Variance by depth" : `${name} by depth`;
}

/** Lines of one statistic against layer, one for each run on show, at the position and at the kept ones. */
function depthSeries(name, withPins) {
  const positionsShown = withPins ? [...state.pins, state.position] : [state.position];
  return positionsShown.flatMap((position, index) =>
    runsWith("layers", name).map((run) => {
      const series = RUNS[run].layers[name];
      const point = pointAt(series, position);
      const at = formatPosition(series[state.axis][point], state.axis);
      return {
        name: RUNS[run].name,
        at,
        color: runColor(run),
        dash: runDash(run),
        dots: true,
        faint: index < positionsShown.length - 1,
        xs: series.values.map((_, layer) => layer),
        ys: series.values.map((values) => values[point]),
      };
    }),
  );
}

function depthTable(name, lines) {
  const rows = Math.max(...lines.map((line) => line.xs.length));
  return {
    caption: `${name} by layer`,
    head: ["layer", ...lines.map((line) => `${line.name}, ${line.at}`)],
    rows: Array.from({ length: rows }, (_, layer) => [layer, ...lines.map((line) => line.ys[layer])]),
  };
}

function depthFigure(parent, name, { id, title, height, withPins, ...rest }) {
  const range = runsWith("layers", name).map((run) => RUNS[run].layers[name].values);
  addFigure(parent, {
    id,
    title,
    uses: ["axis", "position", "log"],
    ...rest,
    subtitle: () => [...new Set(depthSeries(name, false).map((line) => line.at))].join(" · "),
    draw: (plot, width) => {
      const log = isLog("fields", name);
      const lines = depthSeries(name, withPins).map((line) => ({ ...line, name: `${line.name} · ${line.at}` }));
      drawLineChart(plot, width, {
        label: `${name} against layer`,
        height,
        formatX: (layer) => `layer ${layer}`,
        series: lines,
        x: { title: "layer", whole: true },
        // The scale of the whole run, so that moving through training moves the lines and not the axis.
        y: { log, title: withPins ? name : "", domain: withPins ? extent(range.flat(2), log) : null },
      });
    },
    table: () => depthTable(name, depthSeries(name, withPins)),
  });
}

/** Table of one run's statistic over training: a row for each point, a column for each layer. */
function trainingTable(run, name) {
  const series = RUNS[run].layers[name];
  return {
    caption: `${name} of ${RUNS[run].name} over training, by layer`,
    head: ["step", "tokens", ...series.values.map((_, layer) => `layer ${layer}`)],
    rows: series.steps.map((step, point) => [
      step.toLocaleString("en-US"),
      series.tokens[point],
      ...series.values.map((values) => values[point]),
    ]),
  };
}

/** Each column of a heat map reaches half-way to its neighbours. */
function columnsOf(xs) {
  const middle = (index) => (xs[index] + xs[index + 1]) / 2;
  return xs.map((x, index) => ({
    from: index === 0 ? x : middle(index - 1),
    to: index === xs.length - 1 ? x : middle(index),
    name: formatPosition(x, state.axis),
  }));
}

function sharedDomain(name) {
  const all = runsWith("layers", name).flatMap((run) => RUNS[run].layers[name][state.axis]);
  const [low, high] = extent(all, false);
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function sharedExtent(name, log) {
  return extent(
    runsWith("layers", name).flatMap((run) => RUNS[run].layers[name].values.flat()),
    log,
  );
}

function heatMapFigure(parent, run, name) {
  const series = RUNS[run].layers[name];
  const rows = series.values.length;
  addFigure(parent, {
    id: `heat-${run}`,
    title: RUNS[run].name,
    uses: ["axis", "position", "log"],
    subtitle: () => `${name}, layer × ${axisTitle()}`,
    draw: (plot, width) => {
      const log = isLog("fields", name);
      const range = sharedExtent(name, log);
      if (!range) return plot.replaceChildren(html("p", { class: "empty" }, "No value that this scale can show."));
      const scale = makeScale(range, [0, 1], log);
      return drawHeatMap(plot, width, {
        label: `Heat map of ${name} by layer and ${axisTitle()} of ${RUNS[run].name}`,
        height: heatMapHeight(rows),
        rows,
        x: { title: axisTitle(), domain: sharedDomain(name) },
        columns:
          series.steps.length > 1
            ? columnsOf(series[state.axis])
            : [
                {
                  from: sharedDomain(name)[0],
                  to: sharedDomain(name)[1],
                  name: formatPosition(series[state.axis][0], state.axis),
                },
              ],
        value: (column, row) => (scale.drawable(series.values[row][column]) ? series.values[row][column] : null),
        text: formatValue,
        color: (value) => heatColor(scale(value)),
        key: { low: formatValue(range[0]), high: formatValue(range[1]), color: heatColor },
        mark: series[state.axis][pointAt(series, state.position)],
      });
    },
    table: () => trainingTable(run, name),
  });
}

function byLayerFigure(parent, run, name) {
  const series = RUNS[run].layers[name];
  const last = Math.max(1, series.values.length - 1);
  addFigure(parent, {
    id: `layers-${run}`,
    title: RUNS[run].name,
    uses: ["axis", "log"],
    subtitle: () => `${name}, one line a layer`,
    draw: (plot, width) => {
      const log = isLog("fields", name);
      const chart = html("div");
      drawLineChart(chart, width, {
        label: `${name} over training of ${RUNS[run].name}, one line a layer`,
        height: BY_DEPTH_HEIGHT,
        formatX: (at) => formatPosition(at, state.axis),
        series: series.values.map((ys, layer) => ({
          name: `layer ${layer}`,
          color: layerColor(layer / last),
          xs: series[state.axis],
          ys,
        })),
        x: { title: axisTitle(), domain: sharedDomain(name) },
        y: { log, title: name, domain: sharedExtent(name, log) },
      });
      plot.replaceChildren(
        chart,
        makeKey({ low: "layer 0", high: `layer ${series.values.length - 1}`, color: layerColor }),
      );
    },
    table: () => trainingTable(run, name),
  });
}

/** The chosen statistic: all runs by depth, then each run as heat map and as lines. */
function buildDepth() {
  const [byDepth, heatMaps, byLayer] = ["by-depth", "heat-maps", "by-layer"].map((id) => document.getElementById(id));
  for (const parent of [byDepth, heatMaps, byLayer]) clearFigures(parent);
  const name = state.statistic;
  const runs = name ? runsWith("layers", name) : [];
  document.getElementById("depth").hidden = name === null;
  const described = name ? DATA.fields[name].meaning : "";
  const thinned = thinningText(runs.map((run) => RUNS[run].layers[name]));
  document.getElementById("statistic-meaning").textContent = [described && `${name}: ${described}.`, thinned]
    .filter(Boolean)
    .join(" ");
  if (!runs.length) return;
  depthFigure(byDepth, name, {
    id: "depth-chart",
    title: statisticTitle(name),
    height: BY_DEPTH_HEIGHT,
    withPins: true,
  });
  for (const run of runs) {
    heatMapFigure(heatMaps, run, name);
    byLayerFigure(byLayer, run, name);
  }
}

/** A small chart for every statistic, in the order of their groups. */
function buildAll(openStatistic) {
  const parent = document.getElementById("all-charts");
  clearFigures(parent);
  const names = Object.keys(DATA.fields).filter((name) => runsWith("layers", name).length);
  document.getElementById("all").hidden = names.length === 0;
  for (const name of names) {
    depthFigure(parent, name, {
      id: `all-${name}`,
      title: name,
      kicker: DATA.fields[name].group,
      height: SMALL_HEIGHT,
      withPins: false,
      log: ["fields", name],
      open: () => openStatistic(name),
    });
  }
}
