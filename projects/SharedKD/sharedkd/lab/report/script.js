"use strict";

// Light and dark: the system's choice until the switch is used.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("report-theme"); } catch { return null; } };
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
  };
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("report-theme", root.dataset.theme); } catch { /* for this page only */ }
    show();
  });
  system.addEventListener("change", show);
  show();
  // Paper is white.
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
  });
})();

// Tables: a heading sorts, numbers by value, what has none comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = rows.some((row) => row.cells[column].dataset.value !== undefined);
    const current = heading.getAttribute("aria-sort");
    // The first click on numbers shows the largest first, on words the alphabet.
    const first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending";
    const order = current === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
    for (const other of headings) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
  }));
}

// Legends: a name shows and hides its curve.
for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!shown));
    const plot = button.closest(".plot");
    plot.querySelector(`[data-series="${button.dataset.toggle}"]`)?.classList.toggle("off", shown);
  });
}

// Detections: one image at a time, two models on top of each other, and a slider between them.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

for (const gallery of document.querySelectorAll(".gallery")) {
  const shots = [...gallery.querySelectorAll(".shot")];
  const models = [...new Set([...gallery.querySelectorAll("[data-model]")].map((x) => x.dataset.model))];
  const chooser = (name, chosen) => {
    const select = element("select", {}, ...models.map((model) => element("option", { value: model }, model)));
    select.value = models.includes(chosen) ? chosen : models[0];
    select.addEventListener("change", () => show());
    return [select, element("label", {}, name, select)];
  };
  const [left, leftLabel] = chooser("left", gallery.dataset.left);
  const [right, rightLabel] = chooser("right", gallery.dataset.right);
  const over = element("img", { class: "over", draggable: "false" });
  const under = element("img", { draggable: "false" });
  const compare = element("div", { class: "compare" }, under, over, element("div", { class: "handle" }));
  const slider = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "How much of the left model is shown, in percent" });
  const ends = [element("span"), element("span")];
  const where = element("span", { role: "status" });
  const turn = (step, text) => {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => show(step));
    return button;
  };
  const viewer = element(
    "div", { class: "viewer", role: "group", "aria-label": "Detections of two models" },
    element("div", { class: "choices" }, leftLabel, rightLabel), compare, slider,
    element("div", { class: "ends" }, ...ends),
    element("div", { class: "turn" }, turn(-1, "Previous"), turn(1, "Next"), where),
  );
  let index = 0;
  const slide = () => {
    compare.style.setProperty("--at", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % ${left.value}`);
  };
  const show = (step = 0) => {
    index = (index + step + shots.length) % shots.length;
    [[over, left, ends[0]], [under, right, ends[1]]].forEach(([image, select, end]) => {
      const found = [...shots[index].querySelectorAll("[data-model]")].find((x) => x.dataset.model === select.value);
      image.hidden = !found;
      if (!found) return;
      image.src = found.querySelector("img").src;
      image.alt = found.querySelector("img").alt;
      end.textContent = found.querySelector("figcaption").textContent;
    });
    where.textContent = `${index + 1} of ${shots.length}: ${shots[index].querySelector("h4").textContent}`;
    slide();
  };
  slider.addEventListener("input", slide);
  const drag = (event) => {
    const box = compare.getBoundingClientRect();
    slider.value = Math.round(100 * (event.clientX - box.left) / box.width);
    slide();
  };
  compare.addEventListener("pointerdown", (event) => {
    compare.setPointerCapture(event.pointerId);
    drag(event);
  });
  compare.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  gallery.prepend(viewer);
  gallery.querySelector(".shots").open = false;
  show();
}

// Paper cannot be opened: print what is folded, too, and fold it again.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => { for (const each of folded) each.open = false; });
