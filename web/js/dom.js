// Small helpers for the widgets: elements, the node's plain widgets, and running the graph.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

/** Register an extension, once: the host may serve this file under two names, or from two copies of the pack. */
export function register(extension) {
  if (!app.extensions?.some((e) => e.name === extension.name)) app.registerExtension(extension);
}

/** An element with attributes, listeners (on...) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** The pack's style sheet, once. */
export function addStyles() {
  const id = "w2wpp-styles";
  if (document.getElementById(id)) return;
  const href = new URL("widgets.css", import.meta.url).href;
  document.head.append(make("link", { id, rel: "stylesheet", href }));
}

/** What happens inside must not drag the node, zoom the canvas or trigger its shortcuts. */
export function shield(element) {
  for (const event of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) {
    element.addEventListener(event, (e) => e.stopPropagation());
  }
  return element;
}

export function widgetOf(node, name) {
  return node.widgets?.find((w) => w.name === name);
}

export function valueOf(node, name, otherwise) {
  return widgetOf(node, name)?.value ?? otherwise;
}

/** Set a plain widget as if somebody had typed into it. */
export function setValue(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget || widget.value === value) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
  node.setDirtyCanvas?.(true, true);
}

/** Call back whenever one of the node's plain widgets changes. */
export function watch(node, names, changed) {
  for (const name of names) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    const before = widget.callback;
    widget.callback = function (...values) {
      const result = before?.apply(this, values);
      changed(name);
      return result;
    };
  }
}

/** Keep a widget out of sight that another one stands for: on the canvas, and in Nodes 2.0. */
export function hide(node, name) {
  const widget = widgetOf(node, name);
  if (!widget) return;
  widget.hidden = true;
  widget.options.hidden = true;
}

/** Run after a method of the node that the host calls. */
export function chain(node, method, then) {
  const before = node[method];
  node[method] = function (...values) {
    const result = before?.apply(this, values);
    then.apply(this, values);
    return result;
  };
}

/** The id by which the server calls a node: those of the subgraphs around it come first. */
export function serverId(node, graph = app.rootGraph ?? app.graph, prefix = "") {
  for (const other of graph?.nodes ?? []) {
    if (other === node) return `${prefix}${node.id}`;
    const found = other.subgraph && serverId(node, other.subgraph, `${prefix}${other.id}:`);
    if (found) return found;
  }
  return "";
}

/** Runs the graph, or a single node of it with what it needs; while a run is under way, only the last wish waits. */
class Runner {
  constructor() {
    this.busy = false;
    this.next = null;
    api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) this.finished();
    });
  }

  async run(node) {
    if (this.busy) {
      // A wish for the whole graph includes one for a node of it.
      this.next = { node: this.next && this.next.node === null ? null : node };
      return;
    }
    this.busy = true;
    await app.queuePrompt(0, 1, node ? [serverId(node)] : undefined);
    if (await isIdle()) this.finished(); // refused, or over already
  }

  finished() {
    const { next } = this;
    this.busy = false;
    this.next = null;
    if (next) this.run(next.node);
  }
}

/** Whether the server has nothing to do; also if it does not say. */
async function isIdle() {
  try {
    const { Running, Pending } = await api.getQueue();
    return !Running.length && !Pending.length;
  } catch {
    return true;
  }
}

let runner;

/** Run a node alone, or without one the whole graph. */
export function runGraph(node = null) {
  runner ??= new Runner();
  return runner.run(node);
}
