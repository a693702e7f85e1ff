"""Train the embedded models and write weights and cards into advkit/models/weights.

    python scripts/make_zoo.py --root FOLDER [NAME ...]

FOLDER holds the Fashion-MNIST files (idx or idx.gz). Without names everything is made, surrogates first, because PubDef
trains on some of them. Every figure on a card is measured through `advkit.evaluate` on the stored (float16) weights.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from advkit.core.errors import UnknownName
from advkit.evaluation.api import certify, evaluate
from advkit.evaluation.victims import protected, train_victim
from advkit.models import zoo
from advkit.models.checkpoint import load_checkpoint
from advkit.models.projected import Projected
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS

log = logging.getLogger("advkit")

CURVE = "certified_accuracy"
WIDE, NARROW = "atan", "[atan:alpha=10]"  # surrogates that spiking victims are trained with


@dataclass(frozen=True)
class Plan:
    """One model of the zoo.

    train:  first training images of Fashion-MNIST
    attack: what the card's figures are measured with
    names:  the report's metrics by their names on the card
    certified: threat model of the certificates by which a smoothed model is measured, in place of an attack
    base:   model of the zoo that a defense without training of its own is fitted to
    """

    name: str
    task: str
    model: str
    defense: str = "none"
    recipe: str = ""
    seed: int = 0
    train: int = 20_000
    role: str = "victim"
    group: str = "normal"
    seen: bool = False
    attack: str = "pgd:steps=40,step_size=0.1"
    names: Mapping[str, str] = field(default_factory=lambda: {"pgd-40 accuracy": "robust_accuracy"})
    certified: str = ""
    base: str = ""


def fashion(name: str, model: str, defense: str = "none", epochs: int = 6, **more: object) -> Plan:
    return Plan(f"fashion-mnist-{name}", "fashion-mnist", model, defense, f"epochs={epochs},schedule=cosine", **more)  # type: ignore[arg-type]


def robust(name: str, defense: str) -> Plan:
    """A CNN of an adversarial training method, with the recipe of `pgd_at` and `trades`."""
    return fashion(f"cnn-{name}", "cnn", defense, epochs=8, group="linf")


def digits(name: str, model: str, defense: str = "none", epochs: int = 60, **more: object) -> Plan:
    return Plan(f"digits-{name}", "digits", model, defense, f"epochs={epochs},batch_size=64,lr=0.003", **more)  # type: ignore[arg-type]


def spiking(task: str, net: str, recipe: str, name: str = "snn", **more: object) -> Plan:
    """A spiking victim: under PGD with the rule of arXiv 2503.03272 on images, under that paper's SDA on events."""
    if task.endswith("-dvs"):
        half = "attack_success_rate_l0_percent_0.5"
        figures = {"sda success rate": "attack_success_rate", "sda success within 0.5 % of the bits": half}
        measure = {"attack": "sda", "names": figures}
    else:
        attack = "spiking:[pgd:steps=40,step_size=0.1],surrogate=pdsg"
        measure = {"attack": attack, "names": {"pgd-40 (pdsg) accuracy": "robust_accuracy"}}
    recipe = f"{recipe},batch_size=64,schedule=onecycle"
    return Plan(f"{task}-{name}", task, net, "none", recipe, **{**measure, **more})  # type: ignore[arg-type]


PLANS = [
    fashion("public-cnn", "cnn", epochs=10, train=30_000, seed=101, role="public", seen=True),
    fashion("public-mlp", "mlp", epochs=10, train=30_000, seed=102, role="public", seen=True),
    fashion(
        "public-cnn-at",
        "cnn",
        "pgd_at:eps=0.1,steps=4",
        epochs=10,
        train=30_000,
        seed=103,
        role="public",
        group="linf",
        seen=True,
    ),
    fashion("public-cnn5", "cnn:kernel=5", epochs=10, seed=201, role="public"),
    fashion("public-mlp-b", "mlp", epochs=10, seed=202, role="public"),
    fashion("public-cnn5-at", "cnn:kernel=5", "pgd_at:eps=0.1,steps=4", seed=203, role="public", group="linf"),
    fashion("public-mlp-at", "mlp", "pgd_at:eps=0.1,steps=4", seed=204, role="public", group="linf"),
    fashion("cnn", "cnn", epochs=10),
    fashion("cnn-pubdef", "cnn", "pubdef:eps=0.1,copies=2", epochs=10),
    fashion("cnn-pgd_at", "cnn", "pgd_at:eps=0.1,steps=5", epochs=8, group="linf"),
    fashion("cnn-trades", "cnn", "trades:eps=0.1,steps=5", epochs=8, group="linf"),
    robust("mart", "mart:eps=0.1,steps=5"),
    robust("awp", "awp:base=[pgd_at:eps=0.1,steps=5],gamma=0.01"),
    robust("doubly_robust", "doubly_robust:r=1,eps=0.1,steps=5"),
    robust("fgsm_rs", "fgsm_rs:eps=0.1"),
    robust("n_fgsm", "n_fgsm:eps=0.1"),
    robust("grad_align", "grad_align:eps=0.1"),
    robust("free_at", "free_at:replays=4,eps=0.1"),
    robust("aaer", "aaer:base=fgsm_rs,eps=0.1"),
    robust("conadv", "conadv:eps=0.1"),
    fashion(
        "cnn-smoothing",
        "cnn",
        "smoothing:sigma=0.25",
        epochs=8,
        train=60_000,
        certified="certified:n=1000,radii=0+0.25+0.5",
    ),
    Plan(
        "fashion-mnist-cnn-eigenshield",
        "fashion-mnist",
        "cnn",
        "eigenshield:calibration_attack=[pgd:steps=10],threat_model=[linf:eps=0.1]",
        train=60_000,
        names={
            "pgd-40 accuracy, adaptive": "robust_accuracy",
            "pgd-40 accuracy, oblivious": "oblivious_robust_accuracy",
        },
        base="fashion-mnist-cnn",
    ),
    Plan(
        "fashion-mnist-dual-encoder",
        "fashion-mnist-captions",
        "dual-encoder",
        recipe="epochs=3,batch_size=64,validation=0,select=last",
        train=16_000,
    ),
    digits("public-mlp", "mlp:hidden=64", seed=101, role="public", seen=True),
    digits("public-cnn", "cnn", seed=102, role="public", seen=True),
    digits(
        "public-mlp-at", "mlp:hidden=64", "pgd_at:eps=0.2,steps=5", seed=103, role="public", group="linf", seen=True
    ),
    digits("public-mlp-b", "mlp:hidden=128", seed=201, role="public"),
    digits("public-cnn-b", "cnn", seed=202, role="public"),
    digits("public-mlp-b-at", "mlp:hidden=128", "pgd_at:eps=0.2,steps=5", seed=203, role="public", group="linf"),
    digits("public-cnn-at", "cnn", "pgd_at:eps=0.2,steps=5", seed=204, role="public", group="linf"),
    digits("mlp", "mlp:hidden=64"),
    digits("mlp-pgd_at", "mlp:hidden=64", "pgd_at:eps=0.2,steps=7", group="linf"),
    digits("mlp-trades", "mlp:hidden=64", "trades:eps=0.2,steps=7", group="linf"),
    digits("mlp-pubdef", "mlp:hidden=64", "pubdef:eps=0.2"),
    spiking("digits", f"snn:surrogate={WIDE}", "epochs=12"),
    spiking("digits", f"snn:surrogate={NARROW}", "epochs=12", "snn-narrow"),
    spiking("fashion-mnist", f"snn:widths=12+24,hidden=64,surrogate={WIDE}", "epochs=5"),
    spiking("fashion-mnist", f"snn:widths=12+24,hidden=64,surrogate={NARROW}", "epochs=5", "snn-narrow"),
    spiking("digits-dvs", "snn:widths=16+32,down=stride,hidden=0", "epochs=15"),
    spiking("fashion-mnist-dvs", "snn:widths=12+24,down=stride,hidden=0", "epochs=8", train=8_000),
]


def task_spec(plan: Plan, root: str) -> str:
    """The task with its training images; of filmed ones no more test rows than are embedded."""
    if not plan.task.startswith("fashion-mnist"):
        return plan.task
    tests = ",test=1000" if plan.task.endswith("-dvs") else ""
    return f"{plan.task}:root={root},train={plan.train}{tests}"


def measured(plan: Plan) -> dict[str, float]:
    """The card's figures, from two reports: accuracy on every embedded row, and the plan's attack."""
    if plan.certified:
        proven = certify(plan.defense, plan.task, f"zoo:{plan.name}", plan.certified).metrics
        at = {
            f"certified accuracy at {each['radius']:g}": each["certified_accuracy"]["value"] for each in proven[CURVE]
        }
        return {**at, "average certified radius": proven["average_certified_radius"]["value"]}
    victim = {"task": plan.task, "model": f"zoo:{plan.name}", "beside": bool(plan.base)}
    attacked = evaluate(plan.attack, **victim)
    clean = attacked.clean_accuracy
    if plan.task.endswith("-dvs"):  # these are attacked on fewer rows than there are
        clean = evaluate("random_flips", threat_model="flips:n=0", n=100_000, **victim).clean_accuracy
    metrics = attacked.to_dict()["metrics"]
    return {"clean accuracy": clean, **{name: metrics[metric]["value"] for name, metric in plan.names.items()}}


def trained(plan: Plan, root: str, work: Path) -> TorchModel:
    """The model, trained now."""
    done = train_victim(
        plan.model,
        plan.defense,
        task_spec(plan, root),
        recipe=plan.recipe,
        seed=plan.seed,
        device="cpu",
        out=work / plan.name,
        progress=True,
    )
    return load_checkpoint(done["file"], sha256=done["sha256"])


def fitted(plan: Plan, root: str) -> Projected:
    """The base under its defense, fitted now."""
    task = TASKS.build(task_spec(plan, root))
    found: Projected = protected(f"zoo:{plan.base}", plan.defense, task, seed=plan.seed).model
    return found


def make(plan: Plan, root: str, work: Path) -> None:
    """Train, store, measure what was stored, and write the card."""
    model = fitted(plan, root) if plan.base else trained(plan, root, work)
    made = f"fitted to {plan.base}" if plan.base else f"recipe {plan.recipe}"
    described = {
        "name": plan.name,
        "task": plan.task,
        "defense": plan.defense,
        "seed": plan.seed,
        "group": plan.group,
        "role": plan.role,
        "seen_by": ("pubdef",) if plan.seen else (),
        "base": plan.base,
        "command": f"python scripts/make_zoo.py --root FOLDER {plan.name}",
        "notes": made + (f"; first {plan.train} training images" if plan.task.startswith("fashion-mnist") else ""),
    }
    zoo.publish(model, described)
    figures = measured(plan)
    zoo.publish(model, {**described, "measured": figures})
    log.warning("%s: %s", plan.name, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to make (default: all)")
    parser.add_argument("--root", default="", help="folder with the Fashion-MNIST files")
    parser.add_argument(
        "--work", default="", help="folder for checkpoints, kept and resumed (default: a temporary one)"
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    known = {plan.name: plan for plan in PLANS}
    strangers = [name for name in given.names if name not in known]
    if strangers:
        raise UnknownName(f"no plan for {', '.join(strangers)}; known: {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        for plan in PLANS:
            if not given.names or plan.name in given.names:
                make(plan, given.root, Path(given.work or temporary))


if __name__ == "__main__":
    main()
