// What a grid of faces is drawn with: cells with their buttons, and the way through the family above them.

import { api } from "../../../scripts/api.js";
import * as families from "./family.js";
import { make } from "./dom.js";

/** A cell of the grid. `on` is what its buttons call: click, rove, mark (with "lock", "plus" or "minus") and lost. */
export function makeCell(i, say, on) {
  const mark = (sign, text, tip) =>
    make("button", { type: "button", tabindex: -1, title: tip, "aria-label": tip, onclick: () => on.mark(i, sign) }, text);
  const image = make("img", { alt: "", draggable: "false" });
  image.addEventListener("error", () => on.lost(image.getAttribute("src")));
  const face = make("button", {
    type: "button",
    class: "w2wpp-face w2wpp-empty",
    "aria-keyshortcuts": "Enter M X L Plus Minus",
    onclick: () => on.click(i),
    onfocus: () => on.rove(i),
  });
  face.append(make("span", { class: "w2wpp-number", "aria-hidden": "true" }, String(i)));
  const marks = {
    lock: mark("lock", "\u2665", say.lock),
    plus: mark("plus", "+", say.plus),
    minus: mark("minus", "\u2212", say.minus),
  };
  const element = make(
    "div",
    { class: "w2wpp-cell", role: "gridcell" },
    face,
    make("div", { class: "w2wpp-marks" }, ...Object.values(marks)),
  );
  return { element, face, image, marks };
}

/** Bring a cell in line: whose face it shows, whether it is chosen, kept or marked, and whether Tab leads to it. */
export function drawCell({ element, face, image, marks }, i, say, { chosen, focused, family, name }) {
  const locked = families.isLocked(family, i);
  const sign = families.markOf(family, i);
  element.setAttribute("aria-selected", chosen);
  element.classList.toggle("w2wpp-kept", locked);
  element.classList.toggle("w2wpp-on", locked || sign !== "");
  const facts = [chosen && say.chosen, locked && say.locked, say.marked[sign], !name && say.unpainted];
  face.setAttribute("aria-label", [say.face(i), ...facts.filter(Boolean)].join(", "));
  face.tabIndex = focused ? 0 : -1;
  marks.lock.title = locked ? say.unlock : say.lock;
  for (const [kind, button] of Object.entries(marks)) {
    button.setAttribute("aria-pressed", kind === "lock" ? locked : kind === sign);
  }
  showFace(face, image, name);
}

/** Buttons that lead back through the family, each with the faces of those who led on. `names` gives a generation's. */
export function pathButtons(family, say, names, goTo) {
  const steps = families.path(family);
  return steps.slice(0, -1).map(({ generation }, i) => {
    const painted = names(generation);
    const parents = family.g[steps[i + 1].generation].of ?? [];
    const pictures = parents.map((cell) =>
      painted[cell] ? make("img", { src: faceUrl(painted[cell]), alt: "" }) : make("span", { class: "w2wpp-empty" }),
    );
    const label = `${say.back} ${i + 1}`;
    const content = pictures.length ? pictures : ["\u21bb"];
    return make("button", { type: "button", title: label, "aria-label": label, onclick: () => goTo(generation) }, ...content);
  });
}

function faceUrl(name) {
  return api.apiURL(`/w2wpp/faces/${name}`);
}

function showFace(face, image, name) {
  face.classList.toggle("w2wpp-empty", !name);
  if (!name) {
    image.removeAttribute("src");
    return image.remove();
  }
  const url = faceUrl(name);
  if (image.getAttribute("src") !== url) image.setAttribute("src", url);
  if (image.parentElement !== face) face.prepend(image);
}
