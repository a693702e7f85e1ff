"""`advkit.evaluate`: names or objects in, a report out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from advkit.core.speed import Speed
from advkit.core.state import plainly
from advkit.evaluation.execute import Watch, check_inputs_change, execute, in_order
from advkit.evaluation.keywords import explained
from advkit.evaluation.plan import NO_ATTACK, PARTS, Plan, Request
from advkit.evaluation.plan import plan as plan_request
from advkit.evaluation.progress import Bars
from advkit.evaluation.report import Report
from advkit.evaluation.report.examples import Examples, Kept, examples_of
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.examples import all_examples
from advkit.evaluation.run.store import RECORDS_NAME, read_records
from advkit.evaluation.screen import shown
from advkit.evaluation.stats import rate


def _carried_out(
    asked: Request, progress: bool | None, *, change: Callable[[Plan], Plan] | None = None, **how: Any
) -> tuple[Plan, Report]:
    """A request, planned and carried out while its progress is shown: what was carried out, and what came of it.

    change: of the plan, before it is carried out
    how:    the other arguments of `execute`
    """
    with Bars(progress):
        made = plan_request(asked, progress=shown(progress))
        made = made if change is None else change(made)
        return made, execute(made, **how)


def _keeping_all(made: Plan) -> Plan:
    """The plan with every sample's example kept; UsageError where there are none."""
    check_inputs_change(made.case)
    return replace(made, case=replace(made.case, keep=made.case.n))


@explained(Request)
@plainly
def plan(*parts: Any, progress: bool = False, **settings: Any) -> Plan:
    """The plan of a `Request`, or of its fields: attack, defense, task, model, threat_model, goal, others by name.

    progress: a progress bar while a model has to be trained first
    """
    if len(parts) == 1 and isinstance(parts[0], Request) and not settings:
        return plan_request(parts[0], progress=progress)
    return plan_request(Request(**dict(zip(PARTS, parts, strict=False)), **settings), progress=progress)


@explained(Request)
@plainly
def resolve(
    attack: Any = "pgd",
    defense: Any = "none",
    task: Any = "",
    model: Any = None,
    threat_model: Any = None,
    goal: Any = None,
    *,
    progress: bool = False,
    **settings: Any,
) -> Case:
    """The case that names or objects ask for, without what stands beside it.

    progress: a progress bar while a model has to be trained first
    settings: the other fields of `Request`
    """
    made = plan(attack, defense, task, model, threat_model, goal, beside=False, progress=progress, **settings)
    return made.case


@explained()
@plainly
def evaluate(
    attack: Any = "pgd",
    defense: Any = "none",
    task: Any = "",
    model: Any = None,
    threat_model: Any = None,
    goal: Any = None,
    *,
    n: int | None = None,
    seed: int = 0,
    device: str = "auto",
    batch_size: int | None = None,
    draws: int = 10,
    keep: int = 64,
    speed: str | Speed = "fp32",
    beside: bool = True,
    sample_timeout: float | None = None,
    budget: str | None = None,
    rows: str | None = None,
    out: str | Path | None = None,
    watch: Watch | None = None,
    progress: bool | None = None,
    command: str = "",
    workers: int | None = 1,
) -> Report:
    """Robust accuracy and attack success rate of a protected model, re-measured on validated inputs.

    attack:       spec (`pgd:steps=100`) or an object with the Attack protocol
    defense:      spec or object; a training defense takes its weights from the zoo, the cache, or trains
    task:         spec, a Task, or a pair (x [N, ...] float, y [N] long); "" takes fashion-mnist, and prompts for
                  attacks on words
    model:        spec, torch module, TorchModel or callable; None takes the task's default
    threat_model: spec (`linf:eps=8/255`) or object; None takes the attack's own where it has one, else the task's
    goal:         spec (`untargeted`, `targeted:how=next`) or object; None as for the threat model
    n:            samples evaluated, the task's first ones; None takes all
    seed:         the run's only seed
    device:       auto, cpu, cuda[:i], mps
    batch_size:   samples in flight, recorded together; changes no figure. None takes 256, and of models that go through
                  samples one by one, as language models do on a CPU, just as many as are worth it
    draws:        verdict draws of a randomised victim
    keep:         how many samples' adversarial examples are kept for `report.adversarial()`: in the run folder, or with
                  the report where nothing is kept on disk
    speed:        how the attacker's oracle computes: fp32, or bf16, fp16, channels_last, compile joined by "+";
                  verdicts stay full precision, and samples that only the fast model believed broken are attacked again
    beside:       also evaluate companions: transfer from public models where the defense claims to hold against it
                  (PubDef), the attack made without knowing of the defense where it can be taken off (transformations
                  and filters of the input; labels flipped without knowing what is trained on them), the attack in white
                  box where the threat model is a transfer grid, a defense on labels without what makes it one
    sample_timeout: seconds after which a sample that is attacked, or judged, alone is given up as an error; None waits
                  for ever. Batches that take longer are halved, down to single samples. What hangs in compiled code
                  can be stopped with `workers` alone, where its process is ended
    budget:       propagations=N: how many forward and backward passes an attack may spend on a sample, both together;
                  the oracle ends it there. Of a suite each stage has the budget. None sets no limit
    rows:         START:STOP, the rows at these places of the n: a shard, whose records are those of the whole run. Only
                  where what becomes of a row depends on that row alone
    out:          run folder (resumed when it holds the same case); None keeps nothing on disk
    watch:        called with title, case, new records and the number of records in all
    progress:     show how far the run is, stage by stage, what is still robust and how long it takes, about. None shows
                  it where standard error is a terminal, and in notebooks; True always, False never
    command:      what the report gives as the command that made it
    workers:      processes of one thread each that share the batches; change no record. None takes one per core for
                  long work on a CPU; a script then needs the usual `if __name__ == "__main__"`

    Raises AdvkitError subclasses for whatever can't give a number.
    """
    asked = Request(
        attack=attack,
        defense=defense,
        task=task,
        model=model,
        threat_model=threat_model,
        goal=goal,
        n=n,
        seed=seed,
        device=device,
        batch_size=batch_size,
        draws=draws,
        keep=keep,
        speed=speed,
        beside=beside,
        sample_timeout=sample_timeout,
        budget=budget,
        rows=rows,
    )
    return _carried_out(asked, progress, out=out, watch=watch, command=command, workers=workers)[1]


@explained(Request)
@plainly
def certify(
    defense: Any = "smoothing",
    task: Any = "",
    model: Any = None,
    threat_model: Any = "certified",
    *,
    n: int | None = None,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
    watch: Watch | None = None,
    progress: bool | None = None,
    command: str = "",
    workers: int | None = 1,
    attack: Any = NO_ATTACK,
    **settings: Any,
) -> Report:
    """Certified accuracy of a smoothed model: an L2 radius for every sample in which no attacker changes its answer.

    The same as `evaluate` under a threat model `certified`, without an attack.

    defense:      spec or object of a defense that smooths (`smoothing:sigma=0.5`)
    threat_model: spec or object: `certified:n0=100,n=10000,alpha=0.001,radii=0+0.25+0.5`
    n:            samples certified, the task's first ones; None takes the task's usual number
    attack:       spec or object, evaluated beside the certificates at their smallest radius; "none" leaves it out
    settings:     the other fields of `Request`

    task, model, seed, device, out, watch, progress, command and workers are those of `evaluate`. Raises AdvkitError
    subclasses for whatever can't be certified.
    """
    asked = Request(
        attack=attack,
        defense=defense,
        task=task,
        model=model,
        threat_model=threat_model,
        n=n,
        seed=seed,
        device=device,
        **settings,
    )
    return _carried_out(asked, progress, out=out, watch=watch, command=command, workers=workers)[1]


@explained(Request)
@plainly
def attack(
    attack: Any = "pgd",
    defense: Any = "none",
    task: Any = "",
    model: Any = None,
    threat_model: Any = None,
    goal: Any = None,
    *,
    out: str | Path | None = None,
    progress: bool | None = None,
    workers: int | None = 1,
    **settings: Any,
) -> Examples:
    """Adversarial examples of every sample, with the harness's verdict on each and its distance.

    The same run as `evaluate`, with all examples kept and no companions. What comes back has tensors `clean` and
    `adversarial` [n, ...] on the CPU, `broken` [n], `labels`, `ids`, and one outcome, distance, margin, answer before
    and after per sample. Of a suite or a grid each sample's example is the one that broke it, else the nearest.

    out:      run folder (resumed when it holds the same case); None keeps nothing on disk
    progress: as of `evaluate`
    settings: the other fields of `Request` (n, seed, device, batch_size...)

    Raises UsageError for attacks that leave inputs as they are (flips of labels), and for a run folder in which a
    finished run kept the examples of some samples alone.
    """
    asked = {"attack": attack, "defense": defense, "task": task, "model": model, "goal": goal}
    request = Request(**asked, threat_model=threat_model, **{**settings, "beside": False})
    made, report = _carried_out(request, progress, change=_keeping_all, out=out, workers=workers)
    if out is None:
        return report.adversarial()
    records = in_order(made.case, read_records(Path(out) / RECORDS_NAME))
    return examples_of(Kept(records, all_examples(Path(out), records)), None)


__all__ = [
    "Plan",
    "Request",
    "Watch",
    "attack",
    "certify",
    "evaluate",
    "execute",
    "in_order",
    "plan",
    "rate",
    "resolve",
]
