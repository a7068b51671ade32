// Load of the experts: one heat map for each run that has routers.

const BALANCE_RANGE = 2; // powers of two: the colours end at a quarter and at four times the fair share

/** Experts by layers, coloured by load against an equal share of the layer. */
function buildRouter() {
  const parent = document.getElementById("router-maps");
  clearFigures(parent);
  const names = Object.keys(DATA.fields).filter((name) => runsWith("vectors", name).length);
  document.getElementById("router").hidden = names.length === 0;
  for (const name of names) for (const run of runsWith("vectors", name)) routerFigure(parent, run, name);
}

function routerFigure(parent, run, name) {
  const series = RUNS[run].vectors[name];
  const [rows, entries] = [series.values[0].length, series.values[0][0].length];
  const point = () => pointAt(series, state.position);
  const load = (entry, layer) => series.values[point()][layer][entry];
  const balance = (value, layer) => {
    const mean = series.values[point()][layer].reduce((sum, entry) => sum + (entry ?? 0), 0) / entries;
    return mean ? value / mean : 0;
  };
  const signed = (ratio) => Math.min(1, Math.max(-1, ratio > 0 ? Math.log2(ratio) / BALANCE_RANGE : -1));
  addFigure(parent, {
    id: `router-${name}-${run}`,
    title: RUNS[run].name,
    uses: ["axis", "position"],
    subtitle: () => `${name}, ${formatPosition(series[state.axis][point()], state.axis)}`,
    draw: (plot, width) =>
      drawHeatMap(plot, width, {
        label: `Heat map of ${name} by layer and expert of ${RUNS[run].name}`,
        height: heatMapHeight(rows),
        rows,
        x: { title: "expert", domain: [-0.5, entries - 0.5], whole: true },
        columns: Array.from({ length: entries }, (_, entry) => ({
          from: entry - 0.5,
          to: entry + 0.5,
          name: `expert ${entry}`,
        })),
        value: (column, row) => (load(column, row) === null ? null : balance(load(column, row), row)),
        text: (ratio, column, row) =>
          ratio === null ? MISSING : `${formatValue(load(column, row))} (${ratio.toFixed(2)}× equal share)`,
        color: (ratio) => balanceColor(signed(ratio)),
        key: { low: "¼ ×", high: "4 × equal share", color: (share) => balanceColor(2 * share - 1) },
      }),
    table: () => ({
      caption: `${name} of ${RUNS[run].name} at ${formatPosition(series[state.axis][point()], state.axis)}`,
      head: ["layer", ...Array.from({ length: entries }, (_, entry) => `expert ${entry}`)],
      rows: series.values[point()].map((loads, layer) => [layer, ...loads]),
    }),
  });
}
