"""`advkit.evaluate`: names or objects in, a report out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from advkit.attacks import ATTACKS
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Outcome, Record, TaskDefaults
from advkit.core.speed import Speed
from advkit.defenses import DEFENSES
from advkit.evaluation.inputs import pick_device, task_of
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.summary import attack_entry, build, by_label, headline
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.engine import open_store, preflight, run, speed_file
from advkit.evaluation.run.speed import FastViews
from advkit.evaluation.scenarios.stream import stream_metrics
from advkit.evaluation.stats import rate
from advkit.evaluation.trust import diagnostics
from advkit.evaluation.victims import Victim, protected, ready
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

log = logging.getLogger("advkit")

_BESIDE = ("robust_accuracy", "robust_accuracy_upper", "attack_success_rate", "target_nll_after", "rejected")
Watch = Callable[[str, Case, list[Record], int], None]  # title, case, new records, records in all


@dataclass(frozen=True)
class Plan:
    """A resolved evaluation: the case asked for, and the other side beside it.

    Beside an attack on the victim stands the transfer grid that its defense claims to hold against, or, where the
    defense can be taken off, an attacker who does not know of it; beside a grid, an attacker who has the victim itself.
    """

    case: Case
    victim: Victim
    defense: Any
    beside: Case | None = None
    without: str = ""  # why there is nothing beside


def spec_of_model(asked: Any, model: Any) -> str:
    """How the model can be named again: the spec asked for, or what a model of the caller's own says of itself."""
    from advkit.evaluation.victims import model_part

    part, builder = model_part(asked)
    if builder:
        return MODELS.label(part)
    info = model.describe()
    return str(info.architecture or info.name)


def parameters(part: Any) -> dict[str, Any]:
    """An attack's or a defense's settings as JSON values."""
    if not is_dataclass(part) or isinstance(part, type):
        return {}
    return {k: _plain(v) for k, v in asdict(part).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def resolve(*parts: Any, **settings: Any) -> Case:
    """The case that names or objects ask for, without what stands beside it; takes what `plan` takes."""
    return plan(*parts, beside=False, **settings).case


def plan(
    attack: Any = "pgd",
    defense: Any = "none",
    task: Any = "fashion-mnist",
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
    progress: bool = False,
) -> Plan:
    """Resolve every name, find or train the victim, and bind the threat model to its space."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {batch_size}")
    pace = Speed.parse(speed)
    device = pick_device(device)
    work = task_of(task, model)
    total = len(work)
    rows = min(n if n is not None else (work.defaults.n or total), total)
    if rows < 1:
        raise BadInput(f"n must be between 1 and {total}, got {n}")
    strike = ATTACKS.build(attack)
    guard = DEFENSES.build(defense)
    threat = THREAT_MODELS.build(_said(threat_model, strike, "threat_model", work.defaults))
    rule = GOALS.build(_said(goal, strike, "goal", work.defaults))
    threat = with_public_sources(threat, work, DEFENSES.label(guard).partition(":")[0])
    if threat.scenario == "stream":
        threat = threat.agreed(getattr(strike, "k", None))
    victim = protected(model, guard, work, seed=seed, device=device, progress=progress)
    asked, work = work, bound(work, victim.model.space)
    specs = {
        "attack": ATTACKS.label(strike),
        "defense": DEFENSES.label(guard),
        "task": TASKS.label(asked),
        "model": spec_of_model(model if model is not None else work.defaults.model, victim.model),
        "threat_model": THREAT_MODELS.label(threat),
        "goal": GOALS.label(rule),
        **({"speed": str(pace)} if pace.switches else {}),
    }
    case = Case(
        task=work,
        victim=victim.model,
        attack=None if threat.scenario == "grid" else strike,
        threat=threat.bind(victim.model.space),
        rule=rule,
        label=specs["attack"],
        n=rows,
        specs=specs,
        surrogates=surrogates_of(threat, work, device),
        seed=seed,
        randomized=victim.model.describe().randomized,
        draws=draws,
        batch_size=batch_size or int(getattr(victim.model, "batch", 256)),
        device=device,
        data=work.training() if wants_data(strike, threat) else None,
        keep=keep,
        speed=pace,
    )
    trained: Any = DEFENSES.build(victim.defense) if victim.defense else guard
    if not beside or threat.scenario == "stream":
        return Plan(case, victim, trained)
    if threat.scenario == "grid":
        return Plan(case, victim, trained, _white_box(case, strike))
    undefended = getattr(victim.model, "undefended", None)
    if undefended is not None and not case.surrogates:
        return Plan(case, victim, trained, _oblivious(case, undefended))
    if not guard.claims or THREAT_MODELS.build(guard.claims).scenario != "grid":
        return Plan(case, victim, trained)
    try:
        return Plan(case, victim, trained, _claimed(case, guard))
    except UsageError as error:
        return Plan(case, victim, trained, None, str(error))


def bound(task: Any, space: Any) -> Any:
    """The task in a model's space, where its rows depend on one."""
    bind = getattr(task, "bind", None)
    return task if bind is None else bind(space)


def _said(given: Any, attack: Any, part: str, defaults: TaskDefaults) -> Any:
    """What was asked for, else what the attack is made for, else what the task is usually evaluated under.

    Where an attack and the task name the same part, and the attack by its name alone, the task says how.
    """
    if given is not None:
        return given
    made_for, usual = getattr(attack, f"default_{part}", None), str(getattr(defaults, part))
    return usual if made_for in (None, "", usual.partition(":")[0]) else made_for


def wants_data(attack: Any, threat: Any) -> bool:
    """Whether the attack, or one of those that the threat model brings, works with labelled data of its own."""
    brought = threat.algorithms(ATTACKS.build) if threat.scenario == "grid" else ()
    return any(getattr(each, "wants_data", False) for each in (attack, *(one for _, one in brought)))


def with_public_sources(threat: Any, task: Any, defense: str) -> Any:
    """The threat model with `public` replaced by the zoo's surrogates of the task, those the defense trained on marked.

    Raises UsageError when the zoo has none for the task.
    """
    from advkit.models import zoo
    from advkit.threat_models.tapm import PUBLIC

    if PUBLIC not in getattr(threat, "sources", ()):
        return threat
    cards = zoo.public(task.name)
    if not cards:
        raise UsageError(
            f"no public surrogates are known for task {task.name}: name them, tapm:sources=zoo:NAME+path:FILE"
        )
    named = [source for source in threat.sources if source != PUBLIC]
    specs = [f"zoo:{card.name}" for card in cards]
    seen = [f"zoo:{card.name}" for card in cards if defense in card.seen_by]
    return threat.with_sources([*specs, *named], seen=threat.seen or seen)


def surrogates_of(threat: Any, task: Any, device: str) -> tuple[tuple[str, Any], ...]:
    """The models a transfer threat model speaks of, by the names that records use."""
    from advkit.threat_models.transfer import source_name

    return tuple((source_name(source), ready(source, task).to(device)) for source in getattr(threat, "surrogates", ()))


def _white_box(case: Case, strike: Any) -> Case:
    """The attack on the victim itself, in the same ball."""
    base = case.threat.describe()
    ball: Any = THREAT_MODELS.build(f"{str(base['norm']).lower()}:eps={base['eps']!r}")
    return replace(
        case,
        attack=strike,
        threat=ball.bind(case.victim.space),
        label=case.specs["attack"],
        surrogates=(),
        specs={**case.specs, "threat_model": THREAT_MODELS.spec(ball)},
    )


def _oblivious(case: Case, undefended: Any) -> Case:
    """The attack made on the model without its defense, by the same rules, and shown to the defended one.

    A suite follows rows by the verdicts of the model it attacks, so what stands in for it takes its place.
    """
    strike = getattr(case.attack, "stand_in", case.attack)
    label = ATTACKS.label(strike)
    return replace(
        case,
        attack=strike,
        label=f"{label}@undefended",
        surrogates=(("undefended", undefended),),
        specs={**case.specs, "attack": label},
    )


def _claimed(case: Case, guard: Any) -> Case:
    """The case of the threat model that the defense was designed against, at the same eps and norm."""
    base = case.threat.describe()
    norm = str(base.get("norm") or "Linf").lower()
    claim = THREAT_MODELS.build(guard.claims)
    threat: Any = replace(claim, eps=base.get("eps") or claim.eps, norm=norm)
    threat = with_public_sources(threat, case.task, DEFENSES.name_of(guard))
    return replace(
        case,
        attack=None,
        threat=threat.bind(case.victim.space),
        rule=GOALS.build("untargeted"),
        label=guard.claims,
        surrogates=surrogates_of(threat, case.task, case.device),
        specs={**case.specs, "attack": "all", "threat_model": THREAT_MODELS.spec(threat)},
    )


def evaluate(
    attack: Any = "pgd",
    defense: Any = "none",
    task: Any = "fashion-mnist",
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
    out: str | Path | None = None,
    beside: bool = True,
    watch: Watch | None = None,
    progress: bool = False,
    command: str = "",
    workers: int | None = 1,
) -> Report:
    """Robust accuracy and attack success rate of a protected model, re-measured on validated inputs.

    attack:       spec (`pgd:steps=100`) or an object with the Attack protocol
    defense:      spec or object; a training defense takes its weights from the zoo, the cache, or trains
    task:         spec, a Task, or a pair (x [N, ...] float, y [N] long)
    model:        spec, torch module, TorchModel or callable; None takes the task's default
    threat_model: spec (`linf:eps=8/255`) or object; None takes the attack's own where it has one, else the task's
    goal:         spec (`untargeted`, `targeted:how=next`) or object; None as for the threat model
    n:            rows evaluated, the task's first ones; None takes all
    seed:         the run's only seed
    device:       auto, cpu, cuda[:i], mps
    batch_size:   rows in flight, recorded together; changes no figure. None takes 256, and of models that go through
                  rows one by one, as language models do on a CPU, just as many as are worth it
    draws:        verdict draws of a randomised victim
    keep:         how many rows' adversarial examples are written into the run folder
    speed:        how the attacker's oracle computes: fp32, or bf16, fp16, channels_last, compile joined by "+";
                  verdicts stay full precision, and rows that only the fast model believed fallen are attacked again
    out:          run folder (resumed when it holds the same case); None keeps nothing on disk
    beside:       also evaluate the other side: transfer from public models where the defense claims to hold against it
                  (PubDef), the attack made without knowing of the defense where it can be taken off (transformations
                  and filters of the input), the attack in white box where the threat model is a transfer grid
    watch:        called with title, case, new records and the number of records in all
    progress:     a progress bar while a model has to be trained first
    command:      what the report gives as the command that made it
    workers:      processes of one thread each that share the batches; change no record. None takes one per core for
                  long work on a CPU; a script then needs the usual `if __name__ == "__main__"`

    Raises AdvkitError subclasses for whatever can't give a number.
    """
    resolved = plan(
        attack, defense, task, model, threat_model, goal, n=n, seed=seed, device=device, batch_size=batch_size,
        draws=draws, keep=keep, speed=speed, beside=beside, progress=progress,
    )  # fmt: skip
    return execute(resolved, out=out, watch=watch, command=command, workers=workers)


def run_digest(resolved: Plan) -> str:
    """Names the default run folder: sha256 over the configs of the case and of what stands beside it."""
    configs = [resolved.case.config()] + ([resolved.beside.config()] if resolved.beside else [])
    return digest_of(configs)


def execute(
    resolved: Plan,
    *,
    out: str | Path | None = None,
    watch: Watch | None = None,
    command: str = "",
    workers: int | None = 1,
) -> Report:
    """Play a plan and write its report."""
    import tempfile

    if out is None:
        with tempfile.TemporaryDirectory(prefix="advkit-") as folder:
            return _execute(resolved, Path(folder), watch, command, workers, lasting=False)
    return _execute(resolved, Path(out), watch, command, workers, lasting=True)


def _execute(
    resolved: Plan, folder: Path, watch: Watch | None, command: str, workers: int | None, *, lasting: bool
) -> Report:
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    case = resolved.case
    preflight(case)
    if resolved.beside is not None:
        preflight(resolved.beside)
    first = next(iter(case.task.batches(64, n=case.n)))
    labels = first.labels
    findings = diagnostics.cheap(case, first.x.to(case.device), labels.to(case.device)) if labels is not None else []
    varies = any(f.id == "randomized_output" and f.severity != "info" for f in findings)
    case = replace(case, randomized=case.randomized or varies)

    stores, cases, results = [], [case], []
    if resolved.beside is not None:
        cases.append(replace(resolved.beside, randomized=case.randomized))
    for title, each in zip(("records", "beside"), cases, strict=False):
        store = open_store(each, folder, title)
        stores.append(store)
        try:
            watcher = None if watch is None else _bound(watch, title, each)
            results.append(run(each, store, watcher, workers))
        finally:
            store.close()

    records = in_order(case, results[0])
    findings += diagnostics.after(case, records)
    kept = {}
    for title, each, played in zip(("records", "beside"), cases, results, strict=False):
        if each.speed.switches:
            kept[title] = FastViews.load(speed_file(folder, title)).chosen
            findings.append(speed_finding(each, played, kept[title]))
    extra_metrics: dict[str, Any] = {}
    extra_attacks: list[dict[str, Any]] = []
    params = {case.label: parameters(case.attack)}
    if case.threat.scenario == "stream":
        extra_metrics.update(stream_metrics(case, records))
    if case.threat.scenario == "grid":
        extra_metrics.update(grid_metrics(case, records))
        params = _grid_params(case)
    if len(cases) > 1:
        other = cases[1]
        found = in_order(other, results[1])
        if other.threat.scenario == "grid":
            extra_metrics.update(grid_metrics(other, found))
            settings = _grid_params(other)
        else:
            figures = headline(other, found)
            kind = "oblivious" if other.surrogates else "white_box"
            extra_metrics.update({f"{kind}_{name}": figures[name] for name in _BESIDE if name in figures})
            settings = {other.label: parameters(other.attack)}
            if other.surrogates:
                ahead = diagnostics.black_box_beats_white_box(records, found, other.label, randomized=case.randomized)
                findings += [ahead] if ahead else []
        seconds, tokens = stores[1].seconds(), stores[1].tokens()
        for label, rows in by_label(found).items():
            entry = attack_entry(
                other, label, rows, settings[label], len(extra_attacks) + 1, seconds.get(label, 0.0),
                tokens.get(label, 0),
            )  # fmt: skip
            extra_attacks.append({**entry, "beside": True})
    if resolved.without:
        findings.append(
            diagnostics.Finding(
                id="transfer_failure",
                severity="info",
                message=f"the threat model that the defense claims ({resolved.defense.claims}) was not evaluated: "
                + resolved.without,
                advice="name public surrogates of the task with --threat-model tapm:sources=zoo:NAME+zoo:NAME",
            )
        )
    name = case.specs["defense"].partition(":")[0]
    content = build(
        case,
        records,
        defense={"name": name, "params": parameters(resolved.defense), "origin": resolved.victim.origin},
        flags=[f.to_dict() for f in findings],
        seconds=stores[0].seconds(),
        params=params,
        extra_metrics=extra_metrics,
        extra_attacks=extra_attacks,
        per_sample=stores[0].path if lasting else None,
        command=command,
        tokens=stores[0].tokens(),
    )
    if kept:
        content["reproducibility"]["speed"] = {"asked": str(case.speed), "kept": kept}
    report = Report.from_dict(content)
    if lasting:
        report.save(folder / "report.json")
    return report


def speed_finding(case: Case, records: Sequence[Record], kept: dict[str, str]) -> diagnostics.Finding:
    """What the speed switches came to: which were kept, and how many rows they misled."""
    refuted = sum(any(note.startswith("refuted_") for note in record.notes) for record in records)
    again = sum("again_in_fp32" in record.notes for record in records)
    broken = sum(record.outcome == Outcome.BROKEN for record in records)
    used = sorted(set(kept.values()))
    seen = f"the attack searched under speed {case.speed}"
    if used != [str(case.speed)]:
        seen += f" (kept after measuring: {', '.join(f'{text} on {name}' for name, text in sorted(kept.items()))})"
    if case.surrogates:
        seen += ", on surrogates; verdicts are the victim's in full precision"
    else:
        seen += f"; {refuted} rows that it took for fallen were refuted in full precision and attacked again there"
        seen += f", {broken} rows fell in full precision"
    if again:
        seen += f"; {again} rows on which it got no usable answer or gradient were attacked again, too"
    name = case.label if case.attack is not None else ""
    advice = "a row that stands stood against a search at that speed: --speed fp32 searches in full precision"
    return diagnostics.Finding("low_precision", "info", seen, advice, float(refuted), None, name)


def in_order(case: Case, records: Sequence[Record]) -> list[Record]:
    """Records in the task's order, whatever order a resumed run wrote them in."""
    place: dict[str, int] = {}
    for batch in case.task.batches(1024, n=case.n):
        for row in batch.ids:
            place[row] = len(place)
    labels = {label: i for i, label in enumerate(by_label(records))}
    return sorted(records, key=lambda r: (labels[r.attack], place[r.id]))


def _bound(watch: Watch, title: str, case: Case) -> Callable[[list[Record], int], None]:
    return lambda records, total: watch(title, case, records, total)


def _grid_params(case: Case) -> dict[str, dict[str, Any]]:
    return {
        f"{label}@{name}": {**parameters(attack), "source": name, "seen": name in case.threat.seen}
        for name, _ in case.surrogates
        for label, attack in case.threat.algorithms(ATTACKS.build)
    }


def grid_metrics(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """TAPM accuracies from the grid's records: average, best attack and per sample; seen and unseen sources apart."""
    import numpy as np

    from advkit.models import zoo
    from advkit.threat_models.tapm import tapm_metrics

    names = [name for name, _ in case.surrogates]
    algorithms = list(case.threat.attack_names)
    place: dict[str, int] = {}
    for record in records:
        place.setdefault(record.id, len(place))
    errors = np.full((len(names), len(algorithms), len(place)), np.nan)
    for record in records:
        label, _, source = record.attack.partition("@")
        errors[names.index(source), algorithms.index(label), place[record.id]] = record.adversarial != record.label
    group_of = {f"zoo:{card.name}": card.group for card in zoo.public(case.task.name)}
    own = case.victim.describe().state_sha256
    white_box = {name for name, model in case.surrogates if model.describe().state_sha256 == own}
    found = tapm_metrics(
        errors, names, algorithms, {n: group_of.get(n, "given") for n in names}, set(case.threat.seen), white_box
    )
    metrics: dict[str, Any] = {}
    blocks = {"": found["overall"], "_seen": found["seen"], "_unseen": found["unseen"]}
    blocks |= {f"_group_{name}": block for name, block in found["by_group"].items()}
    for suffix, block in blocks.items():
        if block is None:
            continue
        for kind in ("acc_avg", "acc_best_attack", "acc_per_sample"):
            numbers = block[kind]
            value = rate(numbers["numerator"], numbers["denominator"], "all_samples")
            if kind == "acc_avg":
                # The same images stand in every cell: no binomial interval holds for their average.
                value["ci"] = None
            metrics[f"tapm_{kind}{suffix}"] = value
    return metrics


__all__ = ["Fraction", "Plan", "evaluate", "execute", "plan", "rate", "resolve", "run_digest"]
