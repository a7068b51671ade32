// Every chart's numbers as a real table, for screen readers and for copying.

/** A table in a scrolling, focusable box. spec: {caption, head: [text], rows: [[head of the row, value, …]]}. */
function makeTable(spec) {
  const table = html("table", {}, html("caption", {}, spec.caption));
  const headRow = html("tr", {}, ...spec.head.map((text) => html("th", { scope: "col" }, text)));
  const body = html("tbody");
  for (const [first, ...values] of spec.rows) {
    const cells = values.map((value) => html("td", {}, typeof value === "string" ? value : formatExact(value)));
    body.append(html("tr", {}, html("th", { scope: "row" }, String(first)), ...cells));
  }
  table.append(html("thead", {}, headRow), body);
  return html("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": spec.caption }, table);
}
