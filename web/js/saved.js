// The faces of W2W++ Load Identity: the identity files by the pictures in them, one click to load.

import { api } from "../../../scripts/api.js";
import { addStyles, chain, make, register, setValue, shield, valueOf, watch } from "./dom.js";
import { texts } from "./texts.js";

const MIN_HEIGHT = 180;

class SavedFaces {
  constructor(node) {
    this.node = node;
    this.say = texts();
    this.files = [];
    this.list = make("div", { class: "w2wpp-saved", role: "radiogroup", "aria-label": this.say.saved, onkeydown: (e) => this.key(e) });
    this.element = shield(make("div", { class: "w2wpp" }, this.list));
    this.element.addEventListener("keydown", (e) => e.stopPropagation());
    this.element.addEventListener("wheel", (e) => e.stopPropagation(), { passive: true });
  }

  async refresh() {
    const answer = await api.fetchApi("/w2wpp/identities");
    this.files = answer.ok ? await answer.json() : [];
    this.buttons = this.files.map((f) => this.makeButton(f));
    const empty = make("span", { class: "w2wpp-status" }, this.say.nothingSaved);
    this.list.replaceChildren(...(this.buttons.length ? this.buttons : [empty]));
    this.draw();
  }

  makeButton({ file, stamp }) {
    const query = new URLSearchParams({ file, stamp });
    const name = file.replace(/_?\.safetensors \[/, " [");
    const image = make("img", { alt: "", loading: "lazy", src: api.apiURL(`/w2wpp/identities/picture?${query}`) });
    image.addEventListener("error", () => image.replaceWith(make("span", { class: "w2wpp-empty", title: this.say.noPicture })));
    const choose = () => setValue(this.node, "file", file);
    return make("button", { type: "button", role: "radio", title: file, "aria-label": name, onclick: choose }, image, make("span", {}, name));
  }

  draw() {
    const chosen = this.files.findIndex((f) => f.file === valueOf(this.node, "file"));
    this.buttons?.forEach((button, i) => {
      button.setAttribute("aria-checked", i === chosen);
      button.tabIndex = i === Math.max(0, chosen) ? 0 : -1;
    });
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const from = this.buttons?.indexOf(document.activeElement) ?? -1;
    if (!step || from < 0) return;
    const next = this.buttons[(from + step + this.buttons.length) % this.buttons.length];
    next.focus();
    next.click();
    event.preventDefault();
  }
}

const shown = new Set();

function savedFacesWidget(node, inputName) {
  addStyles();
  const faces = new SavedFaces(node);
  const options = { getMinHeight: () => MIN_HEIGHT, hideOnZoom: false, serialize: false };
  const widget = node.addDOMWidget(inputName, "w2wpp_saved_faces", faces.element, options);
  widget.serialize = false;
  shown.add(faces);
  chain(node, "onConfigure", () => faces.draw());
  chain(node, "onRemoved", () => shown.delete(faces));
  watch(node, ["file"], () => faces.draw());
  faces.refresh();
  return { widget };
}

register({
  name: "w2wpp.saved",
  getCustomWidgets() {
    return { W2WPP_SAVED_FACES: savedFacesWidget };
  },
  /** The lists were refreshed, with R or by the host: the faces follow. */
  refreshComboInNodes() {
    for (const faces of shown) faces.refresh();
  },
});
