// The grid of W2W++ Explore: shows the faces that the server painted, and writes what is clicked into plain widgets.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { drawCell, makeCell, pathButtons } from "./cells.js";
import * as families from "./family.js";
import { addStyles, chain, hide, make, register, runGraph, serverId, setValue, shield, valueOf, watch } from "./dom.js";
import { texts } from "./texts.js";

const MIN_HEIGHT = 460;
const PROPERTY = "w2wpp_faces"; // names of painted faces: a hint that saves a run after a reload, no state
const WATCHED = ["seed", "count", "truncation", "radius", "chosen", "attribute", "family"];
const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

class FaceGrid {
  constructor(node) {
    this.node = node;
    this.say = texts();
    this.crossing = false;
    this.focus = 0;
    this.busy = null; // the generation that is being painted, while a run is under way
    this.told = "";
    this.gone = new Set(); // names that the server knows no face for, such as those of a file from elsewhere
    this.on = {
      click: (i) => this.click(i),
      rove: (i) => this.rove(i),
      mark: (i, kind) => this.mark(i, kind),
      lost: (url) => this.lost(url),
    };
    this.build();
  }

  get family() {
    return families.readFamily(valueOf(this.node, "family", ""));
  }

  set family(family) {
    setValue(this.node, "family", families.writeFamily(family));
  }

  get count() {
    return Number(valueOf(this.node, "count", 16));
  }

  get chosen() {
    return Number(valueOf(this.node, "chosen", 0));
  }

  get columns() {
    return Math.ceil(Math.sqrt(this.count));
  }

  /** Names of the painted faces of a generation, if they are those of the present seed. */
  names(generation) {
    const kept = this.node.properties?.[PROPERTY];
    const names = (kept?.of === this.origin() && kept.names[generation]) || [];
    return names.map((name) => (this.gone.has(name) ? null : name));
  }

  remember({ generation, keys, seed, truncation }) {
    for (const name of keys) this.gone.delete(name);
    const of = JSON.stringify([seed, truncation]);
    const before = this.node.properties?.[PROPERTY];
    const names = { ...(before?.of === of ? before.names : {}), [generation]: keys };
    const wanted = new Set([generation, ...families.path(this.family).map((step) => step.generation)]);
    const kept = Object.entries(names).filter(([g]) => wanted.has(Number(g)));
    this.node.properties ??= {};
    this.node.properties[PROPERTY] = { of, names: Object.fromEntries(kept) };
  }

  origin() {
    return JSON.stringify([String(valueOf(this.node, "seed", 0)), Number(valueOf(this.node, "truncation", 1))]);
  }

  build() {
    const { say } = this;
    const tool = (name, act) =>
      make("button", { type: "button", title: say[`${name}Tip`], onclick: act }, say[name]);
    this.tools = {
      fresh: tool("fresh", () => this.breed("new", [])),
      like: tool("like", () => this.like(this.chosen)),
      cross: tool("cross", () => this.startCrossing()),
      back: tool("back", () => this.back()),
      make: tool("make", () => this.makeAttribute()),
    };
    this.path = make("div", { class: "w2wpp-bar w2wpp-path", role: "navigation", "aria-label": say.back });
    this.name = make("input", {
      placeholder: say.attribute,
      "aria-label": say.attribute,
      oninput: () => this.enable(),
      onkeydown: (e) => e.key === "Enter" && this.makeAttribute(),
    });
    this.grid = make("div", {
      class: "w2wpp-faces",
      role: "grid",
      "aria-label": say.faces,
      onkeydown: (e) => this.key(e),
    });
    this.status = make("div", { class: "w2wpp-status", role: "status", "aria-live": "polite" });
    const { fresh, like, cross, back, make: slider } = this.tools;
    this.element = shield(
      make(
        "div",
        { class: "w2wpp w2wpp-explore" },
        make("div", { class: "w2wpp-bar", role: "toolbar", "aria-label": say.tools }, like, cross, fresh, back),
        this.path,
        make("div", { class: "w2wpp-stage" }, this.grid),
        make("div", { class: "w2wpp-bar" }, this.name, slider),
        this.status,
        make("div", { class: "w2wpp-hidden" }, say.keys),
      ),
    );
    this.element.addEventListener("keydown", (e) => e.stopPropagation());
    this.cells = [];
  }

  /** Bring the elements in line with the widgets. */
  draw() {
    const { count, columns } = this;
    if (this.cells.length !== count || Number(this.grid.style.getPropertyValue("--columns")) !== columns) {
      this.lay(count, columns);
    }
    this.focus = Math.min(this.focus, count - 1);
    const family = this.family;
    const names = this.names(family.at);
    const { chosen, focus, say } = this;
    this.cells.forEach((cell, i) =>
      drawCell(cell, i, say, { chosen: i === chosen, focused: i === focus, family, name: names[i] }),
    );
    const back = pathButtons(family, say, (generation) => this.names(generation), (generation) => this.goTo(generation));
    this.path.hidden = !back.length;
    this.path.replaceChildren(...back);
    this.showName();
    this.enable();
    this.tell(names);
  }

  /** The attribute's name as the widget has it, unless somebody is about to give it another. */
  showName() {
    const name = valueOf(this.node, "attribute", "");
    if (name !== this.named) this.name.value = this.named = name;
  }

  lay(count, columns) {
    const rows = Math.ceil(count / columns);
    this.grid.style.setProperty("--columns", columns);
    this.grid.style.setProperty("--rows", rows);
    this.cells = Array.from({ length: count }, (_, i) => makeCell(i, this.say, this.on));
    const row = (r) =>
      make("div", { class: "w2wpp-row", role: "row" }, ...this.cells.slice(r * columns, (r + 1) * columns).map((c) => c.element));
    this.grid.replaceChildren(...Array.from({ length: rows }, (_, r) => row(r)));
  }

  enable() {
    const { tools, family } = this;
    tools.back.disabled = family.g[family.at].p === undefined;
    tools.cross.setAttribute("aria-pressed", this.crossing);
    tools.make.disabled = !family.plus.length || !this.name.value.trim();
  }

  tell(names) {
    const painted = names.filter(Boolean).length;
    let text = this.say.ready(this.count, this.chosen);
    if (this.crossing) text = this.say.pickOther;
    else if (this.busy === this.family.at) text = this.say.painting(painted, this.count);
    else if (painted < this.count) text = this.say.unpainted;
    else if (this.told) text = this.told;
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  click(i) {
    if (this.crossing && i !== this.chosen) return this.cross(i);
    this.crossing = false;
    this.told = "";
    setValue(this.node, "chosen", i);
    this.draw();
    if (valueOf(this.node, "run_on_click", true)) runGraph();
  }

  like(i) {
    setValue(this.node, "chosen", i);
    this.breed("like", [i]);
  }

  startCrossing() {
    this.crossing = !this.crossing;
    this.draw();
  }

  cross(other) {
    if (other !== this.chosen) this.breed("cross", [this.chosen, other]);
  }

  breed(kind, of) {
    this.crossing = false;
    this.told = "";
    this.family = families.bred(this.family, kind, of, Number(valueOf(this.node, "radius", 0.4)), of);
    this.draw();
    runGraph(this.node);
  }

  back() {
    const family = this.family;
    const { p, of = [] } = family.g[family.at];
    if (p === undefined) return;
    if (of.length) setValue(this.node, "chosen", of[0]);
    this.goTo(p);
  }

  goTo(generation) {
    this.crossing = false;
    this.family = families.goTo(this.family, generation);
    this.draw();
    if (this.names(generation).filter(Boolean).length < this.count) runGraph(this.node);
  }

  mark(i, kind) {
    const family = this.family;
    this.family = kind === "lock" ? families.toggleLock(family, i) : families.toggleMark(family, i, kind);
    this.draw();
  }

  makeAttribute() {
    if (this.tools.make.disabled) return;
    setValue(this.node, "attribute", this.name.value.trim());
    this.family = families.named(this.family);
    runGraph(this.node);
  }

  key(event) {
    if (event.target.closest(".w2wpp-marks") || event.ctrlKey || event.metaKey || event.altKey) return;
    const i = this.focus;
    const moves = { ...STEPS, ArrowUp: -this.columns, ArrowDown: this.columns };
    const acts = {
      m: () => this.like(i),
      x: () => this.cross(i),
      l: () => this.mark(i, "lock"),
      "+": () => this.mark(i, "plus"),
      "-": () => this.mark(i, "minus"),
      Backspace: () => this.back(),
      Escape: () => this.crossing && this.startCrossing(),
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (event.key in moves) this.move(i + moves[event.key], i);
    else if (act) act();
    else return;
    event.preventDefault();
  }

  move(to, from) {
    const last = this.count - 1;
    const target = Number.isFinite(to) ? to : to < 0 ? 0 : last;
    const i = target < 0 || target > last ? from : target;
    this.rove(i);
    this.cells[i].face.focus();
  }

  /** One cell is in the tab order, the others are reached by the arrows. */
  rove(i) {
    this.focus = i;
    this.cells.forEach(({ face }, n) => (face.tabIndex = n === i ? 0 : -1));
  }

  lost(url) {
    if (!url) return;
    this.gone.add(url.slice(url.lastIndexOf("/") + 1));
    this.draw();
  }

  painting(detail) {
    this.remember(detail);
    this.busy = detail.generation;
    this.draw();
  }

  painted(detail) {
    this.busy = null;
    this.remember(detail);
    if (detail.told && detail.told !== this.told) app.refreshComboInNodes?.();
    this.told = detail.told ?? "";
    this.draw();
  }

  changed(name) {
    // Other people, another family: what was bred from the old ones means nothing to them.
    if (name === "seed" && this.seed !== undefined && this.seed !== valueOf(this.node, "seed")) {
      setValue(this.node, "family", "");
    }
    this.seed = valueOf(this.node, "seed");
    this.draw();
  }
}

const grids = new Set();

function facesWidget(node, inputName) {
  addStyles();
  const grid = new FaceGrid(node);
  const widget = node.addDOMWidget(inputName, "w2wpp_faces", grid.element, {
    getMinHeight: () => MIN_HEIGHT,
    hideOnZoom: false,
    serialize: false,
  });
  widget.serialize = false;
  chain(node, "onExecuted", (output) => output?.w2wpp?.[0]?.keys && grid.painted(output.w2wpp[0]));
  chain(node, "onConfigure", () => {
    grid.seed = valueOf(node, "seed");
    grid.draw();
  });
  chain(node, "onRemoved", () => grids.delete(grid));
  grids.add(grid);
  // This is the last input of the node: the others have their widgets already.
  hide(node, "family");
  hide(node, "attribute");
  watch(node, WATCHED, (name) => grid.changed(name));
  grid.seed = valueOf(node, "seed");
  grid.draw();
  return { widget };
}

api.addEventListener("w2wpp.faces", ({ detail }) => {
  for (const grid of grids) if (serverId(grid.node) === String(detail.node)) grid.painting(detail);
});
for (const end of ["execution_interrupted", "execution_error"]) {
  api.addEventListener(end, () => {
    for (const grid of grids) {
      if (grid.busy === null) continue;
      grid.busy = null; // what is painted stays
      grid.draw();
    }
  });
}

register({
  name: "w2wpp.explore",
  getCustomWidgets() {
    return { W2WPP_FACES: facesWidget };
  },
});
