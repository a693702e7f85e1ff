"""Convex training of two-layer ReLU networks: what docs/convex_relu_at.md says, measured.

    python benchmarks/convex_relu.py [--only PART ...] [--out docs/convex_relu.json]

Every part is written as soon as it is there; a second call makes those that lack. Seconds are CPU seconds of this
process, with one thread (OMP_NUM_THREADS=1).

optimum     the objective of the recovered network beside the convex optimum, and what 20 gradient runs reach
robust      the robust objective beside the worst case on a grid
protocol_b  random labels in the plane: robust accuracy on the training samples' balls, convex and by gradient steps
admm        time to 1e-4 of the optimum beside cvxpy with Clarabel, 300 samples x 20 features x 20 patterns
harness     digits and moons through `advkit.evaluate`: training samples under PGD and AutoAttack, and test samples
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import advkit
from advkit.core.provenance import commit_text
from advkit.training.convex import patterns
from advkit.training.convex.admm import ADMM, iterate
from advkit.training.convex.cones import solve
from advkit.training.convex.program import LOSSES, Array, Loss, Moves, Network, Program, losses

EPS = 0.08
DIGITS = "digits-pair:classes=3+8"


def cpu(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return call(), time.process_time() - began


def toy(n: int = 8, d: int = 3, seed: int = 0) -> tuple[Array, Array]:
    drawn = np.random.default_rng(seed)
    x, y = drawn.standard_normal((n, d)), np.sign(drawn.standard_normal(n))
    y[:2] = (-1, 1)
    return x, y


def scattered(n: int = 24, seed: int = 0) -> tuple[Array, Array, Moves]:
    """Points of [-1, 1]^2 more than 3 radii apart in l_inf, random labels, a column of ones."""
    drawn = np.random.default_rng(seed)
    points: list[Array] = []
    while len(points) < n:
        point = drawn.uniform(-1, 1, 2)
        if all(np.abs(point - other).max() > 3 * EPS for other in points):
            points.append(point)
    y = np.sign(drawn.standard_normal(n))
    y[:2] = (-1, 1)
    return np.hstack([np.array(points), np.ones((n, 1))]), y, Moves.box([EPS, EPS, 0.0])


def balls(x: Array, points: int) -> Array:
    side = np.linspace(-EPS, EPS, points)
    grid = np.stack([*np.meshgrid(side, side), np.zeros((points, points))], axis=-1).reshape(-1, 3)
    return np.asarray((x[:, None] + grid[None]).reshape(-1, 3))


def on_balls(network: Network, x: Array, y: Array, points: int = 21) -> float:
    f = network(balls(x, points)).reshape(len(y), -1)
    return float((y[:, None] * f > 0).all(1).mean())


def worst_case(program: Program, network: Network, points: int = 21) -> float:
    """The robust objective on a grid of every ball."""
    f = network(balls(program.x, points)).reshape(len(program.y), -1)
    worst = losses(program.loss, f, program.y[:, None]).max(1).mean()
    return float(worst + program.beta * network.penalty())


def value(loss: Loss, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if loss == "squared":
        return 0.5 * (f - y) ** 2
    return (1 - y * f).clamp_min(0) if loss == "hinge" else torch.nn.functional.softplus(-y * f)


def by_gradient(program: Program, restarts: int, neurons: int, steps: int, eps: float = 0.0, seed: int = 0) -> Any:
    """Adam (0.03, falling to 0 along a cosine) from `restarts` starts at once; the best weights of every run.

    eps: radius of the l_inf ball in which PGD (5 steps of half a radius, random start) moves the samples first; the
         last column stays
    """
    drawn = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(program.x), torch.from_numpy(program.y)
    u = (torch.randn(restarts, x.shape[1], neurons, generator=drawn, dtype=torch.float64) / 2).requires_grad_()
    alpha = (torch.randn(restarts, neurons, generator=drawn, dtype=torch.float64) / neurons**0.5).requires_grad_()
    optimizer = torch.optim.Adam([u, alpha], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least = torch.full((restarts,), math.inf, dtype=torch.float64)
    best = u.detach().clone(), alpha.detach().clone()
    free = torch.ones(x.shape[1], dtype=torch.float64)
    free[-1] = 0
    clean = x.expand(restarts, *x.shape)
    for _ in range(steps):
        z = clean
        if eps:
            z = clean + eps * free * (2 * torch.rand(clean.shape, generator=drawn, dtype=torch.float64) - 1)
            for _ in range(5):
                z = z.detach().requires_grad_()
                margin = y * torch.einsum("rnm,rm->rn", torch.relu(z @ u.detach()), alpha.detach())
                (gradient,) = torch.autograd.grad(margin.sum(), z)
                z = (z.detach() - eps / 2 * free * gradient.sign()).clamp(clean - eps * free, clean + eps * free)
        f = torch.einsum("rnm,rm->rn", torch.relu(z @ u), alpha)
        penalty = program.beta / 2 * (u.square().sum((1, 2)) + alpha.square().sum(1))
        reached = value(program.loss, f, y).mean(1) + penalty
        better = reached.detach() < least
        least = torch.where(better, reached.detach(), least)
        best[0][better], best[1][better] = u.detach()[better], alpha.detach()[better]
        optimizer.zero_grad()
        reached.sum().backward()
        optimizer.step()
        schedule.step()
    if eps:  # the loss moves with the attack: the last weights
        best = u.detach(), alpha.detach()
    return least.numpy(), [Network(*(each.numpy() for each in pair)) for pair in zip(*best, strict=True)]


def optimum() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for loss in LOSSES:
        program = Program(*toy(), loss, 0.05)
        every = patterns.enumerated(program.x)
        solution, seconds = cpu(lambda program=program, every=every: solve(program, every))
        (reached, _), spent = cpu(lambda program=program: by_gradient(program, 20, 20, 3000))
        found[loss] = {
            "patterns": every.shape[1],
            "convex": solution.objective,
            "gap": solution.gap,
            "solver": solution.solver,
            "network": program.of(solution.network),
            "units": len(solution.network.alpha),
            "gradient_best": float(reached.min()),
            "gradient_median": float(np.median(reached)),
            "gradient_worst": float(reached.max()),
            "seconds": seconds,
            "gradient_seconds": spent,
        }
    return found


def robust() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for loss in LOSSES:
        x, y, moves = scattered(10, seed=3)
        every = patterns.enumerated(x)
        kept = every[:, patterns.usable(x, every, moves)]
        program = Program(x, y, loss, 1e-3, moves)
        solution = solve(program, kept)
        f = solution.network(balls(x, 41)).reshape(len(y), -1)
        grid = losses(loss, f, y[:, None]).max(1).mean() + 1e-3 * solution.network.penalty()
        found[loss] = {
            "patterns": every.shape[1],
            "usable": kept.shape[1],
            "convex": solution.objective,
            "grid": float(grid),
            "standard": solve(Program(x, y, loss, 1e-3), every).objective,
        }
    return found


def protocol_b() -> dict[str, Any]:
    runs = []
    for seed in range(4):
        x, y, moves = scattered(seed=seed)
        program = Program(x, y, "hinge", 1e-4, moves)
        plain = Program(x, y, "hinge", 1e-4)
        drawn = patterns.sampled(x, 500, np.random.default_rng(seed))
        keep, pruning = cpu(lambda x=x, drawn=drawn, moves=moves: patterns.usable(x, drawn, moves))
        solution, seconds = cpu(lambda program=program, kept=drawn[:, keep]: solve(program, kept))
        standard = solve(plain, drawn[:, :200])
        _, gradient = by_gradient(plain, 3, 60, 4000, seed=seed)
        (_, attacked), spent = cpu(
            lambda program=program, seed=seed: by_gradient(program, 3, 60, 4000, eps=EPS, seed=seed)
        )
        named = {
            "convex": [standard.network],
            "convex_at": [solution.network],
            "gradient": gradient,
            "pgd_at": attacked,
        }
        runs.append(
            {
                "seed": seed,
                "sampled": drawn.shape[1],
                "usable": int(keep.sum()),
                "status": solution.status,
                "gap": solution.gap,
                "certified": int((program.margins(solution.network) > 0).sum()),
                "units": len(solution.network.alpha),
                "pruning_seconds": pruning,
                "seconds": seconds,
                "pgd_at_seconds": spent / 3,
                "train": {name: [float((y * net(x) > 0).mean()) for net in nets] for name, nets in named.items()},
                "robust": {name: [on_balls(net, x, y) for net in nets] for name, nets in named.items()},
                "certified_of": {
                    name: [int((program.margins(net) > 0).sum()) for net in nets] for name, nets in named.items()
                },
                "robust_objective": {name: [worst_case(program, net) for net in nets] for name, nets in named.items()},
            }
        )
    return {"runs": runs, "samples": 24, "eps": EPS}


def admm() -> dict[str, Any]:
    """Time to 1e-4 of the optimum: iterations are stopped where a longer run shows that they stay within it."""
    import cvxpy as cp

    n, d, count = 300, 20, 20
    runs = []
    for seed in range(3):
        drawn = np.random.default_rng(seed)
        x = drawn.standard_normal((n, d))
        y = np.maximum(x @ drawn.standard_normal((d, 10)), 0) @ drawn.standard_normal(10) / 10
        y = y + 0.1 * drawn.standard_normal(n)
        y = (y - y.mean()) / y.std()
        gates = patterns.sampled(x, count, drawn)
        for beta in (0.05, 0.1):
            program = Program(x, y, "squared", beta)

            def clarabel(program: Program = program, gates: Any = gates, **settings: Any) -> float:
                v, w = cp.Variable((d, count)), cp.Variable((d, count))
                f = cp.sum(cp.multiply(gates.astype(float), program.x @ (v - w)), axis=1)
                signs = np.where(gates, 1.0, -1.0)
                penalty = cp.sum(cp.norm(v, 2, axis=0)) + cp.sum(cp.norm(w, 2, axis=0))
                cost = 0.5 * cp.sum_squares(f - program.y) / n + program.beta * penalty
                limits = [cp.multiply(signs, program.x @ each) >= 0 for each in (v, w)]
                problem = cp.Problem(cp.Minimize(cost), limits)
                problem.solve(solver="CLARABEL", **settings)
                return float(problem.value)

            clarabel()  # what is loaded once is loaded
            exact, seconds = cpu(clarabel)
            _, fastest = cpu(lambda call=clarabel: call(direct_solve_method="qdldl"))
            asked = {"rho": n / 12, "relax": 1.8, "tolerance": 1e-9, "single": True}
            gaps = {}
            for steps in range(50, 1501, 50):
                ended = iterate(program, gates, ADMM(steps=steps, **asked))
                gaps[steps] = max(abs(ended.objective / exact - 1), abs(ended.convex / exact - 1))
            wanted = next((s for s in gaps if all(gap <= 1e-4 for later, gap in gaps.items() if later >= s)), max(gaps))
            settings = ADMM(steps=wanted, **asked)
            ended, spent = cpu(lambda p=program, g=gates, s=settings: iterate(p, g, s))
            runs.append(
                {
                    "seed": seed,
                    "beta": beta,
                    "optimum": exact,
                    "objective": ended.objective,
                    "violation": ended.violation,
                    "rounds": wanted,
                    "admm_seconds": spent,
                    "clarabel_seconds": seconds,
                    "clarabel_qdldl_seconds": fastest,
                    "ratio": seconds / spent,
                    "ratio_qdldl": fastest / spent,
                }
            )
    return {"runs": runs, "n": n, "d": d, "patterns": count}


def harness() -> dict[str, Any]:
    """What the harness measures: oblivious (transfer) and adaptive attacks, on training and on test samples."""
    from advkit.evaluation import api

    plans = {
        "digits": (DIGITS, "convex_relu_at:eps=0.1,patterns=16", "linf:eps=0.1"),
        "moons": ("moons:samples=120,noise=0.1", "convex_relu_at:eps=0.1,patterns=200", "linf:eps=0.1"),
    }
    found: dict[str, Any] = {}
    for name, (task, defense, threat) in plans.items():
        for split in ("train", "test"):
            for attack in ("pgd:steps=100,restarts=2", "autoattack"):
                with tempfile.TemporaryDirectory() as out:
                    mark = "," if ":" in task else ":"
                    api.evaluate(
                        attack=attack,
                        defense=defense,
                        task=f"{task}{mark}split={split}",
                        threat_model=threat,
                        out=Path(out) / "run",
                        device="cpu",
                    )
                    report = json.loads((Path(out) / "run" / "report.json").read_text())
                    lines = (Path(out) / "run" / "records.jsonl").read_text().splitlines()
                records = [json.loads(line) for line in lines]
                certified = {r["id"] for r in records if r["figures"].get("certified")}
                broken = {r["id"] for r in records if r["outcome"] == "broken"}
                metrics = report["metrics"]
                found[f"{name}, {split}, {attack.partition(':')[0]}"] = {
                    "defense": defense,
                    "threat": threat,
                    "n": report["dataset"]["n_evaluated"],
                    "clean": metrics["clean_accuracy"]["value"],
                    "robust": metrics["robust_accuracy"]["value"],
                    "certified": len(certified),
                    "certified_and_broken": len(certified & broken),
                    "broken": len(broken),
                    "solved": report["defense"]["solved"],
                }
    return found


def beside() -> dict[str, Any]:
    """The digits' test samples under AutoAttack and under images made on an undefended network (an attacker who does
    not know the defense), beside networks of 64 units that are trained step by step."""
    from advkit.evaluation import api
    from advkit.evaluation.victims import train_victim

    recipe = "recipe=[epochs=200,batch_size=32,validation=0]"
    defenses = {"none": f"none:{recipe}", "pgd_at": f"pgd_at:eps=0.1,{recipe}"}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_victim("mlp:hidden=64", defenses["none"], DIGITS, seed=1, device="cpu", out=Path(folder) / "source")
        source = f"path:{folder}/source/model.safetensors"
        for name, defense in {**defenses, "convex_relu_at": "convex_relu_at:eps=0.1,patterns=16"}.items():
            entry = {}
            for kind, attack, threat in (
                ("adaptive", "autoattack", "linf:eps=0.1"),
                ("oblivious", "mi", f"transfer:eps=0.1,sources={source}"),
            ):
                report = api.evaluate(
                    attack=attack,
                    defense=defense,
                    task=DIGITS,
                    threat_model=threat,
                    out=Path(folder) / f"{name}-{kind}",
                    device="cpu",
                )
                entry |= {"clean": report.metrics["clean_accuracy"]["value"]}
                entry |= {kind: report.metrics["robust_accuracy"]["value"]}
                entry |= {"n": report.metrics["clean_accuracy"]["denominator"]}
            found[name] = entry
    return found


PARTS = {
    "optimum": optimum,
    "robust": robust,
    "protocol_b": protocol_b,
    "admm": admm,
    "harness": harness,
    "beside": beside,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS])
    parser.add_argument("--out", type=Path, default=Path("docs/convex_relu.json"))
    asked = parser.parse_args()
    held: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for name in asked.only or [name for name in PARTS if name not in held]:
        held[name] = PARTS[name]()
        held |= {"advkit": advkit.__version__, "commit": commit_text()}
        asked.out.write_text(json.dumps(held, indent=1, allow_nan=False) + "\n")
        print(name, json.dumps(held[name])[:400])


if __name__ == "__main__":
    main()
