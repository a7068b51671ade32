// A figure: title, buttons, chart and table; and the register that redraws those that a change concerns.

const figures = new Map(); // by id
const openTables = new Set(); // ids whose table was opened by hand

/**
 * Put a figure into `parent`.
 * spec: {id, title, uses: [state keys], draw(plot, width), table()}, and where they apply: kicker, subtitle(),
 *        log: [kind, name] for a Log button, open() for a title that is a button.
 */
function addFigure(parent, spec) {
  const title = spec.open
    ? html("button", { type: "button", class: "title-button" }, spec.title)
    : html("span", { class: "figure-title" }, spec.title);
  if (spec.open) title.addEventListener("click", spec.open);
  const kicker = spec.kicker ? html("span", { class: "figure-kicker" }, spec.kicker) : null;
  const subtitle = html("span", { class: "subtitle" });
  const buttons = html("span", { class: "figure-tools" });
  const plot = html("div", { class: "plot" });
  const tableBox = html("div", { class: "table-box" });
  const element = html(
    "figure",
    { id: spec.id },
    html("figcaption", {}, html("span", { class: "titles" }, kicker, title, subtitle), buttons),
    plot,
    tableBox,
  );
  const figure = { spec, plot, tableBox, subtitle };
  if (spec.log) {
    figure.logButton = html("button", { type: "button", class: "small log" }, "Log");
    figure.logButton.addEventListener("click", () => {
      setLog(...spec.log, !isLog(...spec.log));
      changed("log");
    });
    buttons.append(figure.logButton);
  }
  figure.tableButton = html("button", { type: "button", class: "small table" }, "Table");
  figure.tableButton.addEventListener("click", () => {
    if (!openTables.delete(spec.id)) openTables.add(spec.id);
    drawFigure(figure);
  });
  buttons.append(figure.tableButton);
  for (const button of buttons.children) button.setAttribute("aria-label", `${button.textContent}: ${spec.title}`);
  parent.append(element);
  figures.set(spec.id, figure);
}

/** Empty a container and forget its figures. */
function clearFigures(parent) {
  for (const element of parent.querySelectorAll("figure")) figures.delete(element.id);
  parent.replaceChildren();
}

function drawFigure(figure) {
  const { spec, plot, tableBox } = figure;
  const width = plot.clientWidth;
  if (width === 0) return;
  spec.draw(plot, width);
  figure.subtitle.textContent = spec.subtitle ? spec.subtitle() : "";
  const withTable = state.tables || openTables.has(spec.id);
  tableBox.replaceChildren(...(withTable ? [makeTable(spec.table())] : []));
  figure.tableButton.setAttribute("aria-pressed", String(withTable));
  if (figure.logButton) figure.logButton.setAttribute("aria-pressed", String(isLog(...spec.log)));
}

const pending = new Set();

/** Redraw, before the next frame, every figure that uses one of these parts of the state ("all" for every figure). */
function changed(...keys) {
  if (pending.size === 0) requestAnimationFrame(redraw);
  keys.forEach((key) => pending.add(key));
}

function redraw() {
  const keys = new Set(pending);
  pending.clear();
  hideTooltip();
  for (const figure of figures.values()) {
    if (keys.has("all") || figure.spec.uses.some((key) => keys.has(key))) drawFigure(figure);
  }
}
