// Lines over steps, tokens or layers, with values at the pointer and at the arrow keys.

const TOOLTIP_ROWS = 8;

/**
 * Draw into `host`, `width` pixels wide.
 * spec: {label, height, x: {title, whole}, y: {title, log}, series, formatX}, with optional x.domain, y.domain and
 *       line, a threshold to compare with.
 * series: [{name, color, dash, faint, thin, dots, xs, ys}], xs increasing, null in ys is a gap.
 */
function drawLineChart(host, width, spec) {
  const xDomain = spec.x.domain ??
    extent(
      spec.series.flatMap((series) => series.xs),
      false,
    ) ?? [0, 1];
  const yDomain =
    spec.y.domain ??
    extent(
      [...spec.series.flatMap((series) => series.ys), spec.line],
      spec.y.log,
    );
  if (!yDomain) {
    host.replaceChildren(
      html("p", { class: "empty" }, spec.y.log ? "No value above zero to draw on a log scale." : "No finite value."),
    );
    return;
  }
  const frame = makeFrame(
    { width, height: spec.height },
    { ...spec.x, domain: xDomain[0] === xDomain[1] ? [xDomain[0] - 0.5, xDomain[1] + 0.5] : xDomain },
    { ...spec.y, domain: padded(yDomain, spec.y.log) },
  );
  const lines = spec.series.map((series) =>
    drawSeries(frame, series, series.xs.length < 2 || (series.dots && width / series.xs.length > 9)),
  );
  drawReferenceLine(frame, spec.line);
  const cursor = svg("line", {
    class: "cursor",
    y1: MARGIN.top,
    y2: spec.height - MARGIN.bottom,
    visibility: "hidden",
  });
  const dot = svg("circle", { class: "cursor-dot", r: 4.5, visibility: "hidden" });
  frame.inner.append(cursor, dot);
  fill(
    frame.root,
    { class: "line-chart", tabindex: "0", role: "img", "aria-label": `${spec.label}. Arrow keys read the values.` },
    [],
  );
  host.replaceChildren(frame.root);
  readOut(frame, spec, { lines, cursor, dot });
}

function drawSeries(frame, series, withDots) {
  const group = svg("g", { class: `series${series.faint ? " faint" : ""}${series.thin ? " thin" : ""}` });
  group.style.stroke = series.color;
  group.style.fill = series.color;
  let path = "";
  let open = false;
  series.xs.forEach((at, index) => {
    const drawable = frame.y.drawable(series.ys[index]);
    if (drawable) {
      const [x, y] = [frame.x(at), frame.y(series.ys[index])];
      path += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      const alone = !open && !frame.y.drawable(series.ys[index + 1]);
      if (withDots || alone)
        group.append(svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: series.faint ? 2 : 3 }));
    }
    open = drawable;
  });
  group.append(svg("path", { d: path, "stroke-dasharray": series.dash || null }));
  frame.inner.append(group);
  return group;
}

/** Pointer and keys: the nearest point of the nearest line, in the tooltip with the other lines if they are few. */
function readOut(frame, spec, marks) {
  const drawable = spec.series.map((series) => {
    const kept = series.xs.map((_, index) => index).filter((index) => frame.y.drawable(series.ys[index]));
    return { kept, xs: kept.map((index) => series.xs[index]) };
  });
  const lines = spec.series.map((_, index) => index).filter((index) => drawable[index].kept.length);
  let active = null; // {line: index into `lines`, point: index into that line's drawable points}

  const valueOf = (line, point) => spec.series[line].ys[drawable[line].kept[point]];

  function show(announce) {
    const line = lines[active.line];
    const at = drawable[line].xs[active.point];
    const [x, y] = [frame.x(at), frame.y(valueOf(line, active.point))];
    fill(marks.cursor, { x1: x, x2: x, visibility: "visible" }, []);
    fill(marks.dot, { cx: x, cy: y, visibility: "visible" }, []);
    marks.dot.style.fill = spec.series[line].color;
    marks.lines.forEach((group, index) => group.classList.toggle("active", index === line));
    const named = lines.length <= TOOLTIP_ROWS ? lines : [line];
    const rows = named.map((index) => {
      const point = nearestIndex(drawable[index].xs, at);
      const elsewhere = drawable[index].xs[point] === at ? "" : ` (${spec.formatX(drawable[index].xs[point])})`;
      return {
        color: spec.series[index].color,
        name: spec.series[index].name,
        value: formatValue(valueOf(index, point)) + elsewhere,
        strong: index === line && named.length > 1,
      };
    });
    const box = frame.root.getBoundingClientRect();
    showTooltip(window.scrollX + box.left + x, window.scrollY + box.top + y, spec.formatX(at), rows, announce);
  }

  function hide() {
    for (const mark of [marks.cursor, marks.dot]) mark.setAttribute("visibility", "hidden");
    marks.lines.forEach((group) => group.classList.remove("active"));
    hideTooltip();
  }

  frame.root.addEventListener("pointermove", (event) => {
    const box = frame.root.getBoundingClientRect();
    const [pointerX, pointerY] = [event.clientX - box.left, event.clientY - box.top];
    const share =
      frame.x.position(frame.x.domain[0]) +
      (pointerX - MARGIN.left) / (frame.root.clientWidth - MARGIN.left - MARGIN.right);
    const at = frame.x.domain[0] + share * (frame.x.domain[1] - frame.x.domain[0]);
    let best = Infinity;
    lines.forEach((line, index) => {
      const point = nearestIndex(drawable[line].xs, at);
      const distance = Math.hypot(
        frame.x(drawable[line].xs[point]) - pointerX,
        frame.y(valueOf(line, point)) - pointerY,
      );
      if (distance < best) [best, active] = [distance, { line: index, point }];
    });
    if (active) show(false);
  });
  frame.root.addEventListener("pointerleave", hide);
  frame.root.addEventListener("blur", hide);
  frame.root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!lines.length || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key))
      return undefined;
    event.preventDefault();
    active ??= { line: 0, point: -1 };
    const at = drawable[lines[active.line]].xs[Math.max(0, active.point)];
    const turn = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (turn) {
      active.line = (active.line + turn + lines.length) % lines.length;
      active.point = nearestIndex(drawable[lines[active.line]].xs, at);
    }
    const last = drawable[lines[active.line]].xs.length - 1;
    const moves = { ArrowLeft: active.point - 1, ArrowRight: active.point + 1, Home: 0, End: last };
    active.point = Math.min(last, Math.max(0, moves[event.key] ?? active.point));
    return show(true);
  });
}
