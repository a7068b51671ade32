// Every chart's numbers as a real table, for screen readers and for copying.

/**
 * A table in a scrolling, focusable box. spec: {caption, head: [text], rows: [[head of the row, value, …]], sortable}.
 * A value is a number, a text, or {text, value} with what the column is sorted by.
 */
function makeTable(spec) {
  const table = html("table", {}, html("caption", {}, spec.caption));
  const body = html("tbody");
  const lines = spec.rows.map((values) => ({ values, row: tableRow(values) }));
  body.append(...lines.map((line) => line.row));
  const heads = spec.head.map((text) => html("th", { scope: "col" }, spec.sortable ? "" : text));
  if (spec.sortable) {
    for (const [column, head] of heads.entries()) {
      const button = html("button", { type: "button", class: "sort" }, spec.head[column]);
      button.addEventListener("click", () => sortTable(heads, column, lines, body));
      head.append(button);
    }
  }
  table.append(html("thead", {}, html("tr", {}, ...heads)), body);
  return html("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": spec.caption }, table);
}

function tableRow([first, ...values]) {
  return html("tr", {}, html("th", { scope: "row" }, String(first)), ...values.map((value) => html("td", {}, cellText(value))));
}

function cellText(value) {
  if (typeof value === "string") return value;
  return value !== null && typeof value === "object" ? value.text : formatExact(value);
}

/** Order the rows by a column, the other way round at the next click; what has no value stays at the end. */
function sortTable(heads, column, lines, body) {
  const sign = heads[column].getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const key = (line) => line.values[column]?.value ?? (typeof line.values[column] === "object" ? null : line.values[column]);
  const inOrder = [...lines].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en"));
  });
  body.append(...inOrder.map((line) => line.row));
}
