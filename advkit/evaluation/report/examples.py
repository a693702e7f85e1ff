"""The adversarial examples behind a report: of a run in memory, or of the folder that a report lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import ReportError
from advkit.core.protocols import Outcome, Record
from advkit.core.text import printable
from advkit.evaluation.run.store import Store, read_examples, read_records

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = "records.jsonl"


@dataclass(frozen=True, eq=False)
class Examples:
    """Samples before and after the attack, with the harness's verdict on each.

    One entry per sample, in the order of the records.

    ids:         of the samples
    clean:       the samples [n, ...]; in the task's space, on the CPU
    adversarial: what the victim was shown of what the attack returned, [n, ...]: images as images, recordings as bits
                 [T, 2, H, W], prompts as transcripts [2, W] of token ids and their owners. The sample itself where the
                 attack left it as it was; a point outside the threat model where `outcomes` says invalid
    labels:      true classes, long [n]; -1 where a sample has none
    broken:      bool [n]: the goal is reached on the victim, within the threat model
    outcomes:    wrong, robust, broken, invalid, non_finite or error, as in the records
    attacks:     the label of the attack that made each; of several the one that broke the sample, else the nearest
    texts:       what was said of a sample in words (suffix, replies); empty for samples that are no text
    evaluated:   samples of the report; more than n where not all were kept
    clean_answers, adversarial_answers: classes that the victim answered before and after; None where it gave none
    margins:     signed distance to the goal after the attack, in units of the output; None where it was not measured
    distances:   of the adversarial sample from the clean one, in the threat model's norm; None where it has none
    """

    ids: tuple[str, ...]
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    broken: Tensor
    outcomes: tuple[str, ...]
    attacks: tuple[str, ...]
    texts: tuple[Mapping[str, str], ...]
    evaluated: int
    clean_answers: tuple[int | None, ...] = ()
    adversarial_answers: tuple[int | None, ...] = ()
    margins: tuple[float | None, ...] = ()
    distances: tuple[float | None, ...] = ()

    def some(self, most: int, held: int) -> list[int]:
        """Places of at most so many samples to look at: broken ones and at least `held` that held, where there are any.

        Others (wrong when clean...) fill what is left; in the order of the samples within each of the three.
        """
        broken = [i for i, each in enumerate(self.outcomes) if each == Outcome.BROKEN]
        robust = [i for i, each in enumerate(self.outcomes) if each == Outcome.ROBUST]
        rest = [i for i in range(len(self)) if i not in {*broken, *robust}]
        few = robust[: max(held, most - len(broken))]
        picked = [*broken[: most - len(few)], *few]
        return [*picked, *rest[: most - len(picked)]]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        shape = list(self.adversarial.shape[1:])
        return (
            f"Examples({len(self)} of {self.evaluated} samples, {int(self.broken.sum())} broken, each {shape}; ids, "
            "clean, adversarial, labels, broken, outcomes, attacks, distances, margins, texts)"
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Records and examples of a run, by record key."""

    records: Sequence[Record]
    examples: Mapping[str, tuple[Tensor, Tensor]] = field(repr=False)


def records_beside(path: Path | None, data: Mapping[str, Any]) -> Path | None:
    """The records beside a report, None where there are none; ReportError where it names a file elsewhere."""
    if path is None:
        return None
    named = data.get("per_sample", {}).get("path", RECORDS)
    if Path(named).name != named or named in ("", ".", ".."):
        raise ReportError(f"per_sample.path is {named!r}; expected the name of a file beside the report")
    file = path.absolute().parent / named
    return file if file.is_file() and not file.is_symlink() else None


def kept_beside(path: Path | None, data: Mapping[str, Any]) -> Kept:
    """What lies beside a report; ReportError says what is missing."""
    file = records_beside(path, data)
    if path is None:
        raise ReportError(
            "this report is a document without its run: load it from its run folder with Report.load(folder), where "
            "the adversarial examples lie"
        )
    if file is None:
        raise ReportError(f"{path} has no records beside it, so no examples either: name the run's own folder")
    folder = file.with_name(f"{file.stem}.examples")
    if not folder.is_dir() or folder.is_symlink() or any(each.is_symlink() for each in folder.iterdir()):
        raise ReportError(
            f"{path.parent} keeps the records of the run and no adversarial examples ({folder.name}/ is not there): "
            "run it again with keep=N for the first N samples, or with `advkit attack` for all"
        )
    examples = read_examples(file.parent, file.stem)
    if not examples and any(folder.iterdir()):
        raise ReportError(f"the examples in {folder} can't be read: the files are damaged, or none of advkit's")
    return Kept(read_records(file), examples)


def examples_of(kept: Kept, attack: str | None) -> Examples:
    """One example per sample of what was kept; of one attack's label where it is named.

    Raises ReportError where there is none, or none of that label.
    """
    import torch

    labels = dict.fromkeys(str(record.made_by) for record in kept.records)
    if attack is not None and attack not in labels:
        raise ReportError(f"no attack of this report is called {attack!r}; it has {', '.join(labels) or 'none'}")
    chosen: dict[str, Record] = {}
    for record in kept.records:
        if attack in (None, str(record.made_by)) and Store.key(record.made_by, record.id) in kept.examples:
            best = chosen.get(record.id)
            chosen[record.id] = record if best is None or _rank(record) < _rank(best) else best
    evaluated = len({record.id for record in kept.records})
    if not chosen:
        raise ReportError(
            f"none of the {evaluated} samples' adversarial examples were kept: say keep=N for the first N samples"
        )
    pairs = [kept.examples[Store.key(record.made_by, record.id)] for record in chosen.values()]
    try:
        clean, adversarial = (torch.stack(each).contiguous() for each in zip(*pairs, strict=True))
    except (RuntimeError, TypeError) as error:
        raise ReportError(f"the examples do not fit together ({printable(str(error))[:120]})") from error
    records = tuple(chosen.values())
    return Examples(
        ids=tuple(chosen),
        clean=clean,
        adversarial=adversarial,
        labels=torch.tensor([-1 if record.label is None else record.label for record in records]),
        broken=torch.tensor([record.outcome == Outcome.BROKEN for record in records]),
        outcomes=tuple(str(record.outcome) for record in records),
        attacks=tuple(str(record.made_by) for record in records),
        texts=tuple(record.texts for record in records),
        evaluated=evaluated,
        clean_answers=tuple(record.clean for record in records),
        adversarial_answers=tuple(record.adversarial for record in records),
        margins=tuple(record.margin for record in records),
        distances=tuple(record.distance for record in records),
    )


def _rank(record: Record) -> tuple[bool, bool, float]:
    """Where a record stands among those of its sample: broken ones first, then by the margin that is left."""
    none = record.margin is None
    return record.outcome != Outcome.BROKEN, none, 0.0 if record.margin is None else record.margin
