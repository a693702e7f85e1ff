"""The `advkit` command: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from advkit import __version__
from advkit.core.errors import AdvkitError, UnknownName
from advkit.core.files import disk_full
from advkit.core.text import printable

COMMANDS: dict[str, tuple[str, str]] = {
    "evaluate": ("advkit.cli.evaluate", "Attack a model under a defense and report its robust accuracy."),
    "certify": ("advkit.cli.certify", "Prove radii within which a smoothed model's answers do not change."),
    "train": ("advkit.cli.train", "Train a model under a defense and save the checkpoint."),
    "attack": ("advkit.cli.attack", "Export adversarial examples as safetensors and PNG."),
    "matrix": ("advkit.cli.matrix", "Show what every attack makes on every source to every target, as a table."),
    "list": ("advkit.cli.list", "List attacks, defenses, threat models, tasks, models and goals."),
    "show": (
        "advkit.cli.show",
        "Show all of a run's report, or what a name stands for: its fields, paper, an example.",
    ),
    "compare": ("advkit.cli.compare", "Compare two reports row by row with a paired test."),
    "leaderboard": (
        "advkit.cli.leaderboard",
        "Make a page, a Markdown table and a JSON file of a folder of reports.",
    ),
    "rerun": ("advkit.cli.rerun", "Run a report's evaluation again and compare the two."),
    "doctor": ("advkit.cli.doctor", "Check this installation, or whether a model's gradients can be trusted."),
    "benchmark": ("advkit.cli.benchmark", "Time our suites beside a peer's and compare their flags image by image."),
    "zoo": ("advkit.cli.zoo", "List the embedded models and verify their hashes."),
}
INTERRUPTED = 130
# Newer versions of typer bring a click of their own: what its parser raises is found through what typer shows of it.
_MISUSE: type[Exception] = typer.BadParameter.__mro__[1]
_HELP = {"help_option_names": ["-h", "--help"]}


def load_command(name: str) -> Any:
    """The real command behind a name, imported now."""
    module, line = COMMANDS[name]
    function = getattr(importlib.import_module(module), name)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP)
    single.command(name=name, help=None if function.__doc__ else line)(function)
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """A group whose help comes from the table alone and whose errors are one line and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, line) in COMMANDS.items():
            self.add_command(TyperCommand(name=name, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of the table's line."""
        name = args[0]
        if name in COMMANDS:
            return name, load_command(name), args[1:]
        if name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise UnknownName(f"no command {name!r}{hint} `advkit --help` lists them all")

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a mistake of the user's ends in one line, a bug in a traceback."""
        try:
            return super().invoke(ctx)
        except AdvkitError as error:
            if _debugging(ctx):
                raise
            _tell(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if _debugging(ctx) or not disk_full(error):
                raise
            where = f" ({error.filename})" if error.filename else ""
            _tell(f"error: the disk is full{where}; what is done is kept: make room and resume with the same command")
            raise typer.Exit(AdvkitError.exit_code) from error
        except _MISUSE as error:
            said = _advice(error)
            if not said:
                raise
            _tell(f"error: {said}")
            raise typer.Exit(AdvkitError.exit_code) from error
        except SystemExit as left:
            # No command of ours leaves this way: a part that it ran did, and there is no result.
            if _debugging(ctx):
                traceback.print_exc()
            _tell(f"error: a part that ran here left the program (exit {left.code}); there is no result")
            code = left.code if isinstance(left.code, int) else 1
            raise typer.Exit(code or 1) from left
        except KeyboardInterrupt as error:
            if _debugging(ctx):
                raise
            _tell("interrupted; what is done is kept, resume with the same command")
            raise typer.Exit(INTERRUPTED) from error


def _advice(error: Any) -> str:
    """What to write in place of an option that other tools have; "" where nothing is known of it."""
    from advkit.evaluation.keywords import advice

    option = str(getattr(error, "option_name", "")) if type(error).__name__ == "NoSuchOption" else ""
    command = error.ctx.info_name if error.ctx is not None else ""
    said = advice(option.lstrip("-"), option=True) if option else ""
    return f"advkit {command} has no option {option}; {said}" if said else ""


def _debugging(ctx: Any) -> bool:
    return bool(ctx.params.get("debug")) or os.environ.get("ADVKIT_DEBUG", "") not in ("", "0")


def _tell(line: str) -> None:
    typer.echo(f"advkit: {' '.join(printable(line).split())}", err=True)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"advkit {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="advkit",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
    epilog="First steps: `advkit evaluate --attack pgd --defense pubdef`, then `advkit list` and `advkit show pgd`.",
)


@app.callback()
def advkit(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; ADVKIT_DEBUG=1 does the same.")
    ] = False,
) -> None:
    """Adversarial attacks, defenses and threat models in one evaluation harness."""


def run(arguments: Sequence[str] | None = None) -> int:
    """The console entry: runs the command line and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    if "--debug" in options:  # belongs to the group; users write it last
        given.remove("--debug")
        given.insert(0, "--debug")
    try:
        typer.main.get_command(app).main(args=given, prog_name="advkit")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        _tell("interrupted; what is done is kept, resume with the same command")
        return INTERRUPTED
    return 0
