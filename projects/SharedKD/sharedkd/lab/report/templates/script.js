"use strict";

// Light and dark: the system's choice until the switch is used.
{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  try { root.dataset.theme = localStorage.getItem("report-theme") ?? ""; } catch { /* storage is refused */ }
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("report-theme", root.dataset.theme); } catch { /* for this page only */ }
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

// Tables: a heading sorts, numbers by value, the largest first; what has none comes last.
for (const heading of document.querySelectorAll(".sortable th[aria-sort]")) {
  heading.firstElementChild.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const rows = [...body.rows];
    const cell = (row) => row.cells[heading.cellIndex];
    const key = (row) => cell(row).dataset.value ?? cell(row).textContent;
    const numeric = rows.some((row) => cell(row).dataset.value !== undefined);
    const orders = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = orders[heading.ariaSort === orders[0] ? 1 : 0];
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
    for (const other of heading.parentElement.cells) other.ariaSort = "none";
    heading.ariaSort = order;
  });
}

// Legends: a name shows and hides its curve.
for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const hides = button.ariaPressed === "true";
    button.ariaPressed = String(!hides);
    button.closest("figure").querySelector(`[data-series="${button.dataset.toggle}"]`)?.classList.toggle("off", hides);
  });
}

// Detections: one image at a time, two models on top of each other, and a slider between them.
for (const gallery of document.querySelectorAll(".gallery")) {
  const find = (selector) => gallery.querySelector(selector);
  const shots = [...gallery.querySelectorAll(".shot")];
  const [slider, compare] = [find("input"), find(".compare")];
  const ends = gallery.querySelectorAll(".ends span");
  let index = 0;
  const slide = (value = slider.value) => {
    slider.value = value;
    slider.ariaValueText = `${slider.value} % ${find("select.left").value}`;
    compare.style.setProperty("--at", `${slider.value}%`);
  };
  const show = (step = 0) => {
    index = (index + step + shots.length) % shots.length;
    [["left", ".over"], ["right", ".under"]].forEach(([side, image], i) => {
      const model = find(`select.${side}`).value;
      const found = [...shots[index].querySelectorAll("figure")].find((x) => x.dataset.model === model);
      find(image).hidden = !found;
      ends[i].textContent = found ? found.querySelector("figcaption").textContent : `${model}: no picture`;
      if (found) for (const name of ["src", "alt"]) find(image)[name] = found.querySelector("img")[name];
    });
    find("[role=status]").textContent = `${index + 1} of ${shots.length}: ${shots[index].querySelector("h3").textContent}`;
    slide();
  };
  const drag = (event) => {
    const box = compare.getBoundingClientRect();
    slide(Math.round((100 * (event.clientX - box.left)) / box.width));
  };
  slider.addEventListener("input", () => slide());
  compare.addEventListener("pointerdown", (event) => { compare.setPointerCapture(event.pointerId); drag(event); });
  compare.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  for (const select of gallery.querySelectorAll("select")) select.addEventListener("change", () => show());
  for (const button of gallery.querySelectorAll(".turn button")) button.addEventListener("click", () => show(+button.value));
  find(".viewer").hidden = false;
  find(".shots").open = false;
  show();
}

// Paper cannot be opened: print what is folded, too, and fold it again.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => { for (const each of folded) each.open = false; });
