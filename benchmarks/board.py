"""The board of 2,000 reports: seconds to build, size, seconds to load, milliseconds to sort and filter.

python benchmarks/board.py --out FOLDER [--reports 2000] [--pictures 49] [--repeat 3] [--seed 0] [--code CHECKOUT ...]

Makes reports from a few real runs with changed figures, builds the page with the code of every checkout named (this one
by default; in turns, one process each, the same reports) and opens it in Debian's Chromium where playwright is there.
Prints the median of every figure, and how many times less it is than with the first checkout. The real runs are those
of the first checkout: name the oldest first, since newer code reads older reports.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def bases(folder: Path, code: Path) -> list[Path]:
    """Folders of a few real runs with their plots, made once."""
    made = []
    for i, request in enumerate(BASES):
        made.append(folder / f"base-{i}")
        if not (made[-1] / "report.json").is_file():
            options = [each for name, value in request.items() for each in (f"--{name.replace('_', '-')}", value)]
            told = ["--task", "digits", "--n", "100", "--device", "cpu", "--out", str(made[-1])]
            _run(code, folder, "evaluate", *options, *told)
    return made


def _run(code: Path, where: Path, *arguments: str) -> None:
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "advkit", *arguments],
        env={**os.environ, "PYTHONPATH": str(code)},
        cwd=where,
        check=True,
        capture_output=True,
    )


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


def write(folder: Path, made: list[Path], count: int, seed: int, plots: bool) -> Path:
    """A folder with that many reports, each with the plots of the run that it was made from or without."""
    runs = folder / f"{'pictures' if plots else 'runs'}-{count}"
    texts = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in made]
    for i, data in enumerate(plausible(texts, count, seed)):
        run = runs / f"{data['dataset']['name']}" / f"run-{i:05}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "report.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
        if plots:
            shutil.copytree(made[i % len(made)] / "plots", run / "plots", dirs_exist_ok=True)
    return runs


def built(code: Path, runs: Path, out: Path) -> dict[str, float]:
    """Seconds of the whole command and of the processor's time in it, and megabytes of the page."""
    began, used = time.perf_counter(), _used()
    _run(code, out, "leaderboard", str(runs))
    took, spent = time.perf_counter() - began, _used() - used
    shutil.copy(runs / "leaderboard.html", out)
    size = (out / "leaderboard.html").stat().st_size
    return {"build_s": took, "build_cpu_s": spent, "megabytes": size / 1e6}


def _used() -> float:
    told = resource.getrusage(resource.RUSAGE_CHILDREN)
    return told.ru_utime + told.ru_stime


# Milliseconds from an event to the frame that shows its effect.
_FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
_TIMED = f"""(act) => {{
  const began = performance.now();
  act();
  return {_FRAME}.then(() => performance.now() - began);
}}"""
_FILTER = """() => {
  const field = document.querySelector("#filter-text");
  field.value = "WORD";
  field.dispatchEvent(new Event("input", {bubbles: true}));
}"""
_SORT = """() => document.querySelectorAll("thead button")[COLUMN].click()"""


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
        told = page.context.new_cdp_session(page)
        told.send("Performance.enable")
        page.goto(page_file.resolve().as_uri())
        found = {"load_s": page.evaluate(f"{_FRAME}.then(() => performance.now() / 1000)")}
        spent = {each["name"]: each["value"] for each in told.send("Performance.getMetrics")["metrics"]}
        found["load_cpu_s"] = spent["TaskDuration"]
        found["elements"] = page.evaluate("document.querySelectorAll('*').length")

        def timed(acts: list[str]) -> float:
            return statistics.median(page.evaluate(f"({_TIMED})({act})") for act in acts)

        found["sort_ms"] = timed([_SORT.replace("COLUMN", str(k)) for k in (1, 2, 3, 2, 1)])
        found["filter_ms"] = timed([_FILTER.replace("WORD", word) for word in ("deep", "jpeg", "zero", "wide l2", "")])
        browser.close()
    return found


def measured(codes: list[Path], runs: Path, out: Path, repeat: int) -> list[dict[str, float]]:
    """The median of every figure for every checkout; they take turns."""
    found: list[list[dict[str, float]]] = [[] for _ in codes]
    for _ in range(repeat):
        for i, code in enumerate(codes):
            page = out / f"page-{i}-of-{runs.name}"
            found[i].append(built(code, runs, page) | opened(page / "leaderboard.html"))
    return [{name: statistics.median(one[name] for one in own) for name in own[0]} for own in found]


def main() -> None:
    """Print one line of JSON per checkout and set of reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reports", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=49, help="reports of a second board, with plots; 0: none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code", type=Path, action="append")
    given = parser.parse_args()
    out, codes = given.out.resolve(), [code.resolve() for code in given.code or [HERE]]
    made = bases(out / "bases", codes[0])
    for count, plots in ((given.reports, False), (given.pictures, True)):
        if count == 0:
            continue
        runs = write(out, made, count, given.seed, plots)
        figures = measured(codes, runs, out, given.repeat)
        for code, own in zip(codes, figures, strict=True):
            line = {"code": str(code), "reports": count, "plots": plots, **{k: round(v, 3) for k, v in own.items()}}
            if code != codes[0]:
                line["times_less"] = {name: round(figures[0][name] / own[name], 1) for name in own}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
