"""Lines and time to the first number that can be trusted, beside other packages.

    python benchmarks/first_number.py --out docs [--repeats 3] [--samples 100] [--prompts 4] [--before CHECKOUT]
                                      [--nanogcg FOLDER] [--only tensors suite folder own language]
    python benchmarks/first_number.py --page docs      # the table alone, from docs/first_number.json

benchmarks/first_number/ has the scripts, one for each way and package, as a careful user writes them from the package's
own documentation: the attack, that its points lie in the ball and in the box, and the model asked again, with clean
accuracy beside. What a user has before that (network, samples, images, a language model's folder) is made by
benchmarks/first_number/setup.py and not counted.

--before is a checkout of an earlier advkit, whose scripts are those of benchmarks/first_number/before/ where the
present ones did not work. --nanogcg is a folder with nanoGCG and the transformers that it asks for (`pip install
--target`). What is not installed is left out and named.

Every script runs in a process and a folder of its own, all of them in turn, on one thread. Time is from the start of
the process to its end, by the clock and in CPU time, as a ratio of medians to that of advkit's script in Python; where
other programs run, CPU time is the one to go by. Lines are those of the formatted script without blank ones and
comments. Ways that are not run (--only) stay as they are in OUT/first_number.json.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().with_suffix("")
NAME = "first_number"
WAYS = {
    "tensors": "a module and tensors, PGD of 40 steps",
    "suite": "a module and tensors, AutoAttack",
    "folder": "a folder of images, PGD of 40 steps",
    "own": "an attack and a defense of one's own",
    "language": "a language model's folder, GCG of 15 steps",
}
MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "pyautoattack": "pyautoattack", "nanoGCG": "nanogcg"}


@dataclass(frozen=True)
class Entry:
    """One package on one way.

    way:    key of WAYS
    who:    as the table names it
    script: its file in benchmarks/first_number/
    more:   files that the user has to write beside it
    note:   what is to know of it
    timed:  False where another attack runs than advkit's, so that times say nothing
    """

    way: str
    who: str
    script: str
    more: tuple[str, ...] = ()
    note: str = ""
    timed: bool = True
    before: bool = False

    @property
    def package(self) -> str:
        return self.who.partition(",")[0]

    @property
    def key(self) -> str:
        return f"{self.way} {self.who}{' before' if self.before else ''}"


OTHER_ATTACK = "runs AutoAttack, the one attack that it has"
ENTRIES = (
    Entry("tensors", "advkit", "tensors_advkit.py"),
    Entry("tensors", "advkit, command", "tensors_advkit.sh"),
    Entry("tensors", "foolbox", "tensors_foolbox.py", note="steps of eps/30, its default"),
    Entry("tensors", "foolbox, steps of eps/10", "tensors_foolbox_longer.py"),
    Entry("tensors", "torchattacks", "tensors_torchattacks.py"),
    Entry("suite", "advkit", "suite_advkit.py"),
    Entry("suite", "advkit, command", "suite_advkit.sh"),
    Entry("suite", "advkit, auto", "suite_advkit_auto.py", note="the suite that advkit proposes"),
    Entry("suite", "pyautoattack", "suite_pyautoattack.py"),
    Entry("suite", "torchattacks", "suite_torchattacks.py"),
    Entry("folder", "advkit", "folder_advkit.py"),
    Entry("folder", "advkit, command", "folder_advkit.sh"),
    Entry("folder", "foolbox", "folder_foolbox.py", note="steps of eps/30, its default"),
    Entry("folder", "torchattacks", "folder_torchattacks.py"),
    Entry("folder", "pyautoattack", "folder_pyautoattack.py", note=OTHER_ATTACK, timed=False),
    Entry("own", "advkit", "own_advkit.py"),
    Entry("own", "foolbox", "own_foolbox.py"),
    Entry("own", "torchattacks", "own_torchattacks.py"),
    Entry("own", "pyautoattack", "own_pyautoattack.py", note=OTHER_ATTACK, timed=False),
    Entry("language", "advkit", "language_advkit.py"),
    Entry("language", "advkit, command", "language_advkit.sh"),
    Entry("language", "nanoGCG", "language_nanogcg.py"),
)
FACTORIES = ("before/factories.py",)
BEFORE = (
    Entry("tensors", "advkit", "tensors_advkit.py", before=True),
    Entry("tensors", "advkit, command", "before/tensors_advkit.sh", FACTORIES, before=True),
    Entry("suite", "advkit", "suite_advkit.py", before=True),
    Entry("suite", "advkit, command", "before/suite_advkit.sh", FACTORIES, before=True),
    Entry("folder", "advkit", "before/folder_advkit.py", before=True),
    Entry("folder", "advkit, command", "before/folder_advkit.sh", FACTORIES, before=True),
    Entry("own", "advkit", "own_advkit.py", before=True),
    Entry("language", "advkit", "language_advkit.py", before=True),
    Entry("language", "advkit, command", "language_advkit.sh", before=True),
)


CHECKED = re.compile(r"^ *assert \(adversarial - x\)\.abs\(\)\.max\(\) <= EPS|and within and not marks$", re.M)
"""How a script of the user's own checks the threat model."""


def lines_of(file: Path) -> tuple[int, int]:
    """Lines of a script without blank ones and comments, and how many of these import."""
    text = file.read_text(encoding="utf-8")
    written = {
        number for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")
    }
    if file.suffix != ".py":
        return len(written), 0
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    spent = {number for node in imports for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return len(written), len(written & spent)


@dataclass(frozen=True)
class Said:
    """What a script printed.

    figure:   robust accuracy, or the share of prompts for which the target is reached, in percent
    low, high: its interval, where one is printed
    clean:    the same without an attack
    forged:   of prompts: the target is reached, by marks of turns among the suffix
    """

    figure: float
    clean: float
    low: float | None = None
    high: float | None = None
    forged: float | None = None


_NUMBER = r"[^\d\n]*?([\d.]+) ?%"
_INTERVAL = r"(?: +\[([\d.]+), ([\d.]+)\])?"


def said(text: str) -> Said:
    """The figures in what a script printed; ValueError where they are missing."""
    figure = re.search(rf"^(?:robust accuracy|exact target rate){_NUMBER}{_INTERVAL}", text, re.M)
    clean = re.search(rf"^(clean accuracy|target (?:not )?said, clean prompt){_NUMBER}", text, re.M)
    if figure is None or clean is None:
        raise ValueError(f"no figures in {text[-500:]!r}")
    forged = re.search(rf"^target said, with turn marks in the suffix{_NUMBER}", text, re.M)
    without = float(clean[2])
    return Said(
        figure=float(figure[1]),
        clean=100 - without if "not said" in clean[1] else without,
        low=None if figure[2] is None else float(figure[2]),
        high=None if figure[3] is None else float(figure[3]),
        forged=None if forged is None else float(forged[1]),
    )


@dataclass(frozen=True)
class Run:
    wall: float
    cpu: float
    said: Said


def environment(entry: Entry, before: Path | None, nanogcg: Path | None) -> dict[str, str]:
    """Of the process: one thread, and the packages of the entry first."""
    first = [before if entry.before else ROOT, *([nanogcg] if entry.package == "nanoGCG" else [])]
    paths = [*map(str, reversed(first)), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(entry: Entry, shared: Path, env: dict[str, str]) -> Run:
    """Run a script once, in a copy of the user's folder."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "user"
        shutil.copytree(shared, here)
        for file in (entry.script, *entry.more):
            shutil.copy(SCRIPTS / file, here)
        script = Path(entry.script).name
        command = [sys.executable, script] if script.endswith(".py") else ["bash", "-e", script]
        used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{entry.key}: {done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    return Run(wall, cpu, said(done.stdout))


def measured(entries: Sequence[Entry], runs: dict[str, list[Run]], measured_at: str) -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    for entry in entries:
        own = runs[entry.key]
        reference = runs[f"{entry.way} advkit"]
        counts = [lines_of(SCRIPTS / file) for file in (entry.script, *entry.more)]
        ratios = {
            name: round(median(getattr(r, name) for r in own) / median(getattr(r, name) for r in reference), 2)
            for name in ("wall", "cpu")
            if entry.timed
        }
        text = (SCRIPTS / entry.script).read_text(encoding="utf-8")
        yield {
            "way": entry.way,
            "commit": measured_at,
            "who": entry.who,
            "before": entry.before,
            "files": [entry.script, *entry.more],
            "lines": sum(lines for lines, _ in counts),
            "without_imports": sum(lines - imports for lines, imports in counts),
            "checked_by": "advkit" if entry.package == "advkit" else "the user" if CHECKED.search(text) else "nobody",
            "note": entry.note,
            "ratios": ratios,
            "figures": [{name: told for name, told in asdict(r.said).items() if told is not None} for r in own],
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table, way by way."""
    head = "| way in | with | lines (without imports) | time | CPU time | clean | figure | ball and box checked by |"
    written = [head, "|---|---|---|---|---|---|---|---|"]
    for way, title in WAYS.items():
        for number, row in enumerate(row for row in rows if row["way"] == way):
            cells = [
                title if number == 0 else "",
                row["who"] + (", before" if row["before"] else ""),
                f"{row['lines']} ({row['without_imports']})",
                *(f"{row['ratios'][name]:.2f}" if row["ratios"] else "-" for name in ("wall", "cpu")),
                _range(row, "clean"),
                _range(row, "figure") + _interval(row),
                row["checked_by"],
            ]
            written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def _range(row: dict[str, Any], name: str) -> str:
    values = [each[name] for each in row["figures"]]
    low, high = min(values), max(values)
    return f"{low:.1f} %" if low == high else f"{low:.1f} to {high:.1f} %"


def _interval(row: dict[str, Any]) -> str:
    first = row["figures"][0]
    return f" [{first['low']:.1f}, {first['high']:.1f}]" if "low" in first else ""


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """What is to know of single rows."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            told.setdefault(f"{row['who']}: {row['note']}", []).append(row["way"])
        if "forged" in row["figures"][0]:
            more = f"{row['who']} reaches the target for {_range(row, 'forged')} more by marks of turns in the suffix"
            told.setdefault(more, []).append(row["way"])
    return "\n".join(f"- {what} ({', '.join(ways)})." for what, ways in told.items())


def page(held: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in held["versions"].items())
    return (
        f"{held['samples']} samples, {held['prompts']} prompts, {held['repeats']} repeats; {versions}. Before: commit "
        f"`{held['before']}`.\n\n{table(held['rows'])}\n\n{notes(held['rows'])}"
    )


BETWEEN = re.compile(rf"(<!-- {NAME} -->\n).*?(\n<!-- end -->)", re.S)


def write_page(docs: Path) -> None:
    held = json.loads((docs / f"{NAME}.json").read_text(encoding="utf-8"))
    file = docs / f"{NAME}.md"
    text, found = BETWEEN.subn(lambda mark: mark[1] + page(held) + mark[2], file.read_text(encoding="utf-8"))
    if found != 1:
        raise SystemExit(f"{file} has {found} places for the table")
    file.write_text(text, encoding="utf-8")


def versions(nanogcg: Path | None) -> dict[str, str]:
    """Of the packages, by their distributions."""
    from importlib.metadata import distributions

    wanted = ("foolbox", "torchattacks", "pyautoattack", "nanogcg", "torch", "transformers")
    held = {each.name.lower(): each.version for each in distributions()}
    told = {name: held[name] for name in wanted if name in held}
    for each in distributions(path=[str(nanogcg)]) if nanogcg else ():
        if each.name.lower() == "nanogcg":
            told["nanogcg"] = each.version
        if each.name.lower() == "transformers":
            told["transformers (of nanogcg)"] = each.version
    return told


def commit(folder: Path) -> str:
    asked = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--nanogcg", type=Path)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    asked = parser.parse_args()
    if asked.page:
        write_page(asked.page)
        return
    entries = [each for each in (*ENTRIES, *(BEFORE if asked.before else ())) if each.way in asked.only]
    for package, module in MODULES.items():
        if find_spec(module) is None and not (package == "nanoGCG" and asked.nanogcg):
            print(f"{package} is not installed: left out")
            entries = [each for each in entries if each.package != package]
    order = list(WAYS)
    entries.sort(key=lambda each: order.index(each.way))  # stable: before stands after the peers
    runs: dict[str, list[Run]] = {each.key: [] for each in entries}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "user"
        setup = [sys.executable, str(SCRIPTS / "setup.py"), str(shared), "--samples", str(asked.samples)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([*setup, "--prompts", str(asked.prompts)], check=True, env=env)
        for repeat in range(asked.repeats):
            for entry in entries:
                if repeat and not entry.timed:
                    continue
                done = run(entry, shared, environment(entry, asked.before, asked.nanogcg))
                runs[entry.key].append(done)
                print(f"{entry.key}: {done.wall:.1f} s, {done.cpu:.1f} s CPU, {done.said}", flush=True)
    file = asked.out / f"{NAME}.json" if asked.out else None
    kept = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {"rows": []}
    counts = {"samples": asked.samples, "prompts": asked.prompts, "repeats": asked.repeats}
    others = [row for row in kept["rows"] if row["way"] not in asked.only]
    if others and any(kept[name] != number for name, number in counts.items()):
        raise SystemExit(f"{file} was measured with other counts: run every way")
    rows = [*others, *measured(entries, runs, commit(ROOT))]
    result = {
        "before": commit(asked.before) if asked.before else "",
        "versions": versions(asked.nanogcg),
        **counts,
        "rows": sorted(rows, key=lambda row: order.index(row["way"])),
    }
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_page(asked.out)
    else:
        print(page(result))


if __name__ == "__main__":
    main()
