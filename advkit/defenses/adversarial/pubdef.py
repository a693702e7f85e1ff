"""PubDef: training on stored transfer images from a few public models (Sitawarin et al., arXiv 2310.17645)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.attacks import ATTACKS
from advkit.attacks.gradient.pgd import PGD
from advkit.core.checks import at_least_one, fraction, one_of
from advkit.core.errors import BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Ball, Data, Rng
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.defenses.adversarial.base import TrainingDefense, in_mode
from advkit.defenses.adversarial.pubdef_losses import (
    base_weights,
    dynamic_weights,
    moved_average,
    random_loss,
    start_average,
    topk_loss,
    weighted_loss,
)
from advkit.defenses.adversarial.transfer_set import (
    Maker,
    TransferSet,
    check_space,
    default_folder,
    stored_copies,
)
from advkit.models import MODELS
from advkit.threat_models.transfer import BALLS, source_name
from advkit.training.augment import AUGMENTATIONS
from advkit.training.loop import Objective
from advkit.training.ranks import mean_of_batch

AUTO = "auto"
PUBLIC = "public"
SELECTIONS = ("all", "transfer", "random")

Loss = Literal["random", "all", "topk", "dynamic-loss", "dynamic-acc"]


@dataclass(frozen=True)
class Source:
    """A public model, resolved.

    group: how it was trained ("normal", "linf"...); empty where unknown
    """

    name: str
    model: Any
    group: str = ""

    @property
    def key(self) -> str:
        """What its stored images are keyed by."""
        return str(self.model.describe().state_sha256)


@dataclass(frozen=True, kw_only=True)
class PubDef(TrainingDefense):
    """PubDef: training on clean images and on stored transfer attacks from public models.

    Meant for attackers who hold public models and never see this one; a white-box attacker breaks it at once.

    sources:       model specs (zoo:NAME, path:FILE) or models; `auto` stands for the zoo's public models of the task
                   that PubDef is known to train on, `public` for all of them
    groups:        training procedure of each source where its card does not say; as many as sources
    select:        `all` trains on every source named; `transfer` takes one per group, the one whose images fool the
                   others of its group best; `random` takes one per group at random; names take those
    loss:          random: one drawn source per image and epoch, two passes a step; all: every source; topk: each
                   image's k hardest; dynamic-loss, dynamic-acc: sources weighted by a moving average of their loss or
                   error
    k:             sources that topk keeps
    weights:       clean and adversarial weight, or one per stream (clean first)
    ema:           rate of the moving average, in (0, 1]; the released class has 0.99
    include_clean: let the clean stream compete for the dynamic weights
    copies:        stored versions per image and source, each from an augmented version of its own
    attack:        spec of the attack that makes them; `auto` is the paper's PGD with 10 steps of
                   max(0.001, eps/4/(steps/10)), from a random start
    set_seed:      seed of the stored images, apart from the training seed so that runs share one set
    cache:         folder of the stored images; empty: ADVKIT_CACHE or the user's cache folder

    Stored images have 8 bits and the point of best loss is kept without early stop. Checkpoints are judged by the
    weighted accuracy over clean and transfer streams of the validation split (one copy, not augmented).
    """

    claims: ClassVar[str] = "tapm"

    sources: tuple[str, ...] = (AUTO,)
    groups: tuple[str, ...] = ()
    select: tuple[str, ...] = ("all",)
    loss: Loss = "random"
    k: int = 1
    weights: tuple[float, ...] = (0.5, 0.5)
    ema: float = 0.1
    include_clean: bool = False
    copies: int = 4
    attack: str = AUTO
    set_seed: int = 0
    cache: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sources", "select", "groups"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} {getattr(self, name)!r} is one text; expected a tuple")
        if not self.sources:
            raise UsageError("pubdef needs sources: zoo:NAME, path:FILE, models, or auto")
        if self.groups and len(self.groups) != len(self.sources):
            raise UsageError(f"{len(self.groups)} groups for {len(self.sources)} sources; give one each, or none")
        one_of(self, "loss", ("random", "all", "topk", "dynamic-loss", "dynamic-acc"))
        fraction(self, "ema", what="rate")
        at_least_one(self, "copies", "k")
        _ = self.maker_attack

    @property
    def maker_attack(self) -> Any:
        """The attack that makes the stored images."""
        if self.attack == AUTO:
            steps = 10
            length = max(0.001, self.eps / 4 / (steps / 10)) / self.eps
            return PGD(steps=steps, step_size=length, stop=False)
        return ATTACKS.build(self.attack)

    def stored_ball(self, space: Any) -> Ball[Tensor]:
        """The ball trained for, with 8-bit files."""
        made: Ball[Tensor] = BALLS[self.norm](eps=self.eps, lattice=255)
        return made.bind(space)

    @override
    def objective(self) -> Objective:
        return PubDefObjective(self)


def public_sources(defense: PubDef, data: Data) -> list[Source]:
    """The candidates that the defense names, loaded, in the order named.

    Raises UsageError where there are none or one comes twice, BadModel for an architecture without weights.
    """
    from advkit.models import zoo
    from advkit.models.torch import Architecture, as_model

    task = data.name.partition("/")[0]
    cards = {card.name: card for card in zoo.public(task)} if task else {}
    named: list[tuple[Any, str]] = []
    for place, source in enumerate(cast("tuple[Any, ...]", defense.sources)):
        group = defense.groups[place] if defense.groups else ""
        if isinstance(source, str) and source in (AUTO, PUBLIC):
            chosen = [card for card in cards.values() if source == PUBLIC or "pubdef" in card.seen_by]
            if not chosen:
                raise UsageError(
                    f"the zoo has no public models for task {task or 'unnamed'} to train pubdef on; "
                    "name some with sources=zoo:NAME+path:FILE.safetensors"
                )
            named += [(f"zoo:{card.name}", group or card.group) for card in chosen]
        else:
            card = cards.get(source.removeprefix("zoo:")) if isinstance(source, str) else None
            named.append((source, group or (card.group if card else "")))
    found = []
    for source, group in named:
        part = MODELS.build(source)
        if isinstance(part, Architecture):
            raise BadModel(
                f"{source} is an architecture without weights; name a trained model, e.g. zoo:NAME or path:FILE"
            )
        if isinstance(source, str):
            blank = RowRng.from_ids(0, ["sources"])
            part = part(tuple(data.x.shape[1:]), data.classes, blank, space=data.space)
        found.append(Source(source_name(source), as_model(part, data), group))
    names = [source.name for source in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"sources {', '.join(twice)} come more than once; give every model its own name")
    return found


def select_sources(
    candidates: Sequence[Source],
    select: Sequence[str],
    data: Data,
    attack: Any,
    ball: Ball[Tensor],
    rng: Rng,
    rows: int = 512,
) -> list[Source]:
    """The sources to train on, by name, whatever order the candidates come in.

    `transfer` takes of each group the member on whose images the group's other members are least accurate on average,
    ties by name, measured on the first `rows` training images; `random` draws one per group. Raises UsageError for
    unknown names and for candidates whose group is unknown where groups matter.
    """
    ordered = sorted(candidates, key=lambda source: source.name)
    if tuple(select) == ("all",):
        return ordered
    if tuple(select) not in (("transfer",), ("random",)):
        known = {source.name: source for source in ordered}
        unknown = sorted(set(select) - set(known))
        if unknown:
            raise UsageError(
                f"select names {', '.join(unknown)}; expected transfer, random, all, or some of {', '.join(known)}"
            )
        return [known[name] for name in sorted(set(select))]
    lost = [source.name for source in ordered if not source.group]
    if lost:
        raise UsageError(f"the training group of {', '.join(lost)} is unknown; say it with groups=, or use select=all")
    chosen = []
    for group in sorted({source.group for source in ordered}):
        members = [source for source in ordered if source.group == group]
        if len(members) == 1:
            chosen += members
        elif tuple(select) == ("random",):
            generator = rng.at("select", group).generator()
            chosen.append(members[int(torch.randint(len(members), (), generator=generator))])
        else:
            chosen.append(
                min(members, key=lambda one: (_transferred(one, members, data, attack, ball, rows), one.name))
            )
    return chosen


def _transferred(
    source: Source, members: Sequence[Source], data: Data, attack: Any, ball: Ball[Tensor], rows: int
) -> int:
    """How many answers of the group's other members are right on images made on this source."""
    x, y = data.x[:rows], data.y[:rows]
    maker = Maker(source.model, attack, ball, None, 0, source.key, _device(source.model))
    images, _ = maker(x, y, range(len(x)), "select")
    right = 0
    for other in members:
        if other is not source:
            right += int(_correct(other.model, images.float() / 255, y).sum())
    return right


def _correct(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Bool [B] on the CPU: rows that the model, in evaluation mode, gets right."""
    device = _device(model)
    with in_mode(model, False), frozen(*model.modules()):
        x = x.to(device)
        answer = MeteredOracle(model, rows=len(x), lanes=Lanes.fitting(x))(x)
    return (answer.argmax(1).cpu() == y.cpu()).cpu()


def _device(model: Any) -> torch.device:
    for top in model.modules():
        for tensor in (*top.parameters(), *top.buffers()):
            return torch.device(tensor.device)
    return torch.device("cpu")


class PubDefObjective(Objective):
    """The streams, their weights and the moving average of one PubDef training run."""

    def __init__(self, defense: PubDef) -> None:
        super().__init__()
        self.defense = defense
        self.sources: list[Source] = []

    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        """Find, select and attack the sources, or open what was stored before; the model itself is never asked."""
        defense = self.defense
        check_space(data)
        device = _device(model)
        candidates = [replace(one, model=one.model.to(device)) for one in public_sources(defense, data)]
        attack, ball = defense.maker_attack, defense.stored_ball(data.space)
        self.sources = select_sources(candidates, defense.select, data, attack, ball, rng)
        if defense.loss == "topk" and defense.k > len(self.sources):
            raise UsageError(f"k={defense.k}; expected 1 to {len(self.sources)}, the number of sources")
        self.weights = base_weights(defense.weights, len(self.sources)).to(device)
        self.average = start_average(len(self.sources) + 1).to(device)
        augment = defense.recipe.augment
        recorded = {
            "attack": ATTACKS.label(attack, defense.attack),
            "eps": defense.eps,
            "norm": defense.norm,
            "augment": augment,
        }
        makers = [
            Maker(one.model, attack, ball, AUGMENTATIONS[augment], defense.set_seed, one.key, device)
            for one in self.sources
        ]
        folder = Path(defense.cache) if defense.cache else default_folder()
        self.stored = TransferSet(tuple(stored_copies(one, data, defense.copies, folder, recorded) for one in makers))
        self._plain_makers = [replace(one, augment=None) for one in makers]
        self._plain: dict[int, Tensor] = {}  # validation images [sources, ...] by row

    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """One pass over the clean stream and the transfer streams together, so that they share batch statistics."""
        defense, stored = self.defense, self.stored
        if defense.loss == "random":
            source = rng.at("source").integers(stored.sources, rows)
            streams = [x, stored.take(source, rng.at("copy", 0).integers(stored.copies, rows), rows).to(x)]
            return random_loss(self._losses(model, streams, y)[0], self.weights)
        streams = [x]
        for source_number in range(stored.sources):
            copy = rng.at("copy", source_number).integers(stored.copies, rows)
            streams.append(stored.take(source_number, copy, rows).to(x))
        losses, errors = self._losses(model, streams, y)
        if defense.loss == "all":
            return weighted_loss(losses, self.weights)
        if defense.loss == "topk":
            return topk_loss(losses, self.weights, defense.k)
        current = mean_of_batch([losses.detach().mean(1) if defense.loss == "dynamic-loss" else errors])[0]
        self.average = moved_average(self.average, current, defense.ema)
        return weighted_loss(losses, dynamic_weights(self.average, self.weights, defense.include_clean))

    @staticmethod
    def _losses(model: Any, streams: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies [streams, B] and error rates [streams]."""
        answers = model(torch.cat(list(streams)))
        labels = y.repeat(len(streams))
        losses = functional.cross_entropy(answers, labels, reduction="none")
        errors = (answers.detach().argmax(1) != labels).to(losses.dtype)
        return losses.view(len(streams), -1), errors.view(len(streams), -1).mean(1)

    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """Per row, the weighted share of streams (clean and one image per source) that the model gets right."""
        images = self._validation_images(x, y, rows).float() / 255
        right = torch.stack([_correct(model, x, y)] + [_correct(model, one, y) for one in images])
        return (self.weights.cpu() @ right.float()).to(x.device)

    def _validation_images(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Images uint8 [sources, B, ...] of the rows as they are, made when first asked for; each depends on its row
        alone."""
        places: list[int] = rows.tolist()
        new = torch.tensor([number for number, row in enumerate(places) if row not in self._plain], dtype=torch.long)
        if len(new):
            chosen, index = [places[int(number)] for number in new], new.to(x.device)
            made = torch.stack([one(x[index], y[index], chosen, "validation")[0] for one in self._plain_makers], dim=1)
            self._plain.update(zip(chosen, made.unbind(0), strict=True))
        return torch.stack([self._plain[row] for row in places], dim=1)

    def state(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load(self, state: dict[str, Tensor]) -> None:
        self.average = state["average"]

    def fingerprint(self) -> str:
        """Models passed as objects count by their weights."""
        given = [
            one.describe().state_sha256
            for one in cast("tuple[Any, ...]", self.defense.sources)
            if not isinstance(one, str)
        ]
        return f"{super().fingerprint()}{given}"
