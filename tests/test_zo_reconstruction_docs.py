"""docs/zo_ae_ds.md: the table of reconstruction is that of the file beside it, and what is said of the order holds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from advkit.defenses import DEFENSES

DOCS = Path(__file__).parents[1] / "docs"
SECTION = (DOCS / "zo_ae_ds.md").read_text(encoding="utf-8").partition("## Reconstruction")[2].partition("\n## ")[0]
FILE = json.loads((DOCS / "zo_reconstruction.json").read_text(encoding="utf-8"))
RUNS: list[dict[str, Any]] = list(FILE["runs"]["0.25"].values())
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")
    )
}
AE, FO_AE, FO, ZO, NONE = "ZO-AE-DS, CGE d_z=32", "FO-AE-DS", "FO-DS", "ZO-DS, RGE q=64", "standard"


def mean(name: str, key: str, radius: str) -> float:
    values = [rows[name][key][radius] for rows in RUNS]
    return statistics.mean(value["value"] if isinstance(value, dict) else value for value in values)


def test_the_table_is_that_of_the_file() -> None:
    for name in (NONE, FO, ZO, FO_AE, AE):
        expected = [f"{mean(name, 'rmse', radius):.3f}" for radius in "024"]
        expected.append(f"{100 * mean(name, 'over_threshold', '2'):.1f}")
        expected += [f"{mean(name, 'oblivious_rmse', radius):.3f}" if name != NONE else "-" for radius in "24"]
        queries = {rows[name].get("queries", 0) for rows in RUNS}
        assert len(queries) == 1
        assert ROWS[name][:-1] == [*expected, f"{queries.pop():,}", str(len(RUNS))]
        assert FILE["means"]["0.25"][name]["2"] == mean(name, "rmse", "2")


def test_what_is_said_of_the_order_holds() -> None:
    for radius in "24":
        order = [mean(name, "rmse", radius) for name in (AE, FO, ZO)]
        assert order == sorted(order)
        assert abs(mean(AE, "rmse", radius) - mean(FO_AE, "rmse", radius)) < 0.01
    clean = [mean(name, "rmse", "0") for name in (NONE, FO, AE)]
    assert clean == sorted(clean)
    gain = 1 - mean(AE, "rmse", "2") / mean(NONE, "rmse", "2")
    assert f"by {100 * gain:.0f} % at radius 2" in SECTION


def test_flags_and_settings_are_told() -> None:
    flagged = {name for rows in RUNS for name in rows for flags in rows[name].get("flags", {}).values() if flags}
    assert flagged <= {FO}
    assert ("black_box_beats_white_box" in SECTION) == bool(flagged)
    assert f"first {FILE['n']} test images" in SECTION
    for rows in RUNS:
        for row in rows.values():
            if "defense" in row:
                DEFENSES.build(row["defense"])
