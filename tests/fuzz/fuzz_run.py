"""One process in which damaged files or specs are read under watch: `python fuzz_run.py files OUT [SEED] [NAME]`.

Writes one line of JSON per case to OUT, before the case and after it: a parser that ends the process is found, too.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any, TextIO

import fuzz_watch


def files(out: TextIO, seed: int, only: str) -> None:
    """Every parser of `fuzz_parsers` on its damaged files."""
    from fuzz_parsers import PARSERS

    from advkit.evaluation import document

    assert hasattr(document, "checkout")
    document.checkout = lambda *_: (None, None)  # the harness's own question about its own checkout
    watch = fuzz_watch.Watch()
    chosen = {name: parser for name, parser in PARSERS.items() if only in name}
    with tempfile.TemporaryDirectory() as place:
        whole = {}
        for number, (name, parser) in enumerate(chosen.items()):
            whole[name] = Path(place, f"whole{number}")
            whole[name].mkdir()
            parser.make(whole[name])
            copy = Path(place, "copy")
            shutil.copytree(whole[name], copy)
            parser.parse(copy)  # an intact folder is taken, or the test tests nothing
            shutil.rmtree(copy)
        fuzz_watch.settle()
        for name, parser in chosen.items():
            _damaged(out, seed, name, parser, whole[name], Path(place, "copy"), watch)


def _damaged(out: TextIO, seed: int, name: str, parser: Any, whole: Path, copy: Path, watch: Any) -> None:
    targets = (
        [each.read_text() for each in sorted(whole.glob("*.name"))] if parser.targets == ("*.name",) else parser.targets
    )
    for turn in range(parser.rounds):
        rng = Random(f"{seed}|{name}|{turn}")
        target = targets[turn % len(targets)]
        raw = (whole / target).read_bytes()
        changed = parser.change(target, raw, rng)
        if changed == raw:
            changed = raw[:-1]
        shutil.copytree(whole, copy)
        try:
            (copy / target).write_bytes(changed)
            _case(out, name, turn, f"{target}, {len(changed)} bytes", watch, lambda: parser.parse(copy))
        finally:
            shutil.rmtree(copy)


def specs(out: TextIO, seed: int, only: str) -> None:
    """Every registry on changed specs."""
    from fuzz_specs import build, changed_specs

    watch = fuzz_watch.Watch()
    found = changed_specs(seed)
    for _, kind, spec in found[:40]:
        try:
            build(kind, spec)
        except Exception:
            continue
    fuzz_watch.settle()
    for turn, kind, spec in found:
        if only in kind:
            _case(out, kind, turn, spec, watch, lambda kind=kind, spec=spec: build(kind, spec))


def _case(out: TextIO, name: str, turn: int, what: str, watch: Any, parse: Any) -> None:
    out.write(json.dumps({"name": name, "turn": turn, "what": what[:2000]}) + "\n")
    out.flush()
    said = fuzz_watch.outcome(watch, parse)
    out.write(json.dumps({"name": name, "turn": turn, "said": said[:2000]}) + "\n")
    out.flush()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    mode, path, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as cache, open(path, "w", encoding="utf-8") as target:
        os.environ["ADVKIT_CACHE"] = cache
        {"files": files, "specs": specs}[mode](target, int(rest[0]) if rest else 0, rest[1] if len(rest) > 1 else "")
