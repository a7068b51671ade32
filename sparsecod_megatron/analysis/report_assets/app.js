// The controls: what the reader chooses changes `state`, and the figures that use it follow.

const CARD_FACTS = [
  "Layers",
  "Hidden size",
  "Attention heads / groups",
  "Experts",
  "Layout",
  "Tokens",
  "Last loss",
  "Last validation loss",
  "Architecture",
  "Text",
  "Sequences",
  "Tokens a sequence",
];
const MAX_PINS = 4;

function byId(id) {
  return document.getElementById(id);
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

function runKey(run) {
  const line = svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, "stroke-dasharray": runDash(run) || null });
  line.style.stroke = runColor(run);
  return svg("svg", { class: "line-key", width: 26, height: 10, "aria-hidden": "true" }, line);
}

/** Runs, then analyses: the order of colours, cards and toggles. */
const SUBJECTS = [...RUNS, ...ANALYSES];

function fillHeader() {
  for (const [index, run] of SUBJECTS.entries()) {
    const facts = run.facts.filter(([name]) => CARD_FACTS.includes(name));
    const entries = facts.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value)));
    const head = html(
      "p",
      { class: "card-head" },
      runKey(index),
      html("strong", {}, run.name),
      html("span", { class: "kind" }, run.kind),
    );
    const card = html("article", { class: "card", "aria-label": `${index < RUNS.length ? "Run" : "Analysis"} ${run.name}` }, head, html("dl", {}, ...entries));
    byId("cards").append(card);
  }
  const notes = RUNS.flatMap((run) =>
    run.notes.map((note) => html("li", {}, html("strong", {}, run.name), ` ${note}.`)),
  );
  const warnings = ANALYSES.flatMap((analysis) =>
    analysis.warnings.map(({ score, text }) =>
      html("li", {}, html("strong", {}, `${analysis.name} · ${score}`), ` ${text}.`),
    ),
  );
  const label = "Notes on the files and warnings of the analyses";
  if (notes.length || warnings.length)
    byId("notes").append(html("ul", { class: "notice", "aria-label": label }, ...notes, ...warnings));
  fillFacts("facts", "What each run is and how far it came", RUNS);
  fillFacts("score-facts", "What each analysis was measured with", ANALYSES);
  for (const id of ["axis-choice", "training", "runs"]) byId(id).hidden = RUNS.length === 0;
}

function fillFacts(id, caption, subjects) {
  if (!subjects.length) return;
  const rows = subjects[0].facts.map(([name], index) => [name, ...subjects.map((subject) => subject.facts[index][1])]);
  byId(id).append(makeTable({ caption, head: ["", ...subjects.map((subject) => subject.name)], rows }));
}

function fillRunToggles() {
  for (const [index, run] of SUBJECTS.entries()) {
    const button = html(
      "button",
      { type: "button", class: "run-toggle", "aria-pressed": "true" },
      runKey(index),
      run.name,
    );
    button.addEventListener("click", () => {
      if (!state.hidden.delete(index)) state.hidden.add(index);
      press(button, !state.hidden.has(index));
      rebuild();
    });
    byId("run-toggles").append(button);
  }
}

function fillStatistics() {
  const names = Object.keys(DATA.fields).filter((name) => RUNS.some((run) => run.layers[name]));
  for (const group of new Set(names.map((name) => DATA.fields[name].group))) {
    const options = names
      .filter((name) => DATA.fields[name].group === group)
      .map((name) => html("option", { value: name }, name));
    byId("statistic").append(html("optgroup", { label: group }, ...options));
  }
  byId("statistic").addEventListener("change", () => chooseStatistic(byId("statistic").value));
  byId("statistic-log").addEventListener("change", () => {
    setLog("fields", state.statistic, byId("statistic-log").checked);
    changed("log");
  });
}

function chooseStatistic(name) {
  state.statistic = name;
  byId("statistic").value = name;
  buildDepth();
  syncPosition();
  changed("all");
}

function openStatistic(name) {
  chooseStatistic(name);
  byId("depth").scrollIntoView({
    behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
  });
  byId("statistic").focus({ preventScroll: true });
}

/** Fit the slider to the chosen statistic's points, at the one nearest to where it stood. */
function syncPosition() {
  const all = positions();
  byId("position-tools").hidden = all.length === 0;
  if (!all.length) return;
  const slider = byId("position");
  slider.max = all.length - 1;
  const index = state.position === Infinity ? all.length - 1 : nearestIndex(all, state.position);
  slider.value = index;
  if (state.position !== Infinity || index < all.length - 1) state.position = all[index];
  const text = formatPosition(all[index], state.axis);
  byId("position-value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  byId("statistic-log").checked = isLog("fields", state.statistic);
}

function fillPosition() {
  byId("position").addEventListener("input", () => {
    state.position = positions()[byId("position").valueAsNumber];
    syncPosition();
    changed("position");
  });
  byId("pin").addEventListener("click", () => {
    const at = positions()[byId("position").valueAsNumber];
    if (!state.pins.includes(at)) state.pins = [...state.pins.slice(1 - MAX_PINS), at];
    fillPins();
  });
}

/** The kept positions, as buttons that drop them. */
function fillPins() {
  const buttons = state.pins.map((at) => {
    const text = formatPosition(at, state.axis);
    const button = html("button", { type: "button", class: "small", "aria-label": `Drop ${text}` }, `${text} ×`);
    button.addEventListener("click", () => {
      state.pins = state.pins.filter((kept) => kept !== at);
      fillPins();
    });
    return button;
  });
  byId("pins").replaceChildren(...buttons);
  changed("position");
}

function fillViewTools() {
  for (const radio of document.querySelectorAll("input[name=axis]")) {
    radio.addEventListener("change", () => {
      state.axis = radio.value;
      state.position = Infinity; // steps and tokens have no common scale between runs
      state.pins = [];
      fillPins();
      syncPosition();
      changed("axis");
    });
  }
  byId("tables-toggle").addEventListener("click", () => {
    state.tables = !state.tables;
    press(byId("tables-toggle"), state.tables);
    changed("all");
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (isDarkTheme) => {
    document.documentElement.dataset.theme = isDarkTheme ? "dark" : "light";
    press(byId("theme-toggle"), isDarkTheme);
    changed("all");
  };
  byId("theme-toggle").addEventListener("click", () => setTheme(!isDark()));
  dark.addEventListener("change", () => setTheme(dark.matches));
  setTheme(dark.matches);
}

/** After the set of runs on show changed. */
function rebuild() {
  buildDepth();
  buildRouter();
  buildScores();
  buildTraining();
  buildAll(openStatistic);
  syncPosition();
  changed("all");
}

fillHeader();
fillRunToggles();
fillStatistics();
fillCompressions();
fillAtlases();
fillPosition();
fillViewTools();
rebuild();
new ResizeObserver(() => changed("all")).observe(document.querySelector("main"));
