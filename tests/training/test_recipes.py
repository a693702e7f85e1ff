"""Recipes as files: what they say is what a run gets, each shipped one trains, and a file is data whoever wrote it."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from advkit.core.errors import UnknownName, UsageError
from advkit.core.files import MOST_YAML
from advkit.core.protocols import Data
from advkit.core.registry import outside
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.evaluation.victims import train_victim
from advkit.models import MODELS
from advkit.models.resnet import ResNet18
from advkit.tasks import TASKS
from advkit.training.loop import Recipe, fit
from advkit.training.recipes import FOLDER, METHODS, NAMES, RECIPES

EPS = 8 / 255


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    return tmp_path


def written(text: str | bytes, name: str = "mine.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def defense(name: str) -> Any:
    """The defense of a recipe, with its settings."""
    held = RECIPES.build(name)
    return DEFENSES.build(f"{held.defense},recipe=[{held.text}]")


# --- the shipped ones


def test_every_file_is_listed_and_every_name_has_its_file() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert RECIPES.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_names_parts_that_there_are(name: str) -> None:
    held = RECIPES.build(name)
    assert held.about
    assert defense(name).recipe == held.recipe()
    assert TASKS.build(held.task).name == name.partition("-")[0]
    assert MODELS.build(held.said("model"))
    assert DEFENSES.build(f"none:recipe=[{name}]") == DEFENSES.build(f"none:recipe=[{held.text}]")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("cifar100")])
def test_a_shipped_recipe_trains(name: str) -> None:
    """One epoch on a dozen images and a small network; those of CIFAR-100 differ in weights alone (below)."""
    generator = torch.Generator().manual_seed(0)
    data = Data(torch.rand(12, 3, 8, 8, generator=generator), torch.arange(12) % 3, Box(shape=(3, 8, 8)), 3, "few")
    guard = DEFENSES.build(f"{RECIPES.build(name).defense},recipe=[{name},epochs=1,batch_size=6]")
    start: Any = MODELS.build("resnet8:width=2")((3, 8, 8), 3, RowRng.from_ids(0, ["init"]))
    done = fit(start, data, guard.objective(), guard.recipe, RowRng.from_ids(0, ["train"]), progress=False)
    assert len(done.log) == 1
    assert any(
        not torch.equal(before, after)
        for before, after in zip(start.module.parameters(), done.last.module.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_recipes_for_cifar_100_are_those_for_cifar_10(method: str) -> None:
    """But for AAER, whose weights the paper tells for both."""
    ten, hundred = (RECIPES.build(f"{task}-{method}") for task in ("cifar10", "cifar100"))
    assert ten.settings == hundred.settings
    if method != "aaer-fgsm-rs":
        assert ten.defense == hundred.defense
    assert isinstance(MODELS.build(ten.model), ResNet18)
    assert isinstance(MODELS.build(hundred.model), ResNet18)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cifar10-pgd-at", {"eps": EPS, "steps": 10}),
        ("cifar10-trades", {"eps": EPS, "steps": 10, "beta": 6}),
        ("cifar10-mart", {"beta": 5}),
        ("cifar10-awp-pgd-at", {"gamma": 0.01, "warm_up": 0}),
        ("cifar10-awp-trades", {"gamma": 0.005, "warm_up": 10}),
        ("cifar10-grad-align", {"weight": 0.2}),
        ("cifar10-free-at", {"replays": 8}),
        ("imagenet-free-at", {"replays": 4}),
        ("imagenet-conadv", {"tau": 1, "weight": 0.5, "dual_bn": True, "eps": 1 / 255}),
        ("cifar10-aaer-fgsm-rs", {"eps": EPS, "lambdas": (1, 2.5, 1.5), "ce_grad": False}),
        ("cifar10-aaer-n-fgsm", {"lambdas": (1, 1.5, 0.15)}),
        ("cifar100-aaer-fgsm-rs", {"lambdas": (1, 3.5, 1.5)}),
        ("cifar100-aaer-n-fgsm", {"lambdas": (1, 1.5, 0.15)}),
    ],
)
def test_settings_are_the_papers(name: str, settings: dict[str, Any]) -> None:
    guard = defense(name)
    assert {key: getattr(guard, key) for key in settings} == settings


def test_the_steps_and_schedules_of_the_papers() -> None:
    inner = DEFENSES.build(RECIPES.build("cifar10-pgd-at").defense).attack  # type: ignore[attr-defined]
    assert inner.step_size * EPS == pytest.approx(2 / 255)
    step = defense("cifar10-fgsm-rs").step
    assert step.size * EPS == pytest.approx(10 / 255)
    assert not defense("cifar10-n-fgsm").step.clip
    trades = RECIPES.build("cifar10-trades").recipe()
    rates = [trades.lr_at(epoch, trades.epochs) for epoch in (0, 74, 75, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cyclic = RECIPES.build("cifar10-n-fgsm").recipe()
    assert max(cyclic.lr_at(step, 10_000) for step in range(10_000)) == pytest.approx(0.2, abs=1e-4)
    assert cyclic.lr_at(4_999, 10_000) > 0.199
    large = RECIPES.build("imagenet-conadv").recipe()
    assert (large.optimizer, large.epochs, large.batch_size) == ("lars", 90, 4096)


# --- what a recipe text may be


FILE = """
about: |
  A try.
defense: trades:eps=0.1,steps=1
task: digits
model: mlp:hidden=8
recipe:
  epochs: 2
  batch-size: 64
  lr: 1e-3          # a text to YAML 1.1
  schedule: steps
  milestones: [0.5, .75, 9e-1]
"""


def test_a_file_is_read_as_it_is_written(here: Path) -> None:
    held = RECIPES.build(written(FILE))
    assert (held.about, held.defense, held.task, held.model) == (
        "A try.", "trades:eps=0.1,steps=1", "digits", "mlp:hidden=8",
    )  # fmt: skip
    made = Recipe(epochs=2, batch_size=64, lr=0.001, schedule="steps", milestones=(0.5, 0.75, 0.9))
    assert held.recipe() == made
    assert DEFENSES.build("pgd_at:recipe=mine.yaml") == DEFENSES.build(f"pgd_at:recipe=[{held.text}]")


def test_settings_after_a_name_or_a_file_go_first(here: Path) -> None:
    written(FILE)
    assert RECIPES.build("mine.yaml,lr=0.5,ema=0.9").recipe() == Recipe(
        epochs=2, batch_size=64, lr=0.5, schedule="steps", milestones=(0.5, 0.75, 0.9), ema=0.9
    )
    built: Any = DEFENSES.build("trades:recipe=[cifar10-trades,epochs=3],beta=2")
    assert (built.recipe.epochs, built.recipe.weight_decay, built.beta) == (3, 2e-4, 2)
    assert DEFENSES.build(DEFENSES.spec(built)) == built
    assert "cifar10" not in DEFENSES.spec(built)  # what is stored says the settings, not where they came from
    assert RECIPES.build("epochs=3,lr=0.1").recipe() == Recipe(epochs=3, lr=0.1)
    assert RECIPES.build("").recipe() == Recipe()
    assert RECIPES.build("CIFAR10_trades").defense == RECIPES.build("cifar10-trades").defense


@pytest.mark.parametrize(
    ("written_as", "field", "value"),
    [
        ("lr: 1e-3", "lr", 0.001),
        ('lr: "0.1"', "lr", 0.1),
        ("lr: 1/8", "lr", 0.125),
        ("epochs: 010", "epochs", 10),  # eight to YAML 1.1
        ("compile: on", "compile", True),
        ("compile: No", "compile", False),
        ("schedule: none", "schedule", "none"),
        ("milestones: 0.5+0.9", "milestones", (0.5, 0.9)),
        ("milestones: []", "milestones", ()),
    ],
)
def test_values_mean_what_they_mean_on_the_command_line(here: Path, written_as: str, field: str, value: Any) -> None:
    made = RECIPES.build(written(f"recipe:\n  {written_as}\n")).recipe()
    assert getattr(made, field) == value
    assert type(getattr(made, field)) is type(value)
    assert made == DEFENSES.build("none:recipe=mine.yaml").recipe  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("line 1", "empty", "about, defense, task, model, recipe")),
        ("- a\n- b\n", ("line 1", "expected keys and values")),
        ("recip:\n  epochs: 1\n", ("line 2", "'recip'", "did you mean 'recipe'")),
        ("about: x\nepochs: 3\n", ("line 2", "below recipe:")),
        ("recipe:\n  lr: 0.1\n  epoch: 3\n", ("line 3", "no field 'epoch'", "did you mean 'epochs'")),
        ("recipe:\n  lr: fast\n", ("line 2", "lr expects float, not 'fast'")),
        ("recipe:\n  epochs: 1.5\n", ("line 2", "epochs expects int, not '1.5'")),
        ("recipe:\n  epochs: 1:30\n", ("line 2", "epochs expects int, not '1:30'")),  # ninety to YAML 1.1
        ("recipe:\n  select: on\n", ("line 2", "best | last", "'on'")),
        ("recipe:\n  lr: nan\n", ("line 2", "lr")),
        ("recipe:\n  lr: -1\n", ("line 2", "lr is -1", "a positive number")),
        ("recipe:\n  epochs:\n", ("line 2", "epochs has no value")),
        ("recipe:\n  epochs: ~\n", ("line 2", "epochs has no value")),
        ("recipe:\n", ("line 1", "recipe has no value")),
        ("recipe: fast\n", ("line 1", "keys and values below it")),
        ("recipe:\n  epochs: [1, 2]\n", ("line 2", "epochs expects int")),
        ("recipe:\n  epochs: {a: 1}\n", ("line 2", "too deep")),
        ("recipe:\n  milestones: [[0.5]]\n", ("line 2", "a list of lists")),
        ("recipe:\n  epochs: 1\n  lr: 1\n  epochs: 2\n", ("line 4", "epochs is given twice", "line 2")),
        ("recipe:\n  batch_size: 1\n  batch-size: 2\n", ("line 3", "batch_size is given twice")),
        ("task: digits\ntask: digits\n", ("line 2", "task is given twice")),
        ('recipe:\n  lr: "0.1,epochs=3"\n', ("line 2", "lr expects float")),
        ("defense: [a]\n", ("line 1", "defense expects a text")),
        ("defense:\n", ("line 1", "defense has no value")),
        ("defense: pgd_at:recipe=[epochs=3]\n", ("line 1", "under recipe:")),
        ("defense: 'a,b'\n", ("line 1", "defense", "expected name:key=value")),
        ("a: b: c\n", ("line 1", "no YAML")),
        ("recipe:\n\tepochs: 1\n", ("line 2", "no YAML")),
        ("about: x\n---\nabout: y\n", ("second document",)),
        ("? [a]\n: b\n", ("line 1", "a key that is no text")),
        ("recipe: &a\n  epochs: 1\n", ("line 1", "&a", "no anchors and aliases")),
        ("about: *a\n", ("line 1", "*a", "no anchors and aliases")),
        ("about: !!python/object/apply:os.system [exit]\n", ("line 1", "python/object/apply:os.system", "tag")),
        ("about: !!str x\n", ("line 1", "tag")),
        (b"about: \xff\n", ("UTF-8",)),
        ("about: \x00\n", ("no YAML",)),
        ("#" * (MOST_YAML + 1), ("64 KiB",)),
        ("recipe: " + "[" * 60_000, ("line 1", "a list of lists")),
        ("{" * 60_000, ("line 1", "a key that is no text")),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(here: Path, text: str | bytes, says: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refused:
        RECIPES.build(written(text))
    assert "mine.yaml" in str(refused.value)
    assert all(each in str(refused.value) for each in says), str(refused.value)


def test_aliases_multiply_nothing(here: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="no anchors and aliases"):
            RECIPES.build(written("\n".join(lines)))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cifar10-trade", ("unknown recipe 'cifar10-trade'", "did you mean 'cifar10-trades'", "advkit list recipes")),
        ("epochs", ("unknown recipe 'epochs'", "key=value")),
        ("nowhere.yaml", ("nowhere.yaml can't be read",)),
        ("folder.yaml", ("folder.yaml is no regular file",)),
        ("./mine.txt", ("ends in .yaml",)),
        ("mine.txt", ("ends in .yaml",)),
        ("cifar10-trades,epochs=1,,", ("empty argument",)),
    ],
)
def test_what_names_no_recipe_is_refused(here: Path, text: str, says: tuple[str, ...]) -> None:
    (here / "folder.yaml").mkdir()
    (here / "mine.txt").write_text("about: x")
    with pytest.raises(UsageError) as refused:
        RECIPES.build(text)
    assert all(each in str(refused.value) for each in says), str(refused.value)


def test_a_defense_says_how_its_recipe_may_be_written() -> None:
    with pytest.raises(UsageError, match=r"recipe expects \[key=value,...\] of Recipe \| NAME or FILE.yaml"):
        DEFENSES.build("pgd_at:recipe=epochs=3")
    with pytest.raises(UnknownName, match="in recipe=cifar10-at: unknown recipe"):
        DEFENSES.build("pgd_at:recipe=cifar10-at")


# --- a file is data


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("defense: python:bomb:Guard", "runs a Python module"),
        ("task: python:bomb:rows", "runs a Python module"),
        ("model: python:bomb:net", "runs a Python module"),
        ("defense: awp:base=[python:bomb:Guard]", "runs a Python module"),
        ("model: timm:resnet18", "hub"),
        ("model: timm:resnet18,pretrained=true", "hub"),
        ("model: torchvision:resnet18,pretrained=false,checkpoint=x.pt", "hub"),
        ("model: hf:x", "hub"),
        ("model: path:x.pt", "opens a file"),
        ("task: cifar10:root=x,download=true", "fetches from the network"),
        ("task: cifar10:root=x,download=[true]", "fetches from the network"),
        ("task: cifar10:root=x,download=[[ yes]]", "fetches from the network"),
        ("defense: zo_ds:weights=[x.safetensors]", "opens a file"),
        ("defense: pubdef:cache=elsewhere", "writes to a folder"),
    ],
)
def test_a_file_names_advkits_own_parts_alone(here: Path, line: str, what: str) -> None:
    (here / "bomb.py").write_text("raise SystemExit('imported')\n")
    with pytest.raises(UsageError) as refused:
        train_victim(None, None, None, recipe=written(f"{line}\n"), out=here / "out", device="cpu")
    kind = line.partition(":")[0]
    assert all(each in str(refused.value) for each in ("mine.yaml", what, f"--{kind}"))


def test_architectures_of_other_packages_without_weights_fetch_nothing(here: Path) -> None:
    for model in ("torchvision:resnet18,pretrained=false", "timm:resnet18,pretrained=no"):
        assert RECIPES.build(written(f"model: {model}\n")).said("model") == model


@pytest.mark.slow
def test_what_the_command_line_says_is_not_asked_of_the_file(here: Path) -> None:
    """Nor is the file's part looked at where settings alone are taken."""
    file = written("task: python:bomb:rows\nmodel: timm:resnet18\nrecipe:\n  epochs: 1\n")
    made = train_victim("mlp:hidden=4", None, "digits", recipe=file, out=here / "out", device="cpu")
    assert (made["task"], made["model"], made["epochs"]) == ("digits", "mlp:hidden=4", 1)
    built: Any = DEFENSES.build(f"pgd_at:recipe={file}")
    assert built.recipe == Recipe(epochs=1)


def test_a_spec_that_came_in_a_file_opens_no_recipe_file() -> None:
    assert outside("pgd_at:recipe=[/tmp/x.yaml,epochs=1]") == ["/tmp/x.yaml (opens a file)"]
    assert outside("pgd_at:recipe=x.YML") == ["x.YML (opens a file)"]
    assert outside("pgd_at:recipe=[cifar10-trades,epochs=1]") == []
    assert outside("pubdef:weights=0.7+0.3,eps=0.1") == []  # of a sum: no file


def test_yaml_is_imported_when_a_file_is_read() -> None:
    code = (
        "import sys, advkit.cli.main, advkit.training.recipes as r; before = 'yaml' in sys.modules; "
        "r.RECIPES.summary('cifar10-trades'); print(before, 'yaml' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "False"]


# --- training by one


@pytest.mark.slow
def test_a_run_takes_from_the_recipe_what_it_is_not_told(here: Path) -> None:
    written(FILE)
    made = train_victim(None, None, None, recipe="mine.yaml,epochs=1", out=here / "a", device="cpu")
    assert (made["task"], made["model"], made["epochs"]) == ("digits", "mlp:hidden=8", 1)
    held = RECIPES.build("mine.yaml,epochs=1")
    assert DEFENSES.build(made["defense"]) == DEFENSES.build(f"{held.defense},recipe=[{held.text}]")
    report = json.loads((here / "a" / "training.json").read_text())
    assert report["recipe"] == json.loads(json.dumps(asdict(held.recipe())))
    told = train_victim("mlp:hidden=4", "none", "digits", recipe="mine.yaml,epochs=1", out=here / "b", device="cpu")
    assert told["model"] == "mlp:hidden=4"
    assert told["defense"].startswith("none:recipe=[epochs=1,batch_size=64")


def test_a_mistake_in_a_files_spec_names_the_file(here: Path) -> None:
    for kind, registry in (("defense", "pgd_ta"), ("task", "digit"), ("model", "mpl")):
        with pytest.raises(UsageError) as refused:
            train_victim(None, None, None, recipe=written(f"{kind}: {registry}\n"), out=here / "out", device="cpu")
        assert f"mine.yaml: {kind}: unknown {kind} {registry!r}; did you mean" in str(refused.value)
        assert not (here / "out").exists()


def test_an_object_keeps_its_own_settings(here: Path) -> None:
    guard = DEFENSES.build("none:recipe=[epochs=1]")
    with pytest.raises(UsageError, match="set the object's own recipe"):
        train_victim("mlp", guard, "digits", recipe="cifar10-trades", out=here / "out", device="cpu")
