"""`advkit list`: groups, columns and filters, and that what it says without importing a part is what the part is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from advkit.attacks import ATTACKS
from advkit.cli import catalogue
from advkit.cli.catalogue import ANY, GROUPS, VARIES, facts
from advkit.cli.list import REGISTRIES, registry_of
from advkit.core.errors import AdvkitError, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Data, Learns, Solves, Trains
from advkit.core.registry import parse_spec
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary, Box
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.models.ensemble import Ensemble
from advkit.tasks import TASKS
from advkit.testing.image_laws import on_images
from advkit.testing.label_laws import on_labels
from advkit.testing.play import BALLS, MINIMA, RADII, legal, names, shortened
from advkit.testing.text_laws import on_text
from advkit.testing.victims import uniform
from advkit.threat_models import GOALS, THREAT_MODELS

SHAPE, CLASSES = (2, 6, 6), 4
SOURCES = {"ens": "several", "svre": "several", "cwa": "several", "lgv": "several", "sgm": "resnet8:width=4"}
ON_CLASSES = {"untargeted": "untargeted", "targeted": "targeted"} | {
    name: f"{name}:k=2" for name in ("ordered-topk", "topk", "out-of-topk")
}
ON_CLASSES["near"] = "near:file=target.npy"  # read by the view of a model alone: attacks see its scores
THREATS = {
    **{name: f"{name}:eps={RADII[name]}" for name in BALLS},
    "transfer": "transfer:eps=0.1,sources=zoo:digits-mlp",
    "tapm": "tapm:eps=0.1",
    "online": ("online:inner=[linf:eps=0.1]", "online:inner=flips"),
    "label-flips": "label-flips:rate=0.1",
}


def own(registry: Any) -> list[str]:
    return [name for name in registry.table if registry.table[name].startswith("advkit.")]


BUILT = {name: ATTACKS.build(name) for name in own(ATTACKS) if not name.endswith(":")}
ON_TEXT = [name for name, attack in BUILT.items() if on_text(attack)]
ON_LABELS = [name for name, attack in BUILT.items() if on_labels(attack)]
ON_IMAGES = [name for name, attack in BUILT.items() if on_images(attack)]
PLAYED = [name for name in BUILT if name not in (*ON_TEXT, *ON_LABELS, *ON_IMAGES)]


# --- what is said of attacks


@cache
def net(spec: str, seed: int = 0) -> Any:
    return MODELS.build(spec)(SHAPE, CLASSES, RowRng.from_ids(seed, ["net"]))


def victim(name: str) -> Any:
    """A small untrained network that the attack works on."""
    spec = SOURCES.get(name, "cnn:width=4,hidden=8")
    plain = "cnn:width=4,hidden=8"
    return Ensemble([net(plain, 0), net(plain, 1)]) if spec == "several" else net(spec)


def refusal(attack: Any, model: Any, norm: str, goal: str) -> str | None:
    """None where the attack runs in this threat model with this goal, else the UsageError's message."""
    x = legal(uniform(1, 2, *SHAPE), norm)
    rng = RowRng.from_ids(0, names(len(x)))
    oracle = MeteredOracle(model, len(x))
    oracle.data = Data(uniform(7, 20, *SHAPE), torch.arange(20) % CLASSES, Box(shape=SHAPE), CLASSES)
    clean = model(x)
    wanted = GOALS.build(ON_CLASSES[goal])(clean.argmax(1), clean, rng)
    try:
        shortened(attack, 2, 4)(oracle, x, wanted, (BALLS | MINIMA)[norm](eps=RADII.get(norm, 0.0)), rng)
    except UsageError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize("name", own(ATTACKS))
def test_the_access_of_an_attack_is_what_its_class_needs(name: str) -> None:
    needs = ATTACKS.load(name).needs
    said = facts("attacks", ATTACKS.target(name))["access"]
    assert said == (VARIES if isinstance(needs, property) else Access(needs).name.lower())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PLAYED)
def test_the_norms_of_an_attack_are_those_it_runs_in(name: str) -> None:
    attack = ATTACKS.build(name)
    goal = "targeted" if getattr(attack, "serves", None) else "untargeted"
    said = facts("attacks", ATTACKS.target(name))["norms"]
    runs_in = [norm for norm in BALLS | MINIMA if refusal(attack, victim(name), norm, goal) is None]
    assert [*said] == runs_in


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PLAYED)
def test_the_goals_of_an_attack_are_those_it_runs_for(name: str) -> None:
    known = facts("attacks", ATTACKS.target(name))
    said = [*ON_CLASSES] if known["goals"] == ANY else known["goals"]
    attack, norm = ATTACKS.build(name), known["norms"][0]
    runs_for = {goal for goal in ON_CLASSES if refusal(attack, victim(name), norm, goal) is None}
    assert {*said} == runs_for


def test_every_goal_but_those_on_text_and_samples_is_tried() -> None:
    assert {*ON_CLASSES, "says", "reconstruction"} == {*own(GOALS)}


@pytest.mark.parametrize("name", ON_TEXT)
def test_attacks_on_text_are_made_for_the_suffix_and_what_it_says(name: str) -> None:
    attack, known = ATTACKS.build(name), facts("attacks", ATTACKS.target(name))
    assert known["norms"] == (parse_spec(attack.default_threat_model).name,) == ("suffix",)
    assert known["goals"] == (parse_spec(attack.default_goal).name,) == ("says",)
    assert all(refusal(attack, victim(name), norm, "untargeted") is not None for norm in BALLS)


@pytest.mark.parametrize("name", ON_LABELS)
def test_attacks_on_labels_are_made_for_label_flips_and_wrong_answers(name: str) -> None:
    attack, known = ATTACKS.build(name), facts("attacks", ATTACKS.target(name))
    assert known["norms"] == (parse_spec(attack.default_threat_model).name,) == ("label-flips",)
    assert known["goals"] == ("untargeted",)
    assert all(refusal(attack, victim(name), norm, "untargeted") is not None for norm in BALLS)


@pytest.mark.parametrize("name", ON_IMAGES)
def test_attacks_on_images_are_made_for_a_threat_model_of_their_own(name: str) -> None:
    attack, known = ATTACKS.build(name), facts("attacks", ATTACKS.target(name))
    assert known["norms"] == (parse_spec(attack.default_threat_model).name,)
    assert (known["goals"], known["inputs"]) == (ANY, ("images",))
    assert all(refusal(attack, victim(name), norm, "untargeted") is not None for norm in BALLS | MINIMA)


@pytest.mark.slow
def test_a_chosen_backward_rule_works_where_the_attack_inside_does() -> None:
    model = MODELS.build("snn:widths=4,down=stride,hidden=0")(SHAPE, CLASSES, RowRng.from_ids(0, ["net"]))
    known = facts("attacks", ATTACKS.target("spiking"))
    attack = ATTACKS.build("spiking:pgd")
    assert [*known["norms"]] == [norm for norm in BALLS if refusal(attack, model, norm, "untargeted") is None]
    assert known["goals"] == ANY
    assert all(refusal(attack, model, "linf", goal) is None for goal in ON_CLASSES)


def test_compositions_work_as_their_presets_do() -> None:
    known = facts("attacks", ATTACKS.target("transfer"))
    attack = ATTACKS.build("transfer:mi")
    assert [*known["norms"]] == [norm for norm in BALLS if refusal(attack, victim("mi"), norm, "untargeted") is None]
    assert known["goals"] == ANY


@pytest.mark.parametrize(
    ("package", "attacks"),
    [
        ("foolbox", {"linf": "LinfPGD", "l2": "L2PGD", "l1": "SparseL1DescentAttack"}),
        ("torchattacks", {"linf": "PGD", "l2": "PGDL2", "l0": "OnePixel"}),
        ("art", {"linf": "BasicIterativeMethod", "l2": "DeepFool", "l0": "CarliniL0Method"}),
    ],
)
def test_peers_take_balls_and_labels_or_targets(package: str, attacks: dict[str, str]) -> None:
    pytest.importorskip(package)
    known = facts("attacks", ATTACKS.target(package))
    assert {*attacks} < {*known["norms"]}
    for norm, name in attacks.items():
        assert refusal(ATTACKS.build(f"{package}:{name}"), victim(name), norm, "untargeted") is None
    first = ATTACKS.build(f"{package}:{attacks['linf']}")
    assert {goal for goal in ON_CLASSES if refusal(first, victim(""), "linf", goal) is None} == {*known["goals"]}
    assert refusal(first, victim(""), "minimum-l2", "untargeted") is not None


# --- of other parts


@pytest.mark.parametrize("name", own(THREAT_MODELS))
def test_the_inputs_of_a_threat_model_are_the_spaces_it_can_be_bound_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TASKS.build("prompts").bind(MODELS.build("toychat")().space).space
    spaces = {"images": Box(shape=(1, 8, 8)), "events": Binary(shape=(4, 2, 8, 8)), "text": text}
    specs = THREATS.get(name, name)
    threats = [THREAT_MODELS.build(spec) for spec in ([specs] if isinstance(specs, str) else specs)]
    if name == "lpips":  # its network is filled from a file of the user's
        monkeypatch.setattr("advkit.threat_models.perceptual.LPIPS._network", lambda self, device: None)
    known = facts("threat-models", THREAT_MODELS.target(name))
    assert [*known["inputs"]] == [
        kind for kind, space in spaces.items() if any(_binds(each, space) for each in threats)
    ]
    assert known["scenario"] == threats[0].scenario


def _binds(threat: Any, space: Any) -> bool:
    try:
        threat.bind(space)
    except UsageError:
        return False
    return True


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", own(DEFENSES))
def test_the_inputs_of_a_defense_are_those_it_protects(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    known = facts("defenses", DEFENSES.target(name))
    guard = DEFENSES.build(name)
    trains = guard.needs_data and isinstance(guard, Trains | Solves)
    # A front before a model that is finished is trained, and the model is not; what learns from labels brings its own.
    learns = isinstance(guard, Learns)
    assert (known["group"] == catalogue.LABELS) == learns
    assert learns or known["group"] == "smoothing" or (known["group"] == "trains the model") == trains
    settings = ":recipe=[epochs=1,batch_size=16]" if trains and not learns else ""
    if isinstance(guard, Solves):
        settings = ":patterns=3,components=2"
    rng = RowRng.from_ids(0, ["defense"])
    protected = []
    for inputs, task in (("images", "digits"), ("events", "digits-dvs"), ("text", "prompts")):
        data = TASKS.build(task)
        if inputs == "text":
            model = MODELS.build("toychat")()
            x, short = next(data.bind(model.space).batches(2)).x, None
        else:
            spec = "mlp:hidden=8" if inputs == "images" else "snn:widths=4,down=stride,hidden=0"
            model = MODELS.build(spec)(data.space.shape, 10, rng, space=data.space)
            x = next(data.batches(32)).x
            short = Data(x, torch.arange(32) % 10, data.space, 10, name=task)
        try:
            answer = DEFENSES.build(f"{name}{settings}").protect(model, short, rng)(x)
        except AdvkitError:
            continue
        assert len(answer) == len(x)
        protected.append(inputs)
    assert [*known["inputs"]] == protected


@pytest.mark.parametrize("name", own(TASKS))
def test_what_is_said_of_a_task_is_its_default(name: str) -> None:
    known = facts("tasks", TASKS.target(name))
    defaults = TASKS.load(name).defaults
    if isinstance(defaults, property):
        assert (known["threat_model"], known["model"]) == ("", "")
        defaults = TASKS.build(name).defaults if name == "prompts" else None
    else:
        assert known["threat_model"] == defaults.threat_model
        assert known["model"] in (defaults.model, parse_spec(defaults.model).name)
        assert "=" not in known["model"]
    if defaults is not None:
        assert known["inputs"] == catalogue.inputs_of_threat(defaults.threat_model)
    assert known["group"] == known["inputs"][0]


def test_a_file_of_arrays_is_taken_for_images(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "mine.npz", x=np.zeros((2, 8, 8), np.float32), y=np.arange(2))
    defaults = TASKS.build(f"npz:path={tmp_path / 'mine.npz'}").defaults
    assert facts("tasks", TASKS.target("npz"))["inputs"] == catalogue.inputs_of_threat(defaults.threat_model)


@pytest.mark.parametrize("kind", GROUPS)
def test_every_part_of_our_own_has_a_group_of_the_list(kind: str) -> None:
    registry = registry_of(kind)
    groups = {str(facts(kind, registry.target(name))["group"]) for name in own(registry)}
    assert groups == {*GROUPS[kind]}


def test_tables_name_what_there_is() -> None:
    for table in (catalogue._GROUP, catalogue._NORMS, catalogue._GOALS, catalogue._INPUTS):
        for key in table:
            module, _, name = key.partition(":")
            __import__(module)
            assert not name or hasattr(sys.modules[module], name)


# --- how it is printed


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_pipe_gets_one_name_a_line_and_nothing_is_clipped(
    kind: str, advkit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registry_of(kind)
    for columns in ("20", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = advkit("list", kind).out.splitlines()
        assert sorted(line.split()[0] for line in lines) == sorted(registry.names())
        assert all(line.endswith(registry.summary(line.split()[0])) for line in lines)


def test_a_pipe_gets_every_kind_with_its_name(advkit: Any) -> None:
    lines = advkit("list").out.splitlines()
    said = {tuple(line.split()[:2]) for line in lines}
    assert said == {(name, kind) for kind in REGISTRIES for name in registry_of(kind).names()}
    assert len(lines) == sum(len(registry_of(kind).names()) for kind in REGISTRIES)


@pytest.fixture
def terminal(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on a terminal of 80 columns; its lines without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> list[str]:
        return re.sub(r"\x1b\[[0-9;]*m", "", advkit(*arguments).out).splitlines()

    return call


@pytest.mark.parametrize("kind", REGISTRIES)
def test_at_80_columns_names_are_whole_and_nothing_takes_more_than_three_lines(kind: str, terminal: Any) -> None:
    lines = terminal("list", kind)
    assert max(map(len, lines)) <= 80
    starts = [at for at, line in enumerate(lines) if re.match(r"  \S", line)]
    listed = [lines[at].split()[0].removesuffix("...") for at in starts]
    assert sorted(listed) == sorted(registry_of(kind).names())
    for at, name in zip(starts, listed, strict=True):
        end = next((n for n in range(at + 1, len(lines)) if not lines[n].startswith("      ")), len(lines))
        assert end - at <= 3
        words = registry_of(kind).summary(name).split()
        assert " ".join(lines[at:end]).split()[-len(words) :] == words


def test_groups_stand_in_their_order_with_their_columns(terminal: Any) -> None:
    heads = [line for line in terminal("list", "attacks") if line and not line.startswith(" ")]
    assert [re.split(r"  +", line)[0] for line in heads] == [*GROUPS["attacks"]]
    assert all(re.split(r"  +", line)[1:] == ["access", "norms", "goals"] for line in heads)


def test_first_lines_stand_beside_the_facts_where_there_is_room(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (line,) = [line for line in terminal("list", "attacks") if line.startswith("  pgd ")]
    assert line.endswith(ATTACKS.summary("pgd"))


# --- filters


def listed(said: Any) -> set[str]:
    assert said.code == 0
    return {line.split()[0] for line in said.out.splitlines()}


@pytest.mark.slow
def test_a_word_is_looked_for_in_names_groups_and_first_lines(advkit: Any) -> None:
    momentum = listed(advkit("list", "attacks", "momentum"))
    assert {"mifgsm", "mi"} <= momentum
    assert momentum == {name for name in ATTACKS.names() if "momentum" in ATTACKS.summary(name).casefold()}
    assert listed(advkit("list", "attacks", "MOMENTUM", "1710")) == {"mi", "ens", "mpgd"}
    assert {"fab", "fab-t"} <= listed(advkit("list", "attacks", "minimum norm"))
    ordered = listed(advkit("list", "attacks", "ad-topk"))
    assert ordered == listed(advkit("list", "attacks", "AD_TOPK")) == {"ad_topk"}


@pytest.mark.slow
def test_access_norm_and_task_filter_what_is_listed(advkit: Any) -> None:
    assert "square" in listed(advkit("list", "attacks", "--access", "scores"))
    labels = listed(advkit("list", "attacks", "--access", "Labels"))
    assert "random_flips" in labels
    assert "foolbox:" in labels  # asks for what `access=` says
    assert not {"square", "pgd", "transfer:"} & labels
    assert listed(advkit("list", "attacks", "--access", "gradients")) == {*ATTACKS.names()}
    l0 = listed(advkit("list", "attacks", "--norm", "L0"))
    assert {"pgd", "fgsm"} <= l0
    assert {"art:", "foolbox:", "torchattacks:"} <= l0
    assert not {"apgd-ce", "square"} & l0
    assert listed(advkit("list", "attacks", "--for", "digits-dvs")) == {"sda", "topk_grad", "random_flips"}
    assert listed(advkit("list", "attacks", "--for", "prompts:set=general")) == {
        "beast", "gcg", "random_suffix", "sampled_suffix",
    }  # fmt: skip
    assert "gcg" not in listed(advkit("list", "attacks", "--for", "prompts", "--access", "scores"))
    assert listed(advkit("list", "defenses", "--for", "prompts")) == {"none", "ppl_filter"}
    assert listed(advkit("list", "threat-models", "--for", "digits-dvs")) == {"flips", "online"}


@pytest.mark.slow
def test_without_a_kind_filters_keep_the_kinds_that_they_apply_to(advkit: Any) -> None:
    kinds = {line.split()[1] for line in advkit("list", "--for", "prompts").out.splitlines()}
    assert kinds == {"attacks", "defenses", "threat-models", "tasks"}
    assert {*advkit("list", "--norm", "l1", "--json").json} == {"attacks"}


def test_nothing_found_is_said_in_one_line(advkit: Any) -> None:
    said = advkit("list", "attacks", "no-such-word")
    assert (said.code, said.out) == (0, "")
    assert "nothing of attacks" in said.err
    assert said.err.count("\n") == 1
    assert advkit("list", "attacks", "no-such-word", "--json").json == {"attacks": []}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attacks", "--access", "weights"], "nothing, labels, scores, gradients"),
        (["attacks", "--norm", "lnif"], "did you mean 'linf'"),
        (["attacks", "--for", "digit"], "did you mean 'digits'"),
        (["defenses", "--access", "scores"], "--access does not apply to defenses"),
        (["models", "--for", "digits"], "--for does not apply to models"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], words: str, advkit: Any) -> None:
    said = advkit("list", *arguments)
    assert (said.code, said.out) == (2, "")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_json_has_the_facts_beside_its_old_keys(advkit: Any) -> None:
    rows = {row["name"]: row for row in advkit("list", "attacks", "--json").json["attacks"]}
    assert [*rows] == [*ATTACKS.names()]
    assert [*rows["pgd"]] == ["name", "summary", "target", "group", "access", "norms", "goals", "inputs"]
    assert rows["pgd"]["norms"] == ["linf", "l2", "l1", "l0"]
    assert [*advkit("list", "models", "--json").json["models"][0]] == ["name", "summary", "target"]


# --- other packages


@pytest.fixture
def beside_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`advkit list` where another package is installed, whose modules raise when they are imported."""
    bomb = "raise RuntimeError('imported')\n"
    package = tmp_path / "elsewhere"
    (package / "physical").mkdir(parents=True)
    for name, source in {
        "__init__": "",
        "plain": 'class Plain:\n    """Plain."""\n    needs: "Access" = Access.SCORES\n',
        "silent": 'class Silent:\n    """Says nothing."""\n',
        "physical/__init__": "",
        "physical/base": "class Base:\n    needs = Access.LABELS\n    serves = ('targeted',)\n",
        "physical/patch": (
            "from .base import Base as Root\n"
            'class Patch(Root):\n    """A patch."""\n    default_threat_model: str = "linf:eps=0.5"\n'
        ),
        "task": 'class Mine:\n    """Films."""\n    defaults = TaskDefaults(model="snn", threat_model="flips")\n',
        "asked": (
            "from advkit.core.protocols import TaskDefaults\nfrom advkit.tasks.digits import Digits\n"
            'class Asked(Digits):\n    """Films, too."""\n'
            "    @property\n    def defaults(self):\n"
            '        return TaskDefaults(model="snn", threat_model="flips")\n'
        ),
    }.items():
        start = "" if name == "asked" or name.endswith("__init__") else bomb
        (package / f"{name}.py").write_text(start + source, encoding="utf-8")
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[advkit.attacks]\nplain = elsewhere.plain:Plain\nsilent = elsewhere.silent:Silent\n"
        "sticker = elsewhere.physical.patch:Patch\n"
        "[advkit.tasks]\nmine = elsewhere.task:Mine\nasked = elsewhere.asked:Asked\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "advkit", "list", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return call


@pytest.mark.slow
def test_parts_of_other_packages_say_what_they_can_unimported(beside_a_plug_in: Callable[..., str]) -> None:
    rows = {row["name"]: row for row in json.loads(beside_a_plug_in("attacks", "--json"))["attacks"]}
    said = {key: rows["sticker"][key] for key in ("group", "access", "norms", "goals", "inputs")}
    assert said == {
        "group": "physical", "access": "labels", "norms": ["linf"], "goals": ["targeted"], "inputs": ["images"],
    }  # fmt: skip
    assert (rows["plain"]["group"], rows["plain"]["access"], rows["plain"]["norms"]) == ("other", "scores", [])
    assert (rows["silent"]["group"], rows["silent"]["access"]) == ("other", "")
    lines = beside_a_plug_in("attacks").splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["sticker", "plain", "silent"]
    found = {
        line.split()[0] for line in beside_a_plug_in("attacks", "--norm", "linf", "--access", "labels").splitlines()
    }
    assert "sticker" in found
    assert not {"plain", "silent", "square"} & found


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mine", "asked"])  # the second computes its defaults, so it has to be built
def test_attacks_for_the_task_of_another_package(task: str, beside_a_plug_in: Callable[..., str]) -> None:
    found = [line.split()[0] for line in beside_a_plug_in("attacks", "--for", task).splitlines()]
    assert found == ["sda", "topk_grad", "random_flips"]
