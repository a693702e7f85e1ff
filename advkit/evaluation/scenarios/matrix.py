"""`advkit.matrix`: every attack on every source, each image set made once and shown to every target.

The protocol is PubDef's grid (arXiv 2310.17645) seen from many targets at once. Targets answer stored 8-bit images,
forward only; attacks never ask them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, BadModel, UsageError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access, Label
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.transfer_set import check_space
from advkit.evaluation.inputs import pick_device, task_of
from advkit.evaluation.report.matrix import NOISE, NOTHING, Decisions, Matrix, Table, document, without_images
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import Case, digest_of, parameters
from advkit.evaluation.run.engine import lanes_of
from advkit.evaluation.run.judge import Judge, decide, finite
from advkit.evaluation.run.rehearsal import preflight
from advkit.evaluation.run.workers import Workers
from advkit.evaluation.scenarios.evasion import Evasion
from advkit.evaluation.scenarios.transfer_images import (
    LEVELS,
    Images,
    ImageSet,
    Rows,
    SignNoise,
    Unasked,
    Unsupported,
    as_seen,
    code_digest,
    write_tensors,
)
from advkit.evaluation.victims import cache_root, protected
from advkit.models import MODELS, zoo
from advkit.tasks.base import raw_bytes
from advkit.threat_models import GOALS, THREAT_MODELS
from advkit.threat_models.tapm import PUBLIC
from advkit.threat_models.transfer import Transfer, source_name

log = logging.getLogger("advkit")

VICTIMS = "victims"
Watch = Callable[[str, int, int], None]  # what is going on, units done, units in all
Budget = int | str | None


@dataclass(frozen=True)
class Player:
    """A source or a target.

    name:    as it was asked for
    members: (key, model), several where a source is an ensemble; the key is the hash of weights and architecture
    weights: state hashes of all that is inside
    group:   training group of its zoo card; "given" without a card, "ensemble" for several models
    defense: name of the defense that the card tells, or that was asked for
    cards:   names of the zoo cards inside
    seen_by: names of the victims and defenses whose training used it
    """

    name: str
    members: tuple[tuple[str, Any], ...]
    weights: frozenset[str]
    group: str = "given"
    defense: str = ""
    cards: tuple[str, ...] = ()
    seen_by: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """Hash of what it computes."""
        keys = [key for key, _ in self.members]
        return keys[0] if len(keys) == 1 else digest_of(keys)

    @property
    def model(self) -> Any:
        """The model; of an ensemble the mean of its logits."""
        if len(self.members) == 1:
            return self.members[0][1]
        from advkit.models.ensemble import Ensemble

        return Ensemble(models=tuple(model for _, model in self.members))

    def knows(self, target: Player) -> bool:
        """Whether the target is one of the sources, or has the weights of one."""
        return bool(self.weights & target.weights)

    def was_seen_by(self, target: Player) -> bool:
        """Whether the target's training used it."""
        return bool(self.seen_by & {target.defense, *target.cards} - {""})

    def to_dict(self) -> dict[str, Any]:
        """As the report names it."""
        return {"name": self.name, "sha256": self.key, "group": self.group}


@dataclass(frozen=True)
class Strike:
    """An attack of the matrix: the name it goes by, what it is, and its canonical spec."""

    name: str
    attack: Any
    spec: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As the report names it."""
        return {"name": self.name, "spec": self.spec, "params": parameters(self.attack), "note": self.note}


@dataclass
class _Play:
    """A matrix in the making; `data` is the digest of what labelled data the attacker holds."""

    case: Case
    rows: Rows
    sources: tuple[Player, ...]
    targets: tuple[Player, ...]
    seeds: tuple[int, ...]
    images: Images
    watch: Watch
    wanted: Tensor | None
    data: str = ""
    crew: Workers | None = None
    done: int = 0
    units: int = 0
    lanes: dict[str, Lanes] = field(default_factory=dict)
    refused: dict[tuple[str, str, int], str] = field(default_factory=dict)


def matrix(
    sources: Sequence[Any] | str = (PUBLIC,),
    attacks: Sequence[Any] | str = ("pgd:steps=10,step_size=0.25", "mifgsm"),
    targets: Sequence[Any] | str = (VICTIMS,),
    *,
    task: Any = "fashion-mnist",
    threat_model: Any = None,
    eps: float | None = None,
    goal: Any = "untargeted",
    n: int | None = None,
    seeds: int | Sequence[int] = 3,
    equal_budget: Budget = "auto",
    similarity: bool = False,
    seen: Mapping[str, Collection[str]] | None = None,
    device: str = "auto",
    workers: int = 1,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
    command: str = "",
) -> Matrix:
    """Accuracy of every target on what every attack makes on every source: the transfer matrix.

    sources:      model specs or models; `a+b` (or a tuple of them) is one source, the ensemble of a and b, attacked
                  through the mean of their logits; `public` stands for the task's public zoo models
    attacks:      attack specs or attacks; a sum such as `ni+ti` is the composition `transfer:ni+ti`
    targets:      model specs or models, `DEFENSE@MODEL` for one behind or trained with a defense; `victims` stands for
                  the task's zoo victims, `public` for its public models
    task:         spec, a Task, or a pair (x [N, ...] in [0, 1], y [N] long)
    threat_model: spec or object of an Lp ball (its eps and norm count); None takes the task's
    eps:          radius in its place
    goal:         `untargeted`, `targeted:how=next`, `targeted:how=random` or `targeted:how=class,target=K`
    n:            rows, the task's first ones; None takes the task's default or all
    seeds:        how many, from 0 on, or which; attacks that two seeds give the same images of are made under one
    equal_budget: gradients per image of the second table, in which every attack gets that many (its steps scaled, the
                  length of its path kept); "auto": the median of what the attacks cost, or what one step of the dearest
                  costs where that is more; None: no second table
    similarity:   also the cosine between the perturbations of every two (source, attack) pairs
    seen:         target -> sources that its training used, in place of what the zoo's cards say
    device:       auto, cpu, cuda[:i], mps
    workers:      processes of one thread each that make images; change no figure
    cache:        folder of image sets and answers, known by content and shared by all runs; None: the user's cache
    out:          folder for matrix.json, matrix.md and the stored answers; None writes nothing but the cache
    watch:        called with what is going on, units done and units in all
    command:      what the report gives as the command that made it

    Raises UsageError, BadModel, BadInput. What one pair of source and attack can't do is no error: the cell is missing,
    and the report says why.
    """
    device = pick_device(device)
    work = task_of(task)
    check_space(cast(Any, work))
    total = min(n if n is not None else (work.defaults.n or len(work)), len(work))
    if total < 1:
        raise UsageError(f"n must be between 1 and {len(work)}, got {n}")
    wanted_seeds = _seeds(seeds)
    if isinstance(equal_budget, int) and equal_budget < 1:
        raise UsageError(f"a budget of {equal_budget} gradients; expected at least 1, auto or none")
    players = {
        "source": _players(_filled(sources, work, "source"), work, device, attacked=True),
        "target": _players(_filled(targets, work, "target"), work, device, attacked=False),
    }
    strikes = strikes_of(attacks)
    threat, spec = _threat(threat_model, eps, work)
    rule = GOALS.build(goal)
    rows = Rows.of(work, total)
    wanted_data = any(getattr(strike.attack, "wants_data", False) for strike in strikes)
    base = Case(
        task=work,
        victim=Unasked(work.space, work.classes),
        attack=SignNoise(),
        threat=threat.bind(work.space),
        rule=rule,
        label=Label("noise"),
        n=total,
        specs={"goal": GOALS.label(rule), "threat_model": spec},
        data=work.training() if wanted_data else None,
        surrogates=tuple({key: model for one in players["source"] for key, model in one.members}.items()),
        device=device,
        attack_misclassified=True,
    )
    for kind in ("source", "target"):
        for player in players[kind]:
            for _, model in player.members:
                preflight(replace(base, victim=model, surrogates=(), label=Label(f"{kind} {player.name}")), Evasion())
    for strike in strikes:
        if reason := Evasion().accepts(replace(base, attack=strike.attack, label=Label(strike.spec))):
            raise UsageError(reason)

    play = _Play(
        case=base,
        rows=rows,
        sources=players["source"],
        targets=players["target"],
        seeds=wanted_seeds,
        images=Images(cache_root() / "matrix" if cache is None else Path(cache)),
        watch=watch or (lambda text, done, units: None),
        wanted=_wanted(rule, rows, work, wanted_seeds),
        data="" if base.data is None else _digest(base.data.x, base.data.y),
    )
    known = _seen(play, seen)
    play.units = _pairs(play, strikes) * (1 + (equal_budget is not None))
    clean = np.stack([_answers(play, target, rows.x, 0) for target in play.targets])
    second, budget, how = None, None, ""
    with ExitStack() as stack:
        if workers > 1:
            play.crew = stack.enter_context(Workers(base, workers))
        table = _table(play, strikes, clean)
        if equal_budget is not None:
            budget, scaled = _scaled(play, strikes, equal_budget)
            second = _table(play, scaled, clean)
            how = (
                "every attack's steps are scaled so that it asks for at most this many gradients per image, and a "
                "step's length so that the path stays as long; attacks without steps stay as they are"
            )
    log.info("transfer images: %d pieces made, %d found", play.images.made, play.images.read)
    content = document(
        play.case, play.sources, play.targets, play.seeds, clean, rows, table, second, budget, how,
        seen=known, similarity=_similarity(play, strikes) if similarity else None, command=command,
        wanted=play.wanted,
    )  # fmt: skip
    made = Matrix.from_dict(content, table)
    if out is not None:
        made.save(out)
    return made


def strikes_of(attacks: Sequence[Any] | str) -> tuple[Strike, ...]:
    """The attacks that specs or objects stand for; a sum of parts (`ni+ti`) is the composition `transfer:ni+ti`."""
    found = []
    for given in [attacks] if isinstance(attacks, str) else attacks:
        if isinstance(given, str):
            text = given.strip()
            sum_of_parts = "+" in text.partition(":")[0] and text.partition(":")[0] not in ATTACKS
            attack: Any = ATTACKS.build(f"transfer:{text}" if sum_of_parts else text)
            found.append(Strike(text, attack, ATTACKS.label(attack)))
        else:
            found.append(Strike(ATTACKS.label(given), given, ATTACKS.label(given)))
    if not found:
        raise UsageError("a matrix needs at least one attack")
    _all_different("attacks", [strike.name for strike in found])
    _all_different("attacks", [strike.spec for strike in found])
    return tuple(found)


def _all_different(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{what} hold {', '.join(twice)} more than once; once is enough")


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not found or len(set(found)) < len(found):
        raise UsageError(f"seeds {seeds!r}; expected a number of at least 1, or different seeds")
    return found


def _filled(given: Sequence[Any] | str, task: Any, what: str) -> list[Any]:
    """The specs, with the zoo's names in place of `public` and `victims`."""
    found: list[Any] = []
    for one in [given] if isinstance(given, str) else given:
        role = {PUBLIC: "public", VICTIMS: "victim"}.get(one) if isinstance(one, str) else None
        cards = zoo.find(task.name, role=role) if role else ()
        if role and not cards:
            raise UsageError(f"the zoo has no {role} models for task {task.name}: name them, e.g. path:FILE")
        found += [f"zoo:{card.name}" for card in cards] if role else [one]
    if not found:
        raise UsageError(f"a matrix needs at least one {what}")
    return found


def split_sum(text: str) -> tuple[str, ...]:
    """The models of `a+b`: split at each + outside brackets, where a model's name starts on either side."""
    parts, depth = [""], 0
    for mark in text.strip():
        depth += (mark == "[") - (mark == "]")
        parts += [""] if mark == "+" and depth == 0 else []
        parts[-1] += "" if mark == "+" and depth == 0 else mark
    parts = [part[1:-1] if part.startswith("[") and part.endswith("]") else part for part in parts]
    heads = [part.partition(":")[0] for part in parts]
    whole = all((head.partition("@")[2] or head) in MODELS for head in heads)
    return tuple(parts) if whole else (text.strip(),)


def _players(given: Sequence[Any], task: Any, device: str, *, attacked: bool) -> tuple[Player, ...]:
    found = [_player(one, task, device, attacked) for one in given]
    _all_different("sources" if attacked else "targets", [one.name for one in found])
    return tuple(found)


def _player(given: Any, task: Any, device: str, attacked: bool) -> Player:
    asked = split_sum(given) if isinstance(given, str) else given if isinstance(given, (tuple, list)) else (given,)
    if len(asked) > 1 and not attacked:
        raise UsageError(f"{given} is several targets; name them one by one")
    members, weights, cards, groups, seen_by, defenses = [], set(), [], [], set(), []
    for one in asked:
        text = one if isinstance(one, str) else ""
        guard, at, spec = text.partition("@")
        if not at or guard.partition(":")[0] not in DEFENSES:
            guard, spec = "none", text
        victim = protected(spec if text else one, guard, task, device=device)
        model = victim.model.attacker_view() if attacked else victim.model
        info = model.describe()
        if info.classes is not None and info.classes != task.classes:
            raise BadModel(f"{text or info.name} answers {info.classes} classes, the task has {task.classes}")
        members.append((hashlib.sha256(f"{info.state_sha256}|{info.architecture}".encode()).hexdigest(), model))
        weights |= weights_of(model)
        name = next((where[4:] for where in (spec, victim.origin) if where.startswith("zoo:")), "")
        defense = guard.partition(":")[0] if guard != "none" else ""
        if name:
            card = zoo.card(name)
            cards.append(name)
            groups.append(card.group)
            seen_by |= set(card.seen_by)
            defense = defense or card.defense.partition(":")[0].replace("none", "")
        else:
            groups.append("given")
        defenses.append(defense)
    return Player(
        name=given.strip() if isinstance(given, str) else "+".join(source_name(one) for one in asked),
        members=tuple(members),
        weights=frozenset(weights),
        group=groups[0] if len(groups) == 1 else "ensemble",
        defense=defenses[0] if len(defenses) == 1 else "",
        cards=tuple(cards),
        seen_by=frozenset(seen_by),
    )


def weights_of(model: Any) -> set[str]:
    """State hashes of a model and of the models inside it: behind a transformation it still has the same weights."""
    found = {model.describe().state_sha256}
    for inner in (getattr(model, "model", None), *(getattr(model, "models", None) or ())):
        if inner is not None and callable(getattr(inner, "describe", None)):
            found |= weights_of(inner)
    return found


def _threat(threat_model: Any, eps: float | None, task: Any) -> tuple[Transfer, str]:
    told: Any = THREAT_MODELS.build(threat_model if threat_model is not None else task.defaults.threat_model)
    ball: dict[str, Any] = told.describe()
    norm, radius = str(ball.get("norm") or "").lower(), ball.get("eps") if eps is None else eps
    if radius is None or told.scenario not in ("evasion", "grid"):
        raise UsageError(f"the threat model {threat_model} has no radius; expected a ball such as linf:eps=8/255")
    threat = Transfer(eps=float(radius), norm=cast(Any, norm), lattice=LEVELS, sources=("source",), attacks_all=True)
    return threat, f"{norm}:eps={float(radius)!r}"


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for one in tensors:
        digest.update(raw_bytes(one))
    return digest.hexdigest()


def _wanted(rule: Any, rows: Rows, task: Any, seeds: Sequence[int]) -> Tensor | None:
    """The classes that a targeted attacker wants, long [K, N]; None for an untargeted one."""
    if rule.kind == "untargeted":
        return None
    if rule.kind != "targeted" or getattr(rule, "how", None) not in ("next", "random", "class"):
        raise UsageError(
            f"the goal {GOALS.label(rule)} depends on a victim's answers; in a matrix, whose images are made before "
            "any target is asked, use untargeted or targeted:how=next, how=random, or how=class,target=K"
        )
    answers = torch.zeros(len(rows.ids), task.classes)
    return torch.stack([rule(rows.labels, answers, RowRng.from_ids(s, rows.ids).at("goal")).targets for s in seeds])


def _transfer(case: Case) -> Transfer:
    assert isinstance(case.threat, Transfer)
    return case.threat


def _pairs(play: _Play, strikes: Sequence[Strike]) -> int:
    return len(play.sources) * len(strikes) + 1


def _lanes(play: _Play, key: str, case: Case) -> Lanes:
    if key not in play.lanes:
        play.lanes[key] = lanes_of(case)
    return play.lanes[key]


def _set(play: _Play, source: Player | None, strike: Strike, seed: int) -> tuple[ImageSet, str] | str:
    """Images and their hash, or why there are none; `source` None is noise."""
    key = "" if source is None else source.key
    name = (key, strike.spec, seed)
    if name in play.refused:
        return play.refused[name]
    surrogates = play.case.surrogates[:1] if source is None else source.members
    case = replace(
        play.case,
        attack=strike.attack,
        label=Label(strike.spec, source=key[:16]),
        surrogates=surrogates,
        threat=replace(_transfer(play.case), sources=(key[:16],)),
        seed=seed,
        specs={**play.case.specs, "data": play.data if getattr(strike.attack, "wants_data", False) else ""},
    )
    # What nobody is asked for must not depend on who is not asked.
    told = case if source is not None else replace(case, surrogates=())
    try:
        held = play.images.get(
            told,
            play.rows.pieces(),
            functools.partial(_lanes, play, key, case),
            play.crew if source is not None else None,
        )
    except Unsupported as error:
        play.refused[name] = str(error)
        return str(error)
    return held, held.sha256


def _table(play: _Play, strikes: Sequence[Strike], clean: Decisions) -> Table:
    """Decisions of every target about every set, seed by seed; noise stands in a row of its own."""
    shape = (len(play.targets), len(play.sources), len(strikes), len(play.seeds), len(play.rows.ids))
    decisions = np.full(shape, NOTHING, dtype=np.int16)
    noise = np.full((len(play.targets), len(play.seeds), len(play.rows.ids)), NOTHING, dtype=np.int16)
    missing: dict[tuple[int, int], str] = {}
    sets: dict[tuple[int, int, int], tuple[ImageSet, str]] = {}
    quiet = Strike(NOISE, SignNoise(), NOISE)
    for k, seed in enumerate(play.seeds):
        made = _set(play, None, quiet, seed)
        assert not isinstance(made, str)
        for t, target in enumerate(play.targets):
            noise[t, k] = _shown(play, target, made, seed)
    _tick(play, "noise")
    for s, source in enumerate(play.sources):
        for a, strike in enumerate(strikes):
            play.watch(f"{strike.name} on {source.name}", play.done, play.units)
            first: ImageSet | None = None
            for k, seed in enumerate(play.seeds):
                if k == 1 and first is not None and _repeats(play, source, strike, first):
                    decisions[:, s, a, 1:] = decisions[:, s, a, :1]
                    break
                made = _set(play, source, strike, seed)
                if isinstance(made, str):
                    missing[s, a] = made
                    for gone in range(k):
                        del sets[s, a, gone]
                    decisions[:, s, a] = NOTHING
                    break
                for t, target in enumerate(play.targets):
                    decisions[t, s, a, k] = _shown(play, target, made, seed)
                first = first or made[0]
                sets[s, a, k] = without_images(made[0]), made[1]
            _tick(play, f"{strike.name} on {source.name}")
    return Table(tuple(strikes), decisions, noise, missing, sets)


def _tick(play: _Play, text: str) -> None:
    play.done += 1
    play.watch(text, play.done, play.units)


def _repeats(play: _Play, source: Player, strike: Strike, first: ImageSet) -> bool:
    """Whether the second seed makes the first rows' images once more: an attack that draws nothing."""
    again = _set(replace(play, rows=_head(play.rows), refused={}), source, strike, play.seeds[1])
    return not isinstance(again, str) and torch.equal(again[0].images, first.images[: len(again[0].images)])


def _head(rows: Rows) -> Rows:
    """The first piece alone."""
    first = rows.pieces()[0]
    assert first.labels is not None
    return Rows(first.ids, first.x, first.labels, first.goal)


def _shown(play: _Play, target: Player, made: tuple[ImageSet, str], seed: int) -> Decisions:
    """What a target says of a set, [N]; NOTHING where the set holds nothing."""
    held, sha256 = made
    decisions = _answers(play, target, held.images, seed, sha256)
    return np.where(held.usable.numpy(), decisions, NOTHING).astype(np.int16)


def _answers(play: _Play, target: Player, x: Tensor, seed: int, sha256: str = "") -> Decisions:
    """Decisions [N], the commonest among the draws of a randomised target; kept by the content of model and images.

    x: stored images uint8 [N, ...], or rows as they are. -1 abstains, NOTHING is an answer that is not finite.
    """
    model = target.model
    draws = play.case.draws if model.describe().randomized else 1
    word = {"target": target.key, "images": sha256 or _digest(x), "draws": draws, "code": code_digest()}
    word |= {"seed": seed} if draws > 1 else {}
    name = digest_of(word)
    path = play.images.folder / "answers" / name[:2] / f"{name}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as held:
            kept: Tensor = held.get_tensor("decisions")
        return np.asarray(kept.numpy(), dtype=np.int16)
    device = play.case.device
    probe = replace(play.case, victim=model, surrogates=(), threat=replace(_transfer(play.case), sources=("target",)))
    lanes = play.lanes.get(f"target {target.key}")
    if lanes is None:
        with own_randomness(device, "lanes"):
            lanes = Lanes.probed(
                model, next(iter(probe.task.batches(64, n=min(64, len(probe.task))))).x.to(device), False
            )
        play.lanes[f"target {target.key}"] = lanes
    judge = Judge(model, lanes)
    votes = []
    with frozen(*model.modules()), own_randomness(device, "answers", name):
        for _ in range(draws):
            parts = []
            for part in torch.split(x, 1024):
                answer = judge.answer(as_seen(part).to(device))
                parts.append(torch.where(finite(answer), decide(answer), NOTHING).cpu())
            votes.append(torch.cat(parts))
    decisions = torch.stack(votes).mode(0).values.long()
    write_tensors(path, {"decisions": decisions}, {"target": target.key})
    return np.asarray(decisions.numpy(), dtype=np.int16)


def _scaled(play: _Play, strikes: Sequence[Strike], budget: int | str) -> tuple[int, tuple[Strike, ...]]:
    """The budget, and the attacks with as many steps as it pays for."""
    costs = [_cost(play, strike) for strike in strikes]
    if isinstance(budget, str):
        if budget != "auto":
            raise UsageError(f"budget {budget!r}; expected a number of gradients, auto or none")
        known = [(once + each, once + each * strike.attack.steps) for strike, (once, each) in _scalable(strikes, costs)]
        budget = round(max(statistics.median(full for _, full in known), max(one for one, _ in known))) if known else 1
    return budget, tuple(_fitted(strike, cost, budget) for strike, cost in zip(strikes, costs, strict=True))


def _scalable(strikes: Sequence[Strike], costs: Sequence[Any]) -> list[tuple[Strike, tuple[float, float]]]:
    return [(strike, cost) for strike, cost in zip(strikes, costs, strict=True) if cost is not None]


def _fitted(strike: Strike, cost: tuple[float, float] | None, budget: int) -> Strike:
    if cost is None:
        stepped = isinstance(getattr(strike.attack, "steps", None), int)
        why = "its cost could not be counted on any source" if stepped else "it has no steps to scale"
        return replace(strike, note=f"as it is: {why}")
    once, each = cost
    before = strike.attack.steps
    steps = max(1, int((budget - once) / each + 1e-9))
    note = f"{before} -> {steps} steps"
    if once + each * steps > budget + 1e-9:
        note += f"; one step costs {once + each:g} gradients, more than the budget"
    change: dict[str, Any] = {"steps": steps}
    if isinstance(getattr(strike.attack, "step_size", None), float):
        change["step_size"] = strike.attack.step_size * before / steps
    try:
        attack = replace(strike.attack, **change)
    except AdvkitError as error:
        return replace(strike, note=f"as it is: {error}")
    return Strike(strike.name, attack, ATTACKS.label(attack), note)


def _cost(play: _Play, strike: Strike) -> tuple[float, float] | None:
    """Gradients per image that an attack asks for once and at each step, counted on two rows of its dearest source.

    None where it has no steps, or runs on no source.
    """
    if not isinstance(getattr(strike.attack, "steps", None), int):
        return None
    found = []
    for source in play.sources:
        try:
            few, many = (_asked(play, source, replace(strike.attack, steps=steps)) for steps in (2, 4))
        except Exception:  # the cell itself will say what is wrong
            continue
        each = (many - few) / 2
        if each > 0:
            found.append((few - 2 * each, each))
    return max(found, key=lambda one: one[0] + one[1] * strike.attack.steps) if found else None


def _asked(play: _Play, source: Player, attack: Any) -> float:
    """Gradients of the row that asks for most."""
    case, batch = play.case, _head(play.rows).pieces()[0]
    rows = torch.arange(min(2, len(batch.ids)))
    x = batch.x[rows].to(case.device)
    assert batch.labels is not None
    rng = RowRng.from_ids(0, [batch.ids[row] for row in rows.tolist()], device=case.device).at("cost")
    goal = case.rule(batch.labels[rows].to(case.device), case.victim(x), rng.at("goal"))
    model = source.model
    with frozen(*model.modules()), own_randomness(case.device, "cost"):
        oracle = MeteredOracle(model, len(x), Access.GRADIENTS, decides=False, data=case.data)
        attack(oracle, x, goal, case.threat, rng)
    return float(oracle.meter.backwards.max())


def _seen(play: _Play, given: Mapping[str, Collection[str]] | None) -> dict[str, set[str]]:
    """Target -> the sources that its training used."""
    names = {source.name for source in play.sources}
    if given is None:
        return {t.name: {s.name for s in play.sources if s.was_seen_by(t)} for t in play.targets}
    strangers = sorted((set(given) - {t.name for t in play.targets}) | ({n for v in given.values() for n in v} - names))
    if strangers:
        raise UsageError(f"seen names {', '.join(strangers)}, not among the targets and sources")
    return {t.name: set(given.get(t.name, ())) for t in play.targets}


def _similarity(play: _Play, strikes: Sequence[Strike]) -> dict[str, Any]:
    """Mean cosine over the rows between the perturbations of every two pairs; pairs that agree tell nothing new."""
    names, moves = [], []
    for source in play.sources:
        for strike in strikes:
            made = _set(play, source, strike, play.seeds[0])
            if isinstance(made, str):
                continue
            move = (as_seen(made[0].images) - play.rows.x.float()).flatten(1)
            moves.append(move / move.norm(dim=1, keepdim=True).clamp_min(1e-12))
            names.append([source.name, strike.name])
    cosine = [[float((a * b).sum(1).mean()) for b in moves] for a in moves]
    return {"pairs": names, "cosine": [[round(value, 6) for value in line] for line in cosine]}


def read_matrix(path: str | Path) -> Matrix:
    """A stored matrix, from its file or folder."""
    place = Path(path)
    place = place / "matrix.json" if place.is_dir() else place
    try:
        return Matrix.from_dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{place} holds no matrix ({error})") from error
