"""docs/poisoning.md: its commands exist, its tables are those of the file beside it, and so are its claims."""

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
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "poisoning.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "label_poisoning.json").read_text(encoding="utf-8"))
CELLS: dict[tuple[Any, ...], dict[str, Any]] = {
    (c["task"], c["attack"], c["rate"], c["defense"], c["attacker"]): c for c in FILE["cells"]
}
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
SECTIONS = re.findall(r"^### (\w+), 25 %, (\w+) attacker\n\n(.*?)\n\n", TEXT, re.M | re.S)


def robust(task: str, attack: str, defense: str, rate: float = 0.25, attacker: str = "oblivious") -> float:
    return float(CELLS[task, attack, rate, defense, attacker]["robust_accuracy"]["value"])


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries: dict[str, Any] = {
        "attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "task": TASKS,
    }  # fmt: skip
    for option, registry in registries.items():
        if asked.get(option):
            registry.build(asked[option])


def test_the_tables_are_those_of_the_file() -> None:
    assert {(task, attacker) for task, attacker, _ in SECTIONS} == {
        (task, attacker) for task in FILE["tasks"] for attacker in ("oblivious", "adaptive")
    }
    for task, attacker, table in SECTIONS:
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        attacks = head[2:]
        seen = set()
        for defense, clean, *values in rows:
            name = defense.strip("`")
            for attack, value in zip(attacks, values, strict=True):
                cell = CELLS.get((task, attack, 0.25, name, attacker))
                assert value == ("-" if cell is None else f"{cell['robust_accuracy']['value']:.3f}")
                if cell is not None:
                    seen.add((attack, name))
                    assert f"{cell['clean_accuracy']['value']:.3f}" == clean
        assert seen == {(c[1], c[3]) for c in CELLS if (c[0], c[2], c[4]) == (task, 0.25, attacker)}


@pytest.mark.slow
def test_every_cell_names_what_there_is() -> None:
    for task, attack, rate, defense, attacker in CELLS:
        ATTACKS.build(FILE["attacks"][attack])
        DEFENSES.build(defense)
        TASKS.build(FILE["tasks"][task])
        THREAT_MODELS.build(f"label-flips:rate={rate},trials={FILE['trials']},attacker={attacker}")


def test_figures_of_the_page_are_there() -> None:
    for name in re.findall(r"\(images/([^)]+)\)", TEXT):
        assert (DOCS / "images" / name).stat().st_size > 5_000


def clean(task: str, defense: str) -> float:
    return float(CELLS[task, "farfirst", 0.25, defense, "oblivious"]["clean_accuracy"]["value"])


def gap(attack: str, one: str, other: str, attacker: str = "oblivious") -> float:
    """Robust accuracy of one defense less that of the other on digits, in points."""
    return 100 * (robust("digits", attack, one, attacker=attacker) - robust("digits", attack, other, attacker=attacker))


def worst(task: str, defense: str) -> float:
    """The lowest robust accuracy of a defense at 25 %, over all attacks and both attackers."""
    own = [c for key, c in CELLS.items() if (key[0], key[2], key[3]) == (task, 0.25, defense)]
    return min(float(c["robust_accuracy"]["value"]) for c in own)


def at(attack: str, defense: str, attacker: str = "oblivious", task: str = "digits") -> str:
    return f"{robust(task, attack, defense, attacker=attacker):.3f}"


def sentences() -> list[str]:
    """What the page says of the numbers, made of the numbers."""
    svm, floral, soft, mild = "svm:C=10", "floral:C=10", "svm:C=1", "floral:C=1"
    moons, guarded = "svm:C=1,gamma=1", "floral:C=1,gamma=1"
    points = {a: f"{gap(a, floral, svm):+.1f}" for a in FILE["attacks"] if a != "lfa_greedy"}
    ablation = max(abs(gap(a, "floral:C=10,budget=0", svm)) for a in points)
    known = [key[1] for key in CELLS if key[0] == "digits" and key[2:] == (0.25, "floral:C=10,budget=0", "adaptive")]
    known_ablation = max(abs(gap(a, "floral:C=10,budget=0", svm, attacker="adaptive")) for a in known)
    tilt = [robust("digits", "alfa_tilt", key[3]) for key in CELLS if key[:3] == ("digits", "alfa_tilt", 0.25)]
    on_moons = {
        a: f"({at(a, guarded, task='moons')} against {at(a, moons, task='moons')})"
        for a in ("farfirst", "nearfirst", "alfa", "alfa_tilt")
    }
    return [
        f"On digits the plain machine (C = 1) keeps {at('random_labels', soft)} of its test samples under random flips "
        f"of a quarter of the labels, {at('alfa', soft)} under ALFA and {at('alfa_tilt', soft)} under ALFA-tilt.",
        f"At C = 10 it keeps {at('farfirst', floral)} under `farfirst` (plain: {at('farfirst', svm)}), "
        f"{points['farfirst']} points, and {points['nearfirst']} under `nearfirst`, {points['svflip']} under `svflip`, "
        f"{points['floral_inner']} under its own inner attacker, {points['random_labels']} under random flips. "
        f"It pays {100 * (clean('digits', svm) - clean('digits', floral)):.1f} points of clean accuracy.",
        "All of it is due to the attacker inside: without one (`budget=0`) the rounds stay at the plain machine, where "
        f"they begin, and no figure differs by more than {ablation:.1f} points (under adaptive attackers, each of whom "
        f"trains its own defense, by at most {known_ablation:.1f}).",
        f"At C = 1 the gain is {gap('farfirst', mild, soft):+.1f} points under `farfirst` ({at('farfirst', mild)}), "
        f"and `ln_svm` ({at('farfirst', 'ln_svm:C=1')}), `ls_svm` ({at('farfirst', 'ls_svm:C=1')}) and `cleanlab` "
        f"({at('farfirst', 'cleanlab')}) are about as good.",
        f"ALFA: {at('alfa', floral)} against {at('alfa', svm)} of the plain machine at C = 10, {at('alfa', mild)} "
        f"against {at('alfa', soft)} at C = 1. ALFA-tilt: {at('alfa_tilt', floral)} against {at('alfa_tilt', svm)} at "
        "C = 10.",
        f"An adaptive `farfirst` leaves FLORAL {at('farfirst', floral, 'adaptive')} at C = 10, where the plain machine "
        f"keeps {at('farfirst', svm, 'adaptive')}, and {at('farfirst', mild, 'adaptive')} against "
        f"{at('farfirst', soft, 'adaptive')} at C = 1; an adaptive ALFA-tilt {at('alfa_tilt', floral, 'adaptive')} "
        f"against {at('alfa_tilt', svm, 'adaptive')}, and {at('alfa_tilt', mild, 'adaptive')} against "
        f"{at('alfa_tilt', soft, 'adaptive')}.",
        f"{worst('digits', floral):.3f} against {worst('digits', svm):.3f} at C = 10, "
        f"{worst('digits', mild):.3f} against {worst('digits', soft):.3f} at C = 1.",
        f"FLORAL costs {100 * (clean('moons', moons) - clean('moons', guarded)):.1f} points of clean accuracy there "
        f"({clean('moons', guarded):.3f} against {clean('moons', moons):.3f}) and loses under `farfirst` "
        f"{on_moons['farfirst']}, ALFA {on_moons['alfa']} and ALFA-tilt {on_moons['alfa_tilt']}; under `nearfirst` it "
        f"gains {on_moons['nearfirst']}.",
        f"`curie` falls to {at('farfirst', 'curie:C=1')} under `farfirst` on digits, below the plain machine's "
        f"{at('farfirst', soft)}. The network `nn` keeps {at('random_labels', 'nn')} even under random flips.",
        f"on digits all lie between {min(tilt):.3f} and {max(tilt):.3f} under the oblivious ALFA-tilt.",
    ]


@pytest.mark.parametrize("number", range(10))
def test_what_the_page_says_is_what_the_file_says(number: int) -> None:
    assert " ".join(sentences()[number].split()) in " ".join(TEXT.split())


def test_the_page_says_what_was_run() -> None:
    assert f"{len(CELLS)} cells" in TEXT
    assert {rate for _, _, rate, _, attacker in CELLS if attacker == "adaptive"} == {0.25}
    assert not any(key[3].startswith("nn_pgd_at") for key in CELLS)
    half = [(c["robust_accuracy"]["high"] - c["robust_accuracy"]["low"]) / 2 for k, c in CELLS.items() if k[2] == 0.25]
    assert 0.01 < sorted(half)[len(half) // 2] < 0.04


def test_what_the_page_calls_a_gain_or_a_loss_is_one() -> None:
    for attack in ("farfirst", "nearfirst", "svflip", "floral_inner", "random_labels"):
        assert gap(attack, "floral:C=10", "svm:C=10") > 5
    for attack in ("alfa", "alfa_tilt"):
        assert gap(attack, "floral:C=10", "svm:C=10") < -1
    for c in (1, 10):
        assert gap("farfirst", f"floral:C={c}", f"svm:C={c}", "adaptive") < -5
        assert worst("digits", f"floral:C={c}") < worst("digits", f"svm:C={c}") + 0.01
    for attack in ("farfirst", "alfa", "alfa_tilt"):
        assert robust("moons", attack, "floral:C=1,gamma=1") < robust("moons", attack, "svm:C=1,gamma=1")


def test_what_the_grid_was_expected_to_show() -> None:
    """ALFA hurts far more than chance; FLORAL gains on farthest-first flips of digits at next to no clean accuracy."""
    assert robust("digits", "random_labels", "svm:C=1") - robust("digits", "alfa", "svm:C=1") >= 0.10
    assert gap("farfirst", "floral:C=10", "svm:C=10") >= 4
    assert clean("digits", "svm:C=10") - clean("digits", "floral:C=10") <= 0.01
