"""The report: one JSON document whose every rate carries its counts, checked before it is believed.

Shape: `evaluation_report.schema.json`. What a schema can't say (a value is its numerator over its denominator, an
interval is the one its method gives, robust accuracy is clean accuracy times what the attack left) is checked here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from advkit.core.errors import ReportError
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import DenominatorKind, Interval, clopper_pearson, wilson
from advkit.evaluation.trust.advice import ADVICE

if TYPE_CHECKING:
    import jinja2
    from rich.table import Table
    from rich.text import Text

log = logging.getLogger("advkit")

SCHEMA_VERSION = "1.0"
REPORT_NAME = "report.json"
_HERE = Path(__file__).parent
_SHOWN_ATTACKS = 30  # a full transfer grid has hundreds of cells; the strongest are shown
_SHOWN_BESIDE = 3
_CLASS = "robust_accuracy_class_"
_SEVERITIES = ("info", "warning", "unreliable")
_RATE_KEYS = {"value", "numerator", "denominator", "denominator_kind", "ci"}
_ROUND_OFF = 1e-9


@cache
def schema() -> dict[str, Any]:
    """The packaged JSON Schema of a report."""
    return cast("dict[str, Any]", json.loads((_HERE / "evaluation_report.schema.json").read_text(encoding="utf-8")))


@cache
def environment() -> jinja2.Environment:
    """Templates, with every value escaped: reports come from strangers."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = percent
    return made


def percent(value: float | None) -> str:
    """A fraction as people read it: "84.9 %", or "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def spell(name: str, params: Mapping[str, Any]) -> str:
    """`pgd:steps=40,restarts=2` from a name and its parameters; the name alone where it spells them already."""
    if not params or ":" in name:
        return name
    return name + ":" + ",".join(f"{key}={value}" for key, value in params.items())


def describe_threat(threat: Mapping[str, Any]) -> str:
    """One line: `linf eps=8/255, untargeted, white box`."""
    name = str(threat["name"])
    words = [name]
    eps = threat.get("eps_string") or threat.get("eps")
    if eps is not None and "eps" not in name:
        words[0] += f" of {eps}" if name == "suffix" else f" eps={eps}"
    words += [str(threat["goal"]).replace("_", " "), str(threat["knowledge"]).replace("_", " ")]
    if threat.get("query_budget") is not None:
        words.append(f"{threat['query_budget']} queries")
    return ", ".join(words)


@dataclass(frozen=True)
class Row:
    """One line of a summary: texts ready to print.

    label:    attack, metric or "clean"
    value:    the rate in percent, or the scalar with its unit
    interval: its confidence interval, "" without
    success:  attack success rate, "" where that has no meaning
    counts:   numerator / denominator and what the denominator counts
    section:  "clean", "attack", "worst", "beside", "metric"
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


@dataclass(frozen=True)
class Report:
    """A validated, immutable evaluation report; build it with `from_dict` or `load`.

    text: canonical JSON of the document
    path: the file it came from, None for one made in memory; its folder may hold records.jsonl and plots/
    Raises ReportError when the document does not validate or does not agree with itself.
    """

    text: str
    path: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _validate(self._data)

    @cached_property
    def _data(self) -> dict[str, Any]:
        try:
            data = json.loads(self.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"not a JSON document: {error}") from None
        if not isinstance(data, dict):
            raise ReportError(f"a report is a JSON object; this is a {type(data).__name__}")
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path | None = None) -> Report:
        """Check a document and wrap it; raises ReportError."""
        try:
            text = json.dumps(data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ReportError(
                f"report can't be written as JSON ({error}); expected plain finite numbers, texts, lists and mappings"
            ) from None
        return cls(text, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read report.json, or the report.json of a run folder; raises ReportError."""
        file = Path(path)
        if file.is_dir():
            file = file / REPORT_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ReportError(f"no report at {file}; expected a report.json or the folder of a finished run") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(f"{file} can't be read: {error}") from None
        try:
            return cls(text, file)
        except ReportError as error:
            raise ReportError(f"{file}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report in one move, so that a reader never meets half of it."""
        target = Path(path)
        write_atomic(target, self.to_json() + "\n")
        return target

    def to_dict(self) -> dict[str, Any]:
        """A fresh copy of the document."""
        return cast("dict[str, Any]", json.loads(self.text))

    def to_json(self) -> str:
        """The document, indented; the same report gives the same bytes."""
        return json.dumps(self._data, indent=2, allow_nan=False, ensure_ascii=False)

    def _rate(self, name: str) -> Mapping[str, Any] | None:
        return cast("Mapping[str, Any] | None", self._data["metrics"].get(name))

    def _value(self, name: str) -> float | None:
        entry = self._rate(name)
        return None if entry is None else entry["value"]

    @property
    def clean_accuracy(self) -> float | None:
        """Fraction of rows answered right before any attack; None for no rows."""
        return self._value("clean_accuracy")

    @property
    def robust_accuracy(self) -> float | None:
        """Fraction of rows right before and after every attack; None where no attack was run."""
        return self._value("robust_accuracy")

    @property
    def attack_success_rate(self) -> float | None:
        """Broken rows over the denominator that `metrics` names; None where no attack was run."""
        return self._value("attack_success_rate")

    def interval(self, metric: str = "robust_accuracy") -> Interval | None:
        """The confidence interval of a metric, None where the report gives none."""
        entry = self._rate(metric)
        if not isinstance(entry, Mapping) or entry.get("ci") is None:
            return None
        return Interval(**entry["ci"])

    @property
    def metrics(self) -> dict[str, Any]:
        """Every metric by name: rates with counts, scalars, certified curves."""
        return cast("dict[str, Any]", self.to_dict()["metrics"])

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """One entry per attack, in the order they ran."""
        return cast("list[dict[str, Any]]", self.to_dict()["attacks"])

    @property
    def flags(self) -> list[dict[str, Any]]:
        """Findings about the evaluation itself, the gravest first."""
        found = cast("list[dict[str, Any]]", self.to_dict()["diagnostics"]["flags"])
        return sorted(found, key=lambda flag: -_SEVERITIES.index(flag["severity"]))

    @property
    def trustworthy(self) -> bool:
        """No finding says that the number is unreliable, and every row was decided."""
        return not any(flag["severity"] == "unreliable" for flag in self.flags) and self.undecided == 0

    @property
    def undecided(self) -> int:
        """Rows right before the attack that ended neither robust nor broken (errors, NaN answers)."""
        return _undecided(self._data["metrics"])

    @property
    def title(self) -> str:
        """The report's title, or model, defense and data."""
        given = self._data.get("title")
        if given:
            return str(given)
        defense = spell(self._data["defense"]["name"], self._data["defense"]["params"])
        return f"{self._data['model']['name']}, defense {defense}, on {self._data['dataset']['name']}"

    @property
    def threat(self) -> str:
        """The threat model in one line."""
        return describe_threat(self._data["threat_model"])

    @property
    def other_goal(self) -> bool:
        """The attacker wanted something else than a wrong answer: rows that stand are those that did not give it."""
        return bool(self._data["threat_model"]["goal"] != "untargeted")

    @property
    def of_text(self) -> bool:
        """What is attacked writes text: a row is answered rightly where the wanted reply is held back."""
        return bool(self._data["task"] == "text_generation")

    def rows(self, full: bool = False) -> list[Row]:
        """The summary as data: clean, attacks, worst case, other metrics.

        Unless `full`, long lists (transfer grids, classes) are cut to what decides: the strongest attacks, the weakest
        class.
        """
        metrics = self._data["metrics"]
        attacks = self._data["attacks"]
        beside = [attack for attack in attacks if _is_beside(attack, self._data)]
        together = [attack for attack in attacks if attack not in beside]
        twins = Counter(attack["name"] for attack in attacks)

        def lines(chosen: list[dict[str, Any]], limit: int, section: str) -> Iterator[Row]:
            shown = chosen if full or len(chosen) <= limit else sorted(chosen, key=_strength)[:limit]
            for attack in shown:
                label = spell(attack["name"], attack["params"]) if twins[attack["name"]] > 1 else attack["name"]
                label += " (on survivors)" if attack.get("conditional") else ""
                label = f"beside: {label}" if section == "beside" else label
                yield _rate_row(label, attack["robust_accuracy"], section, attack["attack_success_rate"])
            if len(shown) < len(chosen):
                yield Row(f"... {len(chosen) - len(shown)} weaker attacks", "", section=section)

        clean = "target held back, untouched" if self.of_text else "clean"
        rows = [_rate_row(clean, metrics["clean_accuracy"], "clean")]
        rows += lines(together, _SHOWN_ATTACKS, "attack")
        robust = metrics.get("robust_accuracy")
        if robust is not None:
            alone = "goal not reached" if self.other_goal else "robust accuracy"
            alone = "target held back" if self.of_text else alone
            label = f"worst case of {len(together)} attacks" if len(together) > 1 else alone
            if self._data["protocol"]["aggregation"] == "mean_over_runs":
                label = "mean over runs"
            rows.append(_rate_row(label, robust, "worst", metrics.get("attack_success_rate")))
        rows += lines(beside, _SHOWN_BESIDE, "beside")
        classes = {name: entry for name, entry in metrics.items() if name.startswith(_CLASS)}
        told = {"clean_accuracy", "robust_accuracy", "attack_success_rate", *classes}
        if self.of_text:
            rows += _spent(together)
            told |= set() if full else {name for name in metrics if "_asr_clean_" in name or name.startswith("tokens_")}
        for name, entry in metrics.items():
            if name not in told:
                rows.extend(_metric_rows(_words(name), entry))
        if full or len(classes) < 4:
            for name, entry in classes.items():
                rows.extend(_metric_rows(_words(name), entry))
        elif not self.other_goal:
            weakest = min(classes, key=lambda name: (classes[name]["value"] is None, classes[name]["value"] or 0.0))
            rows.extend(_metric_rows(f"weakest class: {weakest.removeprefix(_CLASS)}", classes[weakest]))
        return rows

    def findings(self) -> list[tuple[str, str, str, str]]:
        """(severity, id, message, advice) of every flag, the gravest first; "" where the message ends with advice."""
        return [
            (f["severity"], f["id"], f["message"], "" if f["message"].endswith(")") else ADVICE.get(f["id"], ""))
            for f in self.flags
        ]

    def verdict(self) -> str:
        """What the number says and whether it can be believed, in a few plain sentences."""
        robust = self._rate("robust_accuracy")
        if robust is None:
            words = [f"No attack was run under {self.threat}."]
            if self._data["defense"].get("certified"):
                words = [f"Certified under {self.threat}: proven, not attacked."]
        elif robust["value"] is None:
            words = ["No row was evaluated."]
        else:
            attacks = sum(not _is_beside(attack, self._data) for attack in self._data["attacks"])
            how = {
                "worst_case_per_sample": f"worst case of {attacks} attacks",
                "single_attack": "one attack",
                "mean_over_runs": "mean over runs",
            }[self._data["protocol"]["aggregation"]]
            if attacks == 1:
                how = "one attack"
            success = self._rate("attack_success_rate")
            figure, name = robust, "Robust accuracy"
            if self.other_goal and success is not None and success["value"] is not None:
                figure, name = success, "Exact target rate (greedy)" if self.of_text else "Attack success rate"
            words = [f"{name} {percent(figure['value'])}{_bracket(figure['ci'], ' ')} under {self.threat}; {how}."]
            norm = str(self._data["threat_model"].get("norm"))
            distance = self._value(f"{norm.lower()}_mean")
            if figure is success and distance is not None:
                words.append(f"Successes lie {distance:.4g} ({norm}) from their origins in the mean.")
            if self.undecided:
                top = (figure["numerator"] + self.undecided) / figure["denominator"]
                words.append(
                    f"{self.undecided} rows are undecided: the true figure lies between "
                    f"{percent(figure['value'])} and {percent(top)}."
                )
        fooling = self._rate("stream_fool_rate")
        if fooling is not None and robust is not None and robust["value"] is not None:
            ratio = self._value("stream_competitive_ratio") or 0.0
            words[0] = (
                f"{percent(fooling['value'])}{_bracket(fooling['ci'], ' ')} of what is handed in fools the model "
                f"under {self.threat}; competitive ratio {ratio:.3f}, both in the mean of {fooling['n']} orders. "
                f"Were every item handed in, robust accuracy would be {percent(robust['value'])}."
            )
        if self._data["threat_model"]["knowledge"] == "transfer" and not any(
            "white_box" in name for name in self._data["metrics"]
        ):
            words.append("White-box accuracy was not evaluated and may be far lower.")
        if self._data["defense"]["name"] != "none" and robust and not self._data["threat_model"].get("adaptive"):
            words.append("No adaptive attack declared.")
        grave = sorted({f["id"] for f in self.flags if f["severity"] == "unreliable"})
        careful = sorted({f["id"] for f in self.flags if f["severity"] == "warning"})
        if grave:
            words.append(f"Do not trust this number: {', '.join(grave)}.")
        elif careful:
            words.append(f"Read it with care: {', '.join(careful)}.")
        else:
            words.append("No reliability flag was raised.")
        return " ".join(words)

    def summary_table(self) -> Table:
        """A rich table: clean, attacks, metrics, findings with advice, verdict."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        level = level_text(self._data["metrics"])
        table = Table(title=Text(self.title), box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
        table.add_column("", overflow="fold")
        table.add_column("figure" if self.of_text else "accuracy", justify="right", no_wrap=True)
        table.add_column(level, justify="right", no_wrap=True)
        table.add_column("exact target" if self.of_text else "success rate", justify="right", no_wrap=True)
        table.add_column("counts", overflow="fold")
        rows = self.rows()
        for i, row in enumerate(rows):
            last = i + 1 < len(rows) and rows[i + 1].section != row.section
            style = "bold" if row.section == "worst" else ""
            # Text, not markup: names such as "[red]" are shown, never obeyed.
            cells = [Text(cell) for cell in (row.label, row.value, row.interval, row.success, row.counts)]
            table.add_row(*cells, end_section=last, style=style)
        table.caption = self._caption()
        table.caption_style = ""
        return table

    def _caption(self) -> Text:
        from rich.text import Text

        styles = {"info": "cyan", "warning": "yellow", "unreliable": "bold red"}
        caption = Text()
        for severity, name, message, advice in self.findings():
            caption.append(f"{severity}: {name}", style=styles[severity])
            caption.append(f": {message}\n")
            if advice:
                caption.append(f"    {advice}\n", style="dim")
        caption.append(self.verdict())
        return caption

    def __repr__(self) -> str:
        return f"Report({self.title}: {self.verdict()})"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=110, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(self.summary_table())
        lines = cast("StringIO", console.file).getvalue().rstrip().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return (
            environment()
            .get_template("report.html")
            .render(report=self, data=self._data, level=level_text(self._data["metrics"]))
        )

    def robustbench(self, dataset: str | None = None, **fields: str | bool | int | None) -> dict[str, Any]:
        """RobustBench's flat block, numbers as percent strings with two decimals.

        `autoattack_acc` is filled only by the protocol autoattack-standard; any other robust accuracy goes to
        `reported`, for a weaker attack must not pass for AutoAttack. `fields` add or override
        (link, authors, venue...).
        """
        name = (dataset or self._data["dataset"]["name"]).replace("-", "").replace("_", "").lower()
        allowed = schema()["properties"]["robustbench"]["properties"]["dataset"]["enum"]
        if name not in allowed:
            raise ReportError(f"RobustBench has no data set {name!r}; expected one of {', '.join(allowed)}")
        threat, model = self._data["threat_model"], self._data["model"]
        eps = threat.get("eps_string") or (None if threat.get("eps") is None else f"{threat['eps']:.6g}")
        block: dict[str, Any] = {"name": self.title, "dataset": name, "eps": eps}
        block["clean_acc"] = _percent_string(self._rate("clean_accuracy"), "clean_accuracy")
        robust = self._rate("robust_accuracy")
        if robust is not None:
            standard = self._data["protocol"].get("name") == "autoattack-standard"
            text = _percent_string(robust, "robust_accuracy")
            block["autoattack_acc" if standard else "reported"] = text
        for key in ("architecture", "additional_data", "number_forward_passes"):
            if key in model:
                block[key] = model[key]
        block["unreliable"] = not self.trustworthy
        notes = sorted({f["id"] for f in self.flags if f["severity"] != "info"})
        block["footnote"] = "flags: " + ", ".join(notes) if notes else None
        block.update(fields)
        _validate_part(block, schema()["properties"]["robustbench"], "robustbench")
        return block


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside the target and rename over it; raises ReportError when the folder can't be written."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a report is meant to be read by others as any file of this user is.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ReportError(f"{path} can't be written: {error.strerror or error}; choose a writable folder") from None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number; unknown values are null")


def _bracket(ci: Mapping[str, Any] | None, lead: str = "", scale: float = 100.0, digits: int = 1) -> str:
    if ci is None:
        return ""
    return f"{lead}[{scale * ci['low']:.{digits}f}, {scale * ci['high']:.{digits}f}]"


def level_text(metrics: Mapping[str, Any]) -> str:
    """Heading of a column of intervals: "95 % interval"."""
    ci = metrics["clean_accuracy"]["ci"]
    return "interval" if ci is None else f"{100 * ci['level']:g} % interval"


def _counts(rate: Mapping[str, Any]) -> str:
    return f"{rate['numerator']} / {rate['denominator']} {rate['denominator_kind'].replace('_', ' ')}"


def _rate_row(label: str, rate: Mapping[str, Any], section: str, success: Mapping[str, Any] | None = None) -> Row:
    ci = rate["ci"]
    counts = _counts(rate)
    if success is not None:
        counts = f"{_counts(success)} broken"
    return Row(
        label,
        percent(rate["value"]),
        _bracket(ci),
        "" if success is None else percent(success["value"]),
        counts,
        section,
        rate["value"],
        None if ci is None else ci["low"],
        None if ci is None else ci["high"],
    )


def _words(name: str) -> str:
    spoken = {"nll": "NLL", "asr": "ASR", "tapm": "TAPM", "acc": "accuracy", "8bit": "after rounding to 8 bits"}
    return " ".join(spoken.get(word, word) for word in name.split("_"))


def _spent(attacks: list[dict[str, Any]]) -> Iterator[Row]:
    """What the search of all attacks together took, in evaluations and in tokens."""
    for word, key in (("evaluations", "forward"), ("tokens", "tokens")):
        total = sum(attack["cost"].get(key, 0) for attack in attacks)
        rows = max((attack["n_attacked"] for attack in attacks), default=0)
        if total and rows:
            yield Row(f"{word} per prompt", f"{total / rows:.4g}", "", "", f"{total} in all")


def _metric_rows(label: str, entry: Any) -> Iterator[Row]:
    if isinstance(entry, list):
        for point in entry:
            yield _rate_row(f"{label} at radius {point['radius']:g}", point["certified_accuracy"], "metric")
    elif "denominator_kind" in entry:
        yield _rate_row(label, entry, "metric")
    else:
        value = "-" if entry["value"] is None else f"{entry['value']:.4g} {entry.get('unit', '')}".rstrip()
        interval = ""
        if entry.get("ci"):
            interval = f"[{entry['ci']['low']:.4g}, {entry['ci']['high']:.4g}]"
        yield Row(label, value, interval, "", f"n = {entry['n']}" if "n" in entry else "")


def _percent_string(rate: Mapping[str, Any] | None, name: str) -> str:
    if rate is None or rate["value"] is None:
        raise ReportError(f"{name} has no value; RobustBench's block needs one")
    return f"{100 * rate['value']:.2f}"


def _validate_part(data: Any, part: Mapping[str, Any], where: str) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(part).iter_errors(data))
    if error is not None:
        place = ".".join([where, *(str(step) for step in error.absolute_path)]).strip(".")
        message = error.message if len(error.message) < 300 else error.message[:297] + "..."
        raise ReportError(f"{place or 'report'}: {message}")


def _validate(data: Mapping[str, Any]) -> None:
    _validate_part(data, schema(), "")
    try:
        moment = datetime.fromisoformat(data["created_utc"])
    except ValueError:
        raise ReportError(f"created_utc: {data['created_utc']!r} is not an ISO 8601 moment") from None
    if moment.tzinfo is None:
        raise ReportError(f"created_utc: {data['created_utc']!r} has no time zone; expected one such as +00:00")
    for where, entry in _rates(data):
        _check_rate(where, entry)
    _check_accuracies(data)
    for name, entry in data["metrics"].items():
        if isinstance(entry, list):
            _check_certified(name, entry)


def _rates(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in data["metrics"].items():
        if isinstance(entry, list):
            yield from ((f"metrics.{name}.{i}", point["certified_accuracy"]) for i, point in enumerate(entry))
        # The schema takes a rate that lacks its denominator's kind for a scalar; counts give it away.
        elif {"numerator", "denominator", "denominator_kind"} & entry.keys():
            yield f"metrics.{name}", entry
    for i, attack in enumerate(data["attacks"]):
        for name, entry in attack.items():
            if isinstance(entry, dict) and {"numerator", "denominator"} & entry.keys() and name != "params":
                yield f"attacks.{i}.{name}", entry


def _check_rate(where: str, rate: Mapping[str, Any]) -> None:
    missing = sorted(_RATE_KEYS - rate.keys())
    if missing:
        raise ReportError(f"{where}: a rate without {', '.join(missing)}; every rate names its counts and denominator")
    k, n, value, ci = rate["numerator"], rate["denominator"], rate["value"], rate["ci"]
    if k > n:
        raise ReportError(f"{where}: numerator {k} exceeds denominator {n}")
    if n == 0:
        if value is not None or ci is not None:
            raise ReportError(f"{where}: 0 of 0 has no value and no interval; expected null")
        return
    if value is None or abs(value - k / n) > _ROUND_OFF:
        raise ReportError(f"{where}: value {value} is not {k} / {n} = {k / n:.6g}")
    if ci is None:
        return
    if not ci["low"] - _ROUND_OFF <= value <= ci["high"] + _ROUND_OFF:
        raise ReportError(f"{where}: value {value:.6g} lies outside its interval [{ci['low']:.6g}, {ci['high']:.6g}]")
    if ci["method"] == "wilson":
        expected = wilson(k, n, ci["level"])
        if max(abs(expected.low - ci["low"]), abs(expected.high - ci["high"])) > 1e-6:
            raise ReportError(
                f"{where}: [{ci['low']:.6g}, {ci['high']:.6g}] is not the Wilson interval of {k} / {n}, "
                f"[{expected.low:.6g}, {expected.high:.6g}]"
            )


def _is_beside(attack: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """Shown next to the headline, not part of it: marked so, or a transfer cell in a report of another kind."""
    own = data["threat_model"]["knowledge"] == "transfer"
    return bool(attack.get("beside")) or ("source" in attack["params"] and not own)


def _strength(attack: Mapping[str, Any]) -> tuple[bool, float]:
    value = attack["robust_accuracy"]["value"]
    return value is None, value or 0.0


def _same_rows(rate: Mapping[str, Any], clean: Mapping[str, Any]) -> bool:
    return bool(
        rate["denominator_kind"] == clean["denominator_kind"] == "all_samples"
        and rate["denominator"] == clean["denominator"]
    )


def _check_identity(
    where: str, clean: Mapping[str, Any], robust: Mapping[str, Any], success: Mapping[str, Any] | None, undecided: int
) -> None:
    """RA <= CA, and RA = CA (1 - ASR) in whole rows where the denominators are the default ones."""
    if not _same_rows(robust, clean):
        return
    right, kept = clean["numerator"], robust["numerator"]
    if kept > right:
        raise ReportError(f"{where}: {kept} robust rows exceed the {right} rows right before the attack")
    if success is None or success["denominator_kind"] != "clean_correct" or success["denominator"] != right:
        return
    broken = success["numerator"]
    if kept + broken + undecided != right:
        raise ReportError(
            f"{where}: {kept} robust + {broken} broken + {undecided} undecided rows are not the {right} rows right "
            "before the attack; rows without a verdict count in `undecided` (attack) and robust_accuracy_upper"
        )


def _undecided(metrics: Mapping[str, Any]) -> int:
    robust, upper = metrics.get("robust_accuracy"), metrics.get("robust_accuracy_upper")
    return 0 if robust is None or upper is None else int(upper["numerator"] - robust["numerator"])


def _check_accuracies(data: Mapping[str, Any]) -> None:
    metrics, attacks = data["metrics"], data["attacks"]
    clean = metrics["clean_accuracy"]
    evaluated = data["dataset"]["n_evaluated"]
    if evaluated > data["dataset"]["n_total"]:
        raise ReportError(f"dataset: {evaluated} rows evaluated of {data['dataset']['n_total']}")
    if clean["denominator_kind"] == "all_samples" and clean["denominator"] != evaluated:
        raise ReportError(
            f"metrics.clean_accuracy: {clean['denominator']} rows, but dataset.n_evaluated is {evaluated}"
        )
    for i, attack in enumerate(attacks):
        undecided = attack.get("undecided", 0)
        if not isinstance(undecided, int) or undecided < 0:
            raise ReportError(f"attacks.{i}.undecided: {undecided!r}; expected a whole count")
        _check_identity(
            f"attacks.{i} ({attack['name']})",
            clean,
            attack["robust_accuracy"],
            attack["attack_success_rate"],
            undecided,
        )
    robust = metrics.get("robust_accuracy")
    if robust is None:
        return
    upper = metrics.get("robust_accuracy_upper")
    if upper is not None and ("numerator" not in upper or upper["numerator"] < robust["numerator"]):
        raise ReportError("metrics.robust_accuracy_upper: expected a rate that is at least robust_accuracy")
    _check_identity(
        "metrics.robust_accuracy",
        clean,
        robust,
        metrics.get("attack_success_rate"),
        _undecided(metrics),
    )
    if data["protocol"]["aggregation"] == "worst_case_per_sample" and _same_rows(robust, clean):
        for attack in attacks:
            alone = attack["robust_accuracy"]
            if _is_beside(attack, data):
                continue
            if _same_rows(alone, clean) and alone["numerator"] < robust["numerator"]:
                raise ReportError(
                    f"metrics.robust_accuracy: {robust['numerator']} rows robust in the worst case, but "
                    f"{attack['name']} alone leaves {alone['numerator']}; an attack outside the worst case is "
                    "marked `beside`"
                )


def _check_certified(name: str, points: list[Mapping[str, Any]]) -> None:
    ordered = sorted(points, key=lambda point: point["radius"])
    for inner, outer in pairwise(ordered):
        near, far = inner["certified_accuracy"], outer["certified_accuracy"]
        if near["denominator"] == far["denominator"] and far["numerator"] > near["numerator"]:
            raise ReportError(
                f"metrics.{name}: more rows certified at radius {outer['radius']:g} than at {inner['radius']:g}"
            )


def merge(a: Report, b: Report, additive: Iterable[str] = ()) -> Report:
    """The report of the union of two disjoint shards of one evaluation: counts add, intervals are made anew.

    additive: further metrics whose counts are per row and so may be added. Metrics that can't be derived from two
    summaries (the strongest cell of a grid, medians, scalars) are left out and named in a log warning; recompute
    those from the records. Raises ReportError when the two are not shards of one evaluation or share rows.
    """
    first, second = a.to_dict(), b.to_dict()
    _check_shards(a, b, first, second)
    merged = first
    merged["created_utc"] = max(first["created_utc"], second["created_utc"], key=datetime.fromisoformat)
    data = merged["dataset"]
    data["n_evaluated"] += second["dataset"]["n_evaluated"]
    if data["n_evaluated"] > data["n_total"]:
        raise ReportError(
            f"{data['n_evaluated']} rows in both shards, but the data set has {data['n_total']}: they overlap"
        )
    data["selection"] = {"kind": "all" if data["n_evaluated"] == data["n_total"] else "explicit_ids"}
    merged["attacks"] = [_merge_attacks(x, y) for x, y in zip(first["attacks"], second["attacks"], strict=True)]
    known = {
        "clean_accuracy",
        "robust_accuracy",
        "attack_success_rate",
        "abstention_rate",
        "robust_accuracy_upper",
        *additive,
    }
    merged["metrics"] = _merge_metrics(first["metrics"], second["metrics"], known)
    merged["diagnostics"] = {"flags": _merge_flags(first, second)}
    one, two = first["diagnostics"], second["diagnostics"]
    if "indicators" in one and one["indicators"] == two.get("indicators"):
        merged["diagnostics"]["indicators"] = one["indicators"]
    merged.pop("per_sample", None)
    merged.pop("robustbench", None)
    hashes = sorted({r["reproducibility"]["config_sha256"] for r in (first, second)})
    if len(hashes) > 1:
        merged["reproducibility"]["config_sha256"] = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    commands = [r["reproducibility"]["command"] for r in (first, second)]
    merged["reproducibility"]["command"] = " && ".join(dict.fromkeys(commands))
    return Report.from_dict(merged)


def _check_shards(a: Report, b: Report, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    def part(data: Mapping[str, Any], key: str) -> Any:
        if key == "dataset":
            return {k: v for k, v in data[key].items() if k not in ("n_evaluated", "selection")}
        if key == "attacks":
            return [(x["name"], x["params"], x.get("order")) for x in data[key]]
        if key == "protocol":
            return {k: v for k, v in data[key].items() if k != "batch_size"}
        if key == "seed":
            return data["reproducibility"]["seed"]
        return data[key]

    for key in ("kind", "task", "dataset", "model", "defense", "threat_model", "protocol", "attacks", "seed"):
        if part(first, key) != part(second, key):
            raise ReportError(f"these are not shards of one evaluation: {key} differs")
    ids = [data["dataset"]["selection"].get("ids_sha256") for data in (first, second)]
    if a == b or (ids[0] is not None and ids[0] == ids[1]):
        raise ReportError("both reports are of the same rows; only disjoint shards can be merged")
    if a.path is not None and b.path is not None:
        files = [records_path(path) for path in (a.path, b.path)]
        if all(file.exists() for file in files):
            shared = {r.id for r in read_records(files[0])} & {r.id for r in read_records(files[1])}
            if shared:
                raise ReportError(f"the shards share {len(shared)} rows; only disjoint shards can be merged")


def _merge_rates(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    if x["denominator_kind"] != y["denominator_kind"]:
        raise ReportError(f"denominators {x['denominator_kind']} and {y['denominator_kind']} can't be added")
    k, n = x["numerator"] + y["numerator"], x["denominator"] + y["denominator"]
    given = x["ci"] or y["ci"]
    ci: dict[str, Any] | None = None
    if n and given is not None:
        # A bootstrap needs the rows again; two summaries can't give it.
        made = {"wilson": wilson, "clopper_pearson": clopper_pearson}.get(given["method"])
        ci = None if made is None else made(k, n, given["level"]).to_dict()
    kind = cast("DenominatorKind", x["denominator_kind"])
    return {"value": k / n if n else None, "numerator": k, "denominator": n, "denominator_kind": kind, "ci": ci}


def _merge_attacks(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: x[key] for key in ("name", "params", "order", "conditional", "beside") if key in x}
    merged["n_attacked"] = x["n_attacked"] + y["n_attacked"]
    for key in ("robust_accuracy", "attack_success_rate", "cumulative_robust_accuracy"):
        if key in x and key in y:
            merged[key] = _merge_rates(x[key], y[key])
    if "undecided" in x or "undecided" in y:
        merged["undecided"] = x.get("undecided", 0) + y.get("undecided", 0)
    if "perturbation" in x and "perturbation" in y:
        merged["perturbation"] = _merge_perturbations(x, y)
    cost: dict[str, Any] = {}
    for key in ("seconds", "forward", "backward"):
        if key in x["cost"] and key in y["cost"]:
            cost[key] = x["cost"][key] + y["cost"][key]
    if "queries_max" in x["cost"] and "queries_max" in y["cost"]:
        cost["queries_max"] = max(x["cost"]["queries_max"], y["cost"]["queries_max"])
    merged["cost"] = cost
    return merged


def _merge_perturbations(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    one, two = x["perturbation"], y["perturbation"]
    merged: dict[str, Any] = {}
    if one.get("norm") == two.get("norm") and "norm" in one:
        merged["norm"] = one["norm"]
    if "max" in one and "max" in two:
        merged["max"] = max(one["max"], two["max"])
    for key in ("n_outside_budget", "n_outside_box", "n_nonfinite"):
        if key in one and key in two:
            merged[key] = one[key] + two[key]
    return merged


def _merge_metrics(x: Mapping[str, Any], y: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    left_out = sorted(set(x) ^ set(y))
    for name in (key for key in x if key in y):
        one, two = x[name], y[name]
        if isinstance(one, list) and isinstance(two, list) and [p["radius"] for p in one] == [p["radius"] for p in two]:
            merged[name] = [
                {
                    "radius": p["radius"],
                    "certified_accuracy": _merge_rates(p["certified_accuracy"], q["certified_accuracy"]),
                }
                for p, q in zip(one, two, strict=True)
            ]
        elif name in known and "numerator" in one and "numerator" in two:
            merged[name] = _merge_rates(one, two)
        else:
            left_out.append(name)
    if left_out:
        log.warning("merge leaves out %s: not derivable from two summaries", ", ".join(left_out))
    return merged


def _merge_flags(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for flag in [*first["diagnostics"]["flags"], *second["diagnostics"]["flags"]]:
        key = (flag["id"], flag.get("attack", ""))
        seen = worst.get(key)
        if seen is None or _SEVERITIES.index(flag["severity"]) > _SEVERITIES.index(seen["severity"]):
            worst[key] = flag
    return list(worst.values())
