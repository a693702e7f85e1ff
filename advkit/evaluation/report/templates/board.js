"use strict";
// The board: tabs, filters, order and pages over the data in #board. What an entry opens is in board_details.js.
const PAGE = 100;
const FILTERS = ["task", "norm", "goal", "access", "defense", "attack", "n"];
const board = JSON.parse(document.getElementById("board").textContent);
const byId = (id) => document.getElementById(id);
const state = {tab: 0, text: "", ranked: false, sort: "", down: false, page: 0};
for (const name of FILTERS) state[name] = "";

function make(tag, {text, children = [], ...attributes} = {}) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function badge(kind, text, title) {
  return make("span", {class: `badge ${kind}`, text, title});
}

// What every entry is filtered and sorted by.

for (const tab of board.tabs) {
  tab.groups.forEach((group, g) => {
    group.id = `table-${board.tabs.indexOf(tab)}-${g}`;
    group.victims.forEach((victim, place) => {
      victim.group = group;
      victim.place = place;
      victim.level ??= group.level;
      victim.sought = [victim.model, victim.defense, ...victim.attacks, group.title, victim.attacker, victim.why ?? "", ...victim.flags.map(([id]) => `${id} ${id.replaceAll("_", " ")}`)].join(" ").toLowerCase();
    });
  });
}

const value = {
  rank: (victim) => victim.rank ?? null,
  victim: (victim) => `${victim.model} ${victim.defense}`,
  score: (victim) => (victim.unbounded ? Infinity : victim.value ?? null),
  n: (victim) => victim.n,
  attacker: (victim) => victim.attacker,
  attacks: (victim) => victim.attacks.join(", "),
  flags: (victim) => victim.flags.length,
};
const of = (key) => value[key] ?? ((victim) => victim.figures[key]?.[1] ?? null);

function compare(a, b, key) {
  const [x, y] = [of(key)(a), of(key)(b)];
  if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1;
  const order = typeof x === "number" ? x - y || 0 : x.localeCompare(y);
  return state.down ? -order : order;
}

// Filters.

const fits = {
  task: (victim, wanted) => victim.group.task === wanted,
  norm: (victim, wanted) => victim.group.norm === wanted,
  goal: (victim, wanted) => victim.group.goal === wanted,
  access: (victim, wanted) => victim.group.access === wanted,
  defense: (victim, wanted) => victim.defense === wanted,
  attack: (victim, wanted) => victim.attacks.includes(wanted),
  n: (victim, wanted) => String(victim.n) === wanted,
};

function shown() {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const asked = FILTERS.filter((name) => state[name] !== "");
  const keep = (victim) => (!state.ranked || victim.rank !== undefined) && asked.every((name) => fits[name](victim, state[name])) && words.every((word) => victim.sought.includes(word));
  const entries = [];
  for (const group of board.tabs[state.tab]?.groups ?? []) {
    const own = group.victims.filter(keep);
    if (state.sort) own.sort((a, b) => compare(a, b, state.sort));
    entries.push(...own);
  }
  return entries;
}

function fillFilters() {
  const victims = board.tabs.flatMap((tab) => tab.groups.flatMap((group) => group.victims));
  const all = {
    task: (victim) => [victim.group.task], norm: (victim) => [victim.group.norm], goal: (victim) => [victim.group.goal],
    access: (victim) => [victim.group.access], defense: (victim) => [victim.defense], attack: (victim) => victim.attacks, n: (victim) => [String(victim.n)],
  };
  for (const name of FILTERS) {
    const found = [...new Set(victims.flatMap(all[name]))].sort((a, b) => a.localeCompare(b, undefined, {numeric: true}));
    byId(`filter-${name}`).append(...found.map((each) => make("option", {text: each, value: each})));
    byId(`filter-${name}`).closest("label").hidden = found.length < 2;
  }
}

// Columns: the score stands right after the victim; figures beside it come from the data.

function columns(tab) {
  return [
    {key: "rank", head: "#", number: true, cell: rankCell},
    {key: "victim", head: "Victim", cell: victimCell},
    {key: "score", head: `${tab.score} (${tab.direction})`, cell: scoreCell},
    ...tab.figures.map(([key, head]) => ({key, head, number: true, size: "medium", cell: (victim) => figureCell(victim, key)})),
    {key: "n", head: "Samples", number: true, size: "wide", cell: (victim) => make("td", {text: victim.n})},
    {key: "attacker", head: "Attacker", size: "medium", cell: attackerCell},
    {key: "attacks", head: "Attacks", size: "wide", cell: attacksCell},
    {key: "flags", head: "Flags", cell: flagsCell},
  ];
}

function rankCell(victim) {
  const cell = make("td", {children: [make("strong", {text: victim.rank ?? "-"})]});
  if (victim.ranks) cell.append(make("small", {text: victim.ranks[0] === victim.ranks[1] ? "alone" : `${victim.ranks[0]} to ${victim.ranks[1]}`, title: "ranks that the tests leave open"}));
  if (victim.why) cell.append(make("small", {text: "no rank"}));
  return cell;
}

function victimCell(victim) {
  const button = make("button", {type: "button", class: "open", text: victim.model, "aria-expanded": "false", "aria-controls": `entry-${victim.id}`});
  button.addEventListener("click", () => toggle(victim, button));
  return make("td", {children: [button, make("small", {text: `defense ${victim.defense}`})]});
}

function bar({value: at, low, high}) {
  const space = "http://www.w3.org/2000/svg";
  const part = (tag, attributes) => {
    const element = document.createElementNS(space, tag);
    for (const [name, each] of Object.entries(attributes)) element.setAttribute(name, each);
    return element;
  };
  const drawn = part("svg", {class: "bar", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true"});
  drawn.append(part("rect", {class: "track", y: 2, width: 100, height: 8}), part("rect", {class: "value", y: 2, width: 100 * at, height: 8}));
  if (low !== undefined) drawn.append(part("path", {class: "whisker", "vector-effect": "non-scaling-stroke", d: `M${100 * low} 6H${100 * high}M${100 * low} 2V10M${100 * high} 2V10`}));
  return drawn;
}

function scoreCell(victim) {
  const cell = make("td", {children: [make("strong", {text: victim.score})]});
  if (victim.fraction && victim.value !== undefined) cell.append(bar(victim));
  if (victim.interval) cell.append(make("small", {children: [make("span", {class: "level", text: `${victim.level} `}), victim.interval]}));
  return cell;
}

function figureCell(victim, key) {
  const text = victim.figures[key]?.[0] ?? "-";
  return make("td", text === "not evaluated" ? {children: [badge("warning", text)]} : {text});
}

function attackerCell(victim) {
  const kind = victim.attacker.includes("adaptive") ? "adaptive" : victim.attacker.includes("oblivious") ? "oblivious" : "info";
  return make("td", {children: [badge(kind, victim.attacker)]});
}

function attacksCell(victim) {
  const more = victim.attacks.length - 3;
  return make("td", {text: victim.attacks.slice(0, 3).join(", ") + (more > 0 ? ` and ${more} more` : "")});
}

function flagsCell(victim) {
  const cell = make("td");
  if (victim.verified !== "yes") cell.append(badge(victim.refuted ? "unreliable" : "info", {no: "not verified", partly: "partly verified"}[victim.verified] ?? victim.verified));
  for (const [id, severity] of victim.flags) cell.append(badge(severity, id.replaceAll("_", " ")));
  if (victim.undecided) cell.append(badge("unreliable", `${victim.undecided} undecided`));
  return cell;
}

// Drawing.

function draw() {
  const tab = board.tabs[state.tab];
  const table = document.querySelector("table.board");
  const entries = shown();
  const pages = Math.max(1, Math.ceil(entries.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  byId("count").textContent = `${entries.length} ${entries.length === 1 ? "victim" : "victims"} shown`;
  for (const body of [...table.tBodies]) body.remove();
  if (tab === undefined) byId("count").textContent = "No report to rank.";
  else {
    const made = columns(tab);
    drawHead(table, made);
    drawBodies(table, made, entries.slice(PAGE * state.page, PAGE * (state.page + 1)));
  }
  drawPages(pages);
  drawContents(entries);
  document.querySelectorAll("[role=tab]").forEach((each, i) => {
    each.setAttribute("aria-selected", String(i === state.tab));
    each.tabIndex = i === state.tab ? 0 : -1;
  });
  byId("panel").setAttribute("aria-labelledby", `tab-${state.tab}`);
  remember();
}

function drawHead(table, made) {
  const focused = document.activeElement?.dataset.key;
  const row = make("tr");
  for (const column of made) {
    const button = make("button", {type: "button", text: column.head, "data-key": column.key});
    button.addEventListener("click", () => {
      state.down = state.sort === column.key ? !state.down : column.number === true && column.key !== "rank";
      state.sort = column.key;
      state.page = 0;
      draw();
    });
    const order = state.sort === column.key ? (state.down ? "descending" : "ascending") : "none";
    row.append(make("th", {scope: "col", class: `${column.number ? "number" : ""} ${column.size ?? ""}`.trim(), "aria-sort": order, children: [button]}));
  }
  table.tHead.replaceChildren(row);
  if (focused) table.tHead.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function drawBodies(table, made, entries) {
  const drawn = document.createDocumentFragment();
  let group = null;
  for (const victim of entries) {
    if (victim.group !== group) {
      group = victim.group;
      drawn.append(make("tbody", {children: [groupRow(group, made.length)]}));
    }
    const row = make("tr", {class: "entry"});
    for (const column of made) {
      const cell = column.cell(victim);
      cell.className = `${column.key} ${column.number ? "number" : ""} ${column.size ?? ""}`.trim();
      row.append(cell);
    }
    drawn.append(make("tbody", {children: [row]}));
  }
  table.append(drawn);
}

function groupRow(group, width) {
  const cell = make("td", {colspan: width, children: [make("h2", {id: group.id, tabindex: "-1", text: group.title}), make("p", {text: `Ranked by ${group.score}; ${group.direction}. ${group.victims.length} ${group.victims.length === 1 ? "victim" : "victims"}.`})]});
  if (group.note) cell.append(make("p", {class: "note", text: group.note}));
  return make("tr", {class: "group", children: [cell]});
}

function drawPages(pages) {
  for (const line of document.querySelectorAll(".pages")) {
    const turn = (text, by) => {
      const button = make("button", {type: "button", class: "plain", text, disabled: state.page + by < 0 || state.page + by >= pages});
      button.addEventListener("click", () => {
        state.page += by;
        draw();
        byId("entries").focus();
        byId("entries").scrollIntoView();
      });
      return button;
    };
    line.hidden = pages < 2;
    line.replaceChildren(turn("Previous", -1), ` page ${state.page + 1} of ${pages} `, turn("Next", 1));
  }
}

function drawContents(entries) {
  const first = new Map();
  entries.forEach((victim, i) => first.has(victim.group) || first.set(victim.group, i));
  const items = [...first].map(([group, i]) => {
    const link = make("a", {href: `#${group.id}`, text: group.title});
    link.addEventListener("click", (event) => {
      event.preventDefault();
      state.page = Math.floor(i / PAGE);
      draw();
      byId(group.id).scrollIntoView();
      byId(group.id).focus();
    });
    return make("li", {children: [link]});
  });
  document.querySelector(".contents ul").replaceChildren(...items);
  document.querySelector(".contents").hidden = items.length < 2;
}

// The address keeps tab, filters, order and page.

function remember() {
  const said = new URLSearchParams();
  if (state.tab) said.set("tab", board.tabs[state.tab].id);
  for (const name of ["text", ...FILTERS, "sort"]) if (state[name] !== "") said.set(name, state[name]);
  if (state.ranked) said.set("ranked", "1");
  if (state.down) said.set("down", "1");
  if (state.page) said.set("page", String(state.page + 1));
  const wanted = said.size ? `#${said}` : "#";
  if (location.hash !== wanted && !(wanted === "#" && location.hash === "")) history.replaceState(null, "", wanted);
}

function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  state.tab = Math.max(0, board.tabs.findIndex((tab) => tab.id === said.get("tab")));
  for (const name of ["text", ...FILTERS, "sort"]) state[name] = said.get(name) ?? "";
  state.ranked = said.has("ranked");
  state.down = said.has("down");
  state.page = Math.max(0, Number(said.get("page") ?? 1) - 1 || 0);
  byId("filter-text").value = state.text;
  byId("filter-ranked").checked = state.ranked;
  for (const name of FILTERS) byId(`filter-${name}`).value = state[name];
}

// CSV of what is shown, over all pages. A text that a spreadsheet would compute gets an apostrophe.

function field(text) {
  const plain = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
  return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function csv() {
  const tab = board.tabs[state.tab];
  const head = ["table", "rank", "best_rank", "worst_rank", "model", "defense", tab.headline, "low", "high", ...tab.figures.map(([key]) => key), "n", "attacker", "attacks", "verified", "flags", "why_no_rank"];
  const lines = shown().map((victim) => [
    victim.group.title, victim.rank, victim.ranks?.[0], victim.ranks?.[1], victim.model, victim.defense, victim.unbounded ? "inf" : victim.value, victim.low, victim.high,
    ...tab.figures.map(([key]) => victim.figures[key]?.[1]), victim.n, victim.attacker, victim.attacks.join("; "), victim.verified, victim.flags.map(([id]) => id).join("; "), victim.why,
  ]);
  return [head, ...lines].map((line) => line.map((each) => field(String(each ?? ""))).join(",")).join("\r\n") + "\r\n";
}

function save() {
  const link = make("a", {href: URL.createObjectURL(new Blob([csv()], {type: "text/csv"})), download: `leaderboard-${board.tabs[state.tab].id}.csv`});
  link.click();
  URL.revokeObjectURL(link.href);
}

// Controls.

function start() {
  const tabs = document.querySelector(".tabs");
  board.tabs.forEach((tab, i) => {
    const button = make("button", {type: "button", role: "tab", id: `tab-${i}`, "aria-controls": "panel", children: [make("strong", {text: tab.scenario}), make("small", {text: `${tab.score}, ${tab.direction}`})]});
    button.addEventListener("click", () => {
      Object.assign(state, {tab: i, sort: "", down: false, page: 0});
      draw();
    });
    tabs.append(button);
  });
  tabs.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    const next = (state.tab + step + board.tabs.length) % board.tabs.length;
    tabs.children[next].click();
    tabs.children[next].focus();
  });
  document.querySelector("form.filters").addEventListener("submit", (event) => event.preventDefault());
  document.querySelector("form.filters").addEventListener("input", () => {
    state.text = byId("filter-text").value;
    state.ranked = byId("filter-ranked").checked;
    for (const name of FILTERS) state[name] = byId(`filter-${name}`).value;
    state.page = 0;
    draw();
  });
  byId("reset").addEventListener("click", () => {
    document.querySelector("form.filters").reset();
    document.querySelector("form.filters").dispatchEvent(new Event("input"));
  });
  document.querySelector("a.skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds filters and order
    byId("entries").scrollIntoView();
    byId("entries").focus();
  });
  byId("csv").addEventListener("click", save);
  byId("csv").disabled = board.tabs.length === 0;
  window.addEventListener("hashchange", () => {
    if (/^#(entries|table-)/.test(location.hash)) return;
    recall();
    draw();
  });
  fillFilters();
  recall();
  draw();
}
