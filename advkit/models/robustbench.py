"""Models of the RobustBench leaderboard (arXiv 2010.09670)."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal

from advkit.core.errors import BadModel, MissingExtra, UnknownName, UsageError
from advkit.core.protocols import Rng
from advkit.models.external import _probed, _space
from advkit.models.torch import TorchModel, seeded


@dataclass(frozen=True, kw_only=True)
class RobustBench:
    """RobustBench model by name; it takes images in [0, 1] and normalises inside.

    name:    as the leaderboard spells it, such as Carmon2019Unlabeled
    dataset: cifar10, cifar100 or imagenet; the task's classes must be its
    threat:  the leaderboard: Linf, L2 or corruptions
    folder:  where the package keeps its weights; it fetches what is not there, and opens the files by its own means

    Raises MissingExtra without the package, UnknownName for a name that the leaderboard lacks, UsageError where the
    weights can't be had, BadModel for a task of another shape.
    """

    name: str
    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    threat: Literal["Linf", "L2", "corruptions"] = "Linf"
    folder: str = "models"

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        from advkit.models import MODELS

        spec = f"robustbench:{self.name}"
        try:
            utils = importlib.import_module("robustbench.utils")
            known = importlib.import_module("robustbench.model_zoo").model_dicts
        except ImportError as error:
            raise MissingExtra(
                f"the package robustbench does not import ({error}): pip install robustbench 'setuptools<82' in an "
                "environment of its own (it pins other packages, and asks for pkg_resources, which later setuptools "
                "lack), and autoattack from github.com/fra31/auto-attack (pip brings it as pyautoattack, a name that "
                "robustbench 1.1.1 does not look for)"
            ) from error
        listed = {kind.value: models for kind, models in self._of(known, self.dataset).items()}
        names = listed.get(self.threat, {})
        if self.name not in names:
            near = difflib.get_close_matches(self.name, list(names), n=3, cutoff=0.5)
            raise UnknownName(
                f"RobustBench lists no {self.name!r} for {self.dataset} and {self.threat}"
                + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            )
        try:
            module = seeded(
                lambda: utils.load_model(
                    model_name=self.name, model_dir=self.folder, dataset=self.dataset, threat_model=self.threat
                ),
                rng,
            ).eval()
        except Exception as error:  # the package fetches by several means, each with errors of its own
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise UsageError(
                f"{spec} can't be loaded ({type(error).__name__}: {first}); connect to the network once, or put the "
                f"package's file into {self.folder}/{self.dataset}/{self.threat}"
            ) from error
        if not shape or len(shape) != 3:
            raise BadModel(f"{spec} takes images of shape [C, H, W], this task's samples are {list(shape)}")
        answered = _probed(module, tuple(shape), spec, f"it was made for {self.dataset}")
        return TorchModel(
            module,
            _space(space, tuple(shape)),
            answered,
            name=spec,
            source=f"RobustBench, {self.dataset}, {self.threat}",
            license="",  # each entry has its authors' own
            architecture=MODELS.spec(self),
        )

    @staticmethod
    def _of(known: Any, dataset: str) -> dict[Any, Any]:
        found: dict[Any, Any] = next((models for kind, models in known.items() if kind.value == dataset), {})
        return found
