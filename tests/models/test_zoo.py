"""The zoo: cards and weights belong together, and the hash is checked first."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advkit.core.errors import CheckpointError, UnknownName, UsageError
from advkit.core.rng import RowRng
from advkit.models import MODELS, zoo

RNG = RowRng.from_ids(0, ["a"])


def published(folder: Path, name: str, defense: str = "none", model: str = "mlp:hidden=4", **more: object) -> zoo.Card:
    made = MODELS.build(model)((1, 2, 2), 3, RNG.at(name))
    told = {"name": name, "task": "digits", "defense": defense, "measured": {"clean accuracy": 0.5}, **more}
    return zoo.publish(made, told, folder)


def test_publish_and_load(tmp_path: Path) -> None:
    card = published(tmp_path, "victim-a", seed=3, seen_by=("x", "y"))
    assert zoo.cards(tmp_path) == (card,)
    assert card.size == (tmp_path / "victim-a.safetensors").stat().st_size
    model = zoo.load("victim-a", tmp_path)
    assert model.name == "victim-a"
    assert model.license == "MIT"
    assert all(p.dtype == torch.float32 for p in model.module.parameters())
    original = MODELS.build("mlp:hidden=4")((1, 2, 2), 3, RNG.at("victim-a"))
    x = torch.rand(3, 1, 2, 2)
    assert torch.allclose(model(x), original(x), atol=1e-2)


def test_swapped_or_damaged_weights_are_not_opened(tmp_path: Path) -> None:
    published(tmp_path, "a")
    published(tmp_path, "b")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="sha256"):
        zoo.load("a", tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can't read"):
        zoo.load("b", tmp_path)


def test_find(tmp_path: Path) -> None:
    published(tmp_path, "a", "pgd_at:eps=0.1")
    published(tmp_path, "b", "pgd_at")
    published(tmp_path, "c", model="mlp", role="public", group="linf")

    def names(**wanted: str) -> list[str]:
        return [card.name for card in zoo.find(**wanted, folder=tmp_path)]

    assert names() == ["a", "b", "c"]
    assert names(defense="pgd_at") == ["b", "a"]  # the exact one first
    assert names(defense="pgd_at:eps=0.1") == ["a"]
    assert names(model="mlp") == ["c"]  # mlp:hidden=4 is another network
    assert names(task="digits", role="victim") == ["a", "b"]
    assert [card.name for card in zoo.public("digits", tmp_path)] == ["c"]
    assert zoo.public("cifar10", tmp_path) == ()
    with pytest.raises(UnknownName, match="did you mean 'a'"):
        zoo.card("aa", tmp_path)


def test_cards_are_checked(tmp_path: Path) -> None:
    card = published(tmp_path, "a")
    assert zoo.Card.from_json(card.to_json()) == card
    for wrong in ({"group": "l7"}, {"role": "judge"}, {"sha256": "beef"}, {"name": "../a"}):
        with pytest.raises(CheckpointError):
            replace(card, **wrong)
    (tmp_path / "other.json").write_text(card.to_json())
    with pytest.raises(CheckpointError, match="named after"):
        zoo.cards(tmp_path)
    for text in ("[]", "{", '{"name": "a"}', card.to_json().replace("notes", "note")):
        with pytest.raises(CheckpointError):
            zoo.Card.from_json(text)
    with pytest.raises(UsageError, match="sha256"):
        zoo.publish(MODELS.build("mlp")((2,), 2, RNG), {"name": "a", "task": "digits", "sha256": "0" * 64}, tmp_path)


@pytest.mark.slow
def test_every_shipped_model_is_the_one_on_its_card() -> None:
    total = 0
    for card in zoo.cards():
        path = zoo.FOLDER / f"{card.name}.safetensors"
        total += path.stat().st_size
        assert path.stat().st_size == card.size <= 500_000
        model = zoo.load(card.name)
        assert model.architecture == card.model
        assert torch.isfinite(model(torch.zeros(1, *model.space.shape))).all()
    assert total <= 5_500_000


def test_cards_load_no_torch(tmp_path: Path) -> None:
    code = "import sys; from advkit.models import zoo; zoo.cards(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
