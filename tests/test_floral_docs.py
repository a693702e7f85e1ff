"""docs/floral.md: its tables are those of the files beside it, and its commands exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.defenses.labels.floral import FLORAL
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "floral.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "floral.json").read_text(encoding="utf-8"))
SCALE = json.loads((DOCS / "floral_scale.json").read_text(encoding="utf-8"))
ATTACKED = ("random_labels", "farfirst", "alfa")


def rows(heading: str) -> dict[str, list[str]]:
    """The table below a line that begins with these words, by first cell."""
    block = TEXT.partition(f"\n{heading}")[2].partition("\n|")[2].partition("\n\n")[0]
    lines = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if not cells[0].startswith("---")}


def figure(task: str, attack: str, attacker: str, rate: float, defense: str, key: str = "robust") -> str:
    for cell in FILE["cells"]:
        asked = (cell["attack"], cell["attacker"], cell["rate"], cell["seed"], cell["defense"])
        if cell["task"].startswith(task) and asked == (attack, attacker, rate, 0, defense):
            return f"{100 * cell[key]:.1f}"
    raise KeyError((task, attack, attacker, rate, defense))


def test_the_table_of_digits_is_that_of_the_file():
    found = rows("Digits 1 against 7")
    defenses = {cell["defense"] for cell in FILE["cells"] if cell["task"].startswith("digits")}
    assert set(found) == {"defense", *defenses}
    for defense in defenses:
        DEFENSES.build(defense)
        expected = [figure("digits", "farfirst", "oblivious", 0.25, defense, "clean")]
        expected += [figure("digits", attack, "oblivious", 0.25, defense) for attack in ATTACKED]
        expected += [figure("digits", attack, "adaptive", 0.25, defense) for attack in ATTACKED[1:]]
        assert found[defense] == expected


def test_the_table_of_moons_is_that_of_the_file():
    found = rows("Two moons")
    defenses = {cell["defense"] for cell in FILE["cells"] if cell["task"] == "moons"}
    assert set(found) == {"defense", *defenses}
    for defense in defenses:
        expected = [figure("moons", "farfirst", "oblivious", 0.1, defense, "clean")]
        expected += [figure("moons", attack, "oblivious", rate, defense) for attack in ATTACKED for rate in (0.1, 0.25)]
        assert found[defense] == expected


def test_the_lines_of_acceptance_are_those_of_the_file():
    found = rows("**What was asked for.**")
    for name, words in (("gain", "gain at `farfirst`"), ("clean_drop", "loss on clean labels")):
        line = FILE["acceptance"][name]
        seeds = ", ".join(f"{100 * each:.1f}" for each in line["of_each_seed"])
        expected = [f"{100 * line['mean']:.1f} ({seeds})", line["expected"], "yes" if line["holds"] else "no"]
        (row,) = [cells for key, cells in found.items() if key.startswith(words)]
        assert row == expected


def test_the_limits_of_cost_are_those_of_the_file():
    found = rows("`benchmarks/floral_scale.py`")
    for size in SCALE.values():
        row = found[f"{size['n']:,}"]
        assert row[0] == f"{size['features']}"
        assert row[1] == f"{size['rounds']}"
        assert row[2] == (f"{size['landmarks']:,}" if size["landmarks"] else "-")
        assert row[3].startswith(f"{size['limit_seconds']:.0f} CPU seconds")
        assert row[4] == ("yes" if size["holds"] else "no")


def test_what_else_was_measured_is_that_of_the_file():
    few, many = FILE["draws"]["200"], FILE["draws"]["500"]
    assert f"give {min(few)} to {max(few)} % with 200 and {min(many)} to {max(many)} % with 500" in TEXT
    near = [each for each in FILE["dual_distances"] if each < 1e-6]
    far = max(FILE["dual_distances"])
    assert f"on {len(near)} of {len(FILE['dual_distances'])} sets of 40 points, and at most {far} on the others" in TEXT


def test_settings_and_defaults_are_the_classs():
    parameters = FLORAL().get_params()
    for names, cells in rows("wrong class of the largest score").items():
        for name in re.findall(r"[a-zA-Z_]\w*", names.replace("`", "")):
            assert name == "setting" or name in parameters
        for value in re.findall(r"^(0\.05|500|auto|average|margin|svm)$", cells[0]):
            assert str(parameters[names]) == value


def test_every_command_exists():
    blocks = re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S)
    for line in "".join(blocks).splitlines():
        program, name, *rest = shlex.split(line)
        assert program == "advkit"
        assert name in COMMANDS
        asked = load_command(name).make_context(name, list(rest)).params
        for option, registry in {"attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS}.items():
            if asked.get(option):
                registry.build(asked[option])
