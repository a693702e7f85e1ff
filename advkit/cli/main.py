"""The `advkit` command's entry.

Only what names a subcommand loads the parser (`advkit.cli.group`): help would otherwise wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from advkit.cli.commands import COMMANDS as COMMANDS
from advkit.cli.commands import INTERRUPTED, MISUSE, page, tell
from advkit.cli.commands import load_command as load_command


def run(arguments: Sequence[str] | None = None) -> int:
    """The console entry: runs the command line and returns its exit code."""
    code = _run(arguments)
    ranks = sys.modules.get("advkit.training.ranks")
    if ranks is not None and ranks.connected:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in ([], ["--help"], ["-h"]):
        sys.stdout.write(page())
        return 0 if given else MISUSE
    from advkit.cli.group import command

    options = given[: given.index("--")] if "--" in given else given
    if "--debug" in options:  # belongs to the group; users write it last
        given.remove("--debug")
        given.insert(0, "--debug")
    try:
        command().main(args=given, prog_name="advkit")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        tell("interrupted; what is done is kept, resume with the same command")
        return INTERRUPTED
    return 0
