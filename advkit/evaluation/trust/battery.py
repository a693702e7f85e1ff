"""The expensive checks behind `advkit doctor`: masked gradients and failed attacks.

After Carlini et al. (arXiv 1902.06705), Athalye et al. (arXiv 1802.00420) and Pintor et al. (arXiv 2106.09947).

Two questions are kept apart. Does the model hide its gradients? A reference attack, PGD on the margin loss, answers it
(`gradient_checks`). Does the attack do its job? The case's own attack answers it, traced on its way through the engine
(`attack_checks`). A fault that has been named is not named again by its consequences: without gradients, an unlimited
budget does not help either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from advkit.core.errors import UsageError
from advkit.core.protocols import Model
from advkit.core.state import plainly
from advkit.evaluation.run.case import Case
from advkit.evaluation.trust import attack_checks, gradient_checks
from advkit.evaluation.trust.context import Context, Progress, Result, examined
from advkit.evaluation.trust.findings import Finding, merge

Check = Callable[[Context], Result]

CHECKS: Sequence[tuple[str, Sequence[Check]]] = (
    ("cheap checks", (gradient_checks.first_look,)),
    (
        "the attack itself",
        (
            attack_checks.own_run,
            attack_checks.silent_success,
            attack_checks.incomplete_optimization,
            attack_checks.transfer_failure,
            attack_checks.nondeterministic_rerun,
        ),
    ),
    ("losses", (gradient_checks.losses,)),
    ("iterations", (gradient_checks.iterations,)),
    ("restarts", (gradient_checks.restarts,)),
    ("eps sweep", (gradient_checks.eps_sweep, gradient_checks.unlimited_budget, attack_checks.unlimited_budget)),
    ("black box", (gradient_checks.square,)),
    ("transfer", (gradient_checks.transfer,)),
    ("random search", (gradient_checks.random_search,)),
    ("finite differences", (gradient_checks.finite_differences,)),
    ("stability", (gradient_checks.stability,)),
)
"""The steps in order, by the name that progress shows; a check may use the results of those before it."""


@plainly
def battery(
    case: Case,
    *,
    rows: int = 100,
    draws: int = 1000,
    queries: int = 1000,
    surrogate: Model[Any, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """The expensive checks, on the first rows of the case; findings, and every curve measured as plain JSON values.

    rows:      rows used
    draws:     random points per robust row
    queries:   of the square attack
    surrogate: an undefended model whose adversarial examples are shown to the victim; None looks into the zoo
    progress:  called with what runs now, steps done and steps in all

    A model in training mode gets the cheap checks alone. Raises UsageError where the threat model has no ball.
    """
    if rows < 1:
        raise UsageError(f"rows is {rows}; the battery needs at least one")
    context = examined(case, rows=rows, draws=draws, queries=queries, surrogate=surrogate)
    for done, (name, checks) in enumerate(CHECKS):
        if progress:
            progress(name, done, len(CHECKS))
        for check in checks:
            context = context.plus(check(context))
        if context.named("training_mode"):
            break
    if progress:
        progress("done", len(CHECKS), len(CHECKS))
    return merge(context.findings), {"rows": context.case.n, "indicators": dict(context.indicators), **context.curves}
