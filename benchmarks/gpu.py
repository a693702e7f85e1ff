"""What a GPU makes of it, in one command: speed switches, batch sizes, whole suites, and equality with the CPU.

python benchmarks/gpu.py [--device cuda] [--models ...] [--n 1000] [--repetitions 3] [--out docs]
python benchmarks/gpu.py --device cpu --small --out FOLDER

Parts, each on the device:

    speeds    forward and backward passes of the model under fp32, bf16, fp16, channels_last, compile (on CUDA: CUDA
              graphs) and bf16+compile, at several batch sizes
    overhead  PGD's loop over the passes that it makes, at several batch sizes
    suites    lean, thorough and autoattack, in fp32 and bf16, against AutoAttack's reference code (pyautoattack) where
              that is installed, else against our autoattack
    batches   thorough with so many samples in flight
    equality  the same runs on the CPU: how many samples end otherwise

Writes gpu.json and gpu.md after every part, into docs unless --out says otherwise; on a CPU gpu_on_cpu.json and
gpu_on_cpu.md, and nothing without --out. `--small` takes few samples and steps: the same code in a minute, so that it
can be tested without a GPU. Exit status 2 in one line where the device is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from advkit import benchmark as bench
from advkit.benchmark.page import GPU_NOT_RUN, GPU_RUN
from advkit.core.errors import AdvkitError
from advkit.core.files import write_whole

PARTS = ("speeds", "overhead", "suites", "batches", "equality")
MODELS = "zoo:fashion-mnist-cnn-pgd_at,zoo:fashion-mnist-cnn-trades"
SPEEDS = "fp32,bf16,fp16,channels_last,compile,bf16+compile"
SUITES = "lean,thorough,autoattack,thorough@bf16"
SIZES, SMALL_SIZES = (64, 256, 1024), (4, 8)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, mps or cpu (default: cuda)")
    parser.add_argument("--models", default=MODELS, help=f"comma between them (default: {MODELS})")
    parser.add_argument("--task", default="fashion-mnist")
    parser.add_argument("--threat-model", default="linf:eps=0.1")
    parser.add_argument("--suites", default=SUITES, help=f"SUITE or SUITE@SPEED (default: {SUITES})")
    parser.add_argument("--speeds", default=SPEEDS, help=f"of the part speeds (default: {SPEEDS})")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--n", type=int, default=1000, help="samples of a suite (default: 1000)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="12 samples, one repetition, small batches")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md (default: docs; on a CPU none)")
    asked = parser.parse_args(given)
    asked.command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if given is None else given)])
    if unknown := sorted(set(asked.parts.split(",")) - set(PARTS)):
        parser.error(f"no part is called {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if asked.small:
        asked.n, asked.repetitions = min(asked.n, 12), 1
    return asked


def missing(device: str) -> str:
    """Why the device can't be used, in one line; empty where it can."""
    kind, _, number = device.partition(":")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if kind not in there:
        return f"device {device!r} is none of cuda, mps and cpu"
    if not there[kind]():
        return f"no {kind} device here; `--device cpu --small` runs the same code on the CPU"
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        return f"{device} is not there: {torch.cuda.device_count()} CUDA devices"
    return ""


def environment(device: str) -> dict[str, str]:
    """What the figures depend on besides the code."""
    told = {"device": device} | bench.environment()
    if device.startswith("cuda"):
        told |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return told


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All parts that were asked for; what is done so far is written after each."""
    models, suites, speeds = (text.split(",") for text in (asked.models, asked.suites, asked.speeds))
    sizes, device = SMALL_SIZES if asked.small else SIZES, asked.device
    same = {"task": asked.task, "device": device}
    times = {"repetitions": asked.repetitions, "steps": 2 if asked.small else 20}
    rows = same | {"threat_model": asked.threat_model, "n": asked.n}
    reference = bench.REFERENCE if importlib.util.find_spec(bench.REFERENCE) else "autoattack"
    makers = {
        "speeds": lambda model: bench.speeds(model, names=speeds, sizes=sizes, **same, **times),
        "overhead": lambda model: bench.pgd_overhead(model, sizes=sizes, **same, **times),
        "suites": lambda model: bench.side_by_side(
            model,
            [suite for suite in suites if suite != reference],
            reference=reference,
            repetitions=asked.repetitions,
            say=print,
            **rows,
        ),
        "batches": lambda model: bench.batch_sizes(model, "thorough", sizes=sizes, **rows),
        "equality": lambda model: bench.equality(model, suites, **rows),
    }
    results: dict[str, Any] = {"command": asked.command, "environment": environment(device)}
    results |= {part: [] for part in PARTS}
    for part in asked.parts.split(","):
        for model in models:
            made = makers[part](model)
            results[part] += made if isinstance(made, list) else [made]
            print(f"{part}: {model} done", flush=True)
            write(results, asked.out, device)
    return results


def write(results: dict[str, Any], out: Path | None, device: str) -> None:
    """gpu.json and gpu.md; benchmarks.md beside them no longer says that it was not run."""
    if out is None:
        return
    name = "gpu_on_cpu" if device == "cpu" else "gpu"
    write_whole(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
    write_whole(out / f"{name}.md", bench.device_page(results))
    page = out / "benchmarks.md"
    if device != "cpu" and page.exists() and GPU_NOT_RUN in (text := page.read_text(encoding="utf-8")):
        write_whole(page, text.replace(GPU_NOT_RUN, GPU_RUN))


def main(given: Sequence[str] | None = None) -> int:
    asked = arguments(given)
    if lacking := missing(asked.device):
        print(f"gpu.py: {lacking}", file=sys.stderr)
        return 2
    if asked.out is None and asked.device != "cpu":
        asked.out = Path(__file__).resolve().parents[1] / "docs"
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
    try:
        print(bench.device_page(measure(asked)))
    except AdvkitError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
