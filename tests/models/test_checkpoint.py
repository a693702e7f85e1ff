"""Checkpoints: everything that rebuilds the model, any changed byte is an error, no code is ever run."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from advkit.core.errors import BadModel, CheckpointError
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.checkpoint import checkpoint_extra, fill_from_file, load_checkpoint, save_checkpoint
from advkit.models.torch import TorchModel

RNG = RowRng.from_ids(5, ["a"])
SHAPE = (1, 4, 4)


@pytest.fixture
def model() -> TorchModel:
    made = MODELS.build("resnet8:width=2,mean=0.3,std=0.6")(SHAPE, 3, RNG)
    made.module.train()
    made(torch.rand(8, *SHAPE))  # running statistics and counters that are not the initial ones
    made.module.eval()
    return made


def test_round_trip(model: TorchModel, tmp_path: Path) -> None:
    model.space = Box(torch.linspace(0, 0.1, 16).reshape(SHAPE), float("inf"), SHAPE, levels=255)
    path = tmp_path / "new" / "model.safetensors"
    sha256 = save_checkpoint(model, path, extra={"seed": 3, "defense": "pgd_at:eps=0.1"})
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [each.name for each in path.parent.iterdir()] == ["model.safetensors"]
    loaded = load_checkpoint(
        path, sha256=sha256, architecture="resnet8:std=0.6,width=2,mean=0.3", shape=SHAPE, classes=3
    )
    assert loaded.describe() == model.describe()
    assert loaded.space == model.space
    assert (loaded.mean, loaded.std) == ((0.3,), (0.6,))
    x = torch.rand(5, *SHAPE)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.module.training
    assert checkpoint_extra(path) == {"seed": 3, "defense": "pgd_at:eps=0.1"}
    by_name = MODELS.build(f"path:{path}")(SHAPE, 3, RNG)
    assert by_name.describe() == model.describe()


def test_half_precision_storage(model: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    before = model.state_sha256()
    save_checkpoint(model, path, half=True)
    assert model.state_sha256() == before
    loaded = load_checkpoint(path)
    for name, value in model.module.state_dict().items():
        held = loaded.module.state_dict()[name]
        assert held.dtype == value.dtype
        assert torch.equal(held, value.half().to(value.dtype) if value.is_floating_point() else value)
    with torch.no_grad():
        model.module.logits.bias[0] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        save_checkpoint(model, path, half=True)


@pytest.mark.slow
def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    model = MODELS.build("mlp:hidden=3")((2,), 2, RNG)
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    content = path.read_bytes()
    harmless = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            continue
        # padding of the header: what is read must then be the same to the last bit
        assert loaded.describe() == model.describe()
        assert loaded.space == model.space
        harmless += 1
    assert harmless < 4
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_hash_is_checked_before_parsing(model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)

    def touched(*_: object) -> None:
        pytest.fail("the file was parsed")

    monkeypatch.setattr(safetensors.torch, "load", touched)
    with pytest.raises(CheckpointError, match="sha256"):
        load_checkpoint(path, sha256="0" * 64)


class Bomb:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.pth", "bomb.safetensors", "bomb.pkl"])
def test_a_pickle_is_never_run(name: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / name
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(sentinel)}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, architecture="mlp", shape=(2,), classes=2)
    assert not sentinel.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # the bomb is a real one
    assert sentinel.exists()


def test_foreign_weights_need_an_architecture_and_fit_strictly(tmp_path: Path) -> None:
    model = MODELS.build("mlp:hidden=3")((2,), 2, RNG)
    state = model.module.state_dict()
    tensors, pickled, nested = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.pth"))
    safetensors.torch.save_file(state, tensors)
    torch.save(state, pickled)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, nested)
    for path in (tensors, pickled, nested):
        loaded = load_checkpoint(path, architecture="mlp:hidden=3", shape=(2,), classes=2)
        assert loaded.state_sha256() == model.state_sha256()
        built = MODELS.build(f"path:{path},architecture=mlp:hidden=3")((2,), 2, RNG)
        assert built.state_sha256() == model.state_sha256()
        with pytest.raises(CheckpointError, match="architecture"):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_checkpoint(path, architecture="mlp:hidden=4", shape=(2,), classes=2)
        with pytest.raises(CheckpointError, match="does not fit"):
            load_checkpoint(path, architecture="mlp:hidden=3+3", shape=(2,), classes=2)


def test_another_task_or_architecture(model: TorchModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    with pytest.raises(BadModel, match="shape"):
        load_checkpoint(path, shape=(1, 8, 8))
    with pytest.raises(BadModel, match="classes"):
        load_checkpoint(path, classes=10)
    with pytest.raises(CheckpointError, match="cnn"):
        load_checkpoint(path, architecture="cnn")
    with pytest.raises(CheckpointError, match="can't read"):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = TorchModel(Tied().eval(), Box(0.0, 1.0, (2,)), 2, architecture="mlp:hidden=2")
    path = tmp_path / "tied.safetensors"
    save_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="does not fit"):  # of the architecture it claims to be
        load_checkpoint(path)
    assert len(safetensors.torch.load_file(path)) == 4


def test_what_can_not_be_saved(model: TorchModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        save_checkpoint(model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="architecture"):
        save_checkpoint(TorchModel(nn.Flatten()), tmp_path / "model.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write"):
        save_checkpoint(model, tmp_path / "file" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "wrap", "prefix"),
    [
        ("net.pth", lambda state: {"net": state, "acc": 93.2, "epoch": 7}, ""),
        ("compiled.pt", lambda state: state, "_orig_mod."),
        ("both.pth", lambda state: {"model": state}, "_orig_mod.module."),
        ("lightning.ckpt", lambda state: {"state_dict": state, "hyper_parameters": {}, "epoch": 3}, "model."),
    ],
)
def test_weights_as_training_scripts_leave_them(name: str, wrap: Any, prefix: str, tmp_path: Path) -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    file = tmp_path / name
    torch.save(wrap({prefix + key: value for key, value in net.state_dict().items()}), file)
    fill_from_file(other, file)
    assert torch.equal(net.weight, other.weight)
    own = nn.ModuleDict({"net": nn.Linear(3, 2), "model": nn.Linear(3, 2)})
    torch.save(own.state_dict(), file)
    fill_from_file(nn.ModuleDict({"net": nn.Linear(3, 2), "model": nn.Linear(3, 2)}), file)
    torch.save({f"other.{key}": value for key, value in net.state_dict().items()}, file)
    with pytest.raises(CheckpointError, match="does not fit"):
        fill_from_file(other, file)


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    file = tmp_path / "other.pth"
    for content, said in (
        ({"model_ema": state, "optimizer": {}}, r"model_ema \(\w+\), optimizer \(dict\)"),
        ({"generator": state, "critic": state}, "generator"),
        ({"state_dict": state, "best": np.float64(3.0)}, r"numpy.*scalar"),
        ([1, 2], "a list"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=said) as raised:
            fill_from_file(nn.Linear(3, 2), file)
        assert "\n" not in str(raised.value)
