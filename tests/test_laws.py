"""The laws over the whole registry: a new attack or ball is tested by its registry line alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.attacks.suites import Suite
from advkit.core.errors import UsageError
from advkit.core.protocols import Trains
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.testing import (
    ATTACK_LAWS,
    BALLS,
    IMAGE_LAWS,
    LABEL_LAWS,
    MINIMA,
    RADII,
    TEXT_LAWS,
    THREAT_LAWS,
    accepts,
    check_defense,
    check_image_law,
    check_label_law,
    check_law,
    check_text_law,
    check_threat_law,
    check_training,
    on_images,
    on_labels,
    on_text,
    subjects,
)
from advkit.threat_models import THREAT_MODELS

BUILT_IN = {"fgsm", "pgd", "mifgsm", "apgd-ce", "apgd-margin", "square"}

# Names that build what another name builds already are aliases; prefixes (`foolbox:`) stand for attacks of others,
# which promise less (their results depend on the batch).
OWN = [
    # Transfer presets work on images and have the laws of images in tests/attacks/test_transfer_engine.py.
    name
    for name in ATTACKS.names()
    if not name.endswith(":") and not ATTACKS.target(name).startswith("advkit.attacks.transfer.")
]
NAMES = [name for name in OWN if ATTACKS.spec(ATTACKS.build(name)).partition(":")[0] == name]
# Attacks made for text find no slot in a ball; they have laws of their own, on a language model.
TEXT = [name for name in NAMES if on_text(ATTACKS.load(name))]
# Attacks on training labels have no inputs to change, and laws of their own, too.
ON_LABELS = [name for name in NAMES if on_labels(ATTACKS.build(name))]
# Attacks made for threat models of images that are no balls of vectors have laws of their own as well.
ON_IMAGES = [name for name in NAMES if on_images(ATTACKS.build(name))]
SUBJECTS = {(name, norm): subject for name in NAMES for norm, subject in subjects(ATTACKS.build(name)).items()}
REFUSED = {(name, norm) for name in NAMES for norm in BALLS} - set(SUBJECTS)
# Attacks that run toward many classes, and suites of attacks, take minutes together.
LONG = {
    "boundary",
    "hopskipjump",
    "sign_opt",
    "geoda",
    "apgd-dlr",
    "apgd-t",
    "fab",
    "fab-t",
    "online",
    "quadattack",
    "ad_topk",
    "cw_topk",
    "cw",
    "ead",
    "sigma_zero",
    "brendel_bethge",
}
# Their other norms are quick.
LONG_IN = {
    ("square", "l1"),
    ("square", "l2"),
    ("pgd", "l1"),
    ("pgd", "l0"),
    ("nes", "l2"),
    ("nes", "l1"),
    ("spsa", "l2"),
    ("simba", "l2"),
    ("one_pixel", "l0"),
    ("pixle", "l0"),
    ("simba", "linf"),
    ("pdpgd", "minimum-l0"),
}
# Long searches: in norms other than their first they meet the laws that know the norm.
IN_EVERY_NORM = {
    "stays_admitted", "closed_form", "agrees_with_exhaustive_search", "batch_of_one", "keeps_the_query_budget",
}  # fmt: skip
SUITES = {name for (name, _), subject in SUBJECTS.items() if isinstance(subject.attack, Suite)}
SEARCHES = SUITES | {
    "cw", "brendel_bethge", "hopskipjump", "sign_opt", "geoda", "nes", "spsa", "simba", "square", "fmn", "pdpgd",
    "alma", "deepfool", "trust_region", "apgd-ce", "apgd-margin", "apgd-dlr", "apgd-t", "fab", "fab-t",
}  # fmt: skip
WHOLE = {"minimum-l2", "linf"}


def is_long(name: str, norm: str) -> bool:
    return name in LONG | SUITES or (name, norm) in LONG_IN


def marks(name: str, norm: str) -> list[Any]:
    """Long ones are slow; of those, suites but one and norms that come after the first are exhaustive."""
    if not is_long(name, norm):
        return []
    again = name in SUITES - {"thorough"} or (name in SEARCHES and norm not in WHOLE)
    return [pytest.mark.exhaustive if again else pytest.mark.slow]


PAIRS = [
    pytest.param(*pair, law, id="-".join((*pair, law)), marks=marks(*pair))
    for pair in SUBJECTS
    for law in ATTACK_LAWS
    if pair[0] not in SEARCHES or pair[1] in WHOLE or law in IN_EVERY_NORM
]

THREATS = {
    "linf": "linf:eps=0.1",
    "linf-8bit": "linf:eps=8/255,lattice=255",
    "l2": "l2:eps=0.5",
    "l2-8bit": "l2:eps=0.5,lattice=255",
    "l1": "l1:eps=2",
    "l1-8bit": "l1:eps=2,lattice=255",
    "l0": "l0:eps=3",
    "transfer": "transfer:eps=0.1,sources=python:advkit.testing.victims:network",
    "minimum-l0": "minimum-l0",
    "minimum-l0-values": "minimum-l0:per=feature",
    "minimum-l1": "minimum-l1",
    "minimum-l2": "minimum-l2",
    "minimum-linf": "minimum-linf",
    "minimum-l2-8bit": "minimum-l2:lattice=255",
    "flips": "flips",
    "flips-3": "flips:n=3",
    "patch": "patch:size=2",
    "patch-fixed": "patch:size=2,place=fixed,at=1+0",
    "patch-random": "patch:size=2,place=random",
}


@pytest.mark.parametrize(("name", "norm", "law"), PAIRS)
def test_attack(name, norm, law):
    check_law(law, SUBJECTS[name, norm])


@pytest.mark.parametrize("law", TEXT_LAWS)
@pytest.mark.parametrize("name", TEXT)
def test_attack_on_text(name, law):
    check_text_law(law, ATTACKS.build(name))


@pytest.mark.parametrize("law", LABEL_LAWS)
@pytest.mark.parametrize("name", ON_LABELS)
def test_attack_on_labels(name, law):
    check_label_law(law, ATTACKS.build(name))


@pytest.mark.parametrize("law", IMAGE_LAWS)
@pytest.mark.parametrize("name", ON_IMAGES)
def test_attack_on_images(name, law):
    if name == "corruption":
        pytest.importorskip("kornia")
    check_image_law(law, ATTACKS.build(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_works_in_some_ball_or_has_laws_of_its_own(name):
    own = (name in TEXT) + (name in ON_LABELS) + (name in ON_IMAGES)
    assert any(attack == name for attack, _ in SUBJECTS) + own == 1


@pytest.mark.parametrize(("name", "norm"), sorted(REFUSED), ids=["-".join(pair) for pair in sorted(REFUSED)])
def test_refused_balls_are_refused_in_words(name, norm):
    refusal = accepts(ATTACKS.build(name), BALLS[norm], norm)
    assert refusal is not None
    works_in = [kind for (attack, kind) in SUBJECTS if attack == name]
    assert norm in refusal.lower()
    assert all(kind in refusal.lower() for kind in works_in)


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in NAMES for norm in MINIMA])
def test_attacks_that_need_a_radius_say_so(name, norm):
    refusal = accepts(ATTACKS.build(name), MINIMA[norm], norm)
    assert (refusal is None) == ((name, norm) in SUBJECTS)
    assert refusal is None or norm.partition("-")[0] in refusal.lower()


def test_what_is_refused_today():
    assert {pair for pair in REFUSED if pair[0] in BUILT_IN} == {
        ("apgd-ce", "l0"),
        ("apgd-margin", "l0"),
        ("square", "l0"),
    }


@pytest.mark.parametrize("law", THREAT_LAWS)
@pytest.mark.parametrize("name", THREATS)
def test_threat_model(name, law):
    check_threat_law(law, THREAT_MODELS.build(THREATS[name]))


def test_every_registered_ball_is_covered():
    covered = {spec.partition(":")[0] for spec in THREATS.values()}
    # A grid is played cell by cell; the ball of a cell is `transfer`'s. An item of a stream is attacked and judged in
    # the ball that the stream names, which is one of those covered. `suffix` is no ball and has laws of its own, and
    # `certified` has no attacker: what is drawn there has its tests in test_certification.py. `label-flips` bounds how
    # many labels are changed: tests/evaluation/test_poisoning.py. What renders
    # parameters, changes all samples alike, or has no projection in closed form: tests/threat_models/test_images.py.
    images = {"transform", "flow", "corruption", "universal", "ssim", "lpips"}
    assert set(THREAT_MODELS.names()) - covered - images == {"tapm", "online", "suffix", "certified", "label-flips"}


def test_radii_fit_the_registry():
    assert set(RADII) == set(BALLS)
    for norm, ball in BALLS.items():
        with pytest.raises(UsageError):
            ball(eps=-1.0)
        assert THREAT_MODELS.load(norm) is ball


# Those in front of language models want one (tests/defenses/test_ppl_filter.py); ten networks of 64 pixels take a cone
# solver minutes (tests/defenses/test_convex_relu_at.py).
@pytest.mark.parametrize("name", [name for name in DEFENSES.names() if name not in ("ppl_filter", "convex_relu_at")])
def test_defense(name, digits, tmp_path, monkeypatch):
    # PubDef trains on the zoo's surrogates of a task; digits has some, and serves the others as well.
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    data = digits.training()
    short = replace(data, x=data.x[:160], y=data.y[:160])
    model = MODELS.build("mlp:hidden=16")((1, 8, 8), 10, RowRng.from_ids(0, ["defense"]), space=data.space)
    trains = hasattr(DEFENSES.load(name), "objective")
    check_defense(DEFENSES.build(f"{name}:recipe=[epochs=1,batch_size=64]" if trains else name), model, short)


# Those that train, and settings under which a run keeps more than weights.
TRAINING = [name for name in DEFENSES.names() if isinstance(DEFENSES.build(name), Trains)]
TRAINING += [
    "awp:base=[trades:steps=2],warm_up=1",
    "awp:base=[fgsm_rs],gamma=0.02",
    "awp:base=conadv",
    "awp:base=[doubly_robust:eta=0.1]",
    "awp:base=free_at",
    "doubly_robust:eta=0.1,barrier=0.01,implicit=true",
    "doubly_robust:eta=0.2,rho=0.3,outer=trades",
    "doubly_robust:outer=alp,r=0.5",
    "conadv:tau=3,watch=2",
    "conadv:tau=0,dual_bn=false",
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", TRAINING)
def test_training(spec, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    data, defense = digits.training(), DEFENSES.build(spec)
    recipe = replace(defense.recipe, epochs=3 * defense.objective().replays, batch_size=64, ema=0.9, schedule="cosine")
    check_training(replace(defense, recipe=recipe), data=replace(data, x=data.x[:160], y=data.y[:160]))
