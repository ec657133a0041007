// The family tree of W2W++ Explore, as w2wpp/family.py reads it: plain data, and what the buttons do to it.

export const FIRST = { v: 1, at: 0, g: [{ k: "new" }], plus: [], minus: [] };

/** A family from the widget's text; a text that cannot be parsed is left to the server to complain about. */
export function readFamily(text) {
  try {
    const family = JSON.parse(text);
    if (family.v === 1 && family.g[family.at]) return { ...FIRST, ...family };
  } catch {
    // empty, or somebody's typing
  }
  return structuredClone(FIRST);
}

/** The text of a family: nothing at all while nothing happened. */
export function writeFamily(family) {
  const text = JSON.stringify(family);
  return text === JSON.stringify(FIRST) ? "" : text;
}

const here = (family) => family.g[family.at];
const sorted = (cells) => [...new Set(cells)].sort((a, b) => a - b);
const samePlace = (a) => (b) => a[0] === b[0] && a[1] === b[1];

/** Where somebody came up first: people who are kept have a place in several generations. */
export function origin(family, [generation, cell]) {
  let g = generation;
  while (family.g[g].keep?.includes(cell)) g = family.g[g].p;
  return [g, cell];
}

/** One more generation, bred from the one that is looked at. */
export function bred(family, kind, of, radius, keep = []) {
  const { lock } = here(family);
  const kept = sorted([...keep, ...(lock ?? [])]);
  const generation = { k: kind, p: family.at, r: radius };
  if (of.length) generation.of = of;
  if (kept.length) generation.keep = kept;
  if (lock?.length) generation.lock = lock;
  return { ...family, at: family.g.length, g: [...fixed(family, radius), generation] };
}

/** Generations that no longer follow the radius of the widget. */
function fixed(family, radius) {
  const [first, ...others] = family.g;
  return [{ ...first, r: first.r ?? radius }, ...others];
}

/** The generations from the first to the one that is looked at, each with the cells that led on from it. */
export function path(family) {
  const steps = [];
  for (let g = family.at, of = []; g !== undefined; { of = [], p: g } = family.g[g]) {
    steps.unshift({ generation: g, of });
  }
  return steps;
}

export function goTo(family, generation) {
  return { ...family, at: generation };
}

export function isLocked(family, cell) {
  return here(family).lock?.includes(cell) ?? false;
}

export function toggleLock(family, cell) {
  const before = here(family).lock ?? [];
  const lock = before.includes(cell) ? before.filter((c) => c !== cell) : sorted([...before, cell]);
  const { lock: _, ...rest } = here(family);
  const g = [...family.g];
  g[family.at] = lock.length ? { ...rest, lock } : rest;
  return { ...family, g };
}

/** "plus", "minus" or "" for a cell of the generation that is looked at. */
export function markOf(family, cell) {
  const is = samePlace(origin(family, [family.at, cell]));
  return ["plus", "minus"].find((sign) => family[sign].some(is)) ?? "";
}

/** Mark somebody, or take the mark back. */
export function toggleMark(family, cell, sign) {
  const place = origin(family, [family.at, cell]);
  const was = markOf(family, cell);
  const without = (places) => places.filter((p) => !samePlace(place)(p));
  const marked = { ...family, plus: without(family.plus), minus: without(family.minus) };
  if (was !== sign) marked[sign] = [...marked[sign], place];
  return marked;
}

/** A family that attributes can be traced back to. */
export function named(family) {
  return family.id ? family : { ...family, id: Math.random().toString(36).slice(2, 10) };
}
