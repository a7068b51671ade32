// Coloured cells, columns by layers: a canvas for the cells; over it, in SVG, the frame and the chosen cell's outline.

/**
 * Draw into `host`, `width` pixels wide.
 * spec: {label, height, x: {title, domain, whole}, columns: [{from, to, name}], rows, value(column, row),
 *        text(value, column, row), color(value), key: {low, high, color(share)}, mark (optional position)}.
 * Rows count upwards from 0 and are layers, unless `rowLabel` says what they are.
 */
function drawHeatMap(host, width, spec) {
  const frame = makeFrame({ width, height: spec.height }, spec.x, {
    domain: [-0.5, spec.rows - 0.5],
    title: spec.rowLabel ?? "layer",
    whole: true,
  });
  const ratio = window.devicePixelRatio || 1;
  const canvas = html("canvas", {
    width: Math.round(width * ratio),
    height: Math.round(spec.height * ratio),
    "aria-hidden": "true",
  });
  const context = canvas.getContext("2d");
  // Cells end on whole device pixels: no seams between them.
  const pixel = (value) => Math.round(value * ratio);
  spec.columns.forEach((column, index) => {
    const [left, right] = [pixel(frame.x(column.from)), pixel(frame.x(column.to))];
    for (let row = 0; row < spec.rows; row += 1) {
      const value = spec.value(index, row);
      if (value === null || value === undefined) continue;
      const [top, bottom] = [pixel(frame.y(row + 0.5)), pixel(frame.y(row - 0.5))];
      context.fillStyle = spec.color(value);
      context.fillRect(left, top, Math.max(1, right - left), bottom - top);
    }
  });
  const outline = svg("rect", { class: "cell-outline", visibility: "hidden" });
  if (spec.mark !== undefined) {
    const x = Math.min(frame.x.domain[1], Math.max(frame.x.domain[0], spec.mark));
    frame.inner.append(
      svg("line", {
        class: "position-mark",
        x1: frame.x(x),
        x2: frame.x(x),
        y1: MARGIN.top,
        y2: spec.height - MARGIN.bottom,
      }),
    );
  }
  frame.inner.append(outline);
  fill(
    frame.root,
    { class: "heat-map", tabindex: "0", role: "img", "aria-label": `${spec.label}. Arrow keys read the values.` },
    [],
  );
  host.replaceChildren(html("div", { class: "layers-of-drawing" }, canvas, frame.root), makeKey(spec.key));
  readCells(frame, spec, outline);
}

function makeKey(key) {
  const canvas = html("canvas", { width: 128, height: 1, class: "ramp", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  for (let x = 0; x < 128; x += 1) {
    context.fillStyle = key.color(x / 127);
    context.fillRect(x, 0, 1, 1);
  }
  return html("div", { class: "key" }, html("span", {}, key.low), canvas, html("span", {}, key.high));
}

function readCells(frame, spec, outline) {
  let active = null; // {column, row}

  function show(announce) {
    const column = spec.columns[active.column];
    const value = spec.value(active.column, active.row) ?? null;
    const [left, right, top, bottom] = [
      frame.x(column.from),
      frame.x(column.to),
      frame.y(active.row + 0.5),
      frame.y(active.row - 0.5),
    ];
    fill(
      outline,
      { x: left, y: top, width: Math.max(2, right - left), height: bottom - top, visibility: "visible" },
      [],
    );
    const rows = [
      {
        name: `${spec.rowLabel ?? "layer"} ${active.row}`,
        value: spec.text(value, active.column, active.row),
        color: value === null ? null : spec.color(value),
      },
    ];
    const box = frame.root.getBoundingClientRect();
    showTooltip(
      window.scrollX + box.left + (left + right) / 2,
      window.scrollY + box.top + top,
      column.name,
      rows,
      announce,
    );
  }

  function hide() {
    outline.setAttribute("visibility", "hidden");
    hideTooltip();
  }

  frame.root.addEventListener("pointermove", (event) => {
    const box = frame.root.getBoundingClientRect();
    const x = event.clientX - box.left;
    const row = Math.round(
      spec.rows -
        0.5 -
        ((event.clientY - box.top - MARGIN.top) / (spec.height - MARGIN.top - MARGIN.bottom)) * spec.rows,
    );
    const column = spec.columns.findIndex((entry) => x >= frame.x(entry.from) && x <= frame.x(entry.to));
    if (column < 0 || row < 0 || row >= spec.rows) return hide();
    active = { column, row };
    return show(false);
  });
  frame.root.addEventListener("pointerleave", hide);
  frame.root.addEventListener("blur", hide);
  frame.root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const last = spec.columns.length - 1;
    const moves = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, 1],
      ArrowDown: [0, -1],
      Home: [-last, 0],
      End: [last, 0],
    };
    const move = moves[event.key];
    if (!move) return undefined;
    event.preventDefault();
    active ??= { column: event.key === "ArrowRight" ? -1 : 0, row: event.key === "ArrowUp" ? -1 : 0 };
    active.column = Math.min(last, Math.max(0, active.column + move[0]));
    active.row = Math.min(spec.rows - 1, Math.max(0, active.row + move[1]));
    return show(true);
  });
}
