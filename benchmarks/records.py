"""What records cost: CPU time and peak memory to write, read and resume runs of many, beside another build.

    git worktree add ../before COMMIT
    python benchmarks/records.py --baseline ../before --out docs/records.json

Every figure is of a process of its own, the builds in turn. `write` appends records to a run folder in batches of 256,
`read` counts the records of that folder, `resume` opens it as a run does that goes on. Both builds must write the same
bytes. `harness` is one FGSM evaluation of digits, repeated to so many rows, with its report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PARTS = ("write", "read", "resume")
BATCH = 256


def _cpu() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _memory() -> float:
    """Peak, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


def _batch(first: int, n: int) -> list[Any]:
    """Records as an evaluation of images makes them."""
    import random

    from advkit.core.protocols import Outcome, Record

    draw = random.Random(first)
    return [
        Record(
            f"images/test/{row:07d}",
            "pgd:eps=0.3,steps=40",
            Outcome.BROKEN if row % 3 else Outcome.ROBUST,
            label=row % 10,
            clean=row % 10,
            adversarial=(row + bool(row % 3)) % 10,
            reached=bool(row % 3),
            distance=draw.random(),
            margin=draw.gauss(0, 1),
            closeness=draw.gauss(0, 0.1),
            eight_bit=bool(row % 3),
            forwards=40,
            backwards=40,
            measures={"l0": float(draw.randrange(784)), "l2": draw.random()},
        )
        for row in range(first, first + n)
    ]


def write(folder: Path, n: int) -> float:
    """CPU seconds of appending alone."""
    from advkit.evaluation.run.store import Store

    store, spent = Store(folder, {"case": "records"}), 0.0
    for first in range(0, n, BATCH):
        made = _batch(first, min(BATCH, n - first))
        begun = _cpu()
        store.append(made, 0.1)
        spent += _cpu() - begun
    begun = _cpu()
    store.settle()
    store.close()
    return spent + _cpu() - begun


def read(folder: Path, n: int) -> float:
    """CPU seconds until the records are counted: one by one where the build can."""
    from advkit.evaluation.counts import count

    try:
        from advkit.evaluation.run.reading import each_record as records_of
    except ImportError:
        from advkit.evaluation.run.store import read_records as records_of  # type: ignore[assignment]
    begun = _cpu()
    found = count(records_of(folder / "records.jsonl"))
    assert (found.n, found.broken) == (n, n - (n + 2) // 3)
    return _cpu() - begun


def resume(folder: Path, n: int) -> float:
    """CPU seconds until the folder is open and a row is known to be on record."""
    from advkit.core.protocols import Label
    from advkit.evaluation.run.store import Store

    begun = _cpu()
    store = Store(folder, {"case": "records"})
    assert len(store) == n
    assert Store.key(Label("pgd:eps=0.3,steps=40"), f"images/test/{n - 1:07d}") in store
    spent = _cpu() - begun
    store.close()
    return spent


def harness(folder: Path, n: int) -> float:
    """CPU seconds of an evaluation; what is loaded once is loaded before."""
    import torch

    import advkit
    from advkit.tasks import TASKS

    rows = TASKS.build("digits").rows
    settings: dict[str, Any] = {"model": "zoo:digits-mlp", "threat_model": "linf:eps=0.1", "device": "cpu"}
    for size in (300, n):
        which = torch.arange(size) % len(rows.x)
        begun = _cpu()
        advkit.evaluate("fgsm", task=(rows.x[which], rows.y[which]), out=folder / str(size), **settings)
    return _cpu() - begun


def _measured(build: Path, part: str, folder: Path, n: int) -> dict[str, float]:
    """One part in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--sizes", str(n)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(builds: dict[str, Path], sizes: list[int], harness_sizes: list[int]) -> list[dict[str, Any]]:
    """One entry per size, part and build."""
    found = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as place:
            for part in PARTS:
                for name, build in builds.items():
                    cost = _measured(build, part, Path(place) / name, n)
                    found.append({"records": n, "part": part, "build": name, **cost})
                    print(_line(found[-1]), flush=True)
            files = [Path(place) / name / "records.jsonl" for name in builds]
            if len({hashlib.sha256(file.read_bytes()).digest() for file in files}) != 1:
                raise SystemExit(f"the builds write different bytes for {n} records")
    for n in harness_sizes:
        for name, build in builds.items():
            with tempfile.TemporaryDirectory() as place:
                found.append(
                    {"records": n, "part": "harness", "build": name, **_measured(build, "harness", Path(place), n)}
                )
                print(_line(found[-1]), flush=True)
    return found


def _line(entry: dict[str, Any]) -> str:
    each = 1e6 * entry["cpu_s"] / entry["records"]
    return (
        f"{entry['part']:8} {entry['records']:>9,} {entry['build']:7} {entry['cpu_s']:8.2f} s CPU "
        f"{each:7.1f} us each {entry['peak_mb']:7.0f} MB"
    )


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="checkout of another build of advkit, measured beside this one")
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--harness", default="", help="sizes of evaluations, such as 1000,50000; none by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=[*PARTS, "harness"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = [int(text) for text in asked.sizes.split(",") if text]
    if asked.part:
        spent = globals()[asked.part](asked.folder, sizes[0])
        print(json.dumps({"cpu_s": round(spent, 4), "peak_mb": round(_memory(), 1)}))
        return
    builds = ({"before": asked.baseline.resolve()} if asked.baseline else {}) | {"now": HERE}
    found = table(builds, sizes, [int(text) for text in asked.harness.split(",") if text])
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
