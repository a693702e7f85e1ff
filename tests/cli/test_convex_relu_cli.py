"""`advkit train`, `evaluate` and `show` with `convex_relu_at`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advkit.models.checkpoint import checkpoint_extra, load_checkpoint

EXTRA = "convex training needs the extra convex: pip install 'advkit[convex]'"
pytest.importorskip("cvxpy", reason=EXTRA)
pytest.importorskip("clarabel", reason=EXTRA)

SPEC = "convex_relu_at:eps=0.05,patterns=60"


def archive(file: Path) -> str:
    drawn = np.random.default_rng(0)
    x = drawn.uniform(0, 1, (200, 2)).astype(np.float32)
    x = x[(np.abs(x - 0.5) > 0.075).all(1)][:30]
    y = ((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)).astype(np.int64)
    np.savez(file, x=x, y=y, x_train=x, y_train=y)
    return f"npz:path={file}"


@pytest.mark.slow
def test_train_then_evaluate_on_the_command_line(advkit: Any, tmp_path: Path) -> None:
    named = archive(tmp_path / "plane.npz")
    said = advkit("train", "--defense", SPEC, "--task", named, "--out", "run")
    assert said.code == 0, said
    assert "30 of 30 training samples certified" in said.out
    made = json.loads(Path("run/training.json").read_text())
    assert made["solved"]["networks"][0]["status"] == "optimal"
    assert checkpoint_extra("run/model.safetensors")["solved"] == made["solved"]
    model = load_checkpoint("run/model.safetensors", sha256=made["sha256"])
    assert model.architecture == made["model"] == f"mlp:hidden={made['solved']['networks'][0]['units']}"
    # the stored network brings its radius: a bare name takes what it was trained with
    said = advkit(
        "evaluate", "--defense", "convex_relu_at", "--model", "path:run/model.safetensors", "--task", named,
        "--attack", "fgsm", "--threat-model", "linf:eps=0.05", "--out", "attacked", "--json",
    )  # fmt: skip
    assert said.code == 0, said
    report = json.loads(Path("attacked/report.json").read_text())
    assert report["defense"]["params"]["eps"] == 0.05
    assert report["defense"]["solved"] == made["solved"]
    assert report["metrics"]["certified"]["value"] == 1
    # without a model the network is found again, or taken from the cache; a report of that runs again
    said = advkit(
        "evaluate", "--defense", SPEC, "--task", named, "--attack", "fgsm", "--threat-model", "linf:eps=0.05",
        "--out", "found",
    )  # fmt: skip
    assert said.code == 0, said
    found = json.loads(Path("found/report.json").read_text())
    assert found["request"]["model"] == "none"
    assert found["model"]["state_sha256"] == report["model"]["state_sha256"]
    told = " ".join(advkit("show", "found").out.split())
    assert f"The solver says: {found['defense']['solved']['summary']}." in told
    assert advkit("rerun", "found/report.json", "--out", "again").code == 0


def test_show_works_without_cvxpy(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    said = advkit("show", "convex_relu_at")
    assert said.code == 0
    assert "arXiv 2201.01965" in said.out
    said = advkit("train", "--defense", SPEC, "--task", "digits", "--out", "run")
    assert said.code == 2
    assert "pip install 'advkit[convex]'" in said.err


def test_bad_requests_get_one_line(advkit: Any, tmp_path: Path) -> None:
    named = archive(tmp_path / "plane.npz")
    for arguments, says in (
        (("--model", "cnn"), "finds a network of its own (mlp:hidden=K): leave the model cnn out"),
        (("--recipe", "epochs=3"), "is solved in one go and has no recipe: leave the recipe out"),
    ):
        said = advkit("train", "--defense", SPEC, "--task", named, "--out", "run", *arguments)
        assert said.code == 2
        assert says in " ".join(said.err.split())
