"""benchmarks/gpu.py on the CPU: every part of it runs, and a device that is missing is one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from advkit import benchmark as bench
from advkit.benchmark import Run, device
from advkit.benchmark.page import GPU_NOT_RUN, GPU_RUN

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ended(broken: dict[str, str], wrong: frozenset[str] = frozenset({"w"})) -> Run:
    return Run(1.0, 10, 5, 2, 4, wrong, broken)


def test_a_missing_device_is_one_line_and_exit_2(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked, words in ((["--device", "cuda"], "--device cpu --small"), (["--device", "tpu"], "none of cuda")):
        assert gpu.main(asked) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert words in said.err


def test_what_was_not_run_is_said_until_it_was(gpu: ModuleType, tmp_path: Path) -> None:
    results = {"command": "c", "environment": {}, "suites": [], **{part: [] for part in gpu.PARTS}}
    page = tmp_path / "benchmarks.md"
    page.write_text(bench.markdown(results), encoding="utf-8")
    assert GPU_NOT_RUN in page.read_text(encoding="utf-8")
    gpu.write(results, tmp_path, "cpu")
    assert GPU_NOT_RUN in page.read_text(encoding="utf-8")
    gpu.write(results, tmp_path, "cuda")
    assert GPU_NOT_RUN not in page.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == bench.markdown(results, gpu=True)
    assert {each.name for each in tmp_path.glob("gpu*")} == {
        "gpu.json", "gpu.md", "gpu_on_cpu.json", "gpu_on_cpu.md",
    }  # fmt: skip


def test_docs_say_whether_it_was_run() -> None:
    there = (ROOT / "docs" / "gpu.json").exists()
    assert (GPU_RUN if there else GPU_NOT_RUN) in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_samples_that_end_otherwise_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def resolve(attack: str, *_: Any, device: str, speed: str, **__: Any) -> str:
        asked.append((attack, device, speed))
        return device

    runs = {"cpu": ended({"a": "apgd-ce", "b": "square"}), "cuda": ended({"b": "fab-t", "c": "square"})}
    monkeypatch.setattr(device, "resolve", resolve)
    monkeypatch.setattr(device, "our_run", runs.__getitem__)
    (entry,) = bench.equality("m", ["lean@bf16"], task="t", threat_model=None, n=4, device="cuda")
    assert asked == [("lean", "cpu", "fp32"), ("lean", "cuda", "bf16")]
    # broken by another stage is broken
    assert entry["differ"] == [
        {"row": "a", "cpu": "broken", "device": "not broken"},
        {"row": "c", "cpu": "not broken", "device": "broken"},
    ]


@pytest.mark.exhaustive
def test_every_part_runs_on_the_cpu(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--small", "--n", "4", "--task", "digits", "--models", "zoo:digits-mlp-pgd_at"]
    words += ["--suites", "lean,thorough@bf16", "--speeds", "fp32,bf16", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    results = json.loads((tmp_path / "gpu_on_cpu.json").read_text(encoding="utf-8"))
    assert all(results[part] for part in gpu.PARTS)
    assert [(row["speed"], row["batch"]) for row in results["speeds"][0]["speeds"]] == [
        ("fp32", 4), ("fp32", 8), ("bf16", 4), ("bf16", 8),
    ]  # fmt: skip
    moved = {row["speed"]: row["moved"] for row in results["speeds"][0]["speeds"]}
    assert moved["fp32"] == 0 < moved["bf16"] < 0.05
    # on the CPU itself full precision ends alike, to the sample
    lean, thorough = results["equality"]
    assert lean["differ"] == []
    assert thorough["suite"] == "thorough@bf16"
    # samples in flight change no figure
    assert len({row["robust_accuracy"] for row in results["batches"][0]["sizes"]}) == 1
    assert (tmp_path / "gpu_on_cpu.md").read_text(encoding="utf-8") in capsys.readouterr().out
