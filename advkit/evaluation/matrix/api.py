"""`advkit.matrix`: every attack on every source, each image set made once and shown to every target.

The protocol is PubDef's grid (arXiv 2310.17645) seen from many targets at once. Targets answer stored 8-bit images,
forward only; attacks never query them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from advkit.core.checks import whole
from advkit.core.files import cache_root
from advkit.core.state import plainly
from advkit.evaluation.keywords import explained
from advkit.evaluation.matrix.answers import Answers
from advkit.evaluation.matrix.budget import scaled
from advkit.evaluation.matrix.document import Matrix, Results, document, read_matrix
from advkit.evaluation.matrix.images import Images
from advkit.evaluation.matrix.participants import VICTIMS
from advkit.evaluation.matrix.plan import Budget, MatrixPlan, MatrixRequest, resolve
from advkit.evaluation.matrix.table import Progress, Tables, Watch
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.run.workers import Workers
from advkit.evaluation.screen import Works
from advkit.threat_models.tapm import PUBLIC

log = logging.getLogger("advkit")


@explained()
@plainly
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
    progress: bool | None = None,
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
    n:            samples, the task's first ones; None takes the task's default or all
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
    progress:     show which attack on which source is at work, how many are done, and about how long the rest takes.
                  None shows it where standard error is a terminal, and in notebooks; True always, False never
    command:      what the report gives as the command that made it

    Raises UsageError, BadModel, BadInput. What one pair of source and attack can't do is no error: the cell is missing,
    and the report says why.
    """
    request = MatrixRequest(
        sources=sources, attacks=attacks, targets=targets, task=task, threat_model=threat_model, eps=eps, goal=goal,
        n=n, seeds=seeds, equal_budget=equal_budget, similarity=similarity, seen=seen, device=device,
    )  # fmt: skip
    return execute(request, workers=workers, cache=cache, out=out, watch=watch, progress=progress, command=command)


@plainly
def execute(
    request: MatrixRequest,
    *,
    workers: int = 1,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
    progress: bool | None = None,
    command: str = "",
) -> Matrix:
    """Carry out a request; see `matrix` for the settings."""
    workers = whole("workers", workers, 1)
    folder = cache_root() / "matrix" if cache is None else Path(cache)
    with Works(progress):
        plan = resolve(request)
        pool = Workers(plan.case, workers) if workers > 1 else None
        with pool or nullcontext():
            images = Images(folder / "images", LocalEngine(pool))
            answers = Answers.of(plan.case, plan.targets, folder / "answers")
            results = _results(plan, Tables(plan, images, answers, Progress(watch, _units(plan))))
    log.info("transfer images: %d pieces made, %d found", images.made, images.read)
    finished = Matrix.from_dict(document(plan, results, command), results.table)
    if out is not None:
        finished.save(out)
    return finished


def _units(plan: MatrixPlan) -> int:
    """What a watcher counts: noise and the pairs, in each table."""
    tables = 1 if plan.request.equal_budget is None else 2
    return tables * (1 + len(plan.sources) * len(plan.attacks))


def _results(plan: MatrixPlan, tables: Tables) -> Results:
    clean, table = tables.clean(), tables.make(plan.attacks)
    budget, budgeted = None, None
    if plan.request.equal_budget is not None:
        budget, attacks = scaled(plan, plan.request.equal_budget)
        budgeted = tables.make(attacks)
    similarity = tables.similarity() if plan.request.similarity else None
    return Results(clean, table, budget, budgeted, similarity)


__all__ = ["Budget", "Matrix", "MatrixRequest", "Watch", "execute", "matrix", "read_matrix"]
