// Bars side by side with their intervals, with values at the pointer and at the arrow keys.

const GROUP_WIDTH = 0.8; // of the distance between groups

/**
 * Draw into `host`, `width` pixels wide.
 * spec: {label, height, x: {title}, y: {title}, line (optional), formatX, series: [{name, color, values, low, high}]}.
 * Group g holds the g-th value of each series; low and high may be empty; null is left out.
 */
function drawBarChart(host, width, spec) {
  const groups = Math.max(...spec.series.map((series) => series.values.length));
  const all = spec.series.flatMap((series) => [...series.values, ...series.low, ...series.high]);
  const range = extent([...all, 0, spec.line], false);
  const margin = (range[1] - range[0]) * 0.05 || 1;
  const domain = [range[0] < 0 ? range[0] - margin : 0, range[1] > 0 ? range[1] + margin : 0];
  const frame = makeFrame(
    { width, height: spec.height },
    { ...spec.x, domain: [-0.5, groups - 0.5], whole: true },
    { ...spec.y, domain },
  );
  const slot = GROUP_WIDTH / spec.series.length;
  const bars = spec.series.map((series, index) => drawBars(frame, series, { slot, offset: index * slot }));
  drawReferenceLine(frame, spec.line);
  fill(
    frame.root,
    { class: "bar-chart", tabindex: "0", role: "img", "aria-label": `${spec.label}. Arrow keys read the values.` },
    [],
  );
  host.replaceChildren(frame.root);
  readBars(frame, { ...spec, groups }, bars);
}

function drawBars(frame, series, { slot, offset }) {
  const group = svg("g", { class: "bars" });
  group.style.fill = series.color;
  series.values.forEach((value, index) => {
    if (value === null || value === undefined) return;
    const left = index - GROUP_WIDTH / 2 + offset;
    const [start, end] = [frame.x(left), frame.x(left + slot)];
    const [top, bottom] = [frame.y(Math.max(0, value)), frame.y(Math.min(0, value))];
    const bar = { x: start, y: top, width: Math.max(1, end - start - 1), height: Math.max(0.5, bottom - top) };
    group.append(svg("rect", { ...bar, "data-group": index }));
    const [low, high] = [series.low[index] ?? null, series.high[index] ?? null];
    if (low === null || high === null) return;
    const middle = (start + end) / 2;
    group.append(svg("line", { class: "interval", x1: middle, x2: middle, y1: frame.y(low), y2: frame.y(high) }));
  });
  frame.inner.append(group);
  return group;
}

/** A dashed line across a chart at a threshold, if there is one. */
function drawReferenceLine(frame, at) {
  if (at === null || at === undefined) return;
  const [left, right] = frame.x.domain.map((end) => frame.x(end));
  frame.inner.append(svg("line", { class: "threshold", x1: left, x2: right, y1: frame.y(at), y2: frame.y(at) }));
}

function readBars(frame, spec, bars) {
  let active = null;

  function show(announce) {
    for (const group of bars) {
      for (const bar of group.querySelectorAll("rect"))
        bar.classList.toggle("active", Number(bar.dataset.group) === active);
    }
    const rows = spec.series.map((series) => ({
      color: series.color,
      name: series.name,
      value: intervalText(series.values[active], series.low[active], series.high[active]),
    }));
    const box = frame.root.getBoundingClientRect();
    const x = window.scrollX + box.left + frame.x(active);
    showTooltip(x, window.scrollY + box.top + MARGIN.top + 12, spec.formatX(active), rows, announce);
  }

  function hide() {
    active = null;
    for (const bar of frame.root.querySelectorAll("rect.active")) bar.classList.remove("active");
    hideTooltip();
  }

  frame.root.addEventListener("pointermove", (event) => {
    const box = frame.root.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    const group = Math.round(share * spec.groups - 0.5);
    if (group < 0 || group >= spec.groups) return hide();
    active = group;
    return show(false);
  });
  frame.root.addEventListener("pointerleave", hide);
  frame.root.addEventListener("blur", hide);
  frame.root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const last = spec.groups - 1;
    const at = active ?? -1;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    if (!(event.key in moves)) return undefined;
    event.preventDefault();
    active = Math.min(last, Math.max(0, moves[event.key]));
    return show(true);
  });
}
