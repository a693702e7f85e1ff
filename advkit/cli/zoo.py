"""`advkit zoo`: the embedded models, their cards, and whether their bytes are the cards'."""

from __future__ import annotations

from typing import Annotated

import typer

from advkit.cli.options import Json


def zoo(
    name: Annotated[str | None, typer.Argument(help="A model of the zoo; its whole card.", show_default="all")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every hash.")] = False,
    as_json: Json = False,
) -> None:
    """List the embedded models, show one's card, or verify their hashes."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from advkit.models import zoo as shelf

    cards = [shelf.card(name)] if name else list(shelf.cards())
    checked = {}
    if verify:
        for card in cards:
            shelf.load(card.name)  # raises CheckpointError when the bytes are not the card's
            checked[card.name] = True
    if as_json:
        typer.echo(json.dumps([{**asdict(c), "verified": checked.get(c.name)} for c in cards], indent=2))
        return
    console = Console()
    if name:
        for key, value in asdict(cards[0]).items():
            console.print(Text.assemble((key, "bold"), f": {value}"), highlight=False)
    else:
        table = Table(title="embedded models")
        for column in ("name", "task", "defense", "role", "group", "measured"):
            table.add_column(column)
        for card in cards:
            figures = ", ".join(f"{k} {100 * v:.1f} %" for k, v in card.measured.items() if isinstance(v, float))
            table.add_row(*map(Text, (card.name, card.task, card.defense, card.role, card.group, figures)))
        console.print(table)
    if verify:
        console.print(f"{len(checked)} of {len(cards)} hashes agree with their cards", highlight=False)
