"""The names that plug-ins may import, as CONTRIBUTING lists them, and the repository's own claims about versions."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import advkit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

NAMES = {
    "core.errors": (
        "AdvkitError UsageError UnknownName SpecError BadInput BadModel CheckpointError NoTrainingData StaleRun "
        "AccessDenied BudgetExhausted MissingExtra ReportError"
    ),
    "core.checks": "check at_least at_least_one positive not_negative fraction one_of",
    "core.oracle": "Lanes Meter MeteredOracle frozen",
    "core.protocols": (
        "Access Outcome Space Rng Model ModelInfo Evidence Goal Oracle ThreatModel Ball Attack Perturb Selector "
        "OnlineAttack Batch Data TaskDefaults Task Defense Record"
    ),
    "core.rmt": (
        "mp_edges mp_atom mp_density mp_cdf mp_median tracy_widom_cdf tracy_widom_quantile tracy_widom_scale "
        "tracy_widom_edge bbp_threshold spiked overlap debiased"
    ),
    "core.rng": "RowRng philox",
    "core.smoothing": "lower_bound upper_bound radius largest_radius abstains hopeless high_probability linf_radius",
    "core.zeroth_order": "rge cge Estimate rge_queries cge_queries",
    "core.spaces": "Box Binary Tokens Transcripts Rows Product",
    "attacks": "ATTACKS",
    "attacks.base": "TensorGoal TensorOracle Best ActiveRows Live affords better descended lp_ball per_row",
    "attacks.search": "Search Step",
    "attacks.suites": "Stage Suite",
    "defenses": "DEFENSES",
    "defenses.inputs.base": "InputDefense",
    "defenses.smoothing.base": "SmoothingDefense",
    "defenses.adversarial.base": "TrainingDefense AdversarialTraining RobustObjective attacked correct_under in_mode",
    "models": "MODELS",
    "models.smoothed": "Smoothed SmoothedView Smoothing Noise",
    "models.checkpoint": "pack unpack load_checkpoint save_checkpoint checkpoint_extra CheckpointFile canonical_json",
    "models.ensemble": "Ensemble",
    "models.spiking": "RULES",
    "models.spiking.model": "SpikingModel",
    "models.spiking.neurons": "Neuron LIF",
    "models.language.model": "LanguageModel",
    "models.torch": "TorchModel FunctionModel NumpyModel Architecture as_model is_model",
    "models.views": "straight_through averaged Averaged Preprocessed",
    "models.zoo": "Card card cards find load public",
    "tasks": "TASKS",
    "threat_models": "THREAT_MODELS GOALS JUDGES",
    "testing": (
        "ATTACK_LAWS BALLS DEFENSE_LAWS MINIMA RADII TEXT_LAWS THREAT_LAWS TOKEN_LAWS check_attack check_defense "
        "check_law check_threat_model subjects play accepts shortened linear network noisy nan_off quantised"
    ),
    "evaluation.api": "evaluate plan execute resolve",
    "evaluation.compare": "compare Comparison PairedTest",
    "evaluation.diagnostics": "Finding",
    "evaluation.indicators": (
        "unavailable_gradients unstable_predictions silent_success incomplete_optimization transfer_failure "
        "unconstrained_attack_failure"
    ),
    "evaluation.pictures": "strip export",
    "evaluation.report": "Report merge percent schema",
    "evaluation.stats": (
        "Interval wilson clopper_pearson bootstrap_mean hierarchical_bootstrap student_t_over_seeds mcnemar_exact "
        "newcombe_paired rate"
    ),
    "evaluation.store": "Store read_records read_examples",
}


def listed() -> set[str]:
    """The modules that CONTRIBUTING's table names."""
    section = TEXT.split("## Stable names")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    return {name for row in rows for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", row) if name not in ADDED}


ADDED = {"pack", "unpack"}  # functions that the table names beside their module


@pytest.mark.parametrize("module", NAMES)
def test_stable_names_are_where_they_were(module: str) -> None:
    home = importlib.import_module(f"advkit.{module}")
    assert not [name for name in NAMES[module].split() if not hasattr(home, name)]


def test_every_module_of_the_table_imports_and_has_its_names_tested() -> None:
    assert {"core.errors", "evaluation.store", "testing"} <= listed()
    for module in listed():
        importlib.import_module(f"advkit.{module}")
    assert listed() <= {*NAMES}


@pytest.mark.parametrize("package", ["models", "defenses", "attacks", "tasks", "threat_models"])
def test_everything_below_a_package_of_parts_imports(package: str) -> None:
    home = importlib.import_module(f"advkit.{package}")
    found = [each.name for each in pkgutil.walk_packages(home.__path__, f"{home.__name__}.")]
    assert found
    for name in found:
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("path", "keywords"),
    [
        ("core.oracle:MeteredOracle", "model rows access queries decides lanes"),
        ("core.oracle:Lanes", "chunk multiple"),
        ("core.rng:RowRng.from_ids", "seed ids"),
        ("models.torch:TorchModel", "module space classes name"),
        ("testing:play", "attack model x goal ball seed ids access queries decides lanes rng"),
        ("evaluation.api:evaluate", "attack defense task model threat_model n seed goal"),
    ],
)
def test_keywords_that_plug_ins_use_are_there(path: str, keywords: str) -> None:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(f"advkit.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    assert not [each for each in keywords.split() if each not in inspect.signature(found).parameters]


# --- versions


def test_workflow_and_readme_claim_the_versions_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = [each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r":: 3\.\d+$", each)]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"3\.\d+", matrix) == claimed
    assert project["requires-python"] == f">={claimed[0]}"
    assert re.search(r"^ +- run: \.ci/run$", workflow, re.MULTILINE)
    assert f"Python {claimed[0]} to {claimed[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [advkit.__version__]
