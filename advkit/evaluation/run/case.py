"""A frozen evaluation: who attacks what, within which threat model, on which rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from advkit.core.protocols import Data, Task
from advkit.core.speed import Speed


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One evaluation, resolved.

    task:       hands out the rows
    victim:     the protected model; every verdict is its answer
    attack:     shapes the rows; None where the threat model brings its own attacks (a grid)
    threat:     bound to the victim's space
    rule:       makes a goal of labels and untouched answers
    surrogates: models the oracle speaks for in place of the victim, by name; empty is white or black box on the victim
    label:      the attack's canonical spec, which names its records
    specs:      canonical specs of attack, defense, task, model, threat_model, goal
    n:          rows evaluated
    seed:       the run's only seed
    randomized: the victim's answers vary from call to call (declared or found): verdicts go by majority of draws, and
                no row stops early
    draws:      verdict draws of a randomised victim
    batch_size: rows in flight; changes no record
    device:     where it runs; part of no digest
    everyone:   attack also the rows that the victim gets wrong untouched (a grid counts every image)
    data:       labelled data that the attacker holds; only where the attack wants some
    keep:       rows whose adversarial examples are written beside the records
    speed:      how the attack's oracle computes; verdicts are always full precision
    views:      the models under that speed, once a run has settled them (`fast.FastViews`); part of no digest
    exact:      rows attacked in full precision at once, for the records before say that they are too near the boundary
                for the speed's precision; part of no digest
    spent:      tokens that attacks sent through models that count them, by label, since the last record was written;
                part of no digest
    """

    task: Task
    victim: Any
    attack: Any
    threat: Any
    rule: Any
    label: str
    n: int
    specs: dict[str, str] = field(default_factory=dict)
    surrogates: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    randomized: bool = False
    draws: int = 10
    batch_size: int = 256
    device: str = "cpu"
    everyone: bool = False
    data: Data | None = None
    keep: int = 64
    speed: Speed = field(default_factory=Speed)
    views: Any = field(default=None, compare=False, repr=False)
    exact: frozenset[str] = field(default=frozenset(), repr=False)
    spent: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def config(self) -> dict[str, Any]:
        """All that decides a record, as plain JSON values.

        The model stands here as what it is, so that a checkpoint may move to another place during a run.
        """
        info = self.victim.describe()
        # Named only where it changes anything, so that runs in full precision keep the digests they always had.
        named = {name: spec for name, spec in self.specs.items() if name != "speed"}
        speed = {"speed": str(self.speed)} if self.speed.switches else {}
        return {
            "specs": {**named, "model": info.architecture or info.name, **speed},
            "label": self.label,
            "threat": self.threat.describe(),
            "victim": info.state_sha256,
            "surrogates": {name: model.describe().state_sha256 for name, model in self.surrogates},
            "data": self.task.digest(),
            "n": self.n,
            "seed": self.seed,
            "draws": self.draws if self.randomized else 1,
        }

    def digest(self) -> str:
        """sha256 of the config; names the run folder."""
        return digest_of(self.config())
