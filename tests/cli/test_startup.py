"""What starting up imports, and what the shell of the command line says; by modules, never by the clock."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import typer

from advkit import __version__
from advkit.cli import commands, main
from advkit.core.errors import UsageError

HEAVY = ("torch", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "jsonschema", "jinja2")
PARSERS = ("typer", "click", "rich", "pydantic", "argparse")


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return {match.split(".")[0] for match in re.findall(r"^import time:.*\|\s*([\w.]+)$", done.stderr, re.MULTILINE)}


def test_the_measure_sees_a_heavy_import() -> None:
    assert "numpy" in imported_by("-c", "import numpy")


def test_importing_the_packages_loads_no_torch_and_no_numpy() -> None:
    packages = (
        "attacks",
        "defenses",
        "models",
        "tasks",
        "threat_models",
        "threat_models.goals",
        "cli",
        "core.registry",
    )
    for code in ("import advkit; dir(advkit)", "; ".join(f"import advkit.{package}" for package in packages)):
        loaded = imported_by("-c", code)
        assert "advkit" in loaded
        assert not loaded & {*HEAVY, "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["list"],
        ["list", "--json"],
        ["list", "attacks", "--for", "digits"],
        ["evaluate", "--help"],
    ],
)
def test_help_and_list_load_no_torch(arguments: list[str]) -> None:
    loaded = imported_by("-m", "advkit", *arguments)
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_needs_no_parser(arguments: list[str]) -> None:
    loaded = imported_by("-m", "advkit", *arguments)
    assert "advkit" in loaded
    assert not loaded & {*HEAVY, *PARSERS, "numpy", "inspect"}


@pytest.mark.slow
def test_help_of_a_subcommand_draws_no_boxes_with_rich() -> None:
    assert "rich" not in imported_by("-m", "advkit", "evaluate", "--help")


def test_help_with_and_without_a_parser_is_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for arguments in (["--help"], ["-h"], ["--debug", "--help"]):
        assert main.run(arguments) == 0
        pages.append(capsys.readouterr().out.rstrip())
    assert main.run([]) == commands.MISUSE == UsageError.exit_code
    pages.append(capsys.readouterr().out.rstrip())
    assert len(set(pages)) == 1


def test_the_page_tells_every_option_that_the_parser_knows() -> None:
    from advkit.cli.group import command

    known = command()
    page = " ".join(commands.page().split())
    context = typer.Context(known, help_option_names=commands.CONTEXT["help_option_names"])
    for option in known.get_params(context):
        assert all(word in page for word in option.opts), option.opts
        assert " ".join(str(option.help).split()) in page
    assert " ".join(str(known.help).split()) in page


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_page_fits_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    widest = max(map(len, commands.page().splitlines()))
    assert widest <= max(50, min(int(columns), 100))


@pytest.mark.slow
def test_a_run_imports_neither_scipy_nor_jsonschema_nor_a_drawer() -> None:
    """What a default run has no use for: intervals at 95 %, a report that fits its schema, and no plots from Python."""
    code = "import advkit; advkit.evaluate('fgsm', task='digits', model='zoo:digits-mlp', n=4)"
    loaded = imported_by("-c", code)
    assert "torch" in loaded
    assert not loaded & {"scipy", "sklearn", "sympy", "matplotlib", "jsonschema", *PARSERS[:4]}


def test_help_imports_no_subcommand() -> None:
    code = (
        "import sys; from advkit.cli.main import run; code = run(['--help']); "
        "print(code, sorted(name for name in sys.modules if name.startswith('advkit.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 ['advkit.cli.commands', 'advkit.cli.main']"


def test_the_lazy_names_are_what_they_say() -> None:
    import advkit
    from advkit.evaluation.api import evaluate
    from advkit.evaluation.report.document import Report

    assert advkit.evaluate is evaluate
    assert advkit.Report is Report
    assert advkit.testing.__name__ == "advkit.testing"
    assert {"evaluate", "Report", "testing"} <= set(dir(advkit))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = advkit.no_such_name


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--help"]) == 0
    assert f"advkit {name}" in capsys.readouterr().out


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in commands.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"advkit {__version__}\n"


def one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "Traceback" not in text
    return text


def test_a_misspelt_subcommand_gets_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["evalute", "--attack", "pgd"]) == 2
    assert "did you mean 'evaluate'" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "attakcs"], "attacks, defenses"),
        (["show", "pgdd"], "did you mean 'pgd'"),
        (["show", "pgd", "--kind", "defenses"], "advkit list"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    assert words in one_line(capsys.readouterr().err)


def test_usage_errors_of_the_parser_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--no-such-option"]) == 2
    assert main.run(["list", "--no-such-option"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def stand_in(monkeypatch: pytest.MonkeyPatch, outcome: BaseException) -> None:
    def fail() -> None:
        raise outcome

    single = typer.Typer(add_completion=False)
    single.command()(fail)
    monkeypatch.setattr(commands, "load_command", lambda name: typer.main.get_command(single))


class Special(UsageError):
    exit_code = 3


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (UsageError("eps is -1;\ngive 0 or more"), 2, "eps is -1; give 0 or more"),
        (Special("flags"), 3, "flags"),
        (KeyboardInterrupt(), 130, "resume with the same command"),
    ],
)
def test_errors_end_in_their_exit_codes(
    outcome: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ADVKIT_DEBUG", raising=False)
    stand_in(monkeypatch, outcome)
    assert main.run(["evaluate"]) == code
    assert words in one_line(capsys.readouterr().err)


def test_a_reader_who_has_seen_enough_gets_no_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`advkit show pgd | head -1`: rich leaves the program when the pipe is closed."""
    left = SystemExit(1)
    left.__context__ = BrokenPipeError()
    stand_in(monkeypatch, left)
    assert main.run(["show"]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("way", ["first", "last", "variable"])
def test_debug_shows_the_traceback(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVKIT_DEBUG", "1" if way == "variable" else "0")
    stand_in(monkeypatch, UsageError("eps is -1"))
    arguments = {"first": ["--debug", "evaluate"], "last": ["evaluate", "--debug"], "variable": ["evaluate"]}[way]
    with pytest.raises(UsageError, match="eps is -1"):
        main.run(arguments)


def test_a_bug_is_never_taken_for_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main.run(["evaluate"])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_holds_every_name_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    from advkit.cli.list import REGISTRIES, registry_of

    found = as_json(capsys, "list")
    assert set(found) == set(REGISTRIES)
    for kind, rows in found.items():
        assert [row["name"] for row in rows] == [*registry_of(kind).names()]
        assert all(row["summary"] for row in rows if row["name"] in registry_of(kind).table)
    assert as_json(capsys, "list", "threat_model") == {"threat-models": found["threat-models"]}
    assert main.run(["list", "attacks"]) == 0
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in found["attacks"])
    assert "fashion-mnist" not in shown


def test_show_explains_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = as_json(capsys, "show", "pgd:steps=3")
    assert (shown["kind"], shown["name"]) == ("attack", "pgd")
    assert shown["papers"] == ["arXiv:1706.06083"]
    steps = next(each for each in shown["fields"] if each["name"] == "steps")
    assert (steps["type"], steps["default"]) == ("int", "40")
    assert shown["example"] == "advkit evaluate --attack pgd:steps=40 --defense pubdef"
    assert main.run(["show", "pgd"]) == 0
    page = capsys.readouterr().out
    assert "arxiv.org/abs/1706.06083" in page
    assert "step_size" in page
    assert as_json(capsys, "show", "attack/PGD") == [shown]


@pytest.mark.slow
def test_every_example_is_a_spec_that_builds_or_asks_for_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    from advkit.cli.list import REGISTRIES, registry_of
    from advkit.cli.show import example
    from advkit.core.registry import parse_spec

    for kind in REGISTRIES:
        if kind == "scenarios":  # named by threat models, by no option
            continue
        registry = registry_of(kind)
        for name in registry.table:
            command = example(registry.signature(name))
            option = "says:judges=[" if kind == "judges" else f"--{registry.kind.replace(' ', '-')} "
            spec = command.split(option)[1].split(" --")[0]
            spec = spec.removesuffix("]") if kind == "judges" else spec
            assert registry.known(parse_spec(spec).name) == name
            if not any(word.isupper() for word in re.findall(r"[A-Z_]{3,}", spec)):
                registry.build(spec)


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "advkit", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "ADVKIT_DEBUG": ""},
    )
    assert done.returncode == 2
    assert "nonsense" in one_line(done.stderr)
