"""docs/eigenshield.md: its commands exist, its tables are those of the file beside it, and it claims no more."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "eigenshield.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "eigenshield.json").read_text(encoding="utf-8"))
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


def rows_of(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    text = TEXT.partition(f"### {section}\n")[2].partition("\n##")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries: dict[str, Any] = {"attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS}
    for option, registry in {**registries, "model": MODELS, "task": TASKS}.items():
        if asked.get(option):
            registry.build(asked[option])


def test_the_table_of_the_image_text_model_is_that_of_the_file() -> None:
    expected = []
    for name, run in FILE["dual"].items():
        plain = name == "none"
        expected.append(
            [
                name,
                "-" if plain else f"{run['kept']} of {run['spikes']}",
                "-" if plain else f"{run['q']:g}",
                *(percent(run[what]) for what in ("clean", "oblivious", "adaptive")),
                "-" if plain else f"{run['auroc']:.2f}",
                *(percent(run[what]) for what in ("suite_clean", "suite")),
            ]
        )
    assert rows_of("On an image-text model") == expected


def test_the_table_of_the_classifier_is_that_of_the_file() -> None:
    run = FILE["classifier"]
    without = percent(run["robust_without"])
    assert rows_of("On a classifier") == [
        ["no filter", "-", percent(run["clean_without"]), without, without],
        [
            "eigenshield",
            f"{run['kept']} of {run['spikes']}",
            *(percent(run[w]) for w in ("clean", "oblivious", "adaptive")),
        ],
    ]


def test_the_table_of_the_planted_model_is_that_of_the_file() -> None:
    def span(found: dict[str, float]) -> str:
        return f"{found['mean']:.3f} ({found['least']:.3f} to {found['most']:.3f})"

    expected = [
        [f"{int(samples):,}", name, *(span(run[what]) for what in ("clean", "attacked", "adaptive"))]
        for samples, runs in FILE["planted"].items()
        for name, run in runs.items()
    ]
    assert rows_of("Where it must work") == expected
    for samples in ("2000", "20000"):
        assert f"{FILE['planted'][samples]['q=0.5']['attacked']['mean']:.3f}"[1:] in TEXT
        for run in FILE["planted"][samples].values():
            assert run["adaptive"]["most"] < 0.01
            assert run.get("spikes", {"least": 8, "most": 8})["least"] == run.get("spikes", {"most": 8})["most"] == 8


def test_the_table_of_noise_is_that_of_the_file() -> None:
    noise = dict(FILE["noise"])
    assert f"{noise.pop('draws'):,} draws" in TEXT
    assert rows_of("How often noise has a spike") == [[name, f"{100 * rate:.2f}"] for name, rate in noise.items()]


def test_what_is_said_of_the_figures_is_so() -> None:
    runs, none = FILE["dual"], FILE["dual"]["none"]
    assert runs["auto"]["kept"] == runs["auto"]["spikes"]
    for name in ("auto", "q=1", "top 9", "q=1, bare edge"):
        assert abs(runs[name]["adaptive"] - none["adaptive"]) < 0.026
        assert abs(runs[name]["clean"] - none["clean"]) < 0.026
    # filters that an oblivious attacker loses to cost clean accuracy, and under PGD an adaptive one gains by them
    for run in runs.values():
        assert run["oblivious"] < none["oblivious"] + 0.026 or run["clean"] < none["clean"] - 0.1
        assert run["adaptive"] <= max(none["adaptive"], run["oblivious"]) + 0.02
    lost = none["clean"] - runs["q=0.75"]["clean"]
    gained = runs["q=0.75"]["oblivious"] - none["oblivious"]
    assert f"{percent(runs['q=0.75']['oblivious'])} % against PGD made on the model without it" in TEXT
    assert f"{percent(gained)} points more than no filter" in TEXT
    assert f"{round(100 * lost)} points less clean accuracy" in TEXT
    assert f"leaves {percent(runs['q=0.75']['adaptive'])} %" in TEXT
    for name in ("none", "q=0.75"):
        low, high = (percent(each) for each in FILE["suite_1000"][name]["interval"])
        assert f"{percent(FILE['suite_1000'][name]['robust'])} % [{low}, {high}]" in TEXT
