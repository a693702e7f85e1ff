"""What users of foolbox, torchattacks, ART and AutoAttack write for an attack, and what it is called here."""

from __future__ import annotations

import inspect
from typing import Any, Final

from advkit.core.errors import UsageError
from advkit.core.registry.familiar import Familiar, Setting, bare, settings

_NORMS: Final = {"linfinity": "linf", "linfty": "linf", "linf": "linf", "l2": "l2", "l1": "l1", "l0": "l0"}
_EXAMPLES: Final = {"linf": "linf:eps=8/255", "l2": "l2:eps=0.5", "l1": "l1:eps=12", "l0": "l0:eps=10"}
_ENDINGS: Final = ("attack", "method")

OURS: Final[dict[str, str]] = {
    "fgm": "fgsm",
    "fastgradient": "fgsm",
    "fastgradientsign": "fgsm",
    "projectedgradientdescent": "pgd",
    "madry": "pgd",
    "basiciterative": "bim",
    "ifgsm": "bim",
    "mim": "mifgsm",
    "momentumiterative": "mifgsm",
    "momentumiterativefastgradient": "mifgsm",
    "autopgd": "apgd-ce",
    "autoprojectedgradientdescent": "apgd-ce",
    "aa": "autoattack",
    "eotpgd": "pgd:eot=10",
    "difgsm": "dim",
    "tifgsm": "tim",
    "sifgsm": "sim",
    "nifgsm": "ni",
    "sinifgsm": "transfer:ni+si",
    "vmifgsm": "vmi",
    "vnifgsm": "vni",
    "pifgsm": "pi",
    "ensemble": "ens",
    "pixel": "one_pixel",
    "differentialevolution": "one_pixel",
    "naturalevolutionstrategies": "nes",
    "naturalevolutionarystrategies": "nes",
    "simultaneousperturbationstochasticapproximation": "spsa",
    "simpleblackbox": "simba",
    "simbadct": "simba:basis=dct",
    "simbapixel": "simba",
    "candw": "cw",
    "carlini": "cw",
    "carliniwagner": "cw",
    "carlinil2": "cw",
    "carlinilinf": "cw",
    "carlinil0": "cw",
    "bb": "brendel_bethge",
    "brendelbethge": "brendel_bethge",
    "elasticnet": "ead",
    "eadl1": "ead",
    "eaden": "ead",
    "saliencymap": "jsma",
    "fastminimumnorm": "fmn",
    "decoupleddirectionnorm": "ddn",
    "decoupleddirectionandnorm": "ddn",
    "sdf": "superdeepfool",
    "df": "deepfool",
    "augmentedlagrangian": "alma",
    "pdgd": "pdpgd",
    "primaldualgradientdescent": "pdpgd",
    "tr": "trust_region",
}
"""Names elsewhere, without norm and ending, and the spec of the same method here."""

PEERS: Final[dict[str, tuple[str, ...]]] = {
    "newtonfool": ("foolbox:NewtonFoolAttack", "art:NewtonFool"),
    "virtualadversarial": ("art:VirtualAdversarialMethod",),
    "sparsefool": ("torchattacks:SparseFool",),
    "tpgd": ("torchattacks:TPGD",),
    "ffgsm": ("torchattacks:FFGSM",),
    "rfgsm": ("torchattacks:RFGSM",),
    "upgd": ("torchattacks:UPGD",),
    "pgdrs": ("torchattacks:PGDRS",),
    "jitter": ("torchattacks:Jitter",),
    "zoo": ("art:ZooAttack",),
    "universalperturbation": ("art:UniversalPerturbation",),
    "saltandpeppernoise": ("foolbox:SaltAndPepperNoiseAttack",),
    "spatial": ("foolbox:SpatialAttack",),
    "sparsel1descent": ("foolbox:SparseL1DescentAttack",),
}
"""Methods that advkit does not have, and the adapters that run another package's."""

_SAME: Final[dict[str, str]] = {
    "hsja": "hopskipjump",
    "hsj": "hopskipjump",
    "geometricdecisionbased": "geoda",
    "signoptlinf": "signopt",
    "vat": "virtualadversarial",
    "saltandpepper": "saltandpeppernoise",
    "uap": "universalperturbation",
    "universal": "universalperturbation",
}

_THREAT: Final = "--threat-model linf:eps=8/255 (threat_model= in Python)"
_STEPS: Final = "steps queries length"

SETTINGS: Final = settings(
    (
        "eps epsilon epsilons eps_max max_eps max_epsilon radius",
        Setting(otherwise=f"the radius belongs to the threat model: {_THREAT}"),
    ),
    ("norm ord p distance", Setting(otherwise="the norm belongs to the threat model: --threat-model l2:eps=0.5")),
    (
        "targeted target targets target_class y y_target labels",
        Setting(otherwise="what is to be reached is the goal: --goal targeted:how=next (goal= in Python)"),
    ),
    (
        "steps iterations iters num_steps n_steps nb_steps nb_iter n_iter niter num_iter num_iterations n_iterations "
        "max_iter max_iters max_iterations max_steps perturb_steps attack_steps attack_iters",
        Setting(here=tuple(_STEPS.split()), otherwise="its length is no setting of it"),
    ),
    (
        "queries n_queries num_queries max_queries query_limit query_budget",
        Setting(
            here=("queries",), otherwise="a budget of queries belongs to the threat model: linf:eps=0.1,queries=1000"
        ),
    ),
    (
        "alpha stepsize step_size eps_step eps_iter rel_stepsize abs_stepsize",
        Setting(
            here=("step_size",),
            words="It is in units of eps: 0.1 is a tenth of the radius",
            otherwise="it chooses the length of its steps itself",
        ),
    ),
    (
        "nb_sample num_samples n_samples samples_per_draw spsa_samples",
        Setting(here=("samples",), words="It counts queries: an estimate along n directions takes 2 n"),
    ),
    ("popsize pop_size population_size", Setting(here=("population",))),
    ("delta spsa_delta fd_eta", Setting(here=("sigma",), words="It is in units of the box's width")),
    ("attack_basis", Setting(here=("basis",), words="It is pixel or dct")),
    ("freq_dim freq_dims", Setting(here=("frequencies",), words="It is a share of the image's height and width")),
    (
        "pixels pixel_count th threshold",
        Setting(otherwise="the number of positions belongs to the threat model: --threat-model l0:eps=1"),
    ),
    (
        "restarts n_restarts num_restarts nb_restarts random_restarts restart num_random_init nb_random_init "
        "n_random_init",
        Setting(here=("restarts",), otherwise="it has no restarts"),
    ),
    (
        "random_start rand_init random_init rand_start random_eps",
        Setting(here=("start",), words="It is random or origin"),
    ),
    ("loss_fn loss_func loss_type loss_function criterion", Setting(here=("loss",), words="It is ce, margin or dlr")),
    ("eot_iter eot_iters num_eot eot_samples eot_steps", Setting(here=("eot",))),
    ("momentum decay_factor mu", Setting(here=("decay",))),
    ("batch_size bs", Setting(otherwise="samples in flight are an option of the run: --batch-size 64")),
    (
        "model estimator classifier net",
        Setting(otherwise="the model is an option of its own: --model (model= in Python)"),
    ),
    ("n_classes num_classes nb_classes", Setting(otherwise="the model knows its number of classes")),
    (
        "clip_min clip_max clip_values bounds x_min x_max",
        Setting(otherwise="legal inputs are those of the model's space, by default the box [0, 1]"),
    ),
    ("seed random_seed", Setting(otherwise="the seed is an option of the run: --seed 1")),
    ("device", Setting(otherwise="the device is an option of the run: --device cuda")),
    ("verbose progress", Setting(otherwise="leave it out: attacks print nothing")),
)


def _method(name: str) -> tuple[str, str]:
    """A name without its norm and its ending, and the norm, "" where it has none."""
    word, norm = bare(name), ""
    for text, meant in _NORMS.items():
        if text in word and word != text:
            word, norm = word.replace(text, "", 1), meant
            break
    for _ in _ENDINGS:
        for ending in _ENDINGS:
            word = word.removesuffix(ending) or word
    return word, norm


def _guess(name: str) -> str | None:
    from advkit.attacks import ATTACKS

    for word, norm in ((bare(name), ""), _method(name)):
        word = _SAME.get(word, word)
        ours = OURS.get(word) or next((known for known in ATTACKS.table if bare(known) == word), None)
        if ours is not None and not ours.endswith(":"):
            if norm:
                part = ATTACKS.load(ours.partition(":")[0])
                least = f"minimum-{norm}"
                threat = least if least in getattr(part, "norms", ()) else _EXAMPLES[norm]
                return f"the norm belongs to the threat model: --attack {ours} --threat-model {threat}"
            return f"did you mean {ours!r}?"
        if word in PEERS:
            return f"advkit has none of its own; other packages' run as --attack {' or '.join(PEERS[word])}"
    return None


def _other(part: object) -> None:
    """Say which adapter takes an attack of another package, and what a function lacks."""
    if isinstance(part, (list, tuple)):
        shown = " and ".join(f"{one}" if isinstance(one, str) else type(one).__name__ for one in list(part)[:3])
        raise UsageError(
            f"{len(part)} attacks at once ({shown}); an evaluation has one attack: call evaluate for each of them, or "
            "name a suite such as autoattack or thorough for their worst case"
        )
    if part is None:
        raise UsageError("the attack is None; expected a spec such as pgd:steps=20, or an object")
    package = type(part).__module__.partition(".")[0]
    if package in ("torchattacks", "foolbox", "art"):
        raise UsageError(
            f"this is {package}'s {type(part).__name__}; its adapter takes it by name: attack="
            f"'{package}:{type(part).__name__}', with settings as {package}:NAME,settings=[key=value]; model, eps, "
            "norm and goal come from the evaluation"
        )
    if _is_network(part):
        raise UsageError(
            f"the attack is a {type(part).__name__}, which is a model: evaluate('pgd', model=model, task=(x, y), "
            "threat_model='linf:eps=8/255')"
        )
    if callable(part):
        raise UsageError(_callable(part))


def _is_network(part: object) -> bool:
    from torch import nn

    return isinstance(part, nn.Module) and not hasattr(part, "needs")


def _callable(part: Any) -> str:
    name = getattr(part, "__name__", type(part).__name__)
    shown = "a function" if inspect.isroutine(part) else f"a callable {type(part).__name__}"
    takes = "oracle, x, goal, threat, rng"
    try:
        inspect.signature(part).bind(*takes.split(", "))
    except TypeError:
        return (
            f"the attack is {shown} ({name}) that does not take ({takes}); an attack gets no model and no labels: it "
            "asks an oracle, and the goal has the loss (CONTRIBUTING.md has one in full)"
        )
    except ValueError:  # built-in functions have no signature
        pass
    return (
        f"the attack is {shown} ({name}) that does not say what it asks of the model: it needs a member `needs`, such "
        f"as {name if name.isidentifier() else 'attack'}.needs = "
        "advkit.core.protocols.Access.GRADIENTS (NOTHING, LABELS or SCORES for less)"
    )


FAMILIAR: Final = Familiar(settings=SETTINGS, guess=_guess, other=_other)
