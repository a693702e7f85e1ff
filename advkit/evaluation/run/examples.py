"""The kept examples of a run folder: inputs and what the attack returned for them, beside the records."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import UsageError
from advkit.core.files import write_whole
from advkit.core.protocols import Record
from advkit.core.strict_json import read_json
from advkit.core.text import first_line
from advkit.evaluation.run.held import key_of

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("advkit")

_EXAMPLES = ("origin", "adversarial")


def read_examples(folder: Path, name: str = "records") -> dict[str, tuple[Tensor, Tensor]]:
    """Origin and returned input of the kept rows by record key, from a run folder.

    A damaged file is left out, with a warning: the records do not depend on it.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _, data, (origin, adversarial) in _example_files(folder / f"{name}.examples"):
        found |= {f"{data['attack']}|{row}": (origin[i], adversarial[i]) for i, row in enumerate(data["ids"])}
    return found


def all_examples(folder: Path, records: Iterable[Record]) -> dict[str, tuple[Tensor, Tensor]]:
    """The kept examples of a run folder; UsageError where some record has none: an earlier run there kept fewer."""
    held = read_examples(folder)
    missing = [record.id for record in records if key_of(record.made_by, record.id) not in held]
    if missing:
        raise UsageError(
            f"{folder} holds no example of {len(missing)} rows on record ({', '.join(missing[:3])}): name another --out"
        )
    return held


def _example_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any], tuple[Tensor, Tensor]]]:
    """The files of examples, in the order of their names: attack and ids, origins and returned inputs."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as held:
                data = dict(held.metadata() or {})
                origin, adversarial = (held.get_tensor(each) for each in _EXAMPLES)
            data["ids"] = read_json(data["ids"])
            if not isinstance(data["ids"], list) or not len(data["ids"]) == len(origin):
                raise ValueError("it does not hold the rows that it names")
            if origin.shape != adversarial.shape or not isinstance(data["attack"], str):
                raise ValueError("it does not hold pairs of inputs")
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            log.warning("%s holds no examples that can be read (%s): remove it", file, first_line(error))
            continue
        yield file, data, (origin, adversarial)


def write_examples(folder: Path, rows: Sequence[Record], examples: tuple[Tensor, Tensor], keep: Container[str]) -> None:
    """Write origin and returned input of those rows of one attack whose id is in `keep`."""
    chosen = [i for i, record in enumerate(rows) if record.id in keep]
    if not chosen:
        return
    from safetensors.torch import save

    ids = [rows[i].id for i in chosen]
    label = str(rows[0].made_by)
    word = hashlib.sha256("|".join([label, *ids]).encode()).hexdigest()[:16]
    tensors = {name: values[chosen].cpu().contiguous() for name, values in zip(_EXAMPLES, examples, strict=True)}
    content = save(tensors, metadata={"attack": label, "ids": json.dumps(ids)})
    write_whole(folder / f"{word}.safetensors", content)


def forget_examples(folder: Path, rows: Container[str]) -> None:
    """Take the examples of some rows out of the files that hold them."""
    from safetensors.torch import save

    for file, data, tensors in _example_files(folder):
        left = [i for i, row in enumerate(data["ids"]) if row not in rows]
        if len(left) < len(data["ids"]):
            ids = json.dumps([data["ids"][i] for i in left])
            if left:
                kept = {name: tensor[left].contiguous() for name, tensor in zip(_EXAMPLES, tensors, strict=True)}
                write_whole(file, save(kept, metadata={"attack": data["attack"], "ids": ids}))
            else:
                file.unlink()
