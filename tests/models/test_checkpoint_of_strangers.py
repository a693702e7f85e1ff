"""A stranger's checkpoint is data: it names advkit's own architectures alone, and takes no memory beyond it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from advkit.core.errors import CheckpointError, UsageError
from advkit.core.registry import outside
from advkit.core.rng import RowRng
from advkit.models import MODELS, own_architecture, zoo
from advkit.models.checkpoint import _seal, load_checkpoint, pack, save_checkpoint, unpack

SHAPE = (1, 4, 4)
MARKER = "open('MARK', 'w').close()\ndef make(shape, classes):\n    raise SystemExit\n"


@pytest.fixture
def genuine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "leaves_a_mark.py").write_text(MARKER)
    sys.modules.pop("leaves_a_mark", None)
    model = MODELS.build("mlp:hidden=8")(SHAPE, 3, RowRng.from_ids(0, ["a"]))
    save_checkpoint(model, tmp_path / "genuine.safetensors", extra={"seed": 1})
    return tmp_path / "genuine.safetensors"


def forged(genuine: Path, **changes: str) -> Path:
    """The checkpoint with other metadata and a seal that fits it: the seal is a plain hash."""
    tensors, metadata = unpack(genuine.read_bytes(), genuine)
    metadata |= changes
    metadata["seal"] = _seal(metadata)
    other = genuine.with_name("forged.safetensors")
    other.write_bytes(pack(tensors, metadata))
    return other


@pytest.mark.parametrize(
    "spec",
    [
        "python:leaves_a_mark:make",
        "PYTHON:leaves_a_mark:make",
        " Python : leaves_a_mark:make",
        "python:[leaves_a_mark:make]",
        "python:target=leaves_a_mark:make",
        "snn:surrogate=[python:leaves_a_mark:make]",
        "snn:surrogate=python:leaves_a_mark:make",
        "hf:nobody/nothing",
        "timm:resnet18",
        "torchvision:resnet18,pretrained=false",
        "robustbench:Carmon2019Unlabeled",
        "gguf:model.gguf",
        "path:genuine.safetensors",
        "zoo:digits-mlp",
        "toychat",
        "nothing",
        "",
        ":",
        "mlp:hidden=[8",
    ],
)
def test_a_file_names_advkits_own_architectures_alone(
    spec: str, genuine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built for what the file says, and nothing imported."""
    file = forged(genuine, architecture=spec)
    monkeypatch.setattr(type(MODELS), "build", lambda *_: pytest.fail("a part was built"))
    monkeypatch.setattr(type(MODELS), "load", lambda *_: pytest.fail("a class was loaded"))
    with pytest.raises(CheckpointError):
        load_checkpoint(file)
    assert not Path("MARK").exists()


def test_a_part_of_another_package_is_no_architecture_of_a_file(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the network nor inside one."""
    module = sys.modules[outside.__module__]
    entry = EntryPoint("theirs", "leaves_a_mark:make", "advkit.models")
    monkeypatch.setattr(module, "_installed_parts", lambda: {"theirs": entry})
    for spec in ("theirs", "Theirs:width=3", "snn:surrogate=theirs", "snn:surrogate=[theirs:a=1]"):
        assert outside(spec)
        with pytest.raises(CheckpointError):
            load_checkpoint(forged(genuine, architecture=spec))
    assert not Path("MARK").exists()


def test_every_own_architecture_may_be_named() -> None:
    own = [name for name in MODELS.table if own_architecture(name)]
    assert own == [name for name in MODELS.table if not name.endswith(":") and name != "toychat"]
    assert {each.model.partition(":")[0] for each in zoo.cards()} <= set(own)


def test_the_user_may_name_what_a_file_may_not(genuine: Path) -> None:
    """The architecture that is asked for is the user's own word; it must be the file's, text for text."""
    Path("nets.py").write_text(
        "import torch\n"
        "def make(shape, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes))\n"
    )
    spec = "python:nets:make"
    model = MODELS.build(spec)(SHAPE, 3, RowRng.from_ids(0, ["a"]))
    save_checkpoint(model, "own.safetensors")
    with pytest.raises(CheckpointError, match="not advkit's own"):
        load_checkpoint("own.safetensors")
    loaded = load_checkpoint("own.safetensors", architecture=spec)
    x = torch.rand(5, *SHAPE)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="holds"):
        load_checkpoint("own.safetensors", architecture="python:leaves_a_mark:make")
    assert not Path("MARK").exists()


def test_a_card_names_advkits_own_architectures_alone(genuine: Path, tmp_path: Path) -> None:
    file = forged(genuine, architecture="python:leaves_a_mark:make")
    content = file.rename(tmp_path / "theirs.safetensors").read_bytes()
    card = zoo.Card(
        name="theirs",
        task="digits",
        model="python:leaves_a_mark:make",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )
    (tmp_path / "theirs.json").write_text(card.to_json())
    with pytest.raises(CheckpointError, match="architecture"):
        zoo.load("theirs", tmp_path)
    assert not Path("MARK").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "mlp:hidden=1000000+1000000"},
        {"architecture": "cnn:width=1000000,hidden=1000000"},
        {"architecture": "wrn-28-10:depth=600000004"},
        {"classes": "1000000000000"},
        {"classes": str(10**30)},
        {"shape": "[1, 1000000, 1000000]"},
        {"shape": json.dumps([10**30])},
    ],
)
def test_sizes_are_checked_before_memory_is_taken(
    changes: dict[str, str], genuine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = forged(genuine, **changes)
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were put into a network")
    )
    with pytest.raises(UsageError, match=r"does not fit|sizes|depth must be|choose smaller layers"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtypes": json.dumps({"1.weight": "load"})},
        {"dtypes": "[]"},
        {"mean": '["a"]'},
        {"mean": "{}", "std": "[[]]"},
        {"space": "[]"},
        {"space": '{"kind": "box", "low": [1, [2]], "high": 1, "shape": null, "levels": null}'},
        {"shape": "7"},
        {"classes": "many"},
    ],
)
def test_metadata_of_another_form_is_one_line(changes: dict[str, str], genuine: Path) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(forged(genuine, **changes))


def test_an_archive_that_unpacks_to_more_than_it_holds_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10_000_000)
    (tmp_path / "bomb.pt").write_bytes(buffer.getvalue())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(CheckpointError, match="10000000 bytes"):
        load_checkpoint(tmp_path / "bomb.pt", architecture="mlp", shape=SHAPE, classes=3)


def test_the_defense_that_a_file_tells_runs_no_code(genuine: Path) -> None:
    """A checkpoint says which defense trained it; asked for by its name alone, its settings are not built unseen."""
    from advkit.evaluation.victims import protected
    from advkit.tasks.arrays import Arrays

    told = {"seed": 1, "defense": "pubdef:attack=[python:leaves_a_mark:make]"}
    file = forged(genuine, extra=json.dumps(told))
    task = Arrays(torch.rand(6, *SHAPE), torch.arange(6) % 3)
    with pytest.raises(CheckpointError, match=r"python:leaves_a_mark:make.*name that defense yourself"):
        protected(f"path:{file}", "pubdef", task)
    assert not Path("MARK").exists()
    honest = forged(genuine, extra=json.dumps({"seed": 1, "defense": "pgd_at:eps=0.1"}))
    assert protected(f"path:{honest}", "pgd_at", task).defense == "pgd_at:eps=0.1"
