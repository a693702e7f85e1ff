// What an entry opens: figures, gaps, attacks, reports with previews. Made when it is asked for, from compressed data.
let unpacked = null;

function details() {
  unpacked ??= (async () => {
    const bytes = Uint8Array.from(atob(byId("details").textContent), (letter) => letter.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(plain).text());
  })();
  return unpacked;
}

async function toggle(victim, button) {
  const row = button.closest("tr");
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  row.classList.toggle("opened", !open);
  if (open) {
    byId(`entry-${victim.id}`)?.remove();
    return;
  }
  const cell = make("td", {colspan: row.cells.length});
  row.after(make("tr", {class: "details", id: `entry-${victim.id}`, children: [cell]}));
  const all = await details();
  cell.append(entry(victim, all.victims[victim.id], all));
}

// A wide table on a narrow page: it scrolls by itself, also by keyboard.
function scrolled(name, table) {
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": name, children: [table]});
}

function terms(pairs) {
  const list = make("dl");
  for (const [name, text] of pairs) list.append(make("dt", {text: name}), make("dd", {text}));
  return list;
}

function entry(victim, more, all) {
  const tab = board.tabs[state.tab];
  const figures = [[victim.group.score, `${victim.score}${victim.interval ? ` (${victim.level} ${victim.interval})` : ""}`], ...tab.figures.filter(([key]) => victim.figures[key]).map(([key, head]) => [head, victim.figures[key][0]]), ["Samples", String(victim.n)], ["Attacker", victim.attacker], ["Counted", more.how], ["Verified", more.verified]];
  if (victim.why) figures.push(["No rank", victim.why]);
  const section = make("section", {"aria-label": `${victim.model}, defense ${victim.defense}`});
  section.append(make("div", {class: "columns", children: [make("div", {children: [make("h3", {text: "Figures"}), terms(figures)]}), gaps(victim, more.gap)]}));
  section.append(make("h3", {text: "Attacks, the strongest first"}), scrolled(`Attacks on ${victim.model}`, attackTable(victim, more)));
  more.reports.forEach((index, i) => section.append(report(all.reports[index], i === 0)));
  return section;
}

function gaps(victim, gap) {
  const part = make("div", {children: [make("h3", {text: "Which gaps are real"})]});
  if (!gap) {
    part.append(make("p", {text: victim.why ? "It has no rank, so it is compared with nobody." : "It is alone in its table."}));
    return part;
  }
  const name = (place) => `${victim.group.victims[place].model} (${victim.group.victims[place].defense})`;
  const names = gap.same.slice(0, 8).map(name).join(", ") + (gap.same.length > 8 ? ` and ${gap.same.length - 8} more` : "");
  part.append(terms([
    ["Better by a real gap", gap.above ? `${gap.above} of the others` : "none"],
    ["No gap shown", names || "none"],
    ["Worse by a real gap", gap.below ? `${gap.below} of the others` : "none"],
    ["Nearest neighbour", `${name(gap.neighbour)}: ${gap.p === null ? "" : `p = ${gap.p < 0.001 ? gap.p.toExponential(1) : gap.p.toFixed(3)}, `}${gap.test}`],
  ]));
  part.append(make("p", {class: "soft", text: "All pairs of the table together are wrong with a chance of at most 5 % (Holm). Pairs of intervals without a test are not corrected."}));
  return part;
}

function attackTable(victim, more) {
  const head = make("tr", {children: more.heads.map((text) => make("th", {scope: "col", text}))});
  const rows = more.attacks.map((cells, i) => make("tr", {children: cells.map((text, k) => (k + 1 < cells.length ? make("td", {text}) : make("td", {children: [link(more.links[i], text)]})))}));
  return make("table", {class: "attacks", children: [make("thead", {children: [head]}), make("tbody", {children: rows})]});
}

function link(href, text) {
  return href ? make("a", {href, text}) : make("code", {text});
}

function report(data, open) {
  const head = make("thead", {children: [make("tr", {children: ["Figure", "Value", data.level, "Broken", "Counts"].map((text) => make("th", {scope: "col", text}))})]});
  const rows = data.rows.map(([label, value, interval, success, counts, kind]) => make("tr", {class: kind, children: [make("th", {scope: "row", text: label}), ...[value, interval, success, counts].map((text) => make("td", {text}))]}));
  const findings = data.findings.map(([severity, id, message, advice]) => make("li", {children: [badge(severity, id.replaceAll("_", " ")), ` ${message} `, make("em", {text: advice})]}));
  const figures = data.plots.map(([title, href, preview]) => {
    const inside = preview ? [make("img", {src: preview, alt: `${title}, small`})] : [title];
    const linked = href ? make("a", {href, children: inside}) : make("span", {children: inside});
    return make("figure", {children: [linked, ...(preview ? [make("figcaption", {text: title})] : [])]});
  });
  return make("details", {class: "report", open, children: [
    make("summary", {text: data.title}),
    make("p", {text: data.verdict}),
    make("ul", {class: "findings", children: findings}),
    make("div", {class: "previews", children: figures}),
    scrolled(`Figures of ${data.title}`, make("table", {class: "figures", children: [head, make("tbody", {children: rows})]})),
    terms(data.facts),
  ]});
}

start();
