"use strict";
(() => {
  const data = JSON.parse(document.getElementById("run-data").textContent);
  const tip = document.getElementById("tip");
  const NS = "http://www.w3.org/2000/svg";
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  document.documentElement.classList.add("js");
  const charts = [];
  let selected = data.selected;

  // What a candidate is, as text: run text never becomes HTML.
  const figures = (id) =>
    Object.entries(data.columns).map(([name, values]) => [name, values[id]]).filter(([, text]) => text !== "\u2013");
  const whole = new Map(all("tr[data-candidate]").map((row) => [Number(row.dataset.candidate), row.querySelector("td.metric > code").textContent]));
  const metric = (id) => whole.get(id) ?? data.metrics[data.metric[id]]; // long ones are whole in tables alone
  const command = (name, id) => data.commands[name].replace("@KEY@", data.key[id]);

  function show(x, y, heading, text) {
    const bold = document.createElement("b");
    bold.textContent = heading;
    tip.replaceChildren(bold, text);
    tip.hidden = false;
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(x + 14, width - tip.offsetWidth - 10));
    const below = y + 18 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(below ? y + 16 : Math.max(6, y - tip.offsetHeight - 14)) + scrollY}px`;
  }
  function hide() {
    tip.hidden = true;
    for (const chart of charts) chart.hover.setAttribute("visibility", "hidden");
  }
  function place(ring, mark) {
    ring.setAttribute("visibility", mark ? "visible" : "hidden");
    if (mark) { ring.setAttribute("cx", mark.x); ring.setAttribute("cy", mark.y); }
  }

  function select(id) {
    if (!(id in data.key)) return;
    selected = id;
    for (const chart of charts) place(chart.ring, chart.marks.find((mark) => mark.id === id));
    for (const row of all("tr[data-candidate]")) {
      const is = Number(row.dataset.candidate) === id;
      row.classList.toggle("selected", is);
      if (is) row.querySelector("input").checked = true;
    }
    const panel = document.getElementById("selected");
    if (!panel) return;
    const texts = { key: data.key[id], metric: metric(id) };
    for (const [name, values] of Object.entries(data.columns)) texts[name] = values[id];
    for (const item of all("[data-figure]", panel)) item.textContent = texts[item.dataset.figure];
    for (const item of all("[data-command]", panel)) item.textContent = command(item.dataset.command, id);
    paint(id);
  }

  // Ratios over depth.
  const cells = all("#cells rect");
  function paint(id) {
    if (!cells.length) return;
    const packed = data.ratios[id];
    const spread = document.getElementById("spread");
    const ratios = Array.isArray(packed) ? packed : cells.map(() => packed);
    if (packed === undefined) {
      spread.textContent = "this file does not hold the ratios of the selected rule";
    } else if (!Array.isArray(packed)) {
      spread.textContent = `every layer loses ${(packed / 10).toFixed(1)}%`;
    } else {
      const [low, high] = [Math.min(...ratios), Math.max(...ratios)];
      spread.textContent = `from ${(low / 10).toFixed(1)}% to ${(high / 10).toFixed(1)}% removed, ` +
        `${(data.sparsity[id] / 10).toFixed(1)}% of the whole model`;
    }
    const away = ratios.map((ratio) => (Array.isArray(packed) ? ratio - data.middle[id] : 0));
    const reach = Math.max(20, ...away.map(Math.abs));
    cells.forEach((cell, i) => {
      cell.setAttribute("class", away[i] > 0 ? "more" : away[i] < 0 ? "less" : "");
      cell.setAttribute("fill-opacity", (Math.abs(away[i]) / reach).toFixed(2));
      cell.dataset.text = packed === undefined ? "not in this file" : `${(ratios[i] / 10).toFixed(1)}% removed`;
    });
  }
  for (const cell of all(".heat rect")) {
    const [name, text] = cell.textContent.split(": ");
    cell.replaceChildren(); // the browser's own hint would stand over ours
    cell.dataset.text = text;
    cell.addEventListener("pointerenter", (event) => show(event.clientX, event.clientY, name, cell.dataset.text));
    cell.addEventListener("pointerleave", hide);
  }

  // Charts: the nearest point to the pointer, or the next one by arrow keys.
  for (const svg of all("svg.chart")) {
    const marks = all("path[data-of]", svg).flatMap((path) => {
      const ids = path.dataset.of.split(" ").map(Number);
      const isFront = path.classList.contains("front");
      return [...path.getAttribute("d").matchAll(/M([\d.]+) ([\d.]+)/g)].map((found, i) => (
        { id: ids[i], x: Number(found[1]), y: Number(found[2]), isFront }));
    });
    if (!marks.length) continue;
    const [ring, hover] = [9, 8].map((radius) => {
      const circle = document.createElementNS(NS, "circle");
      circle.setAttribute("class", "ring");
      circle.setAttribute("r", radius);
      circle.setAttribute("visibility", "hidden");
      return svg.appendChild(circle);
    });
    const chart = { svg, marks, ring, hover };
    charts.push(chart);
    const stops = (marks.some((mark) => mark.isFront) ? marks.filter((mark) => mark.isFront) : marks)
      .sort((a, b) => a.x - b.x || a.y - b.y);
    let stop = -1;
    const point = (mark) => {
      const box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      place(hover, mark);
      show(box.left + mark.x * scale, box.top + mark.y * scale, metric(mark.id),
        figures(mark.id).map(([name, text]) => `${name} ${text}`).join("\n"));
    };
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      let best = null, least = (16 * scale) ** 2 + 60;
      for (const mark of marks) {
        const far = (mark.x - x) ** 2 + (mark.y - y) ** 2 - (mark.isFront ? 40 : 0); // the front lies on top
        if (far < least) [best, least] = [mark, far];
      }
      return best;
    };
    svg.classList.add("points");
    svg.setAttribute("role", "application");
    svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")} Arrow keys move along the points, Enter selects.`);
    svg.tabIndex = 0;
    svg.addEventListener("pointermove", (event) => { const mark = nearest(event); mark ? point(mark) : hide(); });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("click", (event) => { const mark = nearest(event); if (mark) { select(mark.id); point(mark); } });
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
      if (event.key in steps) stop = Math.max(0, Math.min(stops.length - 1, stop + steps[event.key]));
      else if (event.key === "Home") stop = 0;
      else if (event.key === "End") stop = stops.length - 1;
      else if (event.key === "Escape") { hide(); return; }
      else if ((event.key === "Enter" || event.key === " ") && stop >= 0) select(stops[stop].id);
      else return;
      event.preventDefault();
      point(stops[stop]);
    });
  }

  // Tables: rows select, headings sort, buttons copy.
  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = label; }, 1200);
  }
  const copier = (label, text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      if (button.textContent === label) copy(text(), button);
    });
    return button;
  };
  for (const line of all("[data-command]")) line.after(copier("copy", () => line.textContent));
  for (const row of all("tr[data-candidate]")) {
    const id = Number(row.dataset.candidate);
    row.addEventListener("click", () => select(id));
    row.querySelector("input").addEventListener("change", () => select(id));
    row.querySelector("td.copy").append(...Object.keys(data.commands).map((name) => copier(name, () => command(name, id))));
  }
  for (const table of all("table.sortable")) {
    all("th[data-sort]", table).forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
        const column = head.cellIndex;
        const value = (row) => {
          const cell = row.cells[column];
          if (head.dataset.sort === "text") return cell.textContent;
          return cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
        };
        const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
        rows.sort(([a], [b]) => {
          if (typeof a === "string") return way * a.localeCompare(b, "en", { numeric: true });
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // missing comes last
          return way * (a - b);
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
  if (selected !== null) select(selected);
})();
