"""Weights of strangers: a pickle asks for no more than it has, and what is no plain array is named."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from advkit.core.errors import CheckpointError
from advkit.models import zoo
from advkit.models.checkpoint import _seal, checkpoint_extra, fill_from_file, pack, save_checkpoint, unpack
from advkit.models.pickles import check_pickled


def stored(value: Any, old: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=not old)
    return out.getvalue()


def optimised() -> dict[str, Any]:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "epoch": 3,
        "lr": 0.1,
        "tags": {"a", "b"},
    }


KINDS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
HONEST = {
    "numbers of all kinds": {str(dtype): torch.zeros(3).to(dtype) for dtype in KINDS},
    "views of one storage": {"a": torch.zeros(10)[2:5], "b": torch.zeros(4, 5).t(), "c": torch.zeros(1).expand(8)},
    "parameters": {"p": nn.Parameter(torch.zeros(3)), "od": OrderedDict(x=torch.zeros(1))},
    "buffers": nn.BatchNorm1d(3).state_dict(),
    "a training script's": optimised(),
    "counters and sets": {"state_dict": {"w": torch.zeros(2)}, "counts": Counter("abca"), "z": 1 + 2j, "raw": b"bytes"},
    "nothing": {"w": torch.zeros(0, 3)},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", HONEST)
def test_what_torch_writes_is_let_pass(name, old):
    content = stored(HONEST[name], old)
    torch.load(io.BytesIO(content), weights_only=True)  # torch takes it, and so do we
    check_pickled(content)


def zipped(body: bytes, **parts: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        held = {"data.pkl": body, "version": b"3\n", "byteorder": b"little", **parts}
        for name, content in held.items():
            archive.writestr(f"a/{name}", content)
    return out.getvalue()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little")


def storage(count: int, kind: bytes = b"FloatStorage") -> bytes:
    """A tensor of so many numbers, as torch pickles it."""
    ids = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\0000X\x03\0\0\0cpu" + number(count) + b"tQ"
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + ids + b"K\0K\x01\x85K\x01\x85\x89}tRs."


ASKING = {
    "a bytearray": zipped(b"\x80\x02cbuiltins\nbytearray\n" + number(1 << 40) + b"\x85R."),
    "a tensor by its class": zipped(b"\x80\x02ctorch\nFloatTensor\n" + number(1 << 40) + b"\x85R."),
    "a storage larger than the file": zipped(storage(1 << 40), **{"data/0": bytes(16)}),
    "a storage larger than its part": zipped(storage(9), **{"data/0": bytes(16), "data/1": bytes(4096)}),
    "a storage that is not there": zipped(storage(1)),
    "a negative storage": zipped(storage(0).replace(number(0), b"\x8a\x01\xff")),
    "a table": zipped(b"\x80\x02}r\xff\xff\xff\x7f."),
    "code": zipped(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."),
    "two pickles": zipped(b"\x80\x02}.", **{"b/data.pkl": b"\x80\x02}."}),
    "no pickle": zipped(b"").replace(b"data.pkl", b"data.pkx"),
}


@pytest.mark.parametrize("name", [name for name in ASKING if name != "a table"])
def test_what_asks_for_more_than_it_has_is_refused_before_torch_reads_it(name, tmp_path):
    with pytest.raises((ValueError, pickle.UnpicklingError, EOFError)):
        check_pickled(ASKING[name])
    (tmp_path / "a.pt").write_bytes(ASKING[name])
    with pytest.raises(CheckpointError, match="can't be read as weights alone") as told:
        fill_from_file(nn.Linear(2, 2), tmp_path / "a.pt")
    assert "\n" not in str(told.value)


def test_a_storage_that_is_honest_is_let_pass():
    content = zipped(storage(4), **{"data/0": bytes(16)})
    check_pickled(content)
    assert torch.load(io.BytesIO(content), weights_only=True)["w"].shape == (1,)


BOUNDED = """
import resource, sys
from torch import nn
from advkit.core.errors import CheckpointError
from advkit.models.checkpoint import fill_from_file
fill = nn.Linear(2, 2)
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20),) * 2)
for name in sys.argv[1:]:
    try:
        fill_from_file(fill, name)
    except CheckpointError as error:
        print(any(word in str(error) for word in ("MemoryError", "allocat")), error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from Linux's own figures")
def test_none_of_them_takes_memory(tmp_path):
    for number_, content in enumerate(ASKING.values()):
        (tmp_path / f"{number_}.pt").write_bytes(content)
    names = [str(tmp_path / f"{number_}.pt") for number_ in range(len(ASKING))]
    done = subprocess.run([sys.executable, "-c", BOUNDED, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(ASKING)  # an empty dictionary holds no weights, whatever its table
    assert not any(line.startswith("True") for line in said), said


ODD = {
    "sparse": torch.zeros(2, 2).to_sparse(),
    "empty": torch.empty(2, 2, device="meta"),
    "complex64": torch.zeros(2, 2, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", ["sparse", "empty"])
def test_tensors_that_are_no_plain_arrays(name, tmp_path):
    torch.save({"weight": ODD[name], "bias": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        fill_from_file(nn.Linear(2, 2), tmp_path / "a.pt")


@pytest.mark.parametrize("extra", ["", "[]", "[" * 5000, "nan", '{"defense": 1e400}'])
def test_a_sealed_note_that_is_none(extra, tmp_path):
    from advkit.core.rng import RowRng
    from advkit.models import MODELS

    save_checkpoint(MODELS.build("mlp:hidden=8")((1, 4, 4), 3, RowRng.from_ids(0, ["a"])), tmp_path / "a.safetensors")
    tensors, metadata = unpack((tmp_path / "a.safetensors").read_bytes(), "a")
    metadata["extra"] = extra
    (tmp_path / "a.safetensors").write_bytes(pack(tensors, {**metadata, "seal": _seal(metadata)}))
    with pytest.raises(CheckpointError, match="no checkpoint of this version"):
        checkpoint_extra(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": 3},
        {"model": None},
        {"measured": [1]},
        {"measured": {"a": "x"}},
        {"measured": {"a": True}},
        {"seen_by": [1]},
        {"seed": "x"},
        {"size": 1.5},
    ],
)
def test_cards_whose_fields_are_of_another_kind(changes, tmp_path):
    told = json.loads((zoo.FOLDER / "digits-mlp.json").read_text())
    (tmp_path / "digits-mlp.json").write_text(json.dumps({**told, **changes}))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        zoo.cards(tmp_path)
    (tmp_path / "digits-mlp.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="model card"):
        zoo.cards(tmp_path)
