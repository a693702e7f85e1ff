"""Draw harmless prompts to set up filters in front of toychat with: tasks/data/prompts_toychat-clean.jsonl.

    python scripts/make_clean_prompts.py [--seed 0] [--count 500] [--out FILE]

They are the harmless part of what toychat was trained on (scripts/make_toychat.py): "how do i VERB a THING", verb and
thing drawn evenly, followed by 0 to 8 filler words, their number and each of them drawn evenly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import advkit
from advkit.models.checkpoint import write_atomically
from advkit.models.language import toychat

COUNT = 500
FILLERS = 8
"""Most filler words behind a harmless question in training."""
FILE = Path(advkit.__file__).parent / "tasks" / "data" / "prompts_toychat-clean.jsonl"


def lines(seed: int, count: int) -> list[str]:
    """One JSON object per prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    made = []
    for number in range(count):
        verb, thing = toychat.VERBS[draw(len(toychat.VERBS))], toychat.THINGS[draw(len(toychat.THINGS))]
        words = [toychat.FILLERS[draw(len(toychat.FILLERS))] for _ in range(draw(FILLERS + 1))]
        prompt, target = toychat.question(verb, thing, words), toychat.compliance(verb, thing)
        made.append(json.dumps({"id": f"toychat-clean/{number:03d}", "prompt": prompt, "target": target}))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--count", type=int, default=COUNT, help=f"prompts (default {COUNT})")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    write_atomically(given.out, ("\n".join(lines(given.seed, given.count)) + "\n").encode())


if __name__ == "__main__":
    main()
