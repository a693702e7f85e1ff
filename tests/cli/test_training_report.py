"""`advkit train` under single-step defenses: its report and curves, what stops it, and what it says of bad requests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from advkit.models.checkpoint import load_checkpoint

TRAIN = ("train", "--task", "digits", "--model", "mlp:hidden=16", "--device", "cpu")


@pytest.mark.slow
def test_every_training_has_a_report_and_curves(advkit: Any) -> None:
    said = advkit(*TRAIN, "--defense", "aaer:eps=0.2", "--recipe", "epochs=3", "--out", "run", "--json")
    assert said.code == 0
    made, report = said.json, json.loads(Path("run/training.json").read_text())
    assert made["report"] == "run/training.json"
    assert {key: report[key] for key in made if key not in ("report", "curves")} == {
        key: value for key, value in made.items() if key not in ("report", "curves")
    }
    assert report["schema"] == "advkit-training-report-1"
    assert report["recipe"]["epochs"] == len(report["log"]) == 3
    assert report["halted"] == ""
    for entry in report["log"]:
        assert all(math.isfinite(entry[name]) for name in ("loss", "score", "clean", "lr"))
        assert {"fgsm_accuracy", "abnormal_share", "overfitting", "aaer_regulariser"} <= set(entry["figures"])
    assert report["log"] == json.loads(Path("run/training/log.json").read_text())
    with Image.open(made["curves"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    load_checkpoint(report["file"], sha256=report["sha256"])
    # a finished run started again says the same
    again = advkit(*TRAIN, "--defense", "aaer:eps=0.2", "--recipe", "epochs=3", "--out", "run", "--json")
    assert again.json == made
    assert json.loads(Path("run/training.json").read_text()) == report


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["none", "pgd_at:eps=0.1,steps=2"])
def test_so_has_one_without_a_detector(advkit: Any, defense: str) -> None:
    said = advkit(*TRAIN, "--defense", defense, "--recipe", "epochs=2,validation=0", "--out", "run")
    assert said.code == 0
    assert "report: run/training.json, run/plots/training.png" in said.out
    report = json.loads(Path("run/training.json").read_text())
    assert [entry["score"] for entry in report["log"]] == [None, None]
    assert Path("run/plots/training.png").stat().st_size > 5_000


@pytest.mark.slow
def test_free_at_divides_the_epochs(advkit: Any) -> None:
    said = advkit(*TRAIN, "--defense", "free_at:eps=0.1,replays=4", "--recipe", "epochs=10", "--out", "run", "--json")
    assert said.json["epochs"] == 3


def refused(advkit: Any, *arguments: object, says: tuple[str, ...]) -> None:
    said = advkit(*TRAIN, *arguments)
    assert said.code == 2, said
    assert said.err.startswith("advkit: error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert all(each in said.err for each in says), said.err


@pytest.mark.parametrize(
    "defense", ["fgsm_at", "fgsm_rs", "n_fgsm", "grad_align", "free_at", "aaer", "pgd_at", "trades"]
)
def test_radii_of_nothing_and_beyond_the_box(advkit: Any, defense: str) -> None:
    recipe = ("--recipe", "epochs=1", "--out", "run")
    refused(advkit, "--defense", f"{defense}:eps=0", *recipe, says=("eps is 0", "above 0"))
    refused(advkit, "--defense", f"{defense}:eps=8", *recipe, says=("eps=8 is larger than the box", "8/255"))
    assert not Path("run").exists()


def test_divergence_says_the_step(advkit: Any) -> None:
    recipe = "epochs=40,optimizer=sgd,lr=1e30,schedule=none"
    refused(
        advkit, "--defense", "fgsm_rs:eps=0.1", "--recipe", recipe, "--out", "run",
        says=("training diverged", "step ", "(epoch 1)", "lower lr"),
    )  # fmt: skip
    assert not Path("run").exists()


def test_a_batch_of_one_with_batch_statistics(advkit: Any) -> None:
    asked = ("--model", "resnet8", "--defense", "fgsm_rs:eps=0.1", "--recipe", "epochs=1,batch_size=1", "--out", "run")
    refused(advkit, *asked, says=("single row", "batch normalisation", "batch_size of at least 2"))
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_folder_of_another_defense(advkit: Any) -> None:
    asked = ("--recipe", "epochs=1", "--out", "run", "--defense")
    assert advkit(*TRAIN, *asked, "fgsm_rs:eps=0.1").code == 0
    refused(advkit, *asked, "n_fgsm:eps=0.1", says=("another training", "--out"))
    refused(advkit, *asked, "aaer:eps=0.1", says=("another training", "--out"))


def test_a_detector_without_samples_to_look_at(advkit: Any) -> None:
    asked = ("--recipe", "epochs=1,validation=0", "--out", "run", "--defense", "fgsm_rs:eps=0.1,overfitting=stop")
    refused(advkit, *asked, says=("overfitting=stop with validation=0", "0.1"))
