"""The `advkit` command as typer knows it: each subcommand is imported only when it is called."""

from __future__ import annotations

import difflib
import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from advkit import __version__
from advkit.cli import commands
from advkit.cli.commands import COMMANDS, CONTEXT, DEBUG, INTERRUPTED, SUMMARY, VERSION, page, tell
from advkit.core.errors import AdvkitError, UnknownName
from advkit.core.files import disk_full

# Newer versions of typer bring a click of their own: what its parser raises is found through what typer shows of it.
_MISUSE: type[Exception] = typer.BadParameter.__mro__[1]


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
            return name, commands.load_command(name), args[1:]
        if name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise UnknownName(f"no command {name!r}{hint} `advkit --help` lists them all")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The page that `advkit --help` prints without this module."""
        formatter.write(page())

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a mistake of the user's ends in one line, a bug in a traceback."""
        try:
            return super().invoke(ctx)
        except AdvkitError as error:
            if _debugging(ctx):
                raise
            tell(f"error: {error}")
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if _debugging(ctx) or not disk_full(error):
                raise
            where = f" ({error.filename})" if error.filename else ""
            tell(f"error: the disk is full{where}; what is done is kept: make room and resume with the same command")
            raise typer.Exit(AdvkitError.exit_code) from error
        except _MISUSE as error:
            said = _advice(error)
            if not said:
                raise
            tell(f"error: {said}")
            raise typer.Exit(AdvkitError.exit_code) from error
        except SystemExit as left:
            if isinstance(left.__context__, BrokenPipeError):  # who reads what is printed has seen enough (`| head`)
                raise
            # No command of ours leaves this way: a part that it ran did, and there is no result.
            if _debugging(ctx):
                traceback.print_exc()
            tell(f"error: a part that ran here left the program (exit {left.code}); there is no result")
            code = left.code if isinstance(left.code, int) else 1
            raise typer.Exit(code or 1) from left
        except KeyboardInterrupt as error:
            if _debugging(ctx):
                raise
            tell("interrupted; what is done is kept, resume with the same command")
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


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"advkit {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="advkit",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)


@app.callback(help=SUMMARY)
def advkit(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help=VERSION)] = False,
    debug: Annotated[bool, typer.Option("--debug", help=DEBUG)] = False,
) -> None:
    """What stands before a subcommand."""


def command() -> Any:
    """The whole command line, to be called with its arguments."""
    return typer.main.get_command(app)
