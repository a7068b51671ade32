// Numbers as a reader wants them: four significant digits in charts, all stored digits in tables.

const MISSING = "–";
const MAGNITUDES = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "k"],
];

/** A value at the pointer: whole numbers with separators, others to four significant digits. */
function formatValue(value) {
  if (value === null || value === undefined) return MISSING;
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return minus(value.toExponential(3).replace("e+", "e"));
  return minus(value.toPrecision(4));
}

/** A value in a table, with every digit that the page holds. */
function formatExact(value) {
  if (value === null || value === undefined) return MISSING;
  return Number.isInteger(value) ? value.toLocaleString("en-US") : minus(String(value));
}

/** A short label for an axis: 1.5k, 20M, 0.02, 10⁻⁴, 5·10⁻⁴. */
function formatTick(value) {
  const size = Math.abs(value);
  const magnitude = MAGNITUDES.find(([unit]) => size >= unit);
  if (magnitude) return minus(trimZeros((value / magnitude[0]).toPrecision(4)) + magnitude[1]);
  if (size === 0 || size >= 1e-3) return minus(trimZeros(value.toPrecision(4)));
  const [digits, exponent] = value.toExponential(3).split("e-");
  const power = "10⁻" + [...exponent].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  return trimZeros(digits) === "1" ? power : `${minus(trimZeros(digits))}·${power}`;
}

/** The typographic sign in place of the hyphens of a number. */
function minus(text) {
  return text.replaceAll("-", "−");
}

function trimZeros(text) {
  return text.replace(/(\.\d*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, "");
}

/** "step 1,500" or "24.6M tokens". */
function formatPosition(value, axis) {
  return axis === "steps" ? `step ${value.toLocaleString("en-US")}` : `${formatTick(value)} tokens`;
}
