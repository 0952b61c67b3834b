"use strict";
(() => {
  const tip = document.getElementById("tip");

  // ---- charts: a line at the step under the pointer, its values in a box

  const MOST = 16; // lines in the box
  const pairOf = (text) => text.split(",").map(Number);
  const format = (value) => {
    if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)) return String(Number(value.toPrecision(5)));
    return value.toExponential(2);
  };

  const nearest = (points, x) => {
    let best = null;
    for (const point of points) {
      if (point[1] === null) continue;
      if (best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
    }
    return best;
  };

  const place = (event) => {
    const width = tip.offsetWidth;
    const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, event.clientY + 14)}px)`;
  };

  const shape = (svg, tag, attributes) => {
    const element = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    svg.append(element);
    return element;
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const [x0, x1] = pairOf(svg.dataset.x);
    const [y0, y1] = pairOf(svg.dataset.y);
    const [left, right, top, bottom] = pairOf(svg.dataset.plot);
    let lines = null;
    let overlay = [];
    const clear = () => {
      overlay.forEach((element) => element.remove());
      overlay = [];
      tip.hidden = true;
    };
    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("pointermove", (event) => {
      lines ??= [...svg.querySelectorAll(".line")].map((group) => ({
        name: group.dataset.run,
        color: [...group.classList].find((name) => /^c\d$/.test(name)),
        place: Number(group.dataset.place ?? 0),
        points: JSON.parse(group.dataset.points),
      })).sort((a, b) => a.place - b.place);
      clear();
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const x = x0 + ((Math.min(right, Math.max(left, at)) - left) / (right - left)) * (x1 - x0);
      const found = lines.map((line) => ({ ...line, point: nearest(line.points, x) })).filter((line) => line.point);
      if (!found.length) return;
      const across = (step) => left + ((step - x0) / (x1 - x0)) * (right - left);
      const step = found.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point[0];
      overlay.push(shape(svg, "line", { class: "cross", x1: across(step), x2: across(step), y1: top, y2: bottom }));
      for (const line of found) {
        const down = bottom - ((line.point[1] - y0) / (y1 - y0)) * (bottom - top);
        overlay.push(shape(svg, "circle", { class: `cursor ${line.color}`, cx: across(line.point[0]), cy: down, r: 3.5 }));
      }
      tip.textContent = [
        `step ${format(step)}`,
        ...found.slice(0, MOST).map((line) => `${line.name}: ${format(line.point[1])}${line.point[0] === step ? "" : ` (step ${format(line.point[0])})`}`),
        ...(found.length > MOST ? [`and ${found.length - MOST} more`] : []),
      ].join("\n");
      tip.hidden = false;
      place(event);
    });
  }

  // ---- graph: the arrows of the stage under the pointer

  for (const graph of document.querySelectorAll("svg.graph")) {
    const edges = [...graph.querySelectorAll(".edge")];
    const focus = (name) => {
      graph.classList.toggle("focus", name !== null);
      for (const edge of edges) edge.classList.toggle("on", edge.dataset.source === name || edge.dataset.target === name);
    };
    for (const node of graph.querySelectorAll(".node")) {
      node.addEventListener("pointerenter", () => focus(node.dataset.stage));
      node.addEventListener("pointerleave", () => focus(null));
    }
  }

  // ---- samples: filters, a page at a time

  const PAGE = 20;
  for (const group of document.querySelectorAll(".group")) {
    const cards = [...group.querySelectorAll(".sample")];
    const buttons = [...group.querySelectorAll("[data-filter]")];
    const more = group.querySelector(".more");
    let filter = "all";
    let limit = PAGE;
    const show = () => {
      const chosen = cards.filter((card) => filter === "all" || filter in card.dataset);
      const visible = new Set(chosen.slice(0, limit));
      for (const card of cards) card.hidden = !visible.has(card);
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
      more.hidden = chosen.length <= limit;
      more.querySelector("span").textContent = `${visible.size} of ${chosen.length}`;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        filter = button.dataset.filter;
        limit = PAGE;
        show();
      });
    }
    more.querySelector("button").addEventListener("click", () => {
      limit += 2 * PAGE;
      show();
    });
    show();
  }

  // ---- links to a stage open its section

  const open = () => {
    const target = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  open();
  document.documentElement.dataset.ready = "yes"; // for tests: the script ran to its end
})();
