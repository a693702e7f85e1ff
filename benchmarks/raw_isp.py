"""Purification through RAW against blur, JPEG, bit depth and total variation at the same loss of detail.

    pip install scikit-image 'advkit[imagenet-demo]'
    python benchmarks/raw_isp.py [--tasks photographs imagenet-samples] [--eps 2 1 4] [--out docs/raw_isp.json]

`photographs`: 48x48 crops of the ten colour photographs that scikit-image and scikit-learn ship, halved in size, are
classified by the photograph they come from. A CNN is trained on crops of the left 60 % of each, F and G on full-size
crops of the same part; 10 crops of each right part are attacked. `imagenet-samples`: EfficientNet-Lite0 on the twenty
ImageNet images that foolbox ships; F and G were trained on all ten photographs.

For every RAW row the settings of Gaussian blur, total variation, JPEG and bit depth are sought that have its PSNR, as
near as whole numbers allow. Oblivious: PGD-10 on the bare model, images made once and shown to all rows
(`advkit.matrix`). Adaptive: PGD-10 through the whole chain, then PGD-10 with the identity's derivative (BPDA) on the
samples that are left; the worst case counts (`advkit.evaluate`). Every figure is written as soon as it is there; a
second call makes those that lack.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import advkit
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.none import NoDefense
from advkit.evaluation.stats import wilson
from advkit.models import MODELS, raw
from advkit.tasks import TASKS
from advkit.training.loop import Recipe, fit
from advkit.training.raw_pairs import read_rgb, shipped_photographs

PGD = "pgd:steps=10,step_size=0.25"
ADAPTIVE = f"bpda:[{PGD}],through=both"
SIDE, LEFT, TRAIN, TEST = 48, 0.6, 200, 10
RAW = {
    "faithful": "raw_isp",
    "smoothed": "raw_isp:w=0,sigma=1",
    "lossy": "raw_isp:f=plain,g=unet",
}
"""What is compared: the default; its conventional pipeline alone, denoised; the released F's network before a U-Net."""
KINDS = ("Gaussian blur", "JPEG", "total variation", "bit depth")
PHOTOGRAPHS, SAMPLES = "photographs", "imagenet-samples"


def cut(images: list[Tensor], crops: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crops [N, 3, SIDE, SIDE] of 8-bit values, the same number of every image, and which image they are of."""
    generator = torch.Generator().manual_seed(seed)
    held = []
    for image in images:
        for _ in range(crops):
            top, left = (int(torch.randint(size - SIDE + 1, (), generator=generator)) for size in image.shape[1:])
            held.append(image[:, top : top + SIDE, left : left + SIDE])
    x = torch.stack(held).mul(255).round().div(255)
    return x, torch.arange(len(images)).repeat_interleave(crops)


def parts(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The left and right parts of the photographs, halved; the left ones at full size go to a folder as PNG files."""
    from PIL import Image

    left, right = [], []
    for path in shipped_photographs():
        whole = read_rgb(path)
        height, edge, width = (int(size) // 2 * 2 for size in (whole.shape[1], LEFT * whole.shape[2], whole.shape[2]))
        own = whole[:, :height, :edge]
        Image.fromarray((own * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{path.stem}.png")
        left.append(F.avg_pool2d(own[None], 2)[0])
        right.append(F.avg_pool2d(whole[None, :, :height, edge:width], 2)[0])
    if len(left) < 10:
        raise SystemExit(f"{len(left)} photographs: pip install scikit-image")
    return left, right


def on_photographs(folder: Path) -> tuple[Any, Any, Tensor, str]:
    """The CNN, the task, its images, and the folder that F and G are trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    left, right = parts(folder)
    x, y = cut(left, TRAIN, 0)
    data = Data(x, y, Box(shape=(3, SIDE, SIDE), levels=255), len(left), name=PHOTOGRAPHS)
    rng = RowRng.from_ids(0, ["victim"])
    blank = MODELS.build("cnn")((3, SIDE, SIDE), len(left), rng, space=data.space)
    recipe = Recipe(epochs=8, batch_size=100, lr=1e-3, schedule="onecycle", validation=0.0)
    model = fit(blank, data, NoDefense(recipe=recipe).objective(), recipe, rng, progress=False).model
    model.name = "cnn"
    rows, labels = cut(right, TEST, 1)
    # the first so many samples hold every photograph alike
    order = torch.arange(len(rows)).reshape(len(right), TEST).T.flatten()
    return model, (rows[order], labels[order]), rows[order], f"images={folder}"


def on_samples(folder: Path) -> tuple[Any, Any, Tensor, str]:
    """EfficientNet-Lite0 on foolbox's images."""
    task: Any = TASKS.build(SAMPLES)
    batch = next(iter(task.batches(20)))
    model = MODELS.build("efficientnet-lite0")((3, 224, 224), 1000, RowRng.from_ids(0, ["model"]), space=task.space)
    return model, task, batch.x, ""


def quality(x: Tensor, spec: str) -> float:
    """Mean PSNR in dB of the images behind a defense; infinite ones count as 60."""
    defense: Any = DEFENSES.build(spec)
    change = defense.purifier() if hasattr(defense, "purifier") else defense.transform
    with torch.no_grad():
        z = torch.cat([change(part) for part in x.split(20)])
    return float(raw.psnr(x, z).clamp_max(60).mean())


def bisected(x: Tensor, spec: Callable[[float], str], wanted: float, low: float, high: float) -> str:
    """The spec whose PSNR is the one wanted: it falls from `low` to `high`."""
    for _ in range(9):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if quality(x, spec(middle)) > wanted else (low, middle)
    return spec(math.sqrt(low * high))


def matched(x: Tensor, wanted: float) -> dict[str, str]:
    """Simpler defenses of the same PSNR."""
    whole = {
        "JPEG": [
            f"jpeg:quality={q},view=smooth" for q in (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 75, 80, 85, 90, 95)
        ]
    }
    whole["bit depth"] = [f"bit-depth:bits={bits}" for bits in range(1, 7)]
    found = {
        "Gaussian blur": bisected(x, lambda v: f"blur:kind=gaussian,sigma={v:.3f}", wanted, 0.2, 6.0),
        "total variation": bisected(x, lambda v: f"tv:weight={v:.4f}", wanted, 0.001, 1.0),
    }
    for name, specs in whole.items():
        found[name] = min(specs, key=lambda spec: abs(quality(x, spec) - wanted))
    return found


def counted(k: int, n: int) -> dict[str, Any]:
    """A fraction of all images with its 95 % interval (Wilson)."""
    ci = wilson(k, n)
    return {"value": k / n, "k": k, "n": n, "low": round(ci.low, 4), "high": round(ci.high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[PHOTOGRAPHS, SAMPLES], choices=[PHOTOGRAPHS, SAMPLES])
    parser.add_argument("--eps", type=int, nargs="+", default=[2, 1, 4], help="radii in 255ths")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out = Path(given.out) if given.out else None
    result: dict[str, Any] = {
        "command": "python benchmarks/raw_isp.py",
        "commit": commit_text("advkit"),
        "oblivious": PGD,
        "adaptive": ADAPTIVE,
        "tasks": {},
    }
    if out is not None and out.exists():
        result = json.loads(out.read_text(encoding="utf-8"))
    began = time.monotonic()

    def kept(words: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {words}", flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    folder = Path(tempfile.gettempdir()) / "advkit-raw-isp-photographs"
    for name in given.tasks:
        model, task, x, images = {PHOTOGRAPHS: on_photographs, SAMPLES: on_samples}[name](folder)
        held = result["tasks"].setdefault(name, {"n": len(x), "rows": {}})

        def full(spec: str, images: str = images) -> str:
            """The spec as it is built here: RAW rows are trained on this task's photographs."""
            return f"{spec}{',' if ':' in spec else ':'}{images}" if images and spec.startswith("raw_isp") else spec

        rows = held["rows"]
        rows.setdefault("none", {"spec": "none", "group": "", "psnr": None, "oblivious": {}, "adaptive": {}})
        for label, spec in RAW.items():
            if label not in rows:
                psnr = quality(x, full(spec))
                rows[label] = {"spec": spec, "group": label, "psnr": psnr, "oblivious": {}, "adaptive": {}}
                kept(f"{name}: {label}, {psnr:.1f} dB")
            if f"Gaussian blur ({label})" not in rows:
                for kind, simple in matched(x, rows[label]["psnr"]).items():
                    entry = {"spec": simple, "group": label, "psnr": quality(x, simple)}
                    rows[f"{kind} ({label})"] = {**entry, "oblivious": {}, "adaptive": {}}
                    kept(f"{name}: {simple}, {entry['psnr']:.1f} dB")

        behind = {label: DEFENSES.build(full(row["spec"])).protect(model, None, None) for label, row in rows.items()}
        for eps in given.eps:
            if all(str(eps) in row["oblivious"] for row in rows.values()):
                continue
            made = advkit.matrix(
                [model], [PGD], list(behind.values()), task=task, eps=eps / 255, seeds=1, equal_budget=None,
                n=len(x), device="cpu",
            ).to_dict()  # fmt: skip
            cells = {cell["t"]: cell for cell in made["cells"]}
            for row, target in zip(rows.values(), made["targets"], strict=True):
                ((wrong, right),) = cells[target["name"]]["asr_cond"]["counts"]
                row["clean"] = counted(target["clean"]["counts"][0][0], len(x))
                row["oblivious"][str(eps)] = counted(right - wrong, len(x))
            kept(f"{name}: oblivious at {eps}/255")
        order = sorted(rows, key=lambda label: KINDS.index(label.partition(" (")[0]) if "(" in label else -1)
        for eps in given.eps:
            for label in order:
                row = rows[label]
                if str(eps) in row["adaptive"]:
                    continue
                if time.monotonic() - began > given.seconds:
                    return
                report = advkit.evaluate(
                    attack=PGD if label == "none" else ADAPTIVE,
                    defense=full(row["spec"]),
                    model=model,
                    task=task,
                    threat_model=f"linf:eps={eps}/255,lattice=255",
                    n=len(x),
                    beside=False,
                    device="cpu",
                )
                attacks = {entry["name"].rpartition("/")[2]: entry for entry in report.attacks}
                assert report.metrics["clean_accuracy"]["numerator"] == row["clean"]["k"], label
                row["adaptive"][str(eps)] = {
                    **counted(report.metrics["robust_accuracy"]["numerator"], len(x)),
                    "own": attacks.get("own", report.attacks[0])["robust_accuracy"]["value"],
                }
                kept(f"{name}: {label} at {eps}/255: {row['adaptive'][str(eps)]['value']:.2f}")


if __name__ == "__main__":
    main()
