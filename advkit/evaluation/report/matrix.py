"""What a transfer matrix comes to: figures per target, source, attack and group, as JSON, as a page, as a heat map.

Shape: `transfer_matrix.schema.json`; what a schema can't say (a value is its counts, union <= best <= average) is
checked here. Accuracies are PubDef's (arXiv 2310.17645), computed by `tapm_metrics` seed by seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from advkit.core.errors import ReportError, UsageError
from advkit.evaluation.report.document import write_atomic
from advkit.evaluation.stats import wilson
from advkit.threat_models.tapm import tapm_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from advkit.evaluation.run.case import Case
    from advkit.evaluation.scenarios.transfer_images import ImageSet, Rows

Decisions = NDArray[np.int16]
NOISE = "noise"
NOTHING = -2
"""Stands where a decision is missing."""
REPORT_NAME = "matrix.json"
_BLOCKS = {"avg": "acc_avg", "best": "acc_best_attack", "union": "acc_per_sample"}
_ROUND_OFF = 1e-9


@dataclass(frozen=True)
class Table:
    """Raw results of one table.

    strikes:   the attacks, A of them (`matrix.Strike`)
    decisions: [T, S, A, K, N] classes that targets name, -1 abstaining, NOTHING where there is none
    noise:     [T, K, N] the same about random noise
    missing:   why an attack could not be made on a source, by (s, a)
    sets:      images and their hash by (s, a, k); an attack that draws nothing has k = 0 alone
    """

    strikes: tuple[Any, ...]
    decisions: Decisions
    noise: Decisions
    missing: dict[tuple[int, int], str] = field(default_factory=dict)
    sets: dict[tuple[int, int, int], tuple[ImageSet, str]] = field(default_factory=dict)


@cache
def schema() -> dict[str, Any]:
    """The packaged JSON Schema of a matrix."""
    path = Path(__file__).parent / "transfer_matrix.schema.json"
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))


def errors_of(decisions: Decisions, labels: NDArray[Any]) -> NDArray[np.float64]:
    """1 where a decision is not the label, 0 where it is, NaN where there is none; labels run along the last axis."""
    errors: NDArray[np.float64] = np.where(decisions == NOTHING, np.nan, (decisions != labels).astype(np.float64))
    return errors


def aggregate(
    errors: NDArray[np.float64],
    sources: Sequence[str],
    attacks: Sequence[str],
    groups: Mapping[str, str] | Sequence[str] = (),
    seen: Collection[str] = (),
    white_box: Collection[str] = (),
) -> dict[str, Any]:
    """A target's average, best and union accuracy, overall and by source, attack, group and knowledge.

    errors: [K, S, A, N], seed by seed; 1 where the target errs, NaN where there is no entry. A cell that one seed lacks
            is missing under all. The rest is as in `tapm_metrics`, which makes the figures of each seed; here each is
            its mean over the seeds, with the smallest and the largest
    """
    present = np.asarray((~np.isnan(errors)).any(axis=3).all(axis=0), dtype=np.bool_)
    errors = np.where(present[None, :, :, None], errors, np.nan)
    found = [tapm_metrics(one, sources, attacks, groups, seen, white_box) for one in errors]
    first = found[0]
    return {
        "rows": [one["rows"] for one in found],
        "incomplete": [one["incomplete"] for one in found],
        "overall": _merged([one["overall"] for one in found]),
        "seen": _merged([one["seen"] for one in found]),
        "unseen": _merged([one["unseen"] for one in found]),
        **{
            key: {name: _merged([one[key][name] for one in found]) for name in first[key]}
            for key in ("by_source", "by_attack", "by_group")
        },
    }


def _merged(blocks: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    told = [block for block in blocks if block is not None]
    if not told:
        return None
    made: dict[str, Any] = {"cells": told[0]["cells"]}
    for name, key in _BLOCKS.items():
        # The same images stand in every cell: no binomial interval holds for their average.
        made[name] = figure([(b[key]["numerator"], b[key]["denominator"]) for b in told], interval=name != "avg")
    made["best"] |= {"s": told[0]["worst"]["source"], "a": told[0]["worst"]["attack"]}
    made["best"]["by_seed"] = [[block["worst"]["source"], block["worst"]["attack"]] for block in told]
    return made


def figure(counts: Sequence[tuple[int, int]], interval: bool = True) -> dict[str, Any]:
    """A share: the mean over seeds, the smallest and the largest, the counts, and the first seed's Wilson interval."""
    shares = [k / n for k, n in counts if n]
    made: dict[str, Any] = {
        "value": _mean(shares),
        "range": [min(shares), max(shares)] if shares else None,
        "counts": [[int(k), int(n)] for k, n in counts],
        "ci": None,
    }
    if interval and counts[0][1]:
        made["ci"] = wilson(int(counts[0][0]), int(counts[0][1])).to_dict()
    return made


def _mean(shares: Sequence[float]) -> float | None:
    """Exact where all are the same."""
    return None if not shares else shares[0] if min(shares) == max(shares) else fmean(shares)


def cell_figures(
    decisions: Decisions, clean: Decisions, labels: NDArray[Any], wanted: NDArray[Any] | None = None
) -> dict[str, Any]:
    """A cell's accuracy and its three attack success rates, which are never mixed.

    decisions: [K, N]; clean, labels: [N]; wanted: [N] or [K, N]

    acc:      share of all images that are right (asr_all is one minus it)
    asr_cond: share of the images right untouched that become wrong
    fooling:  (right untouched - right now) / right untouched; negative where the change helps
    targeted: share taken for the wanted class, of those that neither are nor were; None without a wanted class
    """
    known = (decisions != NOTHING) & (clean != NOTHING)
    right, before = (decisions == labels) & known, (clean == labels) & known
    counted = known.sum(1)
    acc = figure(list(zip(right.sum(1).tolist(), counted.tolist(), strict=True)))
    fell = (before & ~right).sum(1)
    base = before.sum(1)
    made = {
        "acc": acc,
        "asr_all": figure(list(zip((known & ~right).sum(1).tolist(), counted.tolist(), strict=True))),
        "asr_cond": figure(list(zip(fell.tolist(), base.tolist(), strict=True))),
        "fooling": None if not base.all() else fmean(((base - right.sum(1)) / base).tolist()),
        "targeted": None,
    }
    if wanted is not None:
        open_rows = known & (labels != wanted) & (clean != wanted)
        hits = (open_rows & (decisions == wanted)).sum(1)
        made["targeted"] = figure(list(zip(hits.tolist(), open_rows.sum(1).tolist(), strict=True)))
    return made


def document(
    case: Case,
    sources: Sequence[Any],
    targets: Sequence[Any],
    seeds: Sequence[int],
    clean: Decisions,
    rows: Rows,
    table: Table,
    second: Table | None,
    budget: int | None,
    how: str,
    *,
    seen: Mapping[str, Collection[str]],
    similarity: dict[str, Any] | None,
    command: str,
    wanted: torch.Tensor | None,
) -> dict[str, Any]:
    """The matrix as plain JSON values."""
    import advkit

    labels = rows.labels.numpy()
    aims = None if wanted is None else wanted.numpy()
    threat = case.threat.describe()

    def part(of: Table) -> dict[str, Any]:
        return _part(of, sources, targets, seeds, clean, labels, aims, seen)

    content: dict[str, Any] = {
        "schema_version": "1.0",
        "kind": "transfer_matrix",
        "advkit_version": advkit.__version__,
        "torch_version": str(torch.__version__),
        "command": command,
        "dataset": {
            "name": case.task.name,
            "version": case.task.version,
            "split": case.task.split,
            "sha256": case.task.digest(),
        },
        "n": len(labels),
        "eps": threat["eps"],
        "norm": threat["norm"],
        "goal": case.specs["goal"],
        "quantised": True,
        "levels": threat["lattice"],
        "seeds": list(seeds),
        "sources": [source.to_dict() for source in sources],
        "targets": [
            {**target.to_dict(), "clean": figure([_right(clean[t], labels)])} for t, target in enumerate(targets)
        ],
        "noise": [
            {
                "t": target.name,
                **cell_figures(table.noise[t], clean[t], labels, aims),
            }
            for t, target in enumerate(targets)
        ],
        **part(table),
        "equal_budget": None,
        "similarity": similarity,
    }
    if second is not None:
        content["equal_budget"] = {"budget": budget, "how": how, **part(second)}
    return content


def _right(decisions: Decisions, labels: NDArray[Any]) -> tuple[int, int]:
    known = decisions != NOTHING
    return int((known & (decisions == labels)).sum()), int(known.sum())


def _part(
    table: Table,
    sources: Sequence[Any],
    targets: Sequence[Any],
    seeds: Sequence[int],
    clean: Decisions,
    labels: NDArray[Any],
    wanted: NDArray[Any] | None,
    seen: Mapping[str, Collection[str]],
) -> dict[str, Any]:
    """Attacks, sets, cells, missing cells and the summary of one table."""
    names, attacks = [source.name for source in sources], [strike.name for strike in table.strikes]
    groups = [source.group for source in sources]
    sets = [
        {
            "s": names[s],
            "a": attacks[a],
            "seed": seeds[k],
            "file_hash": made.key,
            "images_sha256": sha256,
            "grads_per_image": float(made.backwards.double().mean()),
            "forwards_per_image": float(made.forwards.double().mean()),
            "eps_used": float(made.distance.max()),
            "outside": int((~made.admitted).sum()),
            "raised": int((~made.usable).sum()),
            "seconds": round(made.seconds, 4),
        }
        for (s, a, k), (made, sha256) in sorted(table.sets.items())
    ]
    cells: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    missing = [{"t": None, "s": names[s], "a": attacks[a], "reason": why} for (s, a), why in table.missing.items()]
    for t, target in enumerate(targets):
        known = seen[target.name]
        white = {source.name for source in sources if source.knows(target)}
        for s, source in enumerate(sources):
            for a, attack in enumerate(attacks):
                if (s, a) in table.missing:
                    continue
                answers = table.decisions[t, s, a]
                if (answers == NOTHING).all(1).any():
                    reason = "the target's answers are not finite"
                    missing.append({"t": target.name, "s": source.name, "a": attack, "reason": reason})
                    continue
                own = [made for made in sets if made["s"] == source.name and made["a"] == attack]
                cells.append(
                    {
                        "t": target.name,
                        "s": source.name,
                        "a": attack,
                        **cell_figures(answers, clean[t], labels, wanted),
                        "whitebox": source.name in white,
                        "seen": source.name in known,
                        "seeds": [made["seed"] for made in own],
                        "file_hash": own[0]["file_hash"] if own else None,
                    }
                )
        errors = errors_of(table.decisions[t].transpose(2, 0, 1, 3), labels)
        summary[target.name] = {
            "clean": figure([_right(clean[t], labels)]),
            "white_box": sorted(white),
            **aggregate(errors, names, attacks, groups, known, white),
        }
    told = []
    for strike in table.strikes:
        own = [made for made in sets if made["a"] == strike.name]
        cost = [made["grads_per_image"] for made in own]
        told.append(
            {
                **strike.to_dict(),
                "grads_per_image": fmean(cost) if cost else None,
                "random": any(made["seed"] != seeds[0] for made in own) if len(seeds) > 1 and own else None,
            }
        )
    return {"attacks": told, "sets": sets, "cells": cells, "missing": missing, "summary": summary}


@dataclass(frozen=True)
class Matrix:
    """A validated transfer matrix.

    text:  canonical JSON of the document
    table: decisions and image sets behind it, where this process made them
    """

    text: str
    table: Table | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], table: Table | None = None) -> Matrix:
        """Raises ReportError where the document breaks the schema or contradicts itself."""
        import jsonschema

        told = next(iter(jsonschema.Draft202012Validator(schema()).iter_errors(content)), None)
        if told is not None:
            place = "/".join(map(str, told.absolute_path))
            raise ReportError(f"no transfer matrix: {place or 'the document'}: {told.message}")
        for part in (content, content["equal_budget"]):
            if part is not None:
                _consistent(part)
        return cls(json.dumps(content, indent=1, sort_keys=False) + "\n", table)

    def to_dict(self) -> dict[str, Any]:
        """The document, a copy."""
        return cast("dict[str, Any]", json.loads(self.text))

    def to_json(self) -> str:
        """The document as text."""
        return self.text

    @property
    def summary(self) -> dict[str, Any]:
        """Figures per target."""
        return cast("dict[str, Any]", self.to_dict()["summary"])

    def cell(self, target: str, source: str, attack: str) -> dict[str, Any]:
        """One cell; UsageError where it is missing or unknown."""
        for one in self.to_dict()["cells"]:
            if (one["t"], one["s"], one["a"]) == (target, source, attack):
                return cast("dict[str, Any]", one)
        raise UsageError(f"the matrix has no cell {attack} on {source} for {target}")

    def markdown(self, brief: bool = False) -> str:
        """The matrix as a page; `brief` leaves out intervals, groups and single cells."""
        return page(self.to_dict(), brief)

    def plot(self, *, equal_budget: bool = False) -> Figure:
        """Heat maps of accuracy, one for each target; UsageError where there is no such table."""
        from advkit.evaluation.figures.plots import matrix_heatmap

        content = self.to_dict()
        part = content["equal_budget"] if equal_budget else content
        if part is None:
            raise UsageError("this matrix has no table at an equal budget; make it with equal_budget=auto")
        title = f"Accuracy under transfer, {_ball(content)}"
        return matrix_heatmap(part["cells"], *_names(content, part), short=shortened(content), title=title)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write matrix.json, matrix.md and, where this process made them, the answers; returns the JSON's path."""
        place = Path(folder)
        write_atomic(place / REPORT_NAME, self.text.encode())
        write_atomic(place / "matrix.md", self.markdown().encode())
        if self.table is not None:
            from advkit.evaluation.scenarios.transfer_images import write_tensors

            tensors = {"decisions": self.table.decisions, "noise": self.table.noise}
            write_tensors(
                place / "decisions.safetensors",
                {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()},
                {"axes": "target, source, attack, seed, row", "missing": str(NOTHING)},
            )
        return place / REPORT_NAME


def _consistent(part: Mapping[str, Any]) -> None:
    for cell in part["cells"]:
        where = f"cell {cell['a']} on {cell['s']} for {cell['t']}"
        for name in ("acc", "asr_all", "asr_cond"):
            _counted(cell[name], f"{where}, {name}")
        for one, other in zip(cell["acc"]["counts"], cell["asr_all"]["counts"], strict=True):
            if one[0] + other[0] != one[1] or one[1] != other[1]:
                raise ReportError(f"{where}: {one} right and {other} wrong do not add up")
    for name, told in part["summary"].items():
        block = told["overall"]
        if block is None:
            continue
        values = [block[kind]["value"] for kind in ("union", "best", "avg")]
        if None not in values and not values[0] <= values[1] + _ROUND_OFF <= values[2] + 2 * _ROUND_OFF:
            raise ReportError(f"{name}: union, best and average are {values}; they must not fall")


def _counted(told: Mapping[str, Any], where: str) -> None:
    shares = [k / n for k, n in told["counts"] if n]
    value = _mean(shares)
    if (value is None) != (told["value"] is None) or (value is not None and abs(value - told["value"]) > _ROUND_OFF):
        raise ReportError(f"{where}: the value is {told['value']}, its counts say {value}")


def _names(content: Mapping[str, Any], part: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    sources, targets = ([one["name"] for one in content[key]] for key in ("sources", "targets"))
    return targets, sources, [one["name"] for one in part["attacks"]]


def shortened(content: Mapping[str, Any]) -> Callable[[str], str]:
    """Names for tables: zoo models without the words that all of a task's share."""
    prefix = f"zoo:{content['dataset']['name']}-"
    return lambda name: name.replace(prefix, "")


def _ball(content: Mapping[str, Any]) -> str:
    return f"{content['norm']} eps {content['eps']:.4g}, {content['n']} images of {content['dataset']['name']}"


def page(content: Mapping[str, Any], brief: bool = False) -> str:
    """The document as Markdown: one line per target, attacks against targets, then every source."""
    seeds = content["seeds"]
    lines = [
        "# Transfer matrix",
        "",
        f"{_ball(content)}, stored with 8 bits; goal {content['goal']}; seeds {', '.join(map(str, seeds))}.",
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
        part = content["equal_budget"]
        lines += [
            f"## The same at an equal budget of {part['budget']} gradients per image",
            "",
            f"{part['how'][0].upper()}{part['how'][1:]}.",
            "",
            *_attacks_table(content, part),
            "",
            *([] if brief else _targets_table(content, part, brief)),
            "",
        ]
    lines += [] if brief else ["## Every cell", ""]
    for source in [] if brief else content["sources"]:
        lines += [*_source_table(content, content, source["name"]), ""]
    missing = [*content["missing"], *((content["equal_budget"] or {}).get("missing", ()))]
    if missing:
        lines += ["## Missing cells", ""]
        short = shortened(content)
        told = dict.fromkeys(
            (one["a"], short(one["s"]), short(one["t"] or "every target"), one["reason"]) for one in missing
        )
        lines += [f"- {a} on {s}, {t}: {why}" for a, s, t, why in told]
        lines.append("")
    if content["similarity"] is not None and not brief:
        lines += _similar_pairs(content)
    return "\n".join(lines).rstrip() + "\n"


def percents(told: Mapping[str, Any] | None, interval: bool = False) -> str:
    """`41.3 (40.5-42.0)` where seeds differ, `41.3` where not; with `interval`, the 95 % interval instead."""
    if told is None or told["value"] is None:
        return "-"
    text = f"{100 * told['value']:.1f}"
    if interval and told["ci"] is not None:
        return f"{text} [{100 * told['ci']['low']:.1f}, {100 * told['ci']['high']:.1f}]"
    low, high = told["range"]
    return text if low == high else f"{text} ({100 * low:.1f}-{100 * high:.1f})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _targets_table(content: Mapping[str, Any], part: Mapping[str, Any], brief: bool) -> list[str]:
    short = shortened(content)
    noise = {one["t"]: one["acc"] for one in content["noise"]}
    told_groups = {name for told in part["summary"].values() for name in told["by_group"]}
    groups = [] if brief else sorted(told_groups)
    both = not brief and any(told["seen"] is not None for told in part["summary"].values())
    heads = ["target", "clean", NOISE, "average", "best attack", "by", "union"]
    heads += [f"best, {name} sources" for name in groups] + (["best, seen", "best, unseen"] if both else [])
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, told in part["summary"].items():
        block = told["overall"]
        row = [short(name), percents(told["clean"], not brief), percents(noise[name])]
        if block is None:
            row += ["-"] * 4
        else:
            by = f"{block['best']['a']} on {short(block['best']['s'])}"
            best, union = percents(block["best"], not brief), percents(block["union"], not brief)
            row += [percents(block["avg"]), best, by, union]
        row += [percents((told["by_group"][each] or {}).get("best")) for each in groups]
        row += [percents((told[each] or {}).get("best")) for each in ("seen", "unseen")] if both else []
        lines.append(_row(row))
    return lines


def _attacks_table(content: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    short = shortened(content)
    targets = list(part["summary"])
    budgeted = any(attack["note"] for attack in part["attacks"])
    heads = ["attack", "gradients", *(["how"] if budgeted else []), *map(short, targets)]
    lines = [_row(heads), _row(["---"] * len(heads))]
    noise = {one["t"]: percents(one["acc"]) for one in content["noise"]}
    lines.append(_row([NOISE, "0", *([""] if budgeted else []), *(noise[name] for name in targets)]))
    for attack in part["attacks"]:
        row = [attack["name"], _grads(attack["grads_per_image"]), *([attack["note"]] if budgeted else [])]
        for name in targets:
            block = part["summary"][name]["by_attack"][attack["name"]]
            row.append("-" if block is None else percents(block["avg"]))
        lines.append(_row(row))
    return lines


def _grads(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _source_table(content: Mapping[str, Any], part: Mapping[str, Any], source: str) -> list[str]:
    short = shortened(content)
    cells = {(one["t"], one["a"]): one for one in part["cells"] if one["s"] == source}
    grads: dict[str, list[float]] = {}
    for made in part["sets"]:
        if made["s"] == source:
            grads.setdefault(made["a"], []).append(made["grads_per_image"])
    targets = list(part["summary"])
    lines = [_row([f"source {short(source)}", "gradients", *map(short, targets)]), _row(["---"] * (2 + len(targets)))]
    lines.append(_row(["clean", "0", *(percents(part["summary"][name]["clean"]) for name in targets)]))
    noise = {one["t"]: percents(one["acc"]) for one in content["noise"]}
    lines.append(_row([NOISE, "0", *(noise[name] for name in targets)]))
    for attack in part["attacks"]:
        row = [attack["name"], _grads(fmean(grads[attack["name"]]) if attack["name"] in grads else None)]
        for name in targets:
            cell = cells.get((name, attack["name"]))
            row.append("-" if cell is None else percents(cell["acc"]) + (" w" if cell["whitebox"] else ""))
        lines.append(_row(row))
    return lines


def _similar_pairs(content: Mapping[str, Any]) -> list[str]:
    """The pairs whose perturbations agree most: what one of them says, the other says too."""
    short = shortened(content)
    told = content["similarity"]
    names = [f"{a} on {short(s)}" for s, a in told["pairs"]]
    agree = sorted(((told["cosine"][i][j], i, j) for i in range(len(names)) for j in range(i)), reverse=True)
    lines = [
        "## Pairs that agree most",
        "",
        "Mean cosine between perturbations.",
        "",
        "| cosine | one | other |",
        "|---|---|---|",
    ]
    return [*lines, *(_row([f"{value:.3f}", names[j], names[i]]) for value, i, j in agree[:20])]


def without_images(made: ImageSet) -> ImageSet:
    """The set with its figures alone."""
    return replace(made, images=made.images[:0])
