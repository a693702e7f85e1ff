"""What training FLORAL costs: 500 samples for 500 rounds, and 20,000 samples of 768 features.

python benchmarks/floral_scale.py [--only small large] [--out docs]

Each size is trained in a process of its own, on labels of which a tenth was flipped at random; CPU seconds of all
threads and the peak memory (resident set) of the whole process are compared with the limits. Prints JSON and writes
OUT/floral_scale.json. Synthetic data: two Gaussian classes for the large size, two moons for the small one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import make_moons

from advkit import FLORAL

SIZES: dict[str, dict[str, Any]] = {
    "small": {"n": 500, "features": 2, "rounds": 500, "landmarks": None, "seconds": 2.0, "gigabytes": 4.0},
    "large": {"n": 20_000, "features": 768, "rounds": 500, "landmarks": 1000, "seconds": 300.0, "gigabytes": 4.0},
}
FLIPPED = 0.1
TEST = 2_000


def samples(size: dict[str, Any]) -> tuple[Any, Any]:
    """Samples and true labels, TEST more than are trained on."""
    count = size["n"] + TEST
    if size["features"] == 2:
        return make_moons(count, noise=0.2, random_state=0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, count)
    x = rng.standard_normal((count, size["features"]))
    # Shifted along a few directions, so that the best classifier is right about 97 times of 100.
    x[:, :16] += np.where(y == 1, 1.0, -1.0)[:, None] * 0.47
    return x, y


def measured(name: str) -> dict[str, Any]:
    """One training, in this process."""
    size = SIZES[name]
    x, y = samples(size)
    n = size["n"]
    flipped = y[:n].copy()
    flips = np.random.default_rng(1).permutation(n)[: int(FLIPPED * n)]
    flipped[flips] = 1 - flipped[flips]
    model = FLORAL(C=1.0, rounds=size["rounds"], landmarks=size["landmarks"], random_state=0)
    cpu, wall = time.process_time(), time.perf_counter()
    model.fit(x[:n], flipped)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    accuracy = model.score(x[n:], y[n:])
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        **{key: size[key] for key in ("n", "features", "rounds", "landmarks")},
        "budget": model.budget_,
        "flipped": len(flips),
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "peak_gigabytes": round(gigabytes, 2),
        "clean_test_accuracy": round(float(accuracy), 4),
        "limit_seconds": size["seconds"],
        "limit_gigabytes": size["gigabytes"],
        "holds": bool(cpu < size["seconds"] and gigabytes < size["gigabytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(SIZES), default=sorted(SIZES, reverse=True))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measured(asked.only[0])))
        return
    found = {}
    for name in asked.only:
        command = [sys.executable, __file__, "--child", "--only", name]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    text = json.dumps(found, indent=2)
    print(text)
    (asked.out / "floral_scale.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
