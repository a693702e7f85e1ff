"""A report as people read it: rows, sentences, a table, HTML; `terminal` makes the page of a terminal.

All take a completed document (`legacy.completed`): plain data, in which the scenario has said what its headline, its
other figures and its words are. No scenario, goal or modality is known by name here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from advkit.core.text import printable
from advkit.evaluation.report.schema import HERE, PLACEHOLDER, undecided
from advkit.evaluation.report.text import (
    counts_text,
    describe_threat,
    interval_text,
    level_text,
    metric_text,
    percent,
    shorten,
    spell,
    value_text,
    words_of,
)
from advkit.evaluation.trust.advice import ADVICE

if TYPE_CHECKING:
    import jinja2
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

Data = Mapping[str, Any]
SEVERITIES = ("info", "warning", "unreliable")
STYLES = {"info": "cyan", "warning": "yellow", "unreliable": "bold red"}
_SHOWN_RADII = 3
_LEAST_NAME = 16


@dataclass(frozen=True)
class Row:
    """One line of a summary: texts ready to print.

    label:    attack or metric
    value:    the rate in percent, or the scalar with its unit
    interval: its confidence interval, "" without
    success:  attack success rate, "" where that has no meaning
    counts:   numerator / denominator and what the denominator counts
    section:  "attack", "headline", "table", "companion", "beside", "metric", "class"
    low, high, share: the same as fractions for drawing, None where there is nothing to draw
    """

    label: str
    value: str
    interval: str = ""
    success: str = ""
    counts: str = ""
    section: str = "metric"
    share: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str = ""


class Finding(NamedTuple):
    """A flag with what to do about it; advice is "" where the message ends with it."""

    severity: str
    id: str
    message: str
    advice: str


@cache
def environment() -> jinja2.Environment:
    """Templates, with every value escaped: reports come from strangers."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    templates.filters["percent"] = percent
    return templates


# Rows


def rows(data: Data, full: bool = False) -> list[Row]:
    """The summary as data: what the scenario names, companions, the weakest class.

    `full` adds every attack, what the attacks cost, every other metric and every class.
    """
    own = [attack for attack in data["attacks"] if not attack["beside"]]
    attacks = _attack_rows(data, own, "attack") if full else ()
    return [*_named(data, full), *attacks, *(_rest(data) if full else _weakest(data))]


def lines_of(data: Data) -> list[tuple[str, str]]:
    """(label, metric) of what the scenario names, the headline among them; the usual three where it names none."""
    section, metrics = data["section"], data["metrics"]
    wording, headline = section["wording"], section["headline"]
    usual = [
        (wording["clean"], "clean_accuracy"),
        (wording["robust"], "robust_accuracy"),
        (wording["success"], "attack_success_rate"),
    ]
    lines = [(line["label"], line["metric"]) for line in section["table"]]
    lines = lines or [(label, name) for label, name in usual if metrics.get(name) is not None]
    if headline is not None and headline["metric"] not in {name for _, name in lines}:
        lines.insert(1, (headline["name"], headline["metric"]))
    return lines


def _named(data: Data, full: bool) -> Iterator[Row]:
    headline = data["section"]["headline"]
    for label, name in lines_of(data):
        section = "headline" if headline is not None and name == headline["metric"] else "table"
        yield from _metric_rows(label, data["metrics"][name], section, full)
    for companion in data["companions"]:
        yield from _metric_rows(companion["title"], data["metrics"][companion["metric"]], "companion")


def attack_labels(data: Data) -> list[str]:
    """Names of the attacks behind the headline, in order, as the rows of the summary have them."""
    return [label for _, label in _labelled(data, [attack for attack in data["attacks"] if not attack["beside"]])]


def _labelled(data: Data, chosen: Sequence[Data]) -> Iterator[tuple[Data, str]]:
    names = Counter(attack["name"] for attack in data["attacks"])
    for attack in chosen:
        label = spell(attack["name"], attack["params"]) if names[attack["name"]] > 1 else str(attack["name"])
        made_of = attack.get("made_of")
        label += f" = {made_of}" if made_of else ""
        yield attack, label + (" (on survivors)" if attack.get("conditional") else "")


def _attack_rows(data: Data, chosen: Sequence[Data], section: str) -> Iterator[Row]:
    for attack, label in _labelled(data, chosen):
        label = f"beside: {label}" if section == "beside" else label
        yield _row(label, attack["robust_accuracy"], section, attack["attack_success_rate"])


def _classes(data: Data) -> dict[str, Data]:
    """Class -> the headline among its samples alone."""
    headline = data["section"]["headline"]
    if headline is None:
        return {}
    prefix = f"{headline['metric']}_class_"
    named = {name.removeprefix(prefix): entry for name, entry in data["metrics"].items() if name.startswith(prefix)}
    return {name: entry for name, entry in named.items() if isinstance(entry, Mapping)}


def _weakest(data: Data) -> Iterator[Row]:
    """The weakest class, where the scenario tells classes apart."""
    if all(figure["name"] != "per_class" for figure in data["section"]["figures"]):
        return
    classes = {name: entry for name, entry in _classes(data).items() if entry["value"] is not None}
    if len(classes) > 1:
        sign = 1 if data["section"]["headline"]["better"] == "higher" else -1
        weakest = min(classes, key=lambda name: sign * classes[name]["value"])
        yield from _metric_rows(f"weakest class: {weakest}", classes[weakest], "class")


def _rest(data: Data) -> Iterator[Row]:
    """Attacks beside the headline, what the attacks cost, every metric that is not shown yet, every class."""
    yield from _attack_rows(data, [attack for attack in data["attacks"] if attack["beside"]], "beside")
    classes, headline = _classes(data), data["section"]["headline"]
    shown = {name for _, name in lines_of(data)} | {companion["metric"] for companion in data["companions"]}
    shown |= {f"{headline['metric']}_class_{name}" for name in classes}
    for name, entry in data["metrics"].items():
        if name not in shown:
            yield from (replace(row, metric=name) for row in _metric_rows(words_of(name), entry, "metric"))
    for name, entry in classes.items():
        yield from _metric_rows(f"class {name}", entry, "class")
    yield from _cost([attack for attack in data["attacks"] if not attack["beside"]])


def _cost(attacks: Sequence[Data]) -> Iterator[Row]:
    """What all attacks together took per attacked sample."""
    attacked = max((attack["n_attacked"] for attack in attacks), default=0)
    for words, key in (("passes", "forward"), ("tokens", "tokens")):
        total = sum(attack["cost"].get(key, 0) for attack in attacks)
        if total and attacked:
            value, counts = f"{total / attacked:.1f}", f"{total} in all"
            yield Row(f"{words} per attacked sample", value, counts=counts, section="cost")


def _row(label: str, entry: Data, section: str, success: Data | None = None) -> Row:
    ci = entry.get("ci")
    return Row(
        label,
        value_text(entry),
        interval_text(entry),
        "" if success is None else value_text(success),
        counts_text(entry) if success is None else f"{success['numerator']} / {success['denominator']} broken",
        section,
        entry["value"],
        None if ci is None else ci["low"],
        None if ci is None else ci["high"],
    )


def _metric_rows(label: str, entry: Any, section: str, full: bool = True) -> Iterator[Row]:
    if not isinstance(entry, list):
        yield _row(label, entry, section)
        return
    points = sorted(entry, key=lambda point: float(point["radius"]))
    if not full and len(points) > _SHOWN_RADII:
        points = [points[0], points[len(points) // 2], points[-1]]
    for point in points:
        yield _row(f"{label} at radius {point['radius']:g}", point["certified_accuracy"], section)


# Sentences


def title(data: Data) -> str:
    """The report's title, or model, defense and data."""
    given = data.get("title")
    if given:
        return str(given)
    defense = spell(data["defense"]["name"], data["defense"]["params"])
    return f"{data['model']['name']}, defense {defense}, on {data['dataset']['name']}"


def findings(data: Data) -> list[Finding]:
    """Every flag with advice, the most severe first."""
    flags = sorted(data["diagnostics"]["flags"], key=lambda flag: -SEVERITIES.index(flag["severity"]))
    return [
        Finding(f["severity"], f["id"], f["message"], "" if f["message"].endswith(")") else ADVICE.get(f["id"], ""))
        for f in flags
    ]


def sentence(data: Data) -> str:
    """What the scenario says of its run, with the values in place."""
    if data["dataset"]["n_evaluated"] == 0:
        return "No sample was evaluated."
    metrics = data["metrics"]
    own = {"threat": describe_threat(data["threat_model"]), "attacks": _how_many(data)}
    return PLACEHOLDER.sub(
        lambda match: own[match[1]] if match[1] in own else metric_text(metrics[match[1]]), data["section"]["sentence"]
    )


def names_threat(data: Data) -> bool:
    return "{threat}" in data["section"]["sentence"]


def not_needed(data: Data) -> str:
    """Which stages of a suite did not run, because no sample was left for them or no alarm called them; "" for none."""
    names = data["protocol"].get("not_needed") or ()
    return f"Stages that were not needed: {', '.join(map(str, names))}." if names else ""


def _how_many(data: Data) -> str:
    attacks = sum(not attack["beside"] for attack in data["attacks"])
    aggregation = data["protocol"]["aggregation"]
    if aggregation == "worst_case_per_sample" and attacks > 1:
        return f"worst case of {attacks} attacks"
    if attacks == 1 or aggregation in ("worst_case_per_sample", "single_attack"):
        return "one attack"
    return str(aggregation).replace("_", " ")


def remarks(data: Data) -> list[str]:
    """Whether the number can be believed, the gravest remark first."""
    flagged = {severity: sorted({f.id for f in findings(data) if f.severity == severity}) for severity in SEVERITIES}
    attacked = data["metrics"].get("robust_accuracy") is not None
    said = [f"Do not trust this number: {', '.join(flagged['unreliable'])}."] if flagged["unreliable"] else []
    said += _bounds(data)
    if data["threat_model"]["knowledge"] == "transfer" and all(c["name"] != "white_box" for c in data["companions"]):
        said.append("White-box accuracy was not evaluated and may be far lower.")
    if flagged["warning"] and not flagged["unreliable"]:
        said.append(f"Read it with care: {', '.join(flagged['warning'])}.")
    if not flagged["unreliable"] and not flagged["warning"]:
        said.append("No reliability flag was raised.")
    if attacked and data["defense"]["name"] != "none" and not data["threat_model"].get("adaptive"):
        said.append("No adaptive attack declared.")
    if spared := not_needed(data):
        said.append(spared)
    return said


def _bounds(data: Data) -> Iterator[str]:
    unknown = undecided(data["metrics"])
    if unknown:
        robust = data["metrics"]["robust_accuracy"]
        low, high = percent(robust["value"]), percent((robust["numerator"] + unknown) / robust["denominator"])
        yield f"{unknown} samples are undecided: robust accuracy lies between {low} and {high}."


def verdict(data: Data) -> str:
    """What the number says and whether it can be believed, in a few plain sentences."""
    said = [sentence(data), *remarks(data)]
    if not names_threat(data):
        said.insert(1, f"Threat model: {describe_threat(data['threat_model'])}.")
    solved = data["defense"].get("solved")
    if isinstance(solved, Mapping) and solved.get("summary"):
        said.append(f"The solver says: {solved['summary']}.")
    return " ".join(said)


# Everything, as a table and as HTML


class _Name:
    """A name in a cell: it loses its middle where the column is too narrow, and never wraps."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        # Text, not markup: names such as "[red]" are shown, never obeyed.
        yield Text(shorten(self.text, options.max_width), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(_LEAST_NAME, len(self.text)), max(1, len(self.text)))


def table(data: Data, full: bool = False) -> Table:
    """A rich table: rows, then findings with advice and the verdict."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title(data)), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    shown.add_column("")
    figure = data["section"]["wording"]["figure"]
    for heading in (figure, level_text(data["metrics"]), *(["broken"] if full else [])):
        shown.add_column(Text(heading), justify="right", no_wrap=True)
    shown.add_column("counts")
    lines = rows(data, full)
    for i, row in enumerate(lines):
        last = i + 1 < len(lines) and lines[i + 1].section != row.section
        cells = (row.value, row.interval, *([row.success] if full else []))
        style = "bold" if row.section == "headline" else ""
        shown.add_row(_Name(row.label), *map(Text, cells), _Name(row.counts), end_section=last, style=style)
    shown.caption = _caption(data)
    shown.caption_style = ""
    return shown


def _caption(data: Data) -> Text:
    from rich.text import Text

    caption = Text()
    for finding in findings(data):
        caption.append(f"{finding.severity}: {finding.id}", style=STYLES[finding.severity])
        caption.append(f": {finding.message}\n")
        if finding.advice:
            caption.append(f"    {finding.advice}\n", style="dim")
    caption.append(verdict(data))
    return caption


def page(data: Data, full: bool = False) -> dict[str, Any]:
    """What the summary's template shows."""
    return {
        "title": title(data),
        "rows": rows(data, full),
        "wording": data["section"]["wording"],
        "level": level_text(data["metrics"]),
        "findings": findings(data),
        "verdict": verdict(data),
    }


def html(data: Data, full: bool = False) -> str:
    """A table with findings and verdict for a notebook; every value escaped."""
    return environment().get_template("report.html").render(page=page(data, full))
