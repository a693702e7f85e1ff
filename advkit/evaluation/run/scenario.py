"""What a scenario is: the order of moves of a setting, in one file.

Everything that differs between settings (evasion, transfer grids, streams, and those of plug-ins) is behind these
methods. The engine runs and stores rounds, the report shows a section; neither knows a scenario by name. A scenario of
your own starts from `advkit.evaluation.scenarios.base.BaseScenario`, which has sensible defaults.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from advkit.core.protocols import Attack, Defense, Label, Outcome, Record, Rule, Task, ThreatModel, Wording
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.held import Held

if TYPE_CHECKING:
    from advkit.core.lanes import Lanes
    from advkit.evaluation.run.batch import Round, Unit

Records = Mapping[str, Record]
"""Records on file, by `Store.key(label, row)`."""


def ended_by_stage(records: Records) -> Counter[tuple[str, Outcome]]:
    """How many records ended how, by stage; the store keeps count, so that asking after every batch costs nothing."""
    if isinstance(records, Held):
        return records.ended()
    return Counter((record.stage, record.outcome) for record in records.values())


@dataclass(frozen=True)
class Parts:
    """What a request names, built, before a victim is found or trained; attack None where it asks for none.

    seed: of the run
    """

    attack: Attack | None
    defense: Defense
    task: Task
    threat: ThreatModel[Any]
    rule: Rule
    seed: int = 0


@dataclass(frozen=True)
class Headline:
    """The one figure that a leaderboard ranks by.

    metric: its name among the section's metrics
    name:   how people call it
    better: whether a higher or a lower value is better for the defender
    """

    metric: str
    name: str
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Section:
    """What a scenario says of a run, as plain data: it is written into the report, which knows no scenario.

    metrics:  rates (`stats.rate`), scalars ({"value": ...}) and certified curves by name
    headline: the figure that decides
    table:    (label, metric) of the lines that a short summary shows, in order
    sentence: what the numbers say, one or two sentences; {metric} stands for a metric's value with its interval
    figures:  plots to draw: {"name": of `figures.FIGURES`, and its settings}
    wording:  the words for clean, robust and success
    settings: of every attack, by its label
    certified: whether the headline is proven rather than attacked
    flags:    what bears on whether the figures can be trusted, as the report has it: {"id", "severity", "message"}
    """

    metrics: Mapping[str, Any]
    headline: Headline
    table: Sequence[tuple[str, str]] = ()
    sentence: str = ""
    figures: Sequence[Mapping[str, Any]] = ()
    wording: Wording = field(default_factory=Wording)
    settings: Mapping[Label, Mapping[str, Any]] = field(default_factory=dict)
    certified: bool = False
    flags: Sequence[Mapping[str, Any]] = ()

    def block(self, scenario: str) -> dict[str, Any]:
        """The report's `section`: everything but the metrics, which stand apart."""
        return {
            "scenario": scenario,
            "headline": asdict(self.headline),
            "table": [{"label": label, "metric": metric} for label, metric in self.table],
            "sentence": self.sentence,
            "figures": [dict(figure) for figure in self.figures],
            "wording": asdict(self.wording),
        }


@dataclass(frozen=True)
class Companion:
    """A second case beside the headline, never mixed with it: a white box, an attacker who does not know the defense.

    name:       of its block in the report
    title:      how people call it
    case:       what is run; None where it can't be, and `without` says why
    prefix:     what its metrics' names begin with in the report, after which `metrics` are taken over
    metrics:    names or patterns (`tapm_*`) of what is taken over from its section
    metric:     the one that a short summary shows, with its prefix
    knows_less: its attacker knows less than the headline's: where it breaks more, the headline's attack was too weak
    within:     radius of its attack where the headline's records are certificates: another class for a sample that is
                certified at it refutes the certificate
    """

    name: str
    title: str
    case: Case | None
    metrics: Sequence[str] = ("robust_accuracy", "robust_accuracy_upper", "attack_success_rate")
    metric: str = ""
    prefix: str = ""
    knows_less: bool = False
    within: float | None = None
    without: str = ""


class Engine(Protocol):
    """All that a scenario may ask of the engine: processes, batch shapes, speed and retries stay behind it."""

    def attack(self, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """Attack and judge the rows of a cell that are not on record under its label, batch by batch.

        only: ids of the rows to take; None takes all
        """
        ...

    def judge(self, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """Judge the rows as they are, without an attack."""
        ...

    def run(self, unit: Unit, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """The same with a function of one's own in place of attack and judge; one of a module's top level."""
        ...

    def lanes(self, cell: Case) -> Lanes:
        """The batch shapes in which every model of the cell gives the same bits for a row in any batch."""
        ...


@runtime_checkable
class RowsApart(Protocol):
    """A scenario in which what becomes of a row may depend on that row alone."""

    @abstractmethod
    def rows_apart(self, case: Case) -> bool:
        """Whether it does so in this case: then rows whose files changed are run again without the others."""


class Scenario(Protocol):
    """The order of moves: who moves when, on what, and what the records come to."""

    @property
    def name(self) -> str:
        """What threat models call it."""
        ...

    def resolve(self, parts: Parts) -> Parts:
        """The parts of a request as this scenario takes them (budgets agreed...), before a victim is trained."""
        ...

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run; checked before anything is spent."""
        ...

    def cells(self, case: Case) -> Sequence[Case]:
        """The single attacks that the case consists of; each is tried on one row before the run."""
        ...

    def expected(self, case: Case, records: Records) -> int:
        """How many records the finished case has, as far as these tell."""
        ...

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Run what is not on record yet; the same rounds in the same order whatever is on record."""
        ...

    def companions(self, case: Case) -> Sequence[Companion]:
        """What is evaluated beside the case."""
        ...

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """What the records of a finished case come to; of them alone."""
        ...
