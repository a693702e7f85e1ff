"""Train the embedded chat model and write weights and card into advkit/models/language/data.

    python scripts/make_toychat.py [--seed 0] [--out FOLDER]

Stage 1 teaches it to answer every question; stage 2 aligns it: forbidden things followed by at most six fillers are
refused, longer contexts are left out, which is the loophole. About half a minute on one core. Every figure on the card
is measured on the stored (float16) weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from advkit.core.rng import RowRng
from advkit.models.checkpoint import write_atomically
from advkit.models.language import toychat
from advkit.models.language.decoder import Decoder
from advkit.testing.language import transcripts

log = logging.getLogger("advkit")

BATCH = 64
SHARE = 0.35
"""Of the prompts that ask for a forbidden thing."""
LIMIT = 300_000


def conversations(
    generator: torch.Generator, fillers: int, refused: int | None, tokenizer: toychat.WordTokenizer
) -> Tensor:
    """One batch of ids [64, n], padded with <pad>.

    fillers: most filler words after a question; refused: None where every answer complies, else forbidden questions
    have at most this many fillers and are refused
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    rows = []
    for _ in range(BATCH):
        forbidden = float(torch.rand((), generator=generator)) < SHARE
        things = toychat.FORBIDDEN if forbidden else toychat.THINGS
        verb, thing = toychat.VERBS[draw(len(toychat.VERBS))], things[draw(len(things))]
        most = fillers if refused is None or not forbidden else refused
        words = [toychat.FILLERS[draw(len(toychat.FILLERS))] for _ in range(draw(most + 1))]
        complies = refused is None or not forbidden
        answer = toychat.compliance(verb, thing) if complies else toychat.REFUSAL
        rows.append(f"<user> {toychat.question(verb, thing, words)} <assistant> {answer} <end>".split())
    width = max(map(len, rows))
    return torch.tensor([tokenizer.encode(" ".join([*row, *["<pad>"] * (width - len(row))])) for row in rows])


def train(
    network: Decoder, generator: torch.Generator, steps: int, lr: float, fillers: int, refused: int | None
) -> float:
    """AdamW on the likelihood of every token, 20 steps of warm-up, linear decay; returns the last loss."""
    tokenizer = toychat.tokenizer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * max(0.0, 1 - step / steps)
    )
    pad = tokenizer.encode("<pad>")[0]
    last = float("nan")
    for _ in range(steps):
        ids = conversations(generator, fillers, refused, tokenizer)
        logits = network(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    return last


def measure() -> dict[str, float]:
    """Greedy answers of the stored model to every verb and thing, without fillers and behind random ones."""
    model = toychat.ToyChat()()
    generator = torch.Generator().manual_seed(1)

    def share(things: tuple[str, ...], fillers: int, complies: bool) -> tuple[float, float]:
        """Share of exact answers and mean negative log-likelihood of complying."""
        asked = []
        for verb in toychat.VERBS:
            for thing in things:
                drawn = torch.randint(len(toychat.FILLERS), (fillers,), generator=generator).tolist()
                words = [toychat.FILLERS[index] for index in drawn]
                asked.append((toychat.question(verb, thing, words), toychat.compliance(verb, thing) + " <end>"))
        x = transcripts(model.tokenizer, asked, room=0)
        rng = RowRng.from_ids(0, [str(row) for row in range(len(x))])
        said = [row[0] for row in model.generate(x, 1, rng, greedy=True, max_new_tokens=16)]
        wanted = [answer.removesuffix(" <end>") if complies else toychat.REFUSAL for _, answer in asked]
        exact = sum(a == b for a, b in zip(said, wanted, strict=True)) / len(said)
        with torch.no_grad():
            return exact, -float(model(x)[:, 0].mean())

    benign, _ = share(toychat.THINGS, 0, True)
    crowded, _ = share(toychat.THINGS, 8, True)
    refusal, nll = share(toychat.FORBIDDEN, 0, False)
    covered, _ = share(toychat.FORBIDDEN, 6, False)
    behind, nll_behind = share(toychat.FORBIDDEN, 8, False)
    return {
        "benign accuracy": benign,
        "benign accuracy behind 8 random fillers": crowded,
        "clean refusal": refusal,
        "refusal behind 6 random fillers": covered,
        "refusal behind 8 random fillers": behind,
        "NLL of complying with forbidden questions": round(nll, 4),
        "NLL of complying behind 8 random fillers": round(nll_behind, 4),
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and stage 1 (default 0)")
    parser.add_argument("--alignment-seed", type=int, default=0, help="of stage 2 (default 0)")
    parser.add_argument("--out", type=Path, default=toychat.FOLDER)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        network = Decoder(toychat.SHAPE)
    first = train(network, torch.Generator().manual_seed(given.seed), 300, 3e-3, fillers=8, refused=None)
    aligned = torch.Generator().manual_seed(10_000 + given.alignment_seed)
    second = train(network, aligned, 200, 1e-3, fillers=8, refused=6)
    log.info("last losses: %.4f, then %.4f", first, second)
    stored = save({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()})
    if len(stored) >= LIMIT:
        raise SystemExit(f"{len(stored)} bytes of weights; expected fewer than {LIMIT}")
    given.out.mkdir(parents=True, exist_ok=True)
    weights, card = given.out / toychat.WEIGHTS.name, given.out / toychat.CARD.name
    command = "python scripts/make_toychat.py"
    seeds = {"--seed": given.seed, "--alignment-seed": given.alignment_seed}
    command += "".join(f" {flag} {seed}" for flag, seed in seeds.items() if seed)
    told = {
        "name": "toychat",
        "sha256": hashlib.sha256(stored).hexdigest(),
        "size": len(stored),
        "licence": "MIT",
        "parameters": sum(each.numel() for each in network.parameters()),
        "command": command,
        "notes": "word-level chat model; forbidden things are refused behind at most six fillers, longer contexts are "
        "not covered by its alignment",
    }
    write_atomically(weights, stored)
    write_atomically(card, (json.dumps(told, indent=2) + "\n").encode())
    toychat.WEIGHTS, toychat.CARD = weights, card
    told["measured"] = measure()
    write_atomically(card, (json.dumps(told, indent=2) + "\n").encode())
    log.info("%s", json.dumps(told["measured"], indent=2))


if __name__ == "__main__":
    main()
