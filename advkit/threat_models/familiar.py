"""What users of other packages write for a threat model or a goal, and what it is called here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from advkit.core.errors import UsageError
from advkit.core.registry.familiar import Familiar, Setting, settings

_NORM: Final = "the norm is the threat model's name: linf, l2, l1 or l0, e.g. linf:eps=8/255"
_BALLS: Final[dict[str, str]] = {
    **dict.fromkeys(("inf", "linfinity", "linfty", "chebyshev", "max"), "did you mean 'linf:eps=8/255'?"),
    **dict.fromkeys(("2", "euclidean"), "did you mean 'l2:eps=0.5'?"),
    "1": "did you mean 'l1:eps=12'?",
    "0": "did you mean 'l0:eps=10'?",
    **dict.fromkeys(("lp", "ball", "norm", "eps", "epsilon"), _NORM),
    **dict.fromkeys(("whitebox", "white"), "white box is what a ball grants: linf:eps=8/255"),
    **dict.fromkeys(
        ("blackbox", "black", "score", "scores", "decision"),
        "access is a setting of a ball: linf:eps=8/255,access=scores (or access=labels)",
    ),
}
_BALL_SETTINGS: Final = settings(
    ("epsilon epsilons eps_max max_eps radius r size bound delta", Setting(here=("eps",))),
    ("k pixels n_pixels num_pixels", Setting(here=("eps",), words="It is the number of features that may change")),
    ("norm p ord", Setting(otherwise=_NORM)),
    ("n_queries num_queries max_queries query_budget budget", Setting(here=("queries",))),
    ("knowledge black_box blackbox", Setting(here=("access",), words="It is gradients, scores or labels")),
    ("surrogates surrogate source models", Setting(here=("sources",), words="They are joined by +")),
    ("clip_min clip_max bounds low high", Setting(otherwise="legal inputs are those of the model's space")),
    ("tokens length max_tokens suffix_length", Setting(here=("n",))),
)
_NUMBER: Final = re.compile(r"[\d.]+(e-?\d+)?(/[\d.]+)?", re.IGNORECASE)


def _ball_guess(name: str) -> str | None:
    """`0.1` and `linf 0.1`: a radius where a name belongs."""
    words = name.replace("=", " ").split()
    if len(words) == 1 and _NUMBER.fullmatch(words[0]):
        return f"that is a radius; say of which norm: linf:eps={words[0]}"
    if len(words) == 2 and _NUMBER.fullmatch(words[1]):
        return f"expected {words[0].casefold()}:eps={words[1]}"
    return None


def _ball_other(part: object) -> None:
    if isinstance(part, (int, float)) and not isinstance(part, bool):
        raise UsageError(f"the threat model {part!r} is a radius; say of which norm: threat_model='linf:eps={part!r}'")
    if isinstance(part, Mapping):
        given = ",".join(f"{key}={value}" for key, value in part.items() if key not in ("norm", "name"))
        norm = str(part.get("norm", part.get("name", "linf"))).casefold()
        raise UsageError(f"the threat model is a {type(part).__name__}; expected a spec, such as '{norm}:{given}'")
    if isinstance(part, (list, tuple)):
        raise UsageError(f"{len(part)} threat models at once; an evaluation has one: call evaluate for each of them")


_LEAST: Final = "did you mean 'targeted:how=least_likely'?"
_GOALS: Final[dict[str, str]] = {
    **dict.fromkeys(("misclassification", "misclassify", "untarget", "nontargeted"), "did you mean 'untargeted'?"),
    **dict.fromkeys(
        ("target", "targetedmisclassification", "targetedmisclassify"),
        "did you mean 'targeted:how=next' or 'targeted:how=class,target=3'?",
    ),
    **dict.fromkeys(("leastlikely", "leastlikelyclass", "llc", "ll"), _LEAST),
    **dict.fromkeys(("random", "randomtarget", "next"), "did you mean 'targeted:how=random' or 'targeted:how=next'?"),
    **dict.fromkeys(("jailbreak", "string", "reply"), "did you mean 'says'? The wanted replies are in the task"),
    **dict.fromkeys(("top5", "topn", "top1"), "did you mean 'out-of-topk:k=5' or 'topk:k=5'?"),
}
_GOAL_SETTINGS: Final = settings(
    (
        "class label y target_class target_label to",
        Setting(here=("target",), words="It goes with how=class: how=class,target=3"),
    ),
    ("mode method strategy kind", Setting(here=("how",))),
    (
        "labels classes y_target per_sample",
        Setting(here=("targets",), words="It goes with how=each: how=each,targets=3+1+4"),
    ),
)


def _goal_guess(name: str) -> str | None:
    return f"that is a class; say targeted:how=class,target={name.strip()}" if name.strip().isdecimal() else None


def _goal_other(part: Any) -> Any:
    """A goal made for the samples of a task, one class per sample, or advice."""
    from advkit.threat_models.goals.given import given

    if isinstance(part, int) and not isinstance(part, bool):
        raise UsageError(
            f"the goal {part} is a class; say 'targeted:how=class,target={part}' for every sample, or give a tensor "
            "with one class per sample"
        )
    if isinstance(part, (list, tuple)) and part and all(isinstance(each, str) for each in part):
        raise UsageError(f"{len(part)} goals at once; an evaluation has one: call evaluate for each of them")
    return given(part)


BALLS: Final = Familiar(names=_BALLS, settings=_BALL_SETTINGS, guess=_ball_guess, other=_ball_other)
GOALS: Final = Familiar(names=_GOALS, settings=_GOAL_SETTINGS, guess=_goal_guess, other=_goal_other)
