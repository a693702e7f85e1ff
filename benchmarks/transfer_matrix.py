"""The Fashion-MNIST transfer matrix of docs/transfer.md: made, checked for the effects it should show, written.

    python benchmarks/transfer_matrix.py [--run FOLDER] [--workers N]

Takes an hour of one core the first time; a run that was cut off goes on where it stopped. Leaves with status 1 where an
effect is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import advkit
from advkit.evaluation.matrix import Matrix, read_matrix
from advkit.evaluation.report.matrix import page

ZOO = "zoo:fashion-mnist-"
SOURCES = [f"{ZOO}{name}" for name in ("public-cnn", "public-cnn5", "public-mlp", "public-mlp-at")]
SOURCES.append(f"{ZOO}public-mlp+{ZOO}public-mlp-b")
TARGETS = [f"{ZOO}{name}" for name in ("cnn", "cnn-pgd_at", "cnn-trades", "cnn-pubdef", "public-mlp")]
PGD = "pgd:steps=10,step_size=0.25"
ATTACKS = ["fgsm", PGD, "mi", "ni", "vmi", "di", "ti", "sim", "ssa", "bsr", "naa", "fia", "linbp", "ni+si+ti+di", "sgm"]
DOCS = Path(__file__).resolve().parent.parent / "docs" / "transfer.md"


def effects(made: Matrix) -> list[tuple[str, float, float]]:
    """What the matrix should show, in points of accuracy: the effect, how large it is, how large it should be."""
    content = made.to_dict()
    noise = {one["t"]: one["acc"]["value"] for one in content["noise"]}
    twin, defended = TARGETS[:2]
    found = []
    for source in SOURCES[:2]:
        value = made.cell(twin, source, PGD)["acc"]["value"]
        found.append((f"PGD on {source} below noise on {twin}", 100 * (noise[twin] - value), 20.0))
    for source in SOURCES[:3]:
        gain = made.cell(defended, source, PGD)["acc"]["value"] - made.cell(twin, source, PGD)["acc"]["value"]
        found.append((f"{defended} above its twin under PGD on {source}", 100 * gain, 10.0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a finished run folder, in place of a run")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    made = (
        read_matrix(asked.run)
        if asked.run
        else advkit.matrix(
            SOURCES, ATTACKS, TARGETS, eps=0.1, n=200, equal_budget=40, device="cpu", workers=asked.workers,
            watch=lambda text, done, units: print(f"{done}/{units} {text}", file=sys.stderr),
        )
    )  # fmt: skip
    found = effects(made)
    lines = [f"- {name}: {value:.1f} points (at least {least:g})" for name, value, least in found]
    text = DOCS.read_text(encoding="utf-8")
    opening = text[: text.index("<!-- made by benchmarks/transfer_matrix.py -->")]
    table = page({**made.to_dict(), "command": ""}).partition("\n")[2]
    mark = "<!-- made by benchmarks/transfer_matrix.py -->\n\n"
    DOCS.write_text(f"{opening}{mark}## Effects\n\n" + "\n".join(lines) + f"\n{table}", encoding="utf-8")
    print("\n".join(lines))
    return int(any(value < least for _, value, least in found))


if __name__ == "__main__":
    sys.exit(main())
