"""`advkit zoo`: the embedded models, their cards, and whether their bytes are the cards'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from advkit.models.zoo import Card


_UNBOUNDED = 10_000


def zoo(
    name: Annotated[str | None, typer.Argument(help="A model of the zoo; its whole card.", show_default="all")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute every hash.")] = False,
    as_json: Json = False,
) -> None:
    """List the embedded models, show one's card, or verify their hashes."""
    import json
    from dataclasses import asdict

    from rich.console import Console
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
            console.print(Text.assemble((key, "bold"), f": {value}"), highlight=False, soft_wrap=True)
    else:
        for task in dict.fromkeys(card.task for card in cards):
            of_task = [card for card in cards if card.task == task]
            table = _table(task, of_task)
            needed = console.measure(table, options=console.options.update(max_width=_UNBOUNDED)).minimum
            fits = needed <= console.width
            console.print(table if fits else Text("\n".join(_listed(task, of_task, console.width))))
    if verify:
        console.print(f"{len(checked)} of {len(cards)} hashes agree with their cards", highlight=False)


def _listed(task: str, cards: Sequence[Card], width: int) -> list[str]:
    """The same as lines, where the table is wider than the terminal: nothing of it is cut off."""
    import textwrap

    lines = [task]
    for card in cards:
        told = f"{card.defense.partition(':')[0]}, {card.role}, {card.group}: "
        told += ", ".join(f"{name} {100 * value:.1f} %" for name, value in card.measured.items())
        lines += [f"  {card.name}", *textwrap.wrap(told, width, initial_indent="    ", subsequent_indent="    ")]
    return [*lines, ""]


def _table(task: str, cards: Sequence[Card]) -> Table:
    """The models of one task, a column per measured figure; the whole of a defense is on the model's card."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    figures = list(dict.fromkeys(key for card in cards for key in card.measured))
    table = Table(title=Text(task), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading in ("defense", "role", "group"):
        table.add_column(heading, no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right", min_width=8)
    for card in cards:
        told = [f"{100 * card.measured[each]:.1f} %" if each in card.measured else "" for each in figures]
        table.add_row(*map(Text, (card.name, card.defense.partition(":")[0], card.role, card.group, *told)))
    return table
