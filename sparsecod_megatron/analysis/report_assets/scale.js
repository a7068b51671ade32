// Scales from data to pixels, with their ticks.

/** Smallest and largest of the numbers that can be drawn; null if there are none. */
function extent(values, logarithmic) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || value === undefined || (logarithmic && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** A scale: call it with a value for its pixel; `domain`, `ticks`, `position` (0…1) describe it. */
function makeScale([low, high], [start, end], logarithmic) {
  const forward = logarithmic ? Math.log10 : (value) => value;
  const from = forward(low);
  const span = forward(high) - from || 1;
  const position = (value) => (forward(value) - from) / span;
  const scale = (value) => start + position(value) * (end - start);
  scale.position = position;
  scale.domain = [low, high];
  scale.logarithmic = logarithmic;
  scale.drawable = (value) => value !== null && value !== undefined && (!logarithmic || value > 0);
  scale.ticks = (count) => (logarithmic ? logTicks(low, high, count) : linearTicks(low, high, count));
  return scale;
}

/** The domain with a margin, so that no point lies on the frame. */
function padded([low, high], logarithmic) {
  if (logarithmic) {
    const factor = low === high ? 2 : (high / low) ** 0.05;
    return [low / factor, high * factor];
  }
  const margin = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  return [low - margin, high + margin];
}

function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index <= high / step + 1e-9; index += 1) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

/** Powers of ten; with 2 and 5 times them over few decades; evenly spaced over less than one. */
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, count).filter((tick) => tick > 0);
  const factors = decades < count / 3 ? [1, 2, 5] : [1];
  const stride = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    if (power % stride !== 0) continue;
    for (const factor of factors) {
      const tick = Number(`${factor}e${power}`);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

/** Index of the last of increasing `values` that is at most `value`; 0 if all are greater. */
function indexAtOrBefore(values, value) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (values[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Index of the nearest of increasing `values`. */
function nearestIndex(values, value) {
  const before = indexAtOrBefore(values, value);
  const after = Math.min(before + 1, values.length - 1);
  return value - values[before] <= values[after] - value ? before : after;
}
