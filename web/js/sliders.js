// The panel of W2W++ Sliders: a row for each attribute, over the node's plain widgets, with the span of real people.

import { api } from "../../../scripts/api.js";
import { addStyles, chain, hide, make, register, setValue, shield, valueOf, watch, widgetOf } from "./dom.js";
import { texts } from "./texts.js";

const PLACES = 8;
const LIMIT = 6; // of the strengths, as the node declares it
const MIN_HEIGHT = 400;
const NONE = "none";
const PROPERTY = "w2wpp_sliders"; // what the last run said: a hint that survives a reload, no state

const shown = (image, text) => make("figure", {}, image, make("figcaption", {}, text));

class Panel {
  constructor(node) {
    this.node = node;
    this.say = texts();
    this.rows = Array.from({ length: PLACES }, (_, i) => this.makeRow(i + 1));
    this.before = make("img", { alt: this.say.before });
    this.after = make("img", { alt: this.say.after });
    this.strip = make("div", { class: "w2wpp-strip" }, shown(this.before, this.say.before), shown(this.after, this.say.after));
    const reset = make("button", { type: "button", onclick: () => this.reset() }, this.say.resetAll);
    const legend = make("span", { class: "w2wpp-status" }, this.say.range);
    this.element = shield(
      make("div", { class: "w2wpp w2wpp-sliders" }, ...this.rows.map((r) => r.element), make("div", { class: "w2wpp-bar" }, reset, legend), this.strip),
    );
    this.element.addEventListener("keydown", (e) => e.stopPropagation());
  }

  makeRow(n) {
    const set = (value) => setValue(this.node, `strength_${n}`, Math.round(Number(value) * 10) / 10);
    const choice = make("select", {
      "aria-label": `attribute ${n}`,
      onchange: () => setValue(this.node, `attribute_${n}`, choice.value),
    });
    const range = { min: -LIMIT, max: LIMIT, step: 0.1 };
    const slider = make("input", { type: "range", ...range, oninput: () => set(slider.value) });
    const number = make("input", { type: "number", ...range, onchange: () => set(number.value) });
    const people = make("div", { class: "w2wpp-people", title: this.say.range });
    const reset = make("button", { type: "button", title: this.say.reset, "aria-label": `${this.say.reset} ${n}`, onclick: () => set(0) }, "\u21ba");
    const track = make("div", { class: "w2wpp-track" }, people, slider);
    return { choice, slider, number, people, element: make("div", { class: "w2wpp-slider" }, choice, track, number, reset) };
  }

  get run() {
    return this.node.properties?.[PROPERTY] ?? {};
  }

  draw() {
    this.rows.forEach((row, i) => this.drawRow(row, i + 1));
    const [before, after] = this.run.keys ?? [];
    this.strip.hidden = !before;
    this.strip.style.display = before ? "" : "none";
    if (before) {
      this.before.src = api.apiURL(`/w2wpp/faces/${before}`);
      this.after.src = api.apiURL(`/w2wpp/faces/${after}`);
    }
  }

  drawRow({ choice, slider, number, people }, n) {
    const name = valueOf(this.node, `attribute_${n}`, NONE);
    const strength = Number(valueOf(this.node, `strength_${n}`, 0));
    const offered = this.offered(n, name);
    if (choice.dataset.offered !== offered.join("\n")) {
      choice.dataset.offered = offered.join("\n");
      choice.replaceChildren(...offered.map((o) => make("option", { value: o }, o === NONE ? this.say.none : o)));
    }
    choice.value = name;
    slider.value = number.value = strength;
    slider.setAttribute("aria-label", name);
    number.setAttribute("aria-label", name);
    slider.disabled = number.disabled = name === NONE;
    const span = this.run.span?.[name];
    people.hidden = !span;
    if (span) {
      const [low, high] = span.map((s) => Math.min(1, Math.max(0, (s + LIMIT) / (2 * LIMIT))));
      people.style.left = `${100 * low}%`;
      people.style.right = `${100 * (1 - high)}%`;
      slider.setAttribute("aria-description", `${this.say.range}: ${span.map((s) => s.toFixed(1)).join(" - ")}`);
    }
  }

  /** The attributes of the connected space once a run has told them, those of all spaces before. */
  offered(n, name) {
    const all = widgetOf(this.node, `attribute_${n}`)?.options?.values ?? [];
    const known = this.run.span ? [NONE, ...Object.keys(this.run.span)] : [...(typeof all === "function" ? all() : all)];
    return known.includes(name) ? known : [...known, name];
  }

  reset() {
    for (let n = 1; n <= PLACES; n++) setValue(this.node, `strength_${n}`, 0);
  }

  executed({ span, keys }) {
    this.node.properties ??= {};
    this.node.properties[PROPERTY] = { span, keys };
    this.draw();
  }
}

function slidersWidget(node, inputName) {
  addStyles();
  const panel = new Panel(node);
  const options = { getMinHeight: () => MIN_HEIGHT, hideOnZoom: false, serialize: false };
  const widget = node.addDOMWidget(inputName, "w2wpp_sliders", panel.element, options);
  widget.serialize = false;
  chain(node, "onExecuted", (output) => output?.w2wpp?.[0]?.span && panel.executed(output.w2wpp[0]));
  chain(node, "onConfigure", () => panel.draw());
  const names = Array.from({ length: PLACES }, (_, i) => [`attribute_${i + 1}`, `strength_${i + 1}`]).flat();
  for (const name of names) hide(node, name);
  watch(node, names, () => panel.draw());
  panel.draw();
  return { widget };
}

register({
  name: "w2wpp.sliders",
  getCustomWidgets() {
    return { W2WPP_SLIDERS: slidersWidget };
  },
});
