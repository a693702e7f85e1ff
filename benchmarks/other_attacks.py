"""Attacks beyond Lp balls on two networks for Fashion-MNIST, and the same attacks of foolbox and ART beside them.

    python benchmarks/other_attacks.py --root FOLDER [--n 200] [--out docs]

FOLDER holds the published idx files: universal perturbations and patches are learned on training images, and every
figure is of test images. Writes OUT/other_attacks.json and the tables of OUT/other_attacks.md between its two marks.
Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import advkit
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.corruptions import KINDS

MODELS_ATTACKED = ("fashion-mnist-cnn", "fashion-mnist-cnn-pgd_at")
SAMPLES = 1000
LEARNED, CLASS = f"samples={SAMPLES},steps=100", "targeted:how=class,target=8"
FEW = 30
"""Samples for ART's universal perturbation, which takes a second for each, and for ours beside it."""
SOME = 50
"""Images for ART's grid, which takes a second for each."""
PACKAGES = ("foolbox", "adversarial-robustness-toolbox", "kornia", "torch")
MARKS = "<!-- tables: made by benchmarks/other_attacks.py -->", "<!-- end of tables -->"

NARROW = "transform:rotation=10,translation=1"

# (heading, attack, threat model, goal)
CASES: tuple[tuple[str, str, str, str], ...] = (
    ("rotation and translation", "spatial", "transform:rotation=30,translation=3", "untargeted"),
    ("rotation and translation", "spatial", NARROW, "untargeted"),
    ("rotation and translation", "spatial:search=random", NARROW, "untargeted"),
    ("rotation and translation", "spatial:search=gradient", NARROW, "untargeted"),
    ("rotation and translation", "apgd-ce", NARROW, "untargeted"),
    ("flow field", "stadv", "flow:tau=0.5", "untargeted"),
    ("flow field", "stadv", "flow:tau=1", "untargeted"),
    ("flow field", "pgd", "flow:tau=0.5", "untargeted"),
    ("patch for each image", "patch:steps=50,restarts=3", "patch:size=5", "untargeted"),
    ("patch for each image", "patch:steps=50,restarts=3", "patch:size=5,place=fixed", "untargeted"),
    ("patch for all images", f"patch:{LEARNED}", "patch:size=7,place=random,universal=true", "untargeted"),
    ("patch for all images", f"patch:{LEARNED}", "patch:size=7,place=random,universal=true", CLASS),
    ("universal perturbation", f"universal:{LEARNED}", "universal:eps=0.1", "untargeted"),
    ("universal perturbation", f"universal:{LEARNED}", "universal:eps=0.1", CLASS),
    ("universal perturbation", f"universal:method=deepfool,samples={FEW},passes=1", "universal:eps=0.1", "untargeted"),
    ("perceptual ball", "pgd:steps=10,step_size=0.2", "ssim:eps=0.1", "untargeted"),
    *(
        ("common corruption", f"corruption:kind={kind},severity={severity}", "corruption", "untargeted")
        for kind in KINDS
        for severity in (3, 5)
    ),
)


def ours(root: str, model: str, case: tuple[str, str, str, str], n: int) -> dict[str, Any]:
    """One case through the harness: what its report says."""
    heading, attack, threat, goal = case
    began = time.process_time()
    report = advkit.evaluate(
        attack=attack,
        threat_model=threat,
        goal=goal,
        task=f"fashion-mnist:root={root}",
        model=f"zoo:{model}",
        n=n,
        device="cpu",
        beside=False,
    )
    metrics = report.to_dict()["metrics"]
    kept = ("clean_accuracy", "robust_accuracy", "attack_success_rate", "fooling_rate", "forwards_mean")
    line = {name: metrics[name]["value"] for name in kept if name in metrics}
    line |= {"counts": {name: [metrics[name]["numerator"], metrics[name]["denominator"]] for name in kept[:3]}}
    flags = [found["id"] for found in report.to_dict()["diagnostics"]["flags"] if found["severity"] != "info"]
    return {
        "heading": heading,
        "by": "advkit",
        "attack": attack,
        "threat_model": threat,
        "goal": goal,
        "model": model,
        **line,
        "flags": flags,
        "cpu_seconds": time.process_time() - began,
    }


class Whole(nn.Module):
    """A model as the torch module that peers want."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.inner = nn.ModuleList(model.modules())

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(x)
        return answer


def decisions(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part).argmax(1) for part in x.split(100)])


def foolbox_spatial(module: nn.Module, x: Tensor, y: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """foolbox's grid, with the limits and the points of ours."""
    import foolbox

    wrapped = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    made = foolbox.attacks.SpatialAttack(
        max_translation=1, max_rotation=10, num_translations=5, num_rotations=31, grid_search=True
    )
    raw, _, _ = made(wrapped, x, y, epsilons=None)
    found: Tensor = raw
    return found


def art_classifier(module: nn.Module) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        module,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )


def art_spatial(module: nn.Module, x: Tensor, y: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """ART's grid, image by image: of a batch it takes the one transformation that is worst for all."""
    from art.attacks.evasion import SpatialTransformation

    def generated(image: Any, label: Any) -> Any:
        made = SpatialTransformation(  # one for each image: it keeps the first transformation that it finds
            classifier,
            max_translation=100 / 28,
            num_translations=5,
            max_rotation=10,
            num_rotations=31,
            verbose=False,
        )
        return made.generate(image[None], label[None])

    classifier = art_classifier(module)
    pairs = zip(x.numpy().astype(np.float32), y.numpy(), strict=True)
    return torch.from_numpy(np.concatenate([generated(image, label) for image, label in pairs]))


def art_universal(attacker: str) -> Callable[..., Tensor]:
    def run(module: nn.Module, x: Tensor, y: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        """ART's universal perturbation, learned on the samples that ours had, added to the test images."""
        from art.attacks.evasion import UniversalPerturbation

        made = UniversalPerturbation(
            art_classifier(module),
            attacker=attacker,
            attacker_params={"verbose": False},
            eps=0.1,
            norm=np.inf,
            max_iter=1,
            delta=0.2,
            verbose=False,
        )
        made.generate(known[0][:FEW].numpy(), known[1][:FEW].numpy())
        noise = torch.from_numpy(np.asarray(made.noise, dtype=np.float32)).reshape(1, 1, 28, 28)
        return (x + noise.clamp(-0.1, 0.1)).clamp(0, 1)

    return run


def art_patch(module: nn.Module, x: Tensor, y: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """ART's patch of 7 x 7, trained upright and at one size, pasted where ours is."""
    from art.attacks.evasion import AdversarialPatchPyTorch

    made = AdversarialPatchPyTorch(
        art_classifier(module),
        rotation_max=0.0,
        scale_min=7 / 28 - 1e-3,
        scale_max=7 / 28,
        learning_rate=0.05,
        max_iter=10,
        batch_size=100,
        patch_shape=(1, 28, 28),
        patch_type="square",
        optimizer="pgd",
        targeted=False,
        verbose=False,
    )
    patch, _ = made.generate(known[0].numpy(), known[1].numpy())
    content = nn.functional.interpolate(torch.from_numpy(np.asarray(patch))[None].float(), size=7, mode="area")[0]
    threat: Any = THREAT_MODELS.build("patch:size=7,place=random,universal=true")
    pasted: Tensor = threat.applied(content.clamp(0, 1), x)
    return pasted


LIMITS, ADDED = "rotation 10, translation 1", "UniversalPerturbation, deepfool"
PEERS: tuple[tuple[str, str, str, str, Callable[..., Tensor]], ...] = (
    ("rotation and translation", "foolbox", "SpatialAttack", LIMITS, foolbox_spatial),
    (
        "rotation and translation",
        "art",
        f"SpatialTransformation, {SOME} images",
        LIMITS,
        art_spatial,
    ),
    ("patch for all images", "art", "AdversarialPatchPyTorch", "7 x 7 pixels, random", art_patch),
    (
        "universal perturbation",
        "art",
        f"UniversalPerturbation, deepfool, {FEW} samples",
        "linf eps 0.1",
        art_universal("deepfool"),
    ),
)


def theirs(root: str, model: str, n: int, done: Container[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The peers' attacks on the same samples, judged by the model alone."""
    task: Any = TASKS.build(f"fashion-mnist:root={root}")
    batch = next(iter(task.batches(n, n=n)))
    data = task.training()
    chosen = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    known = data.x[chosen].float(), data.y[chosen]
    built: Any = MODELS.build(f"zoo:{model}")((1, 28, 28), 10, RowRng.from_ids(0, ["model"]), space=task.space)
    module = Whole(built).eval()
    before = decisions(module, batch.x)
    for heading, package, name, limits, run in PEERS:
        line = {"heading": heading, "by": package, "attack": name, "threat_model": limits, "model": model}
        line["goal"] = "untargeted"
        if (model, name, limits, "untargeted") in done:
            continue
        began = time.process_time()
        try:
            rows = slice(0, SOME if str(SOME) in name else n)
            x, y, clean = batch.x[rows], batch.labels[rows], before[rows]
            z = run(module, x.clone(), y, known)
        except ImportError as error:
            print(f"{package} is left out: {error}")
            continue
        except Exception as error:
            yield {**line, "clean_accuracy": None, "fails": f"{type(error).__name__}: {error}"[:200]}
            continue
        after = decisions(module, z.float())
        right, still = clean == y, (after == y) & (clean == y)
        yield {
            **line,
            "clean_accuracy": right.float().mean().item(),
            "robust_accuracy": still.float().mean().item(),
            "attack_success_rate": 1 - still.sum().item() / max(1, right.sum().item()),
            "fooling_rate": (after != clean).float().mean().item(),
            "cpu_seconds": time.process_time() - began,
        }


def table(lines: list[dict[str, Any]]) -> str:
    """The tables, a heading and a model each."""
    text = []
    for heading in dict.fromkeys(line["heading"] for line in lines):
        text += [f"### {heading[0].upper()}{heading[1:]}", ""]
        fools = any("fooling_rate" in line for line in lines if line["heading"] == heading and line["by"] == "advkit")
        names = ["by", "attack", "threat model", "goal"]
        for model in MODELS_ATTACKED:
            short = model.removeprefix("fashion-mnist-")
            names += [f"{short}: accuracy", "success", *(["fooling rate"] if fools else [])]
        text += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        rows = [line for line in lines if line["heading"] == heading]
        for key in dict.fromkeys((r["by"], r["attack"], r["threat_model"], r.get("goal", "untargeted")) for r in rows):
            shown = [f"`{each}`" if key[0] == "advkit" and place in (1, 2) else each for place, each in enumerate(key)]
            for model in MODELS_ATTACKED:
                found = next(
                    (
                        r
                        for r in rows
                        if r["model"] == model
                        and key == (r["by"], r["attack"], r["threat_model"], r.get("goal", "untargeted"))
                    ),
                    None,
                )
                if found is None or "fails" in found:
                    shown += ["fails" if found else ""] + [""] * (1 + fools)
                    continue
                shown += [_percent(found["robust_accuracy"]), _percent(found["attack_success_rate"])]
                shown += [_percent(found.get("fooling_rate"))] if fools else []
            text.append("| " + " | ".join(shown) + " |")
        text.append("")
    return "\n".join(text)


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the idx files of Fashion-MNIST")
    parser.add_argument("--n", type=int, default=200, help="test images")
    parser.add_argument("--out", default="docs", help="folder of other_attacks.json and other_attacks.md")
    parser.add_argument("--resume", action="store_true", help="keep the lines that the json file has")
    parser.add_argument("--table", action="store_true", help="write the tables of the json file anew, and run nothing")
    given = parser.parse_args()
    file, page = Path(given.out) / "other_attacks.json", Path(given.out) / "other_attacks.md"
    if not given.table:
        lines: list[dict[str, Any]] = json.loads(file.read_text())["lines"] if given.resume else []
        done = {(line["model"], line["attack"], line["threat_model"], line.get("goal")) for line in lines}

        def keep(line: dict[str, Any]) -> None:
            lines.append(line)
            print(line, flush=True)
            packages = {name: _version(name) for name in PACKAGES}
            clean = {each["model"]: each["clean_accuracy"] for each in lines if each["by"] == "advkit"}
            document = {"n": given.n, "packages": packages, "clean_accuracy": clean, "lines": lines}
            file.write_text(json.dumps(document, indent=1) + "\n")

        for model in MODELS_ATTACKED:
            for case in CASES:
                if (model, *case[1:]) not in done:
                    keep(ours(given.root, model, case, given.n))
            for line in theirs(given.root, model, given.n, done):
                keep(line)
    if page.exists():
        lines = json.loads(file.read_text())["lines"]
        before, _, rest = page.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        page.write_text(f"{before}{MARKS[0]}\n\n{table(lines)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
