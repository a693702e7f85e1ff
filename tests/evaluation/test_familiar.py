"""What users of foolbox, torchattacks, ART and AutoAttack write leads to what it is here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.familiar import OURS, PEERS
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Access
from advkit.core.registry import Registry
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

X, Y = torch.rand(6, 1, 8, 8), torch.arange(6)
QUICK: dict[str, Any] = {"task": "digits", "n": 4, "device": "cpu"}


def refusal(registry: Registry[Any], spec: Any) -> str:
    with pytest.raises(UsageError) as refused:
        registry.build(spec)
    said = str(refused.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deep_fool", "did you mean 'deepfool'?"),
        ("L2DeepFoolAttack", "--attack deepfool --threat-model minimum-l2"),
        ("LInfFMNAttack", "--attack fmn --threat-model minimum-linf"),
        ("DDNAttack", "did you mean 'ddn'?"),
        ("C&W", "did you mean 'cw'?"),
        ("carlini_wagner", "did you mean 'cw'?"),
        ("CarliniL2Method", "--attack cw --threat-model minimum-l2"),
        ("pgd_l2", "--attack pgd --threat-model l2:eps=0.5"),
        ("PGDL2", "--attack pgd --threat-model l2:eps=0.5"),
        ("pgd_linf", "--attack pgd --threat-model linf:eps=8/255"),
        ("LinfPGD", "--attack pgd --threat-model linf:eps=8/255"),
        ("L1PGD", "--attack pgd --threat-model l1:eps=12"),
        ("LinfProjectedGradientDescentAttack", "--attack pgd --threat-model linf"),
        ("ProjectedGradientDescent", "did you mean 'pgd'?"),
        ("FastGradientMethod", "did you mean 'fgsm'?"),
        ("L2FastGradientAttack", "--attack fgsm --threat-model l2"),
        ("BasicIterativeMethod", "did you mean 'bim'?"),
        ("I-FGSM", "did you mean 'bim'?"),
        ("MI-FGSM", "did you mean 'mifgsm'?"),
        ("MomentumIterativeMethod", "did you mean 'mifgsm'?"),
        ("DI-FGSM", "did you mean 'dim'?"),
        ("SINIFGSM", "did you mean 'transfer:ni+si'?"),
        ("AutoProjectedGradientDescent", "did you mean 'apgd-ce'?"),
        ("apgdce", "did you mean 'apgd-ce'?"),
        ("APGDT", "did you mean 'apgd-t'?"),
        ("auto_attack", "did you mean 'autoattack'?"),
        ("AA", "did you mean 'autoattack'?"),
        ("SquareAttack", "did you mean 'square'?"),
        ("EOTPGD", "did you mean 'pgd:eot=10'?"),
        ("HSJA", "hopskipjump"),
        ("BoundaryAttack", "boundary"),
        ("SignOPTAttack", "sign_opt"),
        ("GeometricDecisionBasedAttack", "geoda"),
        ("OnePixel", "did you mean 'one_pixel'?"),
        ("PixelAttack", "did you mean 'one_pixel'?"),
        ("LinfSPSA", "--attack spsa --threat-model linf"),
        ("SimBA-DCT", "did you mean 'simba:basis=dct'?"),
        ("UniversalPerturbation", "art:UniversalPerturbation"),
        ("L2BrendelBethgeAttack", "--attack brendel_bethge --threat-model minimum-l2"),
        ("ElasticNet", "did you mean 'ead'?"),
        ("TPGD", "torchattacks:TPGD"),
    ],
)
def test_a_familiar_attack_leads_to_its_name_here(name: str, words: str) -> None:
    assert words in refusal(ATTACKS, name)


def test_what_is_recommended_is_there() -> None:
    for spec in OURS.values():
        ATTACKS.build(spec)
    named = [spec for specs in PEERS.values() for spec in specs]
    assert len(named) == len(set(named))
    for spec in named:
        ATTACKS.build(spec)
    for package, home in (
        ("foolbox", "foolbox.attacks"),
        ("torchattacks", "torchattacks"),
        ("art", "art.attacks.evasion"),
    ):
        try:
            module = __import__(home, fromlist=["attacks"])
        except ImportError:
            continue
        for spec in named:
            if spec.startswith(f"{package}:"):
                assert inspect.isclass(getattr(module, spec.partition(":")[2], None)), spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pgd:eps=8/255", "--threat-model linf:eps=8/255"),
        ("pgd:epsilon=0.1", "the radius belongs to the threat model"),
        ("autoattack:eps=0.1", "the radius belongs to the threat model"),
        ("pgd:norm=l2", "--threat-model l2:eps=0.5"),
        ("pgd:iterations=10", "did you mean 'steps'?"),
        ("pgd:num_steps=10", "did you mean 'steps'?"),
        ("pgd:nb_iter=10", "did you mean 'steps'?"),
        ("pgd:max_iter=10", "did you mean 'steps'?"),
        ("fab:n_iter=10", "did you mean 'steps'?"),
        ("square:max_iter=10", "did you mean 'queries'?"),
        ("square:n_queries=10", "did you mean 'queries'?"),
        ("beast:steps=10", "did you mean 'length'?"),
        ("pgd:alpha=2/255", "did you mean 'step_size'? It is in units of eps"),
        ("bim:alpha=2/255", "did you mean 'step_size'?"),
        ("pgd:eps_step=0.1", "did you mean 'step_size'?"),
        ("pgd:rel_stepsize=0.1", "did you mean 'step_size'?"),
        ("apgd-ce:alpha=0.1", "chooses the length of its steps itself"),
        ("pgd:n_restarts=3", "did you mean 'restarts'?"),
        ("pgd:num_random_init=3", "did you mean 'restarts'?"),
        ("fgsm:restarts=3", "it has no restarts"),
        ("pgd:random_start=true", "did you mean 'start'?"),
        ("pgd:eot_iter=3", "did you mean 'eot'?"),
        ("pgd:loss_fn=ce", "did you mean 'loss'?"),
        ("mifgsm:momentum=1", "did you mean 'decay'?"),
        ("pgd:targeted=true", "--goal targeted:how=next"),
        ("pgd:batch_size=64", "--batch-size 64"),
        ("pgd:step=10", "did you mean 'steps'"),
        ("pgd:pionts=10", "pgd has no field 'pionts'"),
    ],
)
def test_a_familiar_setting_leads_to_its_name_here(spec: str, words: str) -> None:
    assert words in refusal(ATTACKS, spec)


@pytest.mark.parametrize(
    ("registry", "spec", "words"),
    [
        (THREAT_MODELS, "linf:8/255", "did you mean 'linf:eps=8/255'?"),
        (THREAT_MODELS, "linf:epsilon=0.1", "did you mean 'eps'?"),
        (THREAT_MODELS, "l0:pixels=3", "number of features that may change"),
        (THREAT_MODELS, "0.1", "linf:eps=0.1"),
        (THREAT_MODELS, "linf 8/255", "expected linf:eps=8/255"),
        (THREAT_MODELS, "inf", "did you mean 'linf:eps=8/255'?"),
        (THREAT_MODELS, "lp", "linf, l2, l1 or l0"),
        (THREAT_MODELS, "blackbox", "access=scores"),
        (GOALS, "targeted:label=3", "how=class,target=3"),
        (GOALS, "3", "targeted:how=class,target=3"),
        (GOALS, "least_likely", "targeted:how=least_likely"),
        (GOALS, "Misclassification", "'untargeted'"),
        (DEFENSES, "adversarial_training", "pgd_at"),
        (DEFENSES, "feature_squeezing", "'bit-depth'"),
        (DEFENSES, "randomized_smoothing", "'smoothing'"),
        (DEFENSES, "jpegcompression", "'jpeg'"),
        (DEFENSES, "total_variation", "'tv'"),
        (DEFENSES, "FreeAT", "did you mean 'free_at'?"),
        (DEFENSES, "fast_at", "'fgsm_rs' or 'free_at'"),
        (DEFENSES, "pgd_at:epochs=3", "recipe=[epochs=10]"),
        (TASKS, "mnist", "npz:path=FILE"),
        (TASKS, "data/rows.npz", "npz:path=data/rows.npz"),
        (TASKS, "digits:n=100", "--n 100"),
        (MODELS, "net.pt", "path:net.pt"),
        (MODELS, "resnet50", "torchvision:resnet50"),
        (MODELS, "my_package.nets", "python:my_package.nets:NAME"),
        (MODELS, "my_net.py", "python:my_net:NAME"),
        (MODELS, "HuggingFaceTB/SmolLM2-135M", "hf:HuggingFaceTB/SmolLM2-135M"),
        (MODELS, "Carmon2019Unlabeled", "robustbench:Carmon2019Unlabeled"),
    ],
)
def test_other_familiar_words(registry: Registry[Any], spec: str, words: str) -> None:
    assert words in refusal(registry, spec)


def needless(oracle, x, goal, threat, rng):  # type: ignore[no-untyped-def]
    """All that an attack does, and not what it asks for."""
    return threat.project(x + threat.steepest(-oracle.gradient(x, goal)[1], x), x)


class Guard:
    def protect(self, model: Any, data: Any, rng: Any) -> Any:
        return model


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("attack", needless, ("a function (needless)", "needless.needs = ", "Access.GRADIENTS")),
        ("attack", lambda model, x, y: x, ("does not take (oracle, x, goal, threat, rng)", "no labels")),
        ("attack", ["pgd", "fgsm"], ("2 attacks at once", "call evaluate for each", "autoattack")),
        ("attack", None, ("None", "pgd:steps=20")),
        ("defense", Guard(), ("Guard lacks claims and needs_data", "needs_data = False")),
        ("defense", nn.Linear(2, 2), ("a torch module", "model=")),
        ("defense", lambda model: model, ("protect(model, data, rng)", "InputDefense")),
        ("defense", None, ("the spec none",)),
        ("threat_model", 0.1, ("a radius", "linf:eps=0.1")),
        ("threat_model", {"norm": "L2", "eps": 0.5}, ("a dict", "'l2:eps=0.5'")),
        ("goal", 3, ("a class", "targeted:how=class,target=3")),
        ("goal", lambda labels, answer, rng: labels, ("its kind", "goal=classes")),
        ("goal", torch.rand(4), ("[4]", "whole numbers [N]")),
        ("model", nn.Linear(64, 10).state_dict(), ("a state dict", "load_state_dict")),
        ("model", nn.Linear, ("a class", "call it first")),
        ("model", [nn.Linear(2, 2)], ("Ensemble",)),
    ],
)
def test_objects_are_refused_with_what_is_missing(setting: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refused:
        advkit.evaluate(**{"attack": "fgsm", **QUICK, setting: value})
    for word in words:
        assert word in str(refused.value)


def test_two_lines_make_a_function_an_attack() -> None:
    """What the message says is true."""
    with pytest.raises(UsageError):
        advkit.evaluate(needless, **QUICK)
    needless.needs = Access.GRADIENTS
    try:
        found = advkit.evaluate(needless, **QUICK)
    finally:
        del needless.needs
    assert found.robust_accuracy == advkit.evaluate("fgsm", **QUICK).robust_accuracy

    class Whole(Guard):
        needs_data = False
        claims = ""

    assert advkit.evaluate("fgsm", Whole(), **QUICK).robust_accuracy is not None


def test_attacks_of_other_packages_name_their_adapter() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    foolbox, torchattacks = pytest.importorskip("foolbox"), pytest.importorskip("torchattacks")
    for attack, spec in (
        (foolbox.attacks.LinfPGD(), "foolbox:LinfProjectedGradientDescentAttack"),
        (foolbox.attacks.L2DeepFoolAttack(), "foolbox:L2DeepFoolAttack"),
        (torchattacks.PGD(net), "torchattacks:PGD"),
    ):
        with pytest.raises(UsageError, match=f"attack='{spec}'"):
            advkit.evaluate(attack, **QUICK)
        ATTACKS.build(spec)


PAIRS = TensorDataset(X, Y)


class Sizes(Dataset):
    """Images of several sizes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 4 + place, 4), 0


class Pictures(Sizes):
    """Images that are no tensors."""

    def __getitem__(self, place: int) -> Any:
        from PIL import Image

        return Image.new("L", (4, 4)), 0


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (DataLoader(PAIRS, shuffle=True), "shuffle=False"),
        (TensorDataset(X), "a list of Tensor, not (samples, labels)"),
        (Sizes(), "no samples in batches (RuntimeError: stack expects"),
        (Pictures(), "transform=torchvision.transforms.ToTensor()"),
        (list(PAIRS), "torch.stack("),
        (list(PAIRS)[:2], "torch.stack("),
        (list(DataLoader(PAIRS, batch_size=2)), "zip(*pairs)"),
        ((pair for pair in DataLoader(PAIRS)), "zip(*batches)"),
        (X, "the labels are missing"),
        (X.numpy(), "the labels are missing"),
        ({"x": X, "y": Y}, "with x, y"),
        ((Y, X), "the other way round"),
        ((X, nn.functional.one_hot(Y).float()), "y.argmax(1)"),
        ((X, Y, Y), "a task of 3 parts"),
        ((PAIRS, Y), "hand it over alone"),
        ((X, nn.functional.one_hot(Y)), "y.argmax(1)"),
        ((X, Y[:, None]), "y.squeeze(1)"),
        ((X, ["cat"] * len(X)), "made of texts"),
        (Path("rows.npz"), "npz:path=rows.npz"),
        (None, "not None"),
        (3, "not 3"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_data_in_other_forms_say_how_to_collect_them(task: Any, words: str) -> None:
    with pytest.raises(BadInput) as refused:
        advkit.evaluate("fgsm", task=task, model=lambda x: x.flatten(1)[:, :6], device="cpu")
    assert words in str(refused.value)


def test_data_sets_and_loaders_of_torch_are_tasks() -> None:
    digest = TASKS.build((X, Y)).digest()
    for given in (PAIRS, DataLoader(PAIRS, batch_size=4)):
        assert TASKS.build(given).digest() == digest


def test_a_large_data_set_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkit.tasks.familiar.MEMORY", X.nbytes - 1)
    with pytest.raises(UsageError, match="folder:path=FOLDER"):
        TASKS.build(PAIRS)


def test_a_model_in_the_place_of_the_attack_is_named() -> None:
    with pytest.raises(UsageError, match=r"which is a model: evaluate\('pgd', model=model"):
        advkit.evaluate(nn.Linear(2, 2), X, Y)


def test_a_file_of_the_users_own_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    for registry in (MODELS, TASKS, ATTACKS):
        with pytest.raises(UsageError, match="python:mine:NAME"):
            registry.build("mine:net")


def test_who_has_no_model_is_told_where_one_belongs() -> None:
    with pytest.raises(UsageError, match=r"model= in Python.*training=\(x_train"):
        advkit.evaluate("fgsm", task=(X, Y))


def test_the_lines_that_collect_data_do_so() -> None:
    pairs = list(PAIRS)
    x, y = torch.stack([sample for sample, _ in pairs]), torch.tensor([label for _, label in pairs])
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("epsilon", "--threat-model linf:eps=8/255"),
        ("eps", "the radius belongs to the threat model"),
        ("norm", "l2:eps=0.5"),
        ("iterations", "attack='pgd:steps=...'"),
        ("alpha", "attack='pgd:step_size=...'"),
        ("dataset", "did you mean 'task'?"),
        ("gpu", "did you mean 'device'?"),
        ("seeed", "did you mean 'seed"),
        ("frobnicate", "no keyword 'frobnicate'"),
    ],
)
def test_a_keyword_that_there_is_not(keyword: str, words: str) -> None:
    for function in (advkit.evaluate, advkit.matrix):
        if keyword == "eps" and function is advkit.matrix:
            continue  # it has that one
        with pytest.raises(UsageError) as refused:
            function(**{keyword: 1})  # type: ignore[operator]
        assert words in str(refused.value)


def test_numpy_arrays_are_a_task_as_before() -> None:
    task = (np.asarray(X), np.asarray(Y))
    assert (
        advkit.evaluate("fgsm", task=task, model=lambda x: x.flatten(1)[:, :6], device="cpu").clean_accuracy is not None
    )
