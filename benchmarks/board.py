"""The board of 2,000 reports: seconds to build, size, seconds to load, milliseconds to sort and filter.

python benchmarks/board.py --out FOLDER [--reports 2000] [--seed 0] [--code CHECKOUT ...]

Makes FOLDER/runs from a few real runs with changed figures, builds the page with the code of every checkout named (this
one by default, one process each, the same reports) and opens it in Debian's Chromium where playwright is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import advkit
from advkit.evaluation.stats import rate

CHROMIUM = "/usr/bin/chromium"
HERE = Path(__file__).resolve().parents[1]
BASES: tuple[Mapping[str, Any], ...] = (
    {"attack": "pgd", "threat_model": "linf:eps=0.1"},
    {"attack": "lean", "threat_model": "linf:eps=0.1"},
    {"attack": "square:queries=200", "threat_model": "linf:eps=0.1"},
    {"attack": "pgd", "threat_model": "l2:eps=0.5"},
    {"attack": "pgd", "threat_model": "linf:eps=0.1", "goal": "targeted"},
)
WORDS = ("plain", "wide", "deep", "narrow", "augmented", "distilled", "pruned", "quantized", "large", "small")
DEFENSES = ("none", "pgd_at", "trades", "mart", "awp", "bit-depth", "jpeg", "random-resize")
FLAGS = (
    ("zero_gradient", "unreliable", "the gradient is zero on 40 of 100 samples"),
    ("incomplete_optimization", "warning", "the loss still rises at the end of the attack"),
    ("black_box_beats_white_box", "warning", "a black-box attack broke samples that gradients did not"),
)


def bases(folder: Path) -> list[dict[str, Any]]:
    """Reports of a few real runs, made once."""
    found = []
    for i, request in enumerate(BASES):
        run = folder / f"base-{i}"
        if not (run / "report.json").is_file():
            advkit.evaluate(task="digits", n=100, device="cpu", out=run, **request)
        found.append(json.loads((run / "report.json").read_text(encoding="utf-8")))
    return found


def plausible(made: list[dict[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Reports with other victims and figures: five per victim, its strength the same in all of them."""
    draw = random.Random(seed)
    for i in range(count):
        k, base = i // len(made), made[i % len(made)]
        data, n = copy.deepcopy(base), base["dataset"]["n_evaluated"]
        own = random.Random(f"{seed}/{k}")
        name, defense = f"{own.choice(WORDS)}-{own.choice(WORDS)}-{k}", own.choice(DEFENSES)
        data["model"] |= {"name": name, "state_sha256": f"{k:064x}"}
        data["defense"] |= {"name": defense}
        data["request"] |= {"model": name, "defense": defense}
        data["dataset"]["name"] = ("digits", "fashion-mnist", "cifar10")[k % 3]
        data["title"] = f"attack={data['request']['attack']} | defense={defense} | model={name}"
        data["created_utc"] = f"2026-{1 + i % 12:02}-{1 + i % 28:02}T{i % 24:02}:00:00Z"
        data["reproducibility"]["command"] += f" --model {name}"
        _weaken(data, n, own.random(), draw)
        if draw.random() < 0.15:
            flag, severity, message = draw.choice(FLAGS)
            data["diagnostics"]["flags"].append({"id": flag, "severity": severity, "message": message})
        data.pop("per_sample", None)
        yield data


def _weaken(data: dict[str, Any], n: int, strength: float, draw: random.Random) -> None:
    """Other counts of robust samples, at most those of the run: what its attacks left stays an upper bound."""
    metrics = data["metrics"]
    robust, success = metrics["robust_accuracy"], metrics["attack_success_rate"]
    clean = metrics["clean_accuracy"]["numerator"]
    kept = round(clean * strength * (0.8 + 0.2 * draw.random()))
    if data["request"]["goal"] != "untargeted":
        reached = round(success["denominator"] * (1 - strength))
        metrics["attack_success_rate"] = rate(reached, success["denominator"], success["denominator_kind"])
        return
    for attack in data["attacks"]:
        if attack.get("beside") or attack["robust_accuracy"]["denominator"] != n:
            continue
        attack["robust_accuracy"] = rate(kept, n, "all_samples")
        attack["attack_success_rate"] = rate(clean - kept, clean, "clean_correct")
    metrics["robust_accuracy"] = rate(kept, n, robust["denominator_kind"])
    metrics["attack_success_rate"] = rate(clean - kept, clean, success["denominator_kind"])
    metrics.pop("robust_accuracy_upper", None)


def write(folder: Path, count: int, seed: int) -> Path:
    """FOLDER/runs-COUNT with that many reports."""
    runs = folder / f"runs-{count}"
    for i, data in enumerate(plausible(bases(folder / "bases"), count, seed)):
        run = runs / f"{data['dataset']['name']}" / f"run-{i:05}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "report.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    return runs


def built(code: Path, runs: Path, out: Path) -> dict[str, float]:
    """Seconds of the whole command and of the processor's time in it, and megabytes of the page."""
    began, used = time.perf_counter(), _used()
    subprocess.run(
        [sys.executable, "-m", "advkit", "leaderboard", str(runs), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=out,
        check=True,
        capture_output=True,
    )
    took = time.perf_counter() - began
    return {
        "build_s": took,
        "build_cpu_s": _used() - used,
        "megabytes": (out / "leaderboard.html").stat().st_size / 1e6,
    }


def _used() -> float:
    told = resource.getrusage(resource.RUSAGE_CHILDREN)
    return told.ru_utime + told.ru_stime


# Milliseconds from an event to the frame that shows its effect.
_TIMED = """async (act) => {
  const began = performance.now();
  await act();
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}"""
_FILTER = """() => {
  const field = document.querySelector("#filter-text");
  field.value = "deep";
  field.dispatchEvent(new Event("input", {bubbles: true}));
}"""
_SORT = """() => document.querySelectorAll("thead button")[1].click()"""


def opened(page_file: Path) -> dict[str, float]:
    """What a browser says of the page; nothing where playwright is not installed."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(page_file.resolve().as_uri())
        found = {
            "load_s": page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"),
            "elements": page.evaluate("document.querySelectorAll('*').length"),
            "sort_ms": page.evaluate(f"({_TIMED})({_SORT})"),
            "filter_ms": page.evaluate(f"({_TIMED})({_FILTER})"),
        }
        browser.close()
    return found


def main() -> None:
    """Print one line of JSON per checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reports", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code", type=Path, action="append")
    given = parser.parse_args()
    runs = write(given.out, given.reports, given.seed)
    for i, code in enumerate(given.code or [HERE]):
        out = given.out / f"page-{i}"
        out.mkdir(exist_ok=True)
        found = built(code.resolve(), runs.resolve(), out.resolve()) | opened(out / "leaderboard.html")
        print(json.dumps({"code": str(code), "reports": given.reports, **{k: round(v, 3) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
