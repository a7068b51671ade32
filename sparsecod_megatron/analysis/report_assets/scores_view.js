// What analyses found: their numbers with intervals, and every figure, those of several models in one chart.

const SCORE_HEIGHT = 250;
const NO_POINTS_OFF_LAYERS = 40; // from so many points on a curve shows no dots

/** Indices of the analyses on show; they follow the runs in colours and toggles. */
function shownAnalyses() {
  return ANALYSES.map((_, index) => index).filter((index) => !state.hidden.has(RUNS.length + index));
}

/** "0.35 [0.32, 0.37]". */
function intervalText(value, low, high) {
  const ends = low === null || low === undefined ? "" : ` [${formatValue(low)}, ${formatValue(high)}]`;
  return formatValue(value) + ends;
}

/** A number's text in the table: what is no number is shown as it is. */
function scoreText(entry) {
  if (!entry) return MISSING;
  if (typeof entry.value === "boolean") return entry.value ? "yes" : "no";
  return typeof entry.value === "string" ? entry.value : intervalText(entry.value, entry.low, entry.high);
}

function buildScores() {
  const shown = shownAnalyses();
  const figuresBox = document.getElementById("score-figures");
  clearFigures(figuresBox);
  document.getElementById("scores").hidden = shown.length === 0;
  if (!shown.length) return;
  fillScoreTable(shown);
  const names = [...new Set(shown.flatMap((index) => ANALYSES[index].figures.map((figure) => figure.name)))];
  for (const name of names) addScoreFigures(figuresBox, name, shown);
}

function fillScoreTable(shown) {
  const key = (entry) => `${entry.score} · ${entry.name}`;
  const byAnalysis = shown.map((index) => new Map(ANALYSES[index].values.map((entry) => [key(entry), entry])));
  const names = [...new Set(byAnalysis.flatMap((entries) => [...entries.keys()]))];
  document.getElementById("score-table").replaceChildren(
    makeTable({
      caption: "Each score with its 95 % interval over sequences",
      head: ["", ...shown.map((index) => ANALYSES[index].name)],
      rows: names.map((name) => [name, ...byAnalysis.map((entries) => scoreText(entries.get(name)))]),
    }),
  );
}

/** The figures of one name: a heat map for each analysis, other kinds with all analyses in one. */
function addScoreFigures(parent, name, shown) {
  const found = shown
    .map((analysis) => ({ analysis, figure: ANALYSES[analysis].figures.find((figure) => figure.name === name) }))
    .filter((entry) => entry.figure);
  if (found[0].figure.kind === "heat_map") for (const entry of found) scoreHeatMap(parent, entry, found);
  else if (found[0].figure.kind === "bars") scoreBars(parent, found);
  else scoreLines(parent, found);
}

function scoreColor(analysis) {
  return runColor(RUNS.length + analysis);
}

function scoreHeatMap(parent, { analysis, figure }, found) {
  const limits = extent(
    found.flatMap((entry) => entry.figure.values.flat()),
    false,
  ) ?? [0, 1];
  const size = Math.max(Math.abs(limits[0]), Math.abs(limits[1])) || 1;
  const [low, high] = figure.diverging ? [-size, size] : limits;
  const color = (share) => (figure.diverging ? balanceColor(2 * share - 1) : heatColor(share));
  const columns = Math.max(...figure.values.map((row) => row.length));
  addFigure(parent, {
    id: `score-${figure.name}-${analysis}`,
    title: figure.title,
    uses: [],
    subtitle: () => ANALYSES[analysis].name,
    draw: (plot, width) =>
      drawHeatMap(plot, width, {
        label: `${figure.title}, ${ANALYSES[analysis].name}`,
        height: heatMapHeight(figure.values.length),
        rows: figure.values.length,
        rowLabel: figure.row_label,
        x: { title: figure.column_label, domain: [-0.5, columns - 0.5], whole: true },
        columns: Array.from({ length: columns }, (_, column) => ({
          from: column - 0.5,
          to: column + 0.5,
          name: `${figure.column_label} ${column}`,
        })),
        value: (column, row) => figure.values[row][column],
        text: formatValue,
        color: (value) => color((value - low) / (high - low || 1)),
        key: { low: formatValue(low), high: formatValue(high), color },
      }),
    table: () => ({
      caption: `${figure.title}, ${ANALYSES[analysis].name}`,
      head: [
        `${figure.row_label} \\ ${figure.column_label}`,
        ...Array.from({ length: columns }, (_, column) => String(column)),
      ],
      rows: figure.values.map((row, index) => [index, ...row]),
    }),
  });
}

function scoreBars(parent, found) {
  const { figure } = found[0];
  const series = found.map((entry) => ({
    name: ANALYSES[entry.analysis].name,
    color: scoreColor(entry.analysis),
    values: entry.figure.values,
    low: entry.figure.low,
    high: entry.figure.high,
  }));
  const head = series.flatMap((one) => [one.name, "low", "high"]);
  const count = Math.max(...series.map((one) => one.values.length));
  scoreChart(parent, figure, drawBarChart, { series }, head, () =>
    Array.from({ length: count }, (_, index) => [
      index,
      ...series.flatMap((one) => [one.values[index], one.low[index], one.high[index]]),
    ]),
  );
}

function scoreLines(parent, found) {
  const { figure } = found[0];
  const series = found.flatMap((entry) =>
    Object.entries(entry.figure.series).map(([label, ys], index) => {
      const order = entry.figure.x.map((_, point) => point).sort((a, b) => entry.figure.x[a] - entry.figure.x[b]);
      const several = Object.keys(entry.figure.series).length > 1;
      return {
        name: ANALYSES[entry.analysis].name + (several ? ` · ${label}` : ""),
        color: scoreColor(entry.analysis),
        dash: DASHES[(several ? index : entry.analysis) % DASHES.length],
        dots: ys.length < NO_POINTS_OFF_LAYERS,
        xs: order.map((point) => entry.figure.x[point]),
        ys: order.map((point) => ys[point]),
      };
    }),
  );
  const whole = found.every((entry) => entry.figure.x.every(Number.isInteger));
  const head = series.map((one) => one.name);
  scoreChart(parent, figure, drawLineChart, { series, whole }, head, () => {
    const xs = [...new Set(series.flatMap((one) => one.xs))].sort((a, b) => a - b);
    return xs.map((x) => [formatExact(x), ...series.map((one) => one.ys[one.xs.indexOf(x)])]);
  });
}

/** A chart of numbers against the figure's x, and its table. */
function scoreChart(parent, figure, drawChart, { series, whole }, head, rows) {
  addFigure(parent, {
    id: `score-${figure.name}`,
    title: figure.title,
    uses: [],
    draw: (plot, width) =>
      drawChart(plot, width, {
        label: figure.title,
        height: SCORE_HEIGHT,
        formatX: (at) => `${figure.x_label} ${formatValue(at)}`,
        series,
        x: { title: figure.x_label, whole },
        y: { title: figure.y_label },
        line: figure.line,
      }),
    table: () => ({ caption: figure.title, head: [figure.x_label, ...head], rows: rows() }),
  });
}
