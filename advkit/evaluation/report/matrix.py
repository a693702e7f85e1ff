"""A transfer matrix read, checked and shown as a page; it is made in `advkit.evaluation.matrix`.

Shape: `transfer_matrix.schema.json`; what a schema can't say (a value is its counts, union <= best <= average) is
checked here. Accuracies are PubDef's (arXiv 2310.17645). Version 1.1 added the request; 1.0 is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from advkit.core.errors import ReportError
from advkit.core.text import printable_values

SCHEMA_VERSION = "1.1"
NOISE = "noise"
_ROUND_OFF = 1e-9


@cache
def schema() -> dict[str, Any]:
    """The packaged JSON Schema of a matrix."""
    path = Path(__file__).parent / "transfer_matrix.schema.json"
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))


def check(content: Mapping[str, Any]) -> None:
    """Raise ReportError where a document breaks the schema or contradicts itself."""
    import jsonschema

    problem = next(iter(jsonschema.Draft202012Validator(schema()).iter_errors(content)), None)
    if problem is not None:
        place = "/".join(map(str, problem.absolute_path))
        raise ReportError(f"no transfer matrix: {place or 'the document'}: {problem.message}")
    budget = content["equal_budget"]
    for part in (content, budget):
        if part is not None:
            _named(content, part)
            _consistent(part)
    if budget is not None and not budget["how"]:
        raise ReportError("no transfer matrix: equal_budget/how is empty")
    for target in content["targets"]:
        _counted(target["clean"], f"clean accuracy of {target['name']}")
    for one in content["noise"]:
        _counted(one["acc"], f"noise for {one['t']}")
    if (similar := content["similarity"]) is not None:
        side = len(similar["pairs"])
        if [len(row) for row in similar["cosine"]] != [side] * side:
            raise ReportError(f"similarity: {side} pairs need {side} rows of {side} cosines")


def _named(content: Mapping[str, Any], part: Mapping[str, Any]) -> None:
    """Every table speaks of the same targets, sources and attacks."""
    targets, sources = ([one["name"] for one in content[key]] for key in ("targets", "sources"))
    attacks = [one["name"] for one in part["attacks"]]
    told = {
        "the summary": (list(part["summary"]), targets),
        "the noise": ([one["t"] for one in content["noise"]], targets),
        **{f"the attacks of {name}": (list(one["by_attack"]), attacks) for name, one in part["summary"].items()},
        **{f"the sources of {name}": (list(one["by_source"]), sources) for name, one in part["summary"].items()},
    }
    for what, (here, there) in told.items():
        if sorted(here) != sorted(there):
            raise ReportError(f"{what} are {', '.join(here)[:80]}; expected {', '.join(there)[:80]}")
    if len({tuple(sorted(one["by_group"])) for one in part["summary"].values()}) > 1:
        raise ReportError("the summary has other groups for one target than for another")
    for key, known in (("t", targets), ("s", sources), ("a", attacks)):
        for one in (*part["cells"], *part["missing"], *part["sets"]):
            if one.get(key) not in (None, *known):
                raise ReportError(f"a cell or a set names {one[key]!r:.60}, which the matrix does not have")
    for name, one in part["summary"].items():
        blocks = [one[key] for key in ("overall", "seen", "unseen")]
        blocks += [block for key in ("by_source", "by_attack", "by_group") for block in one[key].values()]
        for block in blocks:
            if block is not None and (block["best"]["a"] not in attacks or block["best"]["s"] not in sources):
                raise ReportError(f"the best attack for {name} is none of the matrix")
            for kind in ("union", "best", "avg") if block is not None else ():
                _ranged(block[kind], f"{kind} of {name}")


def _consistent(part: Mapping[str, Any]) -> None:
    for cell in part["cells"]:
        where = f"cell {cell['a']} on {cell['s']} for {cell['t']}"
        for name in ("acc", "asr_all", "asr_cond"):
            _counted(cell[name], f"{where}, {name}")
        for one, other in zip(cell["acc"]["counts"], cell["asr_all"]["counts"], strict=True):
            if one[0] + other[0] != one[1] or one[1] != other[1]:
                raise ReportError(f"{where}: {one} right and {other} wrong do not add up")
    for name, summary in part["summary"].items():
        block = summary["overall"]
        if block is None:
            continue
        values = [block[kind]["value"] for kind in ("union", "best", "avg")]
        if None not in values and not values[0] <= values[1] + _ROUND_OFF <= values[2] + 2 * _ROUND_OFF:
            raise ReportError(f"{name}: union, best and average are {values}; they must not fall")


def _ranged(rate: Mapping[str, Any], where: str) -> None:
    if (rate["value"] is None) != (rate["range"] is None):
        raise ReportError(f"{where}: a value and the range of its seeds are there together")


def _counted(rate: Mapping[str, Any], where: str) -> None:
    if any(k > n or n > 2**53 for k, n in rate["counts"]):
        raise ReportError(f"{where}: {str(rate['counts'])[:60]} are no counts of samples")
    _ranged(rate, where)
    value, said = mean_of([k / n for k, n in rate["counts"] if n]), rate["value"]
    if (value is None) != (said is None) or (value is not None and abs(value - said) > _ROUND_OFF):
        raise ReportError(f"{where}: the value is {said}, its counts say {value}")


def mean_of(values: Sequence[float]) -> float | None:
    """The mean over the seeds, exact where all are the same; None of none."""
    return None if not values else values[0] if min(values) == max(values) else fmean(values)


def shortened(content: Mapping[str, Any]) -> Callable[[str], str]:
    """Names for tables: zoo models without the words that all of a task's share."""
    prefix = f"zoo:{content['dataset']['name']}-"
    return lambda name: name.replace(prefix, "")


def ball_line(content: Mapping[str, Any]) -> str:
    return f"{content['norm']} eps {content['eps']:.4g}, {content['n']} images of {content['dataset']['name']}"


def page(content: Mapping[str, Any], brief: bool = False) -> str:
    """The document as Markdown: one line per target, attacks against targets, then every source.

    Every text in it is printable, for matrices come from strangers, too.
    """
    content = printable_values(content)
    seeds = content["seeds"]
    lines = [
        "# Transfer matrix",
        "",
        f"{ball_line(content)}, stored with 8 bits; goal {content['goal']}; seeds {', '.join(map(str, seeds))}.",
        "Accuracy of the target in %, the mean over the seeds of a random attack with the smallest and the largest in",
        "brackets; in square brackets the 95 % Wilson interval. *Gradients* are gradient evaluations per image, as",
        "metered; one of an ensemble counts once. Cells marked `w` are white box (the target's weights are in the",
        "source): left out of every aggregate. `-` is a missing cell.",
        "",
    ]
    if content["command"] and not brief:
        lines += [f"    {content['command']}", ""]
    lines += ["## Targets", "", *_targets_table(content, content, brief), ""]
    lines += ["## Attacks, averaged over the sources", "", *_attacks_table(content, content), ""]
    if content["equal_budget"] is not None:
        lines += _equal_budget(content, content["equal_budget"], brief)
    if not brief:
        lines += ["## Every cell", ""]
        for source in content["sources"]:
            lines += [*_source_table(content, source["name"]), ""]
    lines += _missing_cells(content)
    if content["similarity"] is not None and not brief:
        lines += _similar_pairs(content)
    return "\n".join(lines).rstrip() + "\n"


def percents(rate: Mapping[str, Any] | None, interval: bool = False) -> str:
    """`41.3 (40.5-42.0)` where seeds differ, `41.3` where not; with `interval`, the 95 % interval instead."""
    if rate is None or rate["value"] is None:
        return "-"
    text = f"{100 * rate['value']:.1f}"
    if interval and rate["ci"] is not None:
        return f"{text} [{100 * rate['ci']['low']:.1f}, {100 * rate['ci']['high']:.1f}]"
    low, high = rate["range"]
    return text if low == high else f"{text} ({100 * low:.1f}-{100 * high:.1f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(heads), _row(["---"] * len(heads)), *map(_row, rows)]


def _noise(content: Mapping[str, Any]) -> dict[str, str]:
    """Target -> its accuracy on random noise."""
    return {one["t"]: percents(one["acc"]) for one in content["noise"]}


def _equal_budget(content: Mapping[str, Any], part: Mapping[str, Any], brief: bool) -> list[str]:
    return [
        f"## The same at an equal budget of {part['budget']} gradients per image",
        "",
        f"{part['how'][0].upper()}{part['how'][1:]}.",
        "",
        *_attacks_table(content, part),
        "",
        *([] if brief else _targets_table(content, part, brief)),
        "",
    ]


def _targets_table(content: Mapping[str, Any], part: Mapping[str, Any], brief: bool) -> list[str]:
    short, noise, summary = shortened(content), _noise(content), part["summary"]
    groups = [] if brief else sorted({name for one in summary.values() for name in one["by_group"]})
    known = ("seen", "unseen") if not brief and any(one["seen"] is not None for one in summary.values()) else ()
    heads = ["target", "clean", NOISE, "average", "best attack", "by", "union"]
    heads += [f"best, {name} sources" for name in groups] + [f"best, {name}" for name in known]
    rows = []
    for name, one in summary.items():
        block = one["overall"]
        row = [short(name), percents(one["clean"], not brief), noise[name]]
        if block is None:
            row += ["-"] * 4
        else:
            by = f"{block['best']['a']} on {short(block['best']['s'])}"
            best, union = percents(block["best"], not brief), percents(block["union"], not brief)
            row += [percents(block["avg"]), best, by, union]
        parts = [*(one["by_group"][group] for group in groups), *(one[each] for each in known)]
        rows.append([*row, *(percents((each or {}).get("best")) for each in parts)])
    return _table(heads, rows)


def _attacks_table(content: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    summary = part["summary"]
    how = {attack["name"]: _how(attack) for attack in part["attacks"]}
    noted = any(how.values())
    heads = ["attack", "gradients", *(["how"] if noted else []), *map(shortened(content), summary)]
    rows = [[NOISE, "0", *([""] if noted else []), *(_noise(content)[name] for name in summary)]]
    for attack in part["attacks"]:
        blocks = [one["by_attack"][attack["name"]] for one in summary.values()]
        rows.append(
            [
                attack["name"],
                _gradients(attack["grads_per_image"]),
                *([how[attack["name"]]] if noted else []),
                *(percents((block or {}).get("avg")) for block in blocks),
            ]
        )
    return _table(heads, rows)


def _how(attack: Mapping[str, Any]) -> str:
    """What a preset is made of, and how an attack was changed to fit a budget."""
    made_of = attack.get("made_of")
    return "; ".join(filter(None, (f"= {made_of}" if made_of else "", attack["note"])))


def _gradients(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _source_table(content: Mapping[str, Any], source: str) -> list[str]:
    short, summary = shortened(content), content["summary"]
    cells = {(one["t"], one["a"]): one for one in content["cells"] if one["s"] == source}
    gradients: dict[str, list[float]] = {}
    for images in content["sets"]:
        if images["s"] == source:
            gradients.setdefault(images["a"], []).append(images["grads_per_image"])
    rows = [
        ["clean", "0", *(percents(one["clean"]) for one in summary.values())],
        [NOISE, "0", *(_noise(content)[name] for name in summary)],
    ]
    for attack in (one["name"] for one in content["attacks"]):
        row = [attack, _gradients(fmean(gradients[attack]) if attack in gradients else None)]
        for name in summary:
            cell = cells.get((name, attack))
            row.append("-" if cell is None else percents(cell["acc"]) + (" w" if cell["whitebox"] else ""))
        rows.append(row)
    return _table([f"source {short(source)}", "gradients", *map(short, summary)], rows)


def _missing_cells(content: Mapping[str, Any]) -> list[str]:
    short, budgeted = shortened(content), content["equal_budget"]
    missing = [*content["missing"], *(budgeted["missing"] if budgeted is not None else ())]
    lines = [
        f"- {one['a']} on {short(one['s'])}, {short(one['t'] or 'every target')}: {one['reason']}" for one in missing
    ]
    return ["## Missing cells", "", *dict.fromkeys(lines), ""] if missing else []


def _similar_pairs(content: Mapping[str, Any]) -> list[str]:
    """The pairs whose perturbations agree most: what one of them says, the other says too."""
    short, cosine = shortened(content), content["similarity"]["cosine"]
    names = [f"{a} on {short(s)}" for s, a in content["similarity"]["pairs"]]
    agree = sorted(((cosine[i][j], i, j) for i in range(len(names)) for j in range(i)), reverse=True)
    rows = [[f"{value:.3f}", names[j], names[i]] for value, i, j in agree[:20]]
    head = ["## Pairs that agree most", "", "Mean cosine between perturbations.", ""]
    return [*head, "| cosine | one | other |", "|---|---|---|", *map(_row, rows)]
