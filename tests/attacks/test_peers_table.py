"""Every class of the peers: the table in the docs is whole and true, and a slow test makes it again."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "peers.py"
PACKAGES = ("foolbox", "torchattacks", "art")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_peers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "peers.json").read_text())


def sides(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry[part] for part in ("adapter", "adapter-targeted") if part in entry]


def test_the_kept_table_holds_no_adapter_that_falls_behind(script: ModuleType, kept: dict[str, Any]) -> None:
    assert [fault for entry in kept["classes"] for fault in script.faults(entry)] == []
    assert len(kept["classes"]) == 156
    # Whatever comes of a class, the adapter says it in words of its own: no traceback, no silence.
    assert [entry["name"] for entry in kept["classes"] for side in sides(entry) if "error" in side] == []


def test_the_page_is_the_kept_table(script: ModuleType, kept: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "peers.md").read_text()
    assert script.page(kept["classes"], kept["versions"]) in page


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_of_an_installed_package_is_missing(script: ModuleType, kept: dict[str, Any], package: str) -> None:
    version = script.installed(package)
    if version != kept["versions"][package]:
        pytest.skip(f"{package} {kept['versions'][package]} is not installed")
    listed = {entry["name"] for entry in kept["classes"] if entry["package"] == package}
    assert listed == set(script.classes(package))
    refused = script.PACKAGES[package][2].refused
    assert set(refused) <= listed
    told = {entry["name"] for entry in kept["classes"] if all("refused" in side for side in sides(entry))}
    assert set(refused) <= told


@pytest.mark.exhaustive
@pytest.mark.parametrize("package", PACKAGES)
def test_every_class_natively_and_by_the_adapter(script: ModuleType, package: str, tmp_path: Path) -> None:
    if script.installed(package) is None:
        pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(SCRIPT), "--packages", package, "--limit", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    made = json.loads((tmp_path / "peers.json").read_text())["classes"]
    assert {entry["name"] for entry in made} == set(script.classes(package))
    assert [fault for entry in made for fault in script.faults(entry)] == [], done.stderr[-2000:]
    both = [entry for entry in made if script.successes(entry.get("native")) is not None]
    alike = [entry for entry in both if script.successes(entry["adapter"]) is not None]
    refused = [entry for entry in both if "refused" in entry["adapter"]]
    cut = [entry for entry in both if script.unfinished(entry["adapter"])]
    assert len(alike) + len(refused) + len(cut) == len(both)
    assert len(cut) <= 5
    assert len(alike) > 0.8 * len(both)
    # What breaks most samples natively must not be hollow here.
    for entry in alike:
        if script.successes(entry["native"]) >= script.N / 2:
            assert script.successes(entry["adapter"]) > 0, entry["name"]
