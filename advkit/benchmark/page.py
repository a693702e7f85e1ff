"""The results of a benchmark as a page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from advkit.benchmark.sides import REFERENCE, TARGETS

GPU_NOT_RUN = "Not run yet: no GPU at hand. `python benchmarks/gpu.py` measures it, and writes gpu.md and gpu.json."
GPU_RUN = "See [gpu.md](gpu.md)."


def markdown(results: dict[str, Any], gpu: bool = False) -> str:
    """The tables as a page; gpu: whether results of a GPU stand beside it."""
    lines = [
        "# Benchmarks",
        "",
        "Made by",
        "",
        f"    {results['command']}",
        "",
        "CPU seconds of one process on one thread; the sides are interleaved and a ratio is the median of the ratios",
        "of neighbouring runs. Passes are samples that went through the model, counted by the same hooks",
        "on both sides, padding and verdicts included. "
        + ", ".join(f"{name} {value}" for name, value in results["environment"].items())
        + ".",
        "",
    ]
    threats = dict.fromkeys(entry["threat_model"] for entry in results.get("suites", ()))
    for threat in threats:
        lines += suites_page([entry for entry in results["suites"] if entry["threat_model"] == threat])
    if results.get("goals"):
        lines += _goals_page(results["goals"])
    if results.get("sizes"):
        lines += _sizes_page(results["sizes"])
    if results.get("overhead"):
        lines += _overhead_page(results["overhead"])
    if results.get("ops"):
        lines += _ops_page(results["ops"])
    lines += ["## GPU", "", GPU_RUN if gpu else GPU_NOT_RUN, ""]
    return "\n".join(lines).rstrip() + "\n"


def suites_page(entries: Sequence[dict[str, Any]], time: str = "CPU time") -> list[str]:
    """The entries of one threat model; what kind of time their seconds are."""
    seconds, ratio = ("CPU s", "times less CPU") if time == "CPU time" else ("s", "times faster")
    first = entries[0]
    reference, repetitions = first["reference"]["name"], len(first["reference"]["runs"])
    return [
        f"## {first['threat_model']}: suites against {reference}"
        + (" (AutoAttack standard)" if reference == REFERENCE else ""),
        "",
        f"{first['n']} samples of {first['task']}, {repetitions} repetitions with seeds 0 to {repetitions - 1} on both "
        "sides. RA is robust accuracy, one figure where all seeds agree. *Missed* are",
        "samples that the reference breaks under any of its seeds and the suite does not, *gained* the converse, each",
        "the worst of our seeds.",
        "",
        f"| model | side | RA | {seconds} | {ratio} | forwards k | backwards k | missed | gained |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for entry in entries for line in _model_lines(entry)),
        "",
        *(_ratio_line(entries, name, time) for name in first["suites"]),
        "",
        "### Samples missed",
        "",
        *_missed_lines(entries),
        "",
        "### What broke the samples",
        "",
        "Samples broken by each stage, first seed.",
        "",
        *(line for entry in entries for line in _stage_lines(entry)),
        "",
    ]


def _model_lines(entry: dict[str, Any]) -> list[str]:
    """The table's lines of one model: the reference, then each suite."""
    theirs = entry["reference"]
    unsteady = len(theirs["fooled_under_some_seeds_only"])
    lines = [
        f"| {entry['model']} | {theirs['name']} | {_spread(theirs['runs'])} | {_middle(theirs['runs'], 'seconds'):.1f} "
        f"|  | {_middle(theirs['runs'], 'forwards') / 1e3:.0f} | {_middle(theirs['runs'], 'backwards') / 1e3:.0f} "
        f"| {unsteady} by some seeds only |  |"
    ]
    for name, suite in entry["suites"].items():
        lines.append(
            f"| | {name}{_revision(suite)} | {_spread(suite['runs'])} | {_middle(suite['runs'], 'seconds'):.1f} "
            f"| {suite['cpu_ratio']:.1f} | {_middle(suite['runs'], 'forwards') / 1e3:.0f} "
            f"| {_middle(suite['runs'], 'backwards') / 1e3:.0f} | {_worst(suite['missed'])} "
            f"| {_worst(suite['gained'])} |"
        )
    return lines


def _revision(suite: dict[str, Any]) -> str:
    """The suite's revision in brackets, where it has one later than the first."""
    return f" (revision {suite['revision']})" if suite.get("revision", 1) > 1 else ""


def _ratio_line(entries: Sequence[dict[str, Any]], name: str, time: str) -> str:
    """A suite's ratios of time over the models, with the ratio it is meant to reach."""
    ratios = [entry["suites"][name]["cpu_ratio"] for entry in entries if name in entry["suites"]]
    target = TARGETS.get(name.partition("@")[0])
    goal = (
        f" (goal {target:g})" if target and time == "CPU time" and entries[0]["reference"]["name"] == REFERENCE else ""
    )
    return (
        f"- `{name}`: {min(ratios):.1f} to {max(ratios):.1f} times less {time}, median of the models "
        f"{statistics.median(ratios):.1f}{goal}"
    )


def _missed_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    missed = [
        f"- {name} on {entry['model']}: {_row(one)}"
        for entry in entries
        for name, suite in entry["suites"].items()
        for one in suite["missed"]
    ]
    return missed or ["None by any suite under any seed."]


def _row(missed: dict[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in missed["their_seeds"])
    ours, stage = missed["our_seed"], missed["felled_by"]
    return f"{missed['row']} under our seed {ours}; broken by {stage} under their seeds {seeds}"


def _stage_lines(entry: dict[str, Any]) -> list[str]:
    theirs = entry["reference"]
    return [
        f"- {entry['model']}",
        f"  - {theirs['name']}: {_stages(theirs['runs'][0])}",
        *(f"  - {name}: {_stages(suite['runs'][0])}" for name, suite in entry["suites"].items()),
    ]


def _stages(run: dict[str, Any]) -> str:
    return ", ".join(f"{stage} {count}" for stage, count in run["felled_by"].items()) or "none"


def _middle(runs: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def _spread(runs: Sequence[dict[str, Any]]) -> str:
    values = sorted({run["robust_accuracy"] for run in runs})
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"


def _worst(rows: Sequence[dict[str, Any]]) -> int:
    counts: dict[int, int] = {}
    for row in rows:
        counts[row["our_seed"]] = counts.get(row["our_seed"], 0) + 1
    return max(counts.values(), default=0)


def _goals_page(goals: Sequence[dict[str, str]]) -> list[str]:
    return [
        "## Goals of the engine",
        "",
        "*Before* is what the figure was when the goal was set, *limit* what no change of ours can go below. PGD keeps",
        "samples to the last step; *by evaluate* in calls of sizes in which a sample's bits are the same. Pairs stand",
        "for the two ways where both have a goal; else the goal is that of runs by `evaluate`. What suites cost beside",
        "the reference is measured by `--parts suites`, what they miss by `benchmarks/missed.py`.",
        "",
        "| | before | now | goal | limit |",
        "|---|---|---|---|---|",
        *(
            f"| {each['name']} | {each['before']} | {each['now']} | {each['goal']} | {each['limit']} |"
            for each in goals
        ),
        "",
    ]


def _sizes_page(sizes: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "## Sizes of a call",
        "",
        "Numbers of samples, up to 64 (8 large ones), in a call of which a sample's answer and gradient have the same",
        "bits, as a probe finds them on this machine. `evaluate` makes calls of these sizes alone. Random weights but",
        "for EfficientNet's; the ViT is torchvision's, with four layers of width 64 and patches of 8 x 8.",
        "",
        "| model | image | sizes |",
        "|---|---|---|",
        *(
            f"| {each['model']} | {'x'.join(map(str, each['image']))} "
            f"| {', '.join(map(str, each['sizes'])) if 'sizes' in each else 'left out: ' + each['left_out']} |"
            for each in sizes
        ),
        "",
    ]


def _overhead_page(overhead: dict[str, Any]) -> list[str]:
    names = {
        "direct": "called directly",
        "evaluate": "by `evaluate`",
        "padded": "padded, as before",
        "torchattacks": "torchattacks",
    }
    shown = [name for name in names if any(name in each for each in overhead["loops"])]
    return [
        "## PGD against bare passes",
        "",
        "PGD on samples that stay to the end over as many bare forward and backward passes of the batch, medians of",
        f"{overhead['repetitions']}. *By evaluate*: in the calls that `evaluate` makes, of numbers of samples in which",
        "the bits of a sample are the same. *As before*: in calls of at most 64 samples (4 large ones), padded to a",
        "multiple of 16 (4). Architectures by their name alone have random weights. The last point is scored by all",
        "but torchattacks, which saves a forward pass.",
        "",
        "| model | image | steps | batch | " + " | ".join(names[name] for name in shown) + " |",
        "|---|" + "---|" * (3 + len(shown)),
        *(
            f"| {each['model']} | {'x'.join(map(str, each['image']))} | {each['steps']} | {each['batch']} | "
            + " | ".join(f"{each[name]:.2f}" if name in each else "" for name in shown)
            + " |"
            for each in overhead["loops"]
        ),
        "",
    ]


def _ops_page(ops: dict[str, Any]) -> list[str]:
    bare = ops["bare"]
    return [
        "## Dispatcher operations per step",
        "",
        f"On {ops['model']}, exact counts; a bare forward is {bare['forward']}, a bare forward and backward "
        f"{bare['forward_and_backward']}. A step of Square is one query, of FAB-T one step toward one target.",
        "",
        "| attack | operations | host synchronisations |",
        "|---|---|---|",
        *(f"| {name} | {step['ops']:.4g} | {step['syncs']:.3g} |" for name, step in ops["steps"].items()),
        "",
    ]
