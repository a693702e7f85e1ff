"use strict";
for (const row of document.querySelectorAll("tr.details")) row.hidden = true;

for (const button of document.querySelectorAll("button.open")) {
  button.addEventListener("click", () => {
    const row = document.getElementById(button.getAttribute("aria-controls"));
    row.hidden = !row.hidden;
    button.setAttribute("aria-expanded", String(!row.hidden));
  });
}

function compare(a, b, column, sign) {
  const x = a.querySelector("tr.entry").cells[column].dataset.key;
  const y = b.querySelector("tr.entry").cells[column].dataset.key;
  if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
  const numbers = [Number(x), Number(y)];
  if (numbers.every((value) => !Number.isNaN(value))) return sign * (numbers[0] - numbers[1]);
  return sign * x.localeCompare(y);
}

for (const head of document.querySelectorAll("th[aria-sort]")) {
  head.querySelector("button").addEventListener("click", () => {
    const table = head.closest("table");
    const next = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", next);
    const bodies = Array.from(table.tBodies);
    bodies.sort((a, b) => compare(a, b, head.cellIndex, next === "ascending" ? 1 : -1));
    for (const body of bodies) table.append(body);
  });
}

const text = document.getElementById("filter-text");
const task = document.getElementById("filter-task");
const norm = document.getElementById("filter-norm");
const sound = document.getElementById("filter-sound");
const count = document.getElementById("count");

function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const section of document.querySelectorAll("section.group")) {
    const fits = (!task.value || section.dataset.task === task.value) && (!norm.value || section.dataset.norm === norm.value);
    let here = 0;
    for (const body of section.querySelectorAll("tbody.item")) {
      const keep = fits && words.every((word) => body.dataset.text.includes(word)) && !(sound.checked && body.dataset.sound === "no");
      body.hidden = !keep;
      here += keep ? 1 : 0;
    }
    section.hidden = here === 0;
    shown += here;
  }
  count.textContent = shown === 1 ? "1 victim shown" : shown + " victims shown";
}

document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
for (const control of [text, task, norm, sound]) control.addEventListener("input", filter);
document.getElementById("filters").hidden = false;
filter();
