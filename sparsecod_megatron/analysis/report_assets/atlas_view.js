// Atlases: every mechanism of many studies in one table, sorted by whichever column the reader chooses, and its picture.

function fillAtlases() {
  document.getElementById("atlases").hidden = DATA.atlases.length === 0;
  for (const atlas of DATA.atlases) {
    const alt = "The last layer's variance against usefulness, every row by its number";
    document.getElementById("atlas-tables").append(
      ...atlas.answer.map((text) => html("p", {}, text)),
      html("img", { class: "picture", src: atlas.picture, alt }),
      makeTable({ caption: atlas.name, head: atlas.columns, rows: atlas.rows, sortable: true }),
      html("p", { class: "aside" }, html("code", {}, atlas.command)),
    );
  }
}
