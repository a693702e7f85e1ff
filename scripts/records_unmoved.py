"""Whether a change of the code moved any record: run a fixed list of evaluations and compare their records.

    python scripts/records_unmoved.py --write before.json     # on the code as it was
    python scripts/records_unmoved.py --check before.json     # on the code as it is; exit status 1 where a record moved

The list covers every scenario, suite and modality, worker processes, and runs that are cut short and resumed. Records
are compared field by field as written (the label of an attack as `attack/stage@source`). They are the same bits on one
machine alone, so no file of them is kept here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import advkit

DIGITS: dict[str, Any] = {"task": "digits", "n": 60}
CASES: dict[str, dict[str, Any]] = {
    "pgd, pubdef, TAPM beside": {"attack": "pgd", "defense": "pubdef", "n": 60},
    "pgd, two processes": {"attack": "pgd:steps=10", "defense": "pgd_at", "n": 200, "batch_size": 50, "workers": 2},
    "pgd l1": {"attack": "pgd:steps=10", "threat_model": "l1:eps=3", **DIGITS},
    "pgd l0": {"attack": "pgd:steps=10", "threat_model": "l0:eps=5", **DIGITS},
    "pgd restarts, targeted": {"attack": "pgd:steps=10,restarts=2", "goal": "targeted:how=next", **DIGITS},
    "pgd bf16": {"attack": "pgd:steps=10", "speed": "bf16", **DIGITS},
    "fgsm, bit depth, oblivious beside": {"attack": "fgsm", "defense": "bit-depth:bits=3", **DIGITS},
    "pgd eot, random resize": {"attack": "pgd:steps=5,eot=2", "defense": "random-resize", "n": 40, "draws": 3},
    "mifgsm l2": {"attack": "mifgsm", "threat_model": "l2:eps=0.5", **DIGITS},
    "apgd-ce": {"attack": "apgd-ce:steps=20,restarts=2", "defense": "trades", **DIGITS},
    "apgd-ce l1": {"attack": "apgd-ce:steps=20", "threat_model": "l1:eps=3", **DIGITS},
    "apgd-t": {"attack": "apgd-t:steps=10", "defense": "pgd_at", **DIGITS},
    "fab l2": {"attack": "fab:steps=10", "threat_model": "l2:eps=0.5", **DIGITS},
    "square": {"attack": "square:queries=100", "threat_model": "linf:eps=0.1,access=scores", **DIGITS},
    "thorough": {"attack": "thorough", "defense": "pgd_at", **DIGITS},
    "thorough, two processes": {"attack": "thorough", "defense": "pgd_at", "workers": 2, "batch_size": 20, **DIGITS},
    "lean": {"attack": "lean", "defense": "trades", **DIGITS},
    "autoattack": {"attack": "autoattack", "defense": "pgd_at", **DIGITS, "n": 24},
    "quadattack": {"attack": "quadattack:k=5,budget=1x10", **DIGITS, "n": 20},
    "transfer": {"attack": "transfer:ni+si", "threat_model": "transfer:sources=zoo:digits-public-mlp", **DIGITS},
    "tapm, white box beside": {"attack": "pgd:steps=10", "threat_model": "tapm", **DIGITS, "n": 40},
    "online": {"attack": "online:inner=fgsm,selector=virtual+,k=10", **DIGITS},
    "sda": {"attack": "sda", "task": "digits-dvs", "n": 16},
    "random flips": {"attack": "random_flips", "task": "digits-dvs", "n": 16},
    "spiking pgd": {
        "attack": "spiking:pgd,surrogate=pdsg", "model": "snn", "threat_model": "linf:eps=0.1", **DIGITS, "n": 32,
    },
    "beast": {"attack": "beast:k=5,length=4", "task": "prompts", "model": "toychat", "n": 4},
    "random suffix, two processes": {
        "attack": "random_suffix", "task": "prompts", "model": "toychat", "n": 4, "workers": 2,
    },
    "gcg, perplexity filter, oblivious beside": {
        "attack": "gcg:steps=3,width=16,topk=16,length=4", "task": "prompts", "model": "toychat",
        "defense": "ppl_filter", "n": 3,
    },
    "foolbox": {"attack": "foolbox:LinfPGD", **DIGITS, "n": 20},
}  # fmt: skip
RESUMED = ("pgd, pubdef, TAPM beside", "thorough", "online", "beast")


def lines_of(folder: Path) -> list[str]:
    """Every record of a run folder in canonical form, in the order of their names."""
    found = []
    for name in ("records", "beside"):
        path = folder / f"{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            record = json.loads(line)
            stage, source = record.pop("stage", ""), record.pop("source", "")
            record["attack"] += (f"/{stage}" if stage else "") + (f"@{source}" if source else "")
            found.append(f"{name} {json.dumps(record, sort_keys=True)}")
    return sorted(found)


def whole(settings: dict[str, Any], folder: Path) -> list[str]:
    """A run from start to end."""
    advkit.evaluate(out=folder, **settings)
    return lines_of(folder)


def resumed(settings: dict[str, Any], folder: Path) -> list[str]:
    """The same run with the second half of its records lost, and a line cut short by a crash."""
    advkit.evaluate(out=folder, **settings)
    for path in sorted(folder.glob("*.jsonl")):
        if path.name in ("records.jsonl", "beside.jsonl"):
            raw = path.read_bytes().splitlines(keepends=True)
            kept = raw[: len(raw) // 2]
            path.write_bytes(b"".join(kept) + raw[len(kept)][: len(raw[len(kept)]) // 2])
    (folder / "report.json").unlink()
    advkit.evaluate(out=folder, **settings)
    return lines_of(folder)


def matrix(settings: dict[str, Any], folder: Path) -> list[str]:
    """Every cell of a small transfer matrix."""
    made = advkit.matrix(
        ["zoo:digits-public-mlp", "zoo:digits-public-cnn"], ["mifgsm", "ni+ti"], ["zoo:digits-mlp", "zoo:digits-mlp-pgd_at"],
        out=folder, cache=folder / "cache", **settings,
    ).to_dict()  # fmt: skip
    for part in (made, made["equal_budget"]):
        for one in [*part["cells"], *part["sets"]]:
            one.pop("file_hash", None)  # names the code that made it
            one.pop("seconds", None)
    kept = ("n", "eps", "norm", "goal", "seeds", "sources", "targets", "noise", "attacks", "sets", "cells", "summary")
    return [f"{key} {json.dumps(made[key], sort_keys=True)}" for key in (*kept, "equal_budget")]


def planned() -> dict[str, tuple[Callable[[dict[str, Any], Path], list[str]], dict[str, Any]]]:
    """What to run, by name."""
    found: dict[str, Any] = {name: (whole, settings) for name, settings in CASES.items()}
    found |= {f"{name}; cut and resumed": (resumed, CASES[name]) for name in RESUMED}
    return found | {"matrix": (matrix, {"task": "digits", "n": 40, "seeds": 2})}


def main() -> int:
    """Run the list; 1 where a record moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    asked = parser.parse_args()
    before = json.loads(asked.check.read_text(encoding="utf-8")) if asked.check else {}
    found, moved = {}, 0
    for name, (run, settings) in planned().items():
        if asked.only not in name:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            lines = run(settings, Path(folder))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        found[name] = lines
        word = ""
        if asked.check:
            same = before.get(name) == lines
            moved += not same
            word = "same" if same else "MOVED"
            if not same:
                for old, new in zip(before.get(name, []), lines, strict=False):
                    if old != new:
                        word += f"\n  was {old[:400]}\n  is  {new[:400]}"
                        break
        print(
            f"{digest[:16]}  {len(lines):4d} records  {time.perf_counter() - start:6.1f} s  {name}  {word}", flush=True
        )
    if asked.write:
        asked.write.write_text(json.dumps(found), encoding="utf-8")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
