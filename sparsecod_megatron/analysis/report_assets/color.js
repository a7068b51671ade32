// Colours: one for each run (page.css holds them), and ramps for layers and heat maps, computed in OKLCH so that
// lightness alone already orders the values; they read the same with every kind of colour vision and in grey.

const RUN_COLORS = 7;
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

/** Colour of a run, as a CSS value that follows the theme. */
function runColor(run) {
  return `var(--run-${run % RUN_COLORS})`;
}

/** Dash pattern that tells runs apart without colour. */
function runDash(run) {
  return DASHES[run % DASHES.length];
}

/**
 * sRGB text of an OKLCH colour: lightness 0…1, chroma, hue in degrees.
 * Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
 */
function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const bytes = linear.map((channel) => {
    const inside = Math.min(1, Math.max(0, channel));
    return Math.round(255 * (inside <= 0.0031308 ? 12.92 * inside : 1.055 * inside ** (1 / 2.4) - 0.055));
  });
  return `rgb(${bytes.join(",")})`;
}

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

/** Colourfulness along the ramps: least at the greens in the middle, where sRGB holds the least. */
function rampChroma(share) {
  return 0.14 - 0.045 * Math.sin(Math.PI * share);
}

/** Dark violet to pale yellow for shares 0…1: heat maps. */
function heatColor(share) {
  return oklch(0.27 + 0.66 * share, rampChroma(share), 290 - 185 * share);
}

/** The same hues, kept apart from the page behind them: lines of layers. */
function layerColor(share) {
  const [low, high] = isDark() ? [0.5, 0.93] : [0.3, 0.8];
  return oklch(low + (high - low) * share, rampChroma(share), 290 - 185 * share);
}

/** Blue through neutral to orange for −1…1: load of an expert against its fair share. */
function balanceColor(signed) {
  const middle = isDark() ? 0.28 : 0.96;
  const end = isDark() ? 0.78 : 0.52;
  return oklch(middle + (end - middle) * Math.abs(signed), 0.14 * Math.abs(signed), signed < 0 ? 250 : 55);
}
