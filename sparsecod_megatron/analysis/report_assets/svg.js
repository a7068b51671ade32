// Elements, and the frame that every chart stands in: grid, ticks and axis titles.

/** An HTML element with attributes, properties in `on…` excepted, and children. */
function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const MARGIN = { left: 58, right: 12, top: 10, bottom: 38 };

/**
 * The frame of a chart.
 * size: {width, height}; x, y: {domain, log, title, ticks (optional labels for whole numbers only)}.
 * Returns {root, inner, x, y}: the svg element, the group to draw in, and the scales to pixels.
 */
function makeFrame(size, xAxis, yAxis) {
  const x = makeScale(xAxis.domain, [MARGIN.left, size.width - MARGIN.right], Boolean(xAxis.log));
  const y = makeScale(yAxis.domain, [size.height - MARGIN.bottom, MARGIN.top], Boolean(yAxis.log));
  const grid = svg("g", { class: "grid-lines", "aria-hidden": "true" });
  const labels = svg("g", { class: "axis-labels", "aria-hidden": "true" });
  for (const tick of wholeIf(xAxis, x.ticks(Math.max(2, size.width / 75)))) {
    grid.append(svg("line", { x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: size.height - MARGIN.bottom }));
    labels.append(
      svg("text", { x: x(tick), y: size.height - MARGIN.bottom + 15, "text-anchor": "middle" }, formatTick(tick)),
    );
  }
  for (const tick of wholeIf(yAxis, y.ticks(Math.max(2, size.height / 45)))) {
    grid.append(svg("line", { x1: MARGIN.left, x2: size.width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    labels.append(svg("text", { x: MARGIN.left - 7, y: y(tick) + 3.5, "text-anchor": "end" }, formatTick(tick)));
  }
  const middle = (MARGIN.left + size.width - MARGIN.right) / 2;
  labels.append(
    svg("text", { class: "axis-title", x: middle, y: size.height - 5, "text-anchor": "middle" }, xAxis.title),
  );
  const inner = svg("g");
  const root = svg(
    "svg",
    { width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}` },
    grid,
    labels,
    inner,
  );
  if (yAxis.title) {
    const at = (MARGIN.top + size.height - MARGIN.bottom) / 2;
    labels.append(
      svg(
        "text",
        { class: "axis-title", transform: `translate(12 ${at}) rotate(-90)`, "text-anchor": "middle" },
        yAxis.title,
      ),
    );
  }
  return { root, inner, x, y };
}

function wholeIf(axis, ticks) {
  return axis.whole ? ticks.filter(Number.isInteger) : ticks;
}

/** The one tooltip of the page; `rows` are {color, name, value}, and the same words go to screen readers if asked. */
function showTooltip(pageX, pageY, head, rows, announce) {
  const tooltip = document.getElementById("tooltip");
  const list = html("dl");
  for (const row of rows) {
    const name = html("dt", {}, row.name);
    if (row.color) {
      const swatch = html("span", { class: "swatch" });
      swatch.style.background = row.color;
      name.prepend(swatch);
    }
    list.append(html("div", { class: row.strong ? "strong" : null }, name, html("dd", {}, row.value)));
  }
  tooltip.replaceChildren(html("p", {}, head), list);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const right = pageX + 16 + width > window.scrollX + document.documentElement.clientWidth;
  tooltip.style.left = `${Math.max(window.scrollX + 4, right ? pageX - width - 16 : pageX + 16)}px`;
  tooltip.style.top = `${Math.max(window.scrollY + 4, pageY - height - 12)}px`;
  if (announce) {
    document.getElementById("announcer").textContent =
      `${head}: ${rows.map((row) => `${row.name} ${row.value}`).join(", ")}`;
  }
}

function hideTooltip() {
  document.getElementById("tooltip").hidden = true;
}
