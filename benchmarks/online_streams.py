"""Which k items to spend an attack on: selectors against theory, noise and transfer, and how long they take.

    python benchmarks/online_streams.py [--parts theory,noise,digits,fashion,speed] [--out FOLDER]

theory:  Monte Carlo of every selector over random orders beside the exact competitive ratios, n = 100
noise:   the same where the selector sees the values through Gaussian noise
digits:  500 images of scikit-learn's digits, candidates made on one MLP and shown to another, pairs of training seeds
fashion: 1,000 Fashion-MNIST images, the zoo's surrogates and victims
speed:   1,000 orders of a stream of 10,000 items, all selectors, k = 1, 10 and 100, one thread

Prints Markdown; --out also writes online_streams.md, online_streams.json and online_ratios.png.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advkit.attacks.stream.online import Online as OnlineAttack
from advkit.attacks.stream.ratios import optimal_policy
from advkit.attacks.stream.selectors import SELECTORS, selector
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.defenses.none import NoDefense
from advkit.evaluation import api
from advkit.evaluation.execute import run
from advkit.evaluation.figures.plots import save
from advkit.evaluation.figures.stream_plots import competitive_ratio_curves
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.scenarios.ratios import RatioCurve, measure_ratios
from advkit.evaluation.scenarios.stream import Items, candidates_of, compare_selectors, noise_study, shuffled, streams
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models.online import Online as OnlineStream
from advkit.training.loop import Recipe, fit

SHOWN = ("random", "virtual", "optimistic", "virtual+", "single-ref", "optimal-dp", "offline")
PGD = "pgd:steps=20,step_size=0.25"


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def theory(orders: int, out: Path | None) -> tuple[str, dict[str, Any]]:
    ks = (1, 2, 3, 4, 5, 7, 10, 15, 20)
    curves = measure_ratios(ks, SHOWN, n=100, orders=orders)
    for name, curve in curves.items():
        for k, exact in curve.exact.items():
            mean, error = curve.measured[k]
            if abs(mean - exact) > 4 * error + 1e-12:
                raise AssertionError(f"{name}, k={k}: {mean:.4f} +- {error:.4f} measured, {exact:.4f} exact")
    for k, value in ((1, 0.3710), (2, 0.4939), (5, 0.6482), (10, 0.7452)):
        if abs(optimal_policy(100, k).ratio - value) > 5e-5:
            raise AssertionError(f"optimal-dp, n=100, k={k}: {optimal_policy(100, k).ratio}")
    if out is not None:
        smooth = [int(k) for k in np.unique(np.round(np.geomspace(1, 20, 30)))]
        drawn = {
            name: RatioCurve(curve.measured, {k: r for k in smooth if (r := selector(name).ratio(100, k)) is not None})
            for name, curve in curves.items()
        }
        save(competitive_ratio_curves(drawn, title="100 items in random order"), out / "online_ratios.png")
    rows = [
        [name, *(f"{number(c.measured[k][0])} ({number(c.exact[k]) if k in c.exact else '-'})" for k in ks)]
        for name, c in curves.items()
    ]
    text = f"n = 100, {orders} orders, no exhaust: measured (exact)"
    return f"{text}\n\n{table(['selector', *(f'k={k}' for k in ks)], rows)}", {
        name: {"measured": dict(c.measured), "exact": dict(c.exact)} for name, c in curves.items()
    }


def noise(orders: int) -> tuple[str, dict[str, Any]]:
    names = ("virtual", "virtual+", "single-ref", "optimal-dp", "offline")
    found: dict[str, Any] = {}
    rows = []
    for sigma in (0, 1, 5, 10, 20):
        row: list[object] = [sigma]
        for k in (1, 5, 10):
            for name in names:
                settings = {"observe": 37} if name in ("virtual", "virtual+") else {}
                mean, error = noise_study(selector(name, **settings), k, float(sigma), orders=orders)
                found[f"{name},k={k},sigma={sigma}"] = [mean, error]
            row.append(" / ".join(number(found[f"{name},k={k},sigma={sigma}"][0]) for name in names))
        rows.append(row)
    measured = found["virtual+,k=10,sigma=10"][0]
    if abs(measured - 0.444) > 0.01:
        raise AssertionError(f"virtual+, k=10, sigma=10: {measured}, expected .444 +- .01")
    return f"{' / '.join(names)}\n\n{table(['sigma', 'k=1', 'k=5', 'k=10'], rows)}", found


def items_of(source: Any, target: Any, task: Any, attack: str, n: int, eps: str = "0.1") -> Items:
    """Candidates made on the source and judged on the target by the harness."""
    threat = OnlineStream(k=1, inner=f"linf:eps={eps}", sources=(source,), permutations=1)
    case = api.resolve(OnlineAttack(inner=attack, k=1), "none", task, target, threat, n=n, device="cpu", keep=0)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(case, Path(folder))
        try:
            run(case, store)
            return Items.of(candidates_of(case, list(store)))
        finally:
            store.close()


def digits_models(data: Data, seed: int) -> tuple[Any, Any]:
    recipe = Recipe(epochs=40, batch_size=64, lr=3e-3, validation=0.0, select="last")
    made = []
    for spec, offset in (("mlp:hidden=64+64", 0), ("mlp:hidden=32+32", 1000)):
        rng = RowRng.from_ids(seed + offset, ["training"])
        start = MODELS.build(spec)((1, 8, 8), 10, rng.at("init"), space=data.space)
        made.append(fit(start, data, NoDefense(recipe=recipe).objective(), recipe, rng, progress=False).model)
    return made[0], made[1]


def averaged(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: float(np.mean([each[name][key] for each in tables])) for key in tables[0][name]}
        for name in tables[0]
    }


def selector_rows(label: list[object], found: dict[str, dict[str, float]]) -> list[object]:
    def cell(name: str) -> str:
        figures = found[name]
        return " / ".join(number(figures[key]) for key in ("competitive_ratio", "fool_rate", "value_ratio"))

    return [*label, *(cell(name) for name in SHOWN)]


def spearman(items: Items) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(items.value, items.true_value).statistic)


def digits(orders: int, seeds: int) -> tuple[str, dict[str, Any]]:
    task = TASKS.build("digits")
    training = task.training()
    test = next(iter(task.batches(len(task))))
    x, y = torch.cat([training.x, test.x]), torch.cat([training.y, test.labels])
    data = Data(x[:-500], y[:-500], training.space, 10, "digits")
    pairs = [digits_models(data, seed) for seed in range(seeds)]
    found: dict[str, Any] = {"spearman": {}}
    rows, checks = [], []
    for attack, ks in (("fgsm", (5, 10, 50)), (PGD, (5, 10, 50))):
        items = [items_of(source, target, (x[-500:], y[-500:]), attack, 500) for source, target in pairs]
        found["spearman"][attack] = [spearman(each) for each in items]
        for k in ks:
            tables = [compare_selectors(each, k, orders=orders) for each in items]
            mean = averaged(tables)
            found[f"{attack},k={k}"] = {"mean": mean, "seeds": tables}
            rows.append(selector_rows([attack.partition(":")[0], k], mean))
            naive, v, plus = (mean[name]["fool_rate"] for name in ("random", "virtual", "virtual+"))
            checks.append((attack, k, plus - v, v - naive, mean["optimal-dp"]["fool_rate"] - plus))
    spread = [value for values in found["spearman"].values() for value in values]
    words = (
        f"{seeds} pairs of training seeds, {orders} orders each, exhaust: competitive ratio / fool rate / value ratio. "
        f"Spearman correlation of v and u {min(spread):.2f} to {max(spread):.2f}."
    )
    head = ["attack", "k", *SHOWN]
    gains = table(
        ["attack", "k", "V+ over V", "V over naive", "optimal-dp over V+"],
        [[a.partition(":")[0], k, *(f"{100 * each:+.1f}" for each in rest)] for a, k, *rest in checks],
    )
    return f"{words}\n\n{table(head, rows)}\n\nFool rate, points:\n\n{gains}", found


PAIRS = (
    ("zoo:fashion-mnist-public-cnn5", "zoo:fashion-mnist-cnn"),
    ("zoo:fashion-mnist-public-mlp", "zoo:fashion-mnist-cnn"),
    ("zoo:fashion-mnist-public-cnn", "zoo:fashion-mnist-cnn-pubdef"),
    ("zoo:fashion-mnist-public-cnn-at", "zoo:fashion-mnist-cnn-pgd_at"),
)


def fashion(orders: int) -> tuple[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    rows = []
    for source, target in PAIRS:
        for attack in ("fgsm", PGD):
            items = items_of(source, target, "fashion-mnist", attack, 1000)
            for k in (5, 10, 50):
                each = compare_selectors(items, k, orders=orders)
                key = f"{source},{target},{attack},k={k}"
                found[key] = {"selectors": each, "spearman": spearman(items), "fooled": int(items.fooled.sum())}
                names = [one.removeprefix("zoo:fashion-mnist-").removeprefix("public-") for one in (source, target)]
                rows.append(selector_rows([" > ".join(names), attack.partition(":")[0], k], each))
    words = f"{orders} orders, exhaust: competitive ratio / fool rate / value ratio"
    return f"{words}\n\n{table(['source > target', 'attack', 'k', *SHOWN], rows)}", found


def speed(ks: tuple[int, ...] = (1, 10, 100)) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    optimal_policy.cache_clear()
    orders, n = 1000, 10_000
    start, processor = time.perf_counter(), time.process_time()
    rng = streams(0, orders)
    values = np.random.default_rng(0).normal(size=n)[shuffled(rng, n)]
    spent: dict[str, Any] = {"orders drawn": time.perf_counter() - start}
    rows: list[list[object]] = []
    for name in SELECTORS:
        row: list[object] = [name]
        for k in ks:
            lap = time.perf_counter()
            selector(name, exhaust=True).select(values, k, rng)
            spent[f"{name},k={k}"] = time.perf_counter() - lap
            row.append(f"{spent[f'{name},k={k}']:.2f}")
        rows.append(row)
    spent["wall"], spent["cpu"] = time.perf_counter() - start, time.process_time() - processor
    if spent["cpu"] > 60:
        raise AssertionError(f"{spent['cpu']:.1f} s of one core, expected less than 60")
    words = (
        f"{orders} orders of {n} items, seconds, one thread; drawing the orders {spent['orders drawn']:.1f}; "
        f"together {spent['wall']:.1f} (CPU {spent['cpu']:.1f})"
    )
    return f"{words}\n\n{table(['selector', *(f'k={k}' for k in ks)], rows)}", spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="theory,noise,digits,fashion,speed")
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of training seeds on digits")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    makers = {
        "theory": lambda: theory(10 * arguments.orders, arguments.out),
        "noise": lambda: noise(5 * arguments.orders),
        "digits": lambda: digits(arguments.orders, arguments.seeds),
        "fashion": lambda: fashion(arguments.orders),
        "speed": speed,
    }
    pages, found = [], {}
    for part in arguments.parts.split(","):
        text, found[part] = makers[part]()
        pages.append(f"## {part}\n\n{text}")
        print(pages[-1], end="\n\n", flush=True)
    if arguments.out:
        (arguments.out / "online_streams.md").write_text("\n\n".join(pages) + "\n")
        (arguments.out / "online_streams.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
