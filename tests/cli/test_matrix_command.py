"""`advkit matrix` from arguments to files, on the digits models of the zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from advkit.evaluation.matrix import read_matrix

SOURCES = "zoo:digits-public-cnn,zoo:digits-public-mlp+zoo:digits-public-cnn"
SMALL = (
    "matrix", "--task", "digits", "--sources", SOURCES, "--targets", "zoo:digits-public-cnn-b,zoo:digits-mlp-pgd_at",
    "--attacks", "fgsm,[mifgsm:steps=3,decay=0.9],mi+ti", "-n", 20, "--seeds", 2, "--device", "cpu",
)  # fmt: skip


@pytest.mark.slow
def test_a_matrix_is_printed_and_written(advkit: Any) -> None:
    said = advkit(*SMALL, "--eps", "51/255", "--out", "out", "--similarity")
    assert said.code == 0, said.err
    made = read_matrix("out")
    data = made.to_dict()
    assert [source["name"] for source in data["sources"]] == SOURCES.split(",")
    assert [attack["name"] for attack in data["attacks"]] == ["fgsm", "mifgsm:steps=3,decay=0.9", "mi+ti"]
    assert data["attacks"][2]["spec"] == "transfer:mi+ti"
    assert (data["eps"], data["n"], data["seeds"]) == (51 / 255, 20, [0, 1])
    assert len(data["cells"]) == 2 * 2 * 3
    assert len(data["similarity"]["pairs"]) == 6
    assert data["equal_budget"] is not None
    for word in ("noise", "mifgsm:steps=3", "union", "equal budget"):
        assert word in said.out
    assert {path.name for path in Path("out").iterdir()} == {
        "matrix.json", "matrix.md", "decisions.safetensors", "heatmap.png", "heatmap_equal_budget.png",
    }  # fmt: skip
    assert "## Every cell" in Path("out/matrix.md").read_text()


@pytest.mark.slow
def test_json_alone_on_standard_output_and_the_cache_used_again(advkit: Any) -> None:
    first = advkit(*SMALL, "--budget", "none", "--no-plots", "--json")
    assert first.code == 0, first.err
    assert first.json == json.loads(Path("runs/matrix/matrix.json").read_text())
    images = {path: path.stat().st_mtime_ns for path in Path("../cache/matrix").rglob("*.safetensors")}
    again = advkit(*SMALL, "--budget", "none", "--no-plots", "--json")
    assert again.json == first.json
    assert images
    assert images == {path: path.stat().st_mtime_ns for path in Path("../cache/matrix").rglob("*.safetensors")}


def test_mistakes_are_one_line(advkit: Any) -> None:
    for arguments, word in (
        (("--attacks", "nothing"), "unknown attack"),
        (("--eps", "wide"), "0.1 or 8/255"),
        (("--seeds", "few"), "how many"),
        (("--budget", "much"), "auto or none"),
        (("--sources", "zoo:digits-public-cnn,zoo:digits-public-cnn"), "more than once"),
    ):
        said = advkit(*SMALL, *arguments)
        assert said.code == 2
        assert word in said.err
        assert len(said.err.strip().splitlines()) == 1
    assert not Path("runs").exists()
