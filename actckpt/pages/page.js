"use strict";
// The figures of this page are in its JSON; the script moves the instant and sorts the tables.
const report = JSON.parse(document.getElementById("actckpt-report").textContent);

// as actckpt/units.py: three significant digits, powers of ten
function digits(value) {
  const size = Math.abs(value);
  return value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
}
function scaled(value, units, smallest, scale) {
  for (const [unit, size] of units) {
    if (Math.abs(value) >= 0.9995 * size) return `${digits(value / size)} ${unit}`;
  }
  value /= scale;
  return `${Number.isInteger(value) ? value.toFixed(0) : digits(value)} ${smallest}`;
}
const bytes = (count) => scaled(count, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]], "B", 1);
function seconds(time) {
  if (Math.abs(time) >= 600) return `${Number((time / 60).toPrecision(3))} min`;
  if (Math.abs(time) < 1e-9) return "0 s";
  return scaled(time, [["s", 1], ["ms", 1e-3]], "µs", 1e-6);
}

function cells(...texts) {
  const row = document.createElement("tr");
  texts.forEach((text, n) => {
    const cell = row.insertCell();
    cell.className = n ? "number" : "word";
    cell.textContent = text;
  });
  return row;
}

// what lives at an instant
for (const arm of document.querySelectorAll(".arm")) {
  const plot = arm.querySelector(".plot");
  const cursor = plot.querySelector(".cursor");
  const name = plot.dataset.arm;
  const places = plot.dataset.places.split(" ").map(Number);
  const timeline = report.timeline;
  const levels = timeline[name];
  const running = timeline[`${name}_running`];
  const living = timeline[`${name}_living`];
  let now = Number(arm.dataset.instant);

  const phaseAt = (n) => {
    let phase = "";
    for (const [mark, share] of Object.entries(timeline[`${name}_marks`])) {
      if (Math.trunc(share * places.length) <= n) phase = mark;
    }
    return phase;
  };

  function show(n) {
    now = Math.min(Math.max(n, 0), places.length - 1);
    arm.dataset.instant = now;
    cursor.hidden = false;
    cursor.style.left = `${100 * places[now]}%`;
    const when = arm.dataset.seconds ? `at ${seconds(places[now] * arm.dataset.seconds)}` : "";
    arm.querySelector(".at").textContent = [when, phaseAt(now), running[now]].filter(Boolean).join(": ");
    let total = 0;
    for (const row of arm.querySelectorAll("tr[data-category]")) {
      const count = levels[row.dataset.category][now];
      total += count;
      row.lastElementChild.textContent = bytes(count);
    }
    arm.querySelector(".total").textContent = bytes(total);
    const rows = (living[now] || []).map(([op, where, count, size]) =>
      cells(`${count > 1 ? `${count} × ` : ""}${op}${where ? ` in ${where}` : ""}`, bytes(size)));
    arm.querySelector(".living tbody").replaceChildren(...rows);
  }

  const nearest = (share) => {
    let best = 0;
    places.forEach((place, n) => {
      if (Math.abs(place - share) < Math.abs(places[best] - share)) best = n;
    });
    return best;
  };
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest((event.clientX - box.left) / box.width));
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(now + move);
  });
  show(now);
}

// tables are sorted by a click on a column, and the other way round by another
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const { dataset, textContent } = row.cells[column];
        return dataset.value === undefined ? textContent : Number(dataset.value);
      };
      const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)));
      table.tBodies[0].replaceChildren(...(down ? rows.reverse() : rows));
    });
  });
}
