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

  const place = (x, y) => {
    const width = tip.offsetWidth;
    const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
    const top = Math.min(y + 14, innerHeight - tip.offsetHeight - 4);
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
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
    const linesOf = () => (lines ??= [...svg.querySelectorAll(".line")].map((group) => ({
      name: group.dataset.run,
      color: [...group.classList].find((name) => /^c\d$/.test(name)),
      place: Number(group.dataset.place ?? 0),
      points: JSON.parse(group.dataset.points),
    })).sort((a, b) => a.place - b.place));
    const across = (step) => left + ((step - x0) / (x1 - x0)) * (right - left);
    let at = null; // the step that is shown

    const show = (x, clientX, clientY) => {
      clear();
      const found = linesOf().map((line) => ({ ...line, point: nearest(line.points, x) })).filter((line) => line.point);
      if (!found.length) return;
      const step = found.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point[0];
      at = step;
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
      place(clientX, clientY);
    };

    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("blur", clear);
    svg.addEventListener("pointermove", (event) => {
      const { a, e } = svg.getScreenCTM();
      const inside = Math.min(right, Math.max(left, (event.clientX - e) / a));
      show(x0 + ((inside - left) / (right - left)) * (x1 - x0), event.clientX, event.clientY);
    });
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return clear();
      const steps = [...new Set(linesOf().flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
      const now = at === null ? -1 : steps.indexOf(at);
      const to = { ArrowRight: now + 1, ArrowLeft: now - 1, PageDown: now + 10, PageUp: now - 10, Home: 0, End: steps.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const { a, e, f } = svg.getScreenCTM();
      const step = steps[Math.min(steps.length - 1, Math.max(0, to))];
      show(step, e + across(step) * a, f + top * a);
      at = step;
    });
  }

  // ---- graph: the arrows of the stage under the pointer

  for (const graph of document.querySelectorAll("svg.graph")) {
    const edges = [...graph.querySelectorAll(".edge")];
    graph.parentElement.scrollLeft = (graph.parentElement.scrollWidth - graph.parentElement.clientWidth) / 2;
    const focus = (name) => {
      graph.classList.toggle("focus", name !== null);
      for (const edge of edges) edge.classList.toggle("on", edge.dataset.source === name || edge.dataset.target === name);
    };
    for (const node of graph.querySelectorAll(".node")) {
      node.addEventListener("pointerenter", () => focus(node.dataset.stage));
      node.addEventListener("pointerleave", () => focus(null));
      node.addEventListener("focus", () => focus(node.dataset.stage));
      node.addEventListener("blur", () => focus(null));
    }
  }

  // ---- samples: filters, a page at a time

  const PAGE = 6; // of few models; of many, fewer rows
  for (const group of document.querySelectorAll(".group")) {
    const cards = [...group.querySelectorAll(".sample")];
    const buttons = [...group.querySelectorAll("[data-filter]")];
    const more = group.querySelector(".more");
    let filter = "all";
    const page = Math.max(2, Math.min(PAGE, Math.floor(30 / cards[0].querySelectorAll(".by").length)));
    let limit = page;
    const fits = (card) => filter === "all" || (filter === "changed" ? "changed" in card.dataset : (card.dataset.wrong ?? "").split(" ").includes(filter));
    const show = () => {
      const chosen = cards.filter(fits);
      const visible = new Set(chosen.slice(0, limit));
      for (const card of cards) card.hidden = !visible.has(card);
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
      more.hidden = chosen.length <= limit;
      more.querySelector("span").textContent = `${visible.size} of ${chosen.length}`;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        filter = button.dataset.filter;
        limit = page;
        show();
      });
    }
    more.querySelector("button").addEventListener("click", () => {
      limit += 4 * page;
      show();
    });
    show();
  }

  // ---- the section that is read

  const anchors = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const link of anchors.values()) link.removeAttribute("aria-current");
      anchors.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main section")) watch.observe(section);

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
