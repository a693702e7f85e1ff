"""MAITE 0.10: models and data sets by name, our attacks as its augmentation, objects that break the protocol."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import advkit
from advkit.cli.main import run
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.rng import RowRng
from advkit.evaluation.maite import AttackAugmentation, MaiteClassifier, MaiteDataset
from advkit.evaluation.run.store import read_records
from advkit.models import MODELS
from advkit.tasks import TASKS

OBJECTS = """
import numpy as np
import torch

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 16)).astype(np.float32)
W -= W.mean(1, keepdims=True)
X = RNG.uniform(0.3, 0.7, (12, 1, 4, 4)).astype(np.float32)
Y = (X.reshape(12, 16) @ W.T).argmax(1)


class Data:
    metadata = {"id": "squares", "index2label": {0: "a", 1: "b", 2: "c"}}

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], np.eye(3)[Y[i]], {"id": i}


class Model:
    metadata = {"id": "linear"}

    def __call__(self, batch):
        return [np.asarray(x).reshape(-1) @ W.T for x in batch]


class Torch:
    metadata = {"id": "linear in torch"}

    def __call__(self, batch):
        return [torch.as_tensor(x).reshape(-1) @ torch.from_numpy(W).T for x in batch]


data, model = Data(), Model()


def bad(cls, **members):
    return type("Bad", (cls,), members)()


no_metadata = object()
no_id = bad(Model, metadata={"name": "x"})
scalar = bad(Model, __call__=lambda self, batch: [np.float32(1) for x in batch])
too_few = bad(Model, __call__=lambda self, batch: [np.zeros(3)])
raises = bad(Model, __call__=lambda self, batch: 1 / 0)
other_names = bad(Model, metadata={"id": "x", "index2label": {0: "a"}})
cut = bad(Torch, __call__=lambda self, batch: [torch.as_tensor(x).detach().reshape(-1)[:3] for x in batch])
pair = bad(Data, __getitem__=lambda self, i: (X[i], np.eye(3)[Y[i]]))
flat = bad(Data, __getitem__=lambda self, i: (X[i][0], np.eye(3)[Y[i]], {"id": i}))
numbered = bad(Data, __getitem__=lambda self, i: (X[i], Y[i], {"id": i}))
tie = bad(Data, __getitem__=lambda self, i: (X[i], np.ones(3), {"id": i}))
nameless = bad(Data, __getitem__=lambda self, i: (X[i], np.eye(3)[Y[i]], {}))
twice = bad(Data, __getitem__=lambda self, i: (X[i], np.eye(3)[Y[i]], {"id": "same"}))
outside = bad(Data, __getitem__=lambda self, i: (4 * X[i], np.eye(3)[Y[i]], {"id": i}))
broken = bad(Data, __getitem__=lambda self, i: 1 / 0)
empty = bad(Data, __len__=lambda self: 0)


def needs(argument):
    return data
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "maite_objects.py").write_text(OBJECTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("maite_objects")
    sys.modules.pop("maite_objects", None)


def model_of(spec: str, task: Any) -> Any:
    return MODELS.build(spec)(tuple(task.space.shape), task.classes, RowRng(0, ["model"]), space=task.space)


def test_a_data_set_and_models_by_name(module: Any, tmp_path: Path) -> None:
    task = TASKS.build("maite:maite_objects.Data")
    assert (task.name, task.classes, task.class_names(), len(task)) == ("squares", 3, ("a", "b", "c"), 12)
    batch = next(iter(task.batches(12)))
    assert torch.equal(batch.x, torch.from_numpy(module.X))
    assert batch.labels.tolist() == module.Y.tolist()
    assert batch.ids == tuple(map(str, range(12)))
    for spec in ("maite:maite_objects.model", "maite:maite_objects:Torch,gradients=true"):
        model = model_of(spec, task)
        assert torch.allclose(model(batch.x), batch.x.flatten(1) @ torch.from_numpy(module.W).T, atol=1e-6)
        assert model.describe().differentiable == spec.endswith("true")
        assert model.describe().state_sha256 == model_of(spec, task).describe().state_sha256


def test_a_run_by_names_is_that_of_the_same_network(module: Any, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3, bias=False))
    net[1].weight.data = torch.from_numpy(module.W)
    asked = {"attack": "fgsm", "task": "maite:maite_objects.data", "threat_model": "linf:eps=0.03", "device": "cpu"}
    for name, model in (("named", "maite:maite_objects.Torch,gradients=true"), ("net", net.eval())):
        advkit.evaluate(model=model, out=tmp_path / name, **asked)
    found = [read_records(tmp_path / name / "records.jsonl") for name in ("named", "net")]
    assert [record.outcome for record in found[0]] == [record.outcome for record in found[1]]
    assert len({record.outcome for record in found[0]}) > 1
    blind = advkit.evaluate(model="maite:maite_objects.Torch", **asked)  # without gradients=true it has scores alone
    assert not blind.trustworthy
    assert "not_differentiable" in {flag["id"] for flag in blind.flags}


def test_the_protocols_and_the_programs_of_the_package(module: Any) -> None:
    pytest.importorskip("maite")
    import maite.protocols.image_classification as ic
    from maite.tasks import evaluate

    augmentation = AttackAugmentation(
        "fgsm", module.Torch(), threat_model="linf:eps=0.03", gradients=True, device="cpu"
    )
    model, data = MaiteClassifier(lambda x: x.flatten(1) @ torch.from_numpy(module.W).T, "ours"), module.data
    own = MaiteDataset(TASKS.build("maite:maite_objects.Data"), 12)
    assert isinstance(augmentation, ic.Augmentation)
    assert isinstance(model, ic.Model)
    assert isinstance(own, ic.Dataset)

    class Accuracy:
        metadata = {"id": "accuracy"}

        def __init__(self) -> None:
            self.reset()

        def reset(self) -> None:
            self.right: list[bool] = []

        def update(self, predictions: Any, targets: Any, metadata: Any) -> None:
            self.right += [int(np.argmax(p)) == int(np.argmax(t)) for p, t in zip(predictions, targets, strict=True)]

        def compute(self) -> dict[str, float]:
            return {"accuracy": sum(self.right) / len(self.right)}

    report = advkit.evaluate(
        "fgsm", task="maite:maite_objects.data", model="maite:maite_objects.Torch,gradients=true",
        threat_model="linf:eps=0.03", device="cpu",
    )  # fmt: skip
    for dataset, size in ((data, 5), (own, 12)):
        accuracy, _, batches = evaluate(
            model=model, metric=Accuracy(), dataset=dataset, batch_size=size, augmentation=augmentation,
            return_augmented_data=True,
        )  # fmt: skip
        assert accuracy["accuracy"] == pytest.approx(report.metrics["robust_accuracy"]["value"])
        told = [each["advkit"] for _, _, metadata in batches for each in metadata]
        assert sum(each["broken"] for each in told) == report.metrics["attack_success_rate"]["numerator"] > 0
        assert {(each["attack"], each["threat_model"], each["seed"]) for each in told} == {("fgsm", "linf:eps=0.03", 0)}
        moved = [np.abs(x - module.X[int(m["id"])]).max() for xs, _, ms in batches for x, m in zip(xs, ms, strict=True)]
        assert max(moved) <= 0.03 * (1 + 1e-5)


def test_what_goes_out_comes_back(module: Any) -> None:
    task = TASKS.build("maite:maite_objects.Data")
    module.again = MaiteDataset(task)
    twin = TASKS.build("maite:maite_objects.again")
    assert torch.equal(twin.rows.x, task.rows.x)
    assert (twin.rows.ids, twin.class_names(), twin.digest()) == (task.rows.ids, task.class_names(), task.digest())
    with pytest.raises(IndexError):
        module.again[len(task)]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("no_metadata", UsageError, "object lacks metadata"),
        ("no_id", UsageError, "whose id is a text"),
        ("scalar", BadModel, r"targets of shape \[\]"),
        ("too_few", BadModel, "1 targets to 4 images"),
        ("raises", BadModel, r"does not take images of shape \[1, 4, 4\] \(ZeroDivisionError"),
        ("other_names", UsageError, "a name for each of the classes 0 to 2"),
        ("cut,gradients=true", BadModel, "answers without a gradient"),
        ("model,gradients=true", BadModel, "it gets torch tensors because of gradients=true"),
        ("nothing", Exception, "expected a MAITE model"),
    ],
)
def test_bad_models_are_refused_in_one_line(name: str, error: type[Exception], says: str) -> None:
    task = TASKS.build("maite:maite_objects.data")
    with pytest.raises(error, match=says) as caught:
        model_of(f"maite:maite_objects.{name}", task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("model", UsageError, "lacks __getitem__, __len__"),
        ("pair", BadInput, "a tuple of image, target and metadata"),
        ("flat", BadInput, r"images \[C, H, W\]"),
        ("numbered", BadInput, r"a target of shape \[\]"),
        ("tie", BadInput, "no class is the likeliest"),
        ("nameless", BadInput, "whose id is a number or text"),
        ("twice", BadInput, "12 ids for 12 samples"),
        ("outside", BadInput, "squares"),
        ("broken", BadInput, r"sample 0 can't be read \(ZeroDivisionError"),
        ("empty", BadInput, "no samples|no classes"),
        ("needs", UsageError, "can't be made without arguments"),
    ],
)
def test_bad_data_sets_are_refused_in_one_line(name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        _ = TASKS.build(f"maite:maite_objects.{name}").rows
    assert "\n" not in str(caught.value)


def test_bad_batches_are_refused(module: Any) -> None:
    augmentation = AttackAugmentation("fgsm", module.Torch(), gradients=True)
    x, t, m = [module.X[0]], [np.eye(3)[0]], [{"id": 0}]
    for batch, says in (
        ((x, t), "a MAITE batch"),
        ((x, [], m), "as many of each"),
        (([(255 * x[0]).astype(np.uint8)], t, m), "expected float images"),
        ((x, [0], m), "one number per class"),
        ((x, t, [{}]), "whose id"),
    ):
        with pytest.raises(BadInput, match=says):
            augmentation(batch)  # type: ignore[arg-type]
    assert augmentation(([], [], [])) == ([], [], [])


def test_the_command_line_says_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--attack", "square", "--task", "maite:maite_objects.tie", "--model", "cnn"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert run(["evaluate", "--attack", "square", "--task", "maite:alone", "--model", "cnn"]) == 2
    assert "expected maite:MODULE.NAME" in capfd.readouterr().err


@pytest.mark.slow
def test_the_snippets_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/maite.md: commands on objects in the working directory, and the augmentation in another program."""
    page = (Path(__file__).parents[2] / "docs" / "maite.md").read_text(encoding="utf-8")
    commands, *_ = re.findall(r"^```console\n(.*?)^```$", page, re.M | re.S)
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "my_objects.py").write_text(OBJECTS + "\nmodel = Torch()\n")
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "advkit"
        assert run([*arguments, "--device", "cpu", "--no-plots"]) == 0
    objects = __import__("my_objects")
    try:
        samples = [objects.data[i] for i in range(len(objects.data))]
        images, targets, metadata = (list(each) for each in zip(*samples, strict=True))
        names: dict[str, Any] = {"model": objects.model, "images": images, "targets": targets, "metadata": metadata}
        exec(compile(snippet, "docs/maite.md", "exec"), names)
        assert [each["advkit"]["label"] for each in names["metadata"]] == objects.Y.tolist()
        assert any(each["advkit"]["broken"] for each in names["metadata"])
        assert all(np.abs(new - old).max() <= 8 / 255 + 1e-6 for new, old in zip(names["images"], images, strict=True))
    finally:
        sys.modules.pop("my_objects", None)
