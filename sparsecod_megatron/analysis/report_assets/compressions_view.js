// Tables of compressions: a row for each method and pattern, sorted by whichever column the reader chooses.

function fillCompressions() {
  document.getElementById("compressions").hidden = DATA.compressions.length === 0;
  for (const table of DATA.compressions) {
    const rows = table.rows.map((row) => [row.name, ...row.cells.map(compressionCell)]);
    const notes = table.warnings.map((text) => html("li", {}, text));
    document.getElementById("compression-tables").append(
      makeTable({ caption: table.name, head: ["method, pattern", ...table.columns], rows, sortable: true }),
      html("p", { class: "aside" }, html("code", {}, table.command)),
    );
    if (notes.length)
      document
        .getElementById("compression-tables")
        .append(html("ul", { class: "notice", "aria-label": `Warnings of ${table.name}` }, ...notes));
  }
}

function compressionCell(cell) {
  return cell === null ? { text: MISSING, value: null } : { text: intervalText(cell.value, cell.low, cell.high), value: cell.value };
}
