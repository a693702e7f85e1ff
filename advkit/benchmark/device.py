"""What an accelerator adds to a benchmark: sizes of batches, equality with the CPU, and the page of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advkit.benchmark.page import suites_page
from advkit.benchmark.sides import Run, our_run
from advkit.evaluation.api import resolve


def batch_sizes(
    model: str, suite: str, *, task: Any, threat_model: Any, n: int, sizes: Sequence[int], device: str
) -> dict[str, Any]:
    """Seconds of a suite with so many samples in flight, seed 0; the first size is run once more before, to warm up."""
    table = []
    for turn, size in enumerate((sizes[0], *sizes)):
        done = our_run(resolve(suite, "none", task, model, threat_model, n=n, seed=0, device=device, batch_size=size))
        if turn:
            table.append({"batch": size, "seconds": round(done.seconds, 3), "robust_accuracy": done.robust_accuracy})
    return {"model": model, "suite": suite, "n": n, "sizes": table}


def equality(
    model: str, suites: Sequence[str], *, task: Any, threat_model: Any, n: int, device: str
) -> list[dict[str, Any]]:
    """How every sample ends on the CPU and on the device, seed 0, for each suite; "thorough@bf16" is at that speed.

    The CPU's side is always in full precision. `differ` lists the samples that end otherwise, by id.
    """
    found = []
    for suite in suites:
        attack, _, speed = suite.partition("@")
        here, there = (
            our_run(resolve(attack, "none", task, model, threat_model, n=n, seed=0, device=where, speed=how))
            for where, how in (("cpu", "fp32"), (device, speed or "fp32"))
        )
        rows = sorted(here.wrong | there.wrong | here.broken.keys() | there.broken.keys())
        differ = [
            {"row": row, "cpu": _ended(here, row), "device": _ended(there, row)}
            for row in rows
            if _ended(here, row) != _ended(there, row)
        ]
        found.append(
            {
                "model": model,
                "suite": suite,
                "n": n,
                "robust_accuracy_cpu": here.robust_accuracy,
                "robust_accuracy_device": there.robust_accuracy,
                "differ": differ,
            }
        )
    return found


def _ended(run: Run, row: str) -> str:
    return "wrong" if row in run.wrong else "broken" if row in run.broken else "not broken"


def device_page(results: Mapping[str, Any]) -> str:
    """The tables of a device's results as a page of Markdown."""
    told = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    lines = ["# Benchmarks on one device", "", "Made by", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += [
        "Seconds are those until the work is done (on a CPU: CPU seconds), medians of interleaved runs.",
        "",
    ]
    for each in results["speeds"]:
        lines += [
            f"## Passes under each speed switch: {each['model']}",
            "",
            "One forward and backward pass. *Moved* is the largest change of a score against fp32, over the spread of",
            "the sample's scores; *first* the seconds of the first turn, compilation included.",
            "",
            "| speed | batch | us per sample | times faster than fp32 | moved | first s |",
            "|---|---|---|---|---|---|",
            *(
                f"| {row['speed']} | {row['batch']} | {row['us_per_sample']} | {row['times_faster']} | {row['moved']} "
                f"| {row['first_seconds']} |"
                for row in each["speeds"]
            ),
            "",
        ]
    for each in results["overhead"]:
        lines += [
            f"## PGD over bare passes: {each['loops'][0]['model']}",
            "",
            "| batch | called directly | by `evaluate` |",
            "|---|---|---|",
            *(f"| {row['batch']} | {row['direct']} | {row['evaluate']} |" for row in each["loops"]),
            "",
        ]
    for threat in dict.fromkeys(entry["threat_model"] for entry in results["suites"]):
        lines += suites_page([entry for entry in results["suites"] if entry["threat_model"] == threat], "time")
    for each in results["batches"]:
        lines += [
            f"## Samples in flight: {each['suite']} on {each['model']}, {each['n']} samples",
            "",
            "| batch | s | RA |",
            "|---|---|---|",
            *(f"| {row['batch']} | {row['seconds']} | {row['robust_accuracy']:.4g} |" for row in each["sizes"]),
            "",
        ]
    lines += [
        "## Equality with the CPU",
        "",
        "The same run with the same seed on both. Random numbers are the same bits; round-off is not.",
        "",
        "| model | suite | samples | end otherwise | RA on the CPU | RA on the device |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each['model']} | {each['suite']} | {each['n']} | {len(each['differ'])} "
            f"| {each['robust_accuracy_cpu']:.4g} | {each['robust_accuracy_device']:.4g} |"
            for each in results["equality"]
        ),
        "",
        *(
            f"- {each['suite']} on {each['model']}: {row['row']} is {row['cpu']} on the CPU, {row['device']} here"
            for each in results["equality"]
            for row in each["differ"]
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"
