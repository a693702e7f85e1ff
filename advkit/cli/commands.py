"""The table of subcommands, the page of help and lines on standard error; no parser is needed for these."""

from __future__ import annotations

import sys
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "evaluate": ("advkit.cli.evaluate", "Attack a model under a defense and report its robust accuracy."),
    "certify": ("advkit.cli.certify", "Prove radii within which a smoothed model's answers do not change."),
    "train": ("advkit.cli.train", "Train a model under a defense and save the checkpoint."),
    "attack": ("advkit.cli.attack", "Export adversarial examples as safetensors and PNG."),
    "matrix": ("advkit.cli.matrix", "Show what every attack makes on every source to every target, as a table."),
    "sweep": ("advkit.cli.sweep", "Run a grid of evaluations, here, on SLURM or on Ray; or one at several radii."),
    "list": ("advkit.cli.list", "List attacks, defenses, threat models, tasks, models and goals."),
    "show": (
        "advkit.cli.show",
        "Show all of a run's report, or what a name stands for: its fields, paper, an example.",
    ),
    "report": ("advkit.cli.report", "Write a run's report as one page, for somebody who decides."),
    "plot": ("advkit.cli.plot", "Draw the figures of a run again, as PNG, SVG or PDF."),
    "compare": ("advkit.cli.compare", "Compare two reports row by row with a paired test."),
    "leaderboard": (
        "advkit.cli.leaderboard",
        "Make a page, a Markdown table and a JSON file of a folder of reports.",
    ),
    "query": ("advkit.cli.query", "Ask the records of all runs in a folder in SQL."),
    "rerun": ("advkit.cli.rerun", "Run a report's evaluation again and compare the two."),
    "retry": ("advkit.cli.retry", "Run a run's samples that ended in an error again, and those alone."),
    "doctor": ("advkit.cli.doctor", "Check this installation, or whether a model's gradients can be trusted."),
    "benchmark": ("advkit.cli.benchmark", "Time our suites beside a peer's and compare their flags image by image."),
    "zoo": ("advkit.cli.zoo", "List the embedded models and verify their hashes."),
    "init-attack": ("advkit.cli.skeleton", "Write a package with an attack of your own: code to edit, and its tests."),
    "init-defense": ("advkit.cli.skeleton", "Write a package with a defense of your own: code to edit, and its tests."),
}
INTERRUPTED, MISUSE = 130, 2
CONTEXT = {"help_option_names": ["-h", "--help"]}
SUMMARY = "Adversarial attacks, defenses and threat models in one evaluation harness."
VERSION = "Print the version and leave."
DEBUG = "Show the traceback of an error; ADVKIT_DEBUG=1 does the same."
_OPTIONS = {
    "--version": VERSION,
    "--debug": DEBUG,
    "--install-completion": "Install completion for the current shell.",
    "--show-completion": "Show completion for the current shell, to copy it or customize the installation.",
    "-h, --help": "Show this message and exit.",
}
_FIRST_STEPS = "First steps: `advkit evaluate --attack pgd --defense pubdef`, then `advkit list` and `advkit show pgd`."
_NARROW, _WIDE = 50, 100


def page() -> str:
    """The help of the command itself, as wide as the terminal and at most 100 columns."""
    import shutil
    import textwrap

    width = max(_NARROW, min(shutil.get_terminal_size().columns - 2, _WIDE))
    lines = ["Usage: advkit [OPTIONS] COMMAND [ARGS]...", "", *textwrap.wrap(SUMMARY, width)]
    for title, rows in ("Options", _OPTIONS), ("Commands", {name: line for name, (_, line) in COMMANDS.items()}):
        column = max(map(len, rows)) + 4
        lines += ["", f"{title}:"]
        for name, line in rows.items():
            first, *rest = textwrap.wrap(line, width - column)
            lines += [f"  {name}".ljust(column) + first, *(" " * column + more for more in rest)]
    return "\n".join([*lines, "", *textwrap.wrap(_FIRST_STEPS, width)]) + "\n"


def tell(line: str) -> None:
    """One line on standard error."""
    from advkit.core.text import printable

    sys.stderr.write(f"advkit: {' '.join(printable(line).split())}\n")
    sys.stderr.flush()


def load_command(name: str) -> Any:
    """The real command behind a name, imported now."""
    import importlib

    import typer

    module, line = COMMANDS[name]
    function = getattr(importlib.import_module(module), name.replace("-", "_"))
    single = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=CONTEXT
    )
    single.command(name=name, help=None if function.__doc__ else line)(function)
    return typer.main.get_command(single)
