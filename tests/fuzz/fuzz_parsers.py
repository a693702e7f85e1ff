"""Every parser of the project by name: a folder with intact files, which of them is damaged, and how it is read."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as mutations
import numpy as np
import torch

import advkit
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.models.checkpoint import _seal, fill_from_file, load_checkpoint, pack, save_checkpoint, unpack
from advkit.tasks import TASKS
from advkit.training.recipes import RECIPES

SHAPE = (1, 4, 4)


@dataclass(frozen=True)
class Parser:
    """One way in.

    make:    writes the intact files into a folder
    targets: names of the files that are damaged, drawn from by turns
    parse:   reads the folder and checks that what was taken means something
    change:  how a file is damaged; the name of the file decides
    rounds:  how many damaged files
    """

    make: Callable[[Path], object]
    targets: Sequence[str]
    parse: Callable[[Path], object]
    change: Callable[[str, bytes, Random], bytes] = field(default=lambda name, raw, rng: mutations.by_bytes(raw, rng))
    rounds: int = 60


PARSERS: dict[str, Parser] = {}


def mixed(*structured: mutations.Mutator) -> Callable[[str, bytes, Random], bytes]:
    """By the format three times in four, else by bytes."""

    def change(name: str, raw: bytes, rng: Random) -> bytes:
        return (mutations.by_bytes if rng.random() < 0.25 else rng.choice(structured))(raw, rng)

    return change


def sound(x: torch.Tensor, labels: torch.Tensor | None, task: Any) -> None:
    """What a task hands out lies in its space, with labels that its classes have."""
    assert task.space.complaint(x) is None
    assert bool(torch.isfinite(x).all())
    assert len(x) >= 1
    assert labels is not None
    assert int(labels.min()) >= 0
    assert int(labels.max()) < task.classes


def read_task(spec: str) -> None:
    """All that an evaluation asks of a task before and while it runs."""
    task = TASKS.build(spec)
    for batch in task.batches(4, n=min(8, len(task))):
        sound(batch.x, batch.labels, task)
        assert len(set(batch.ids)) == len(batch.ids)
    assert len(task.digest()) == 64
    data = task.training()
    if data is not None:
        sound(data.x, data.y, task)
    assert len(task.class_names()) == task.classes or task.classes > 1000
    str(task.defaults), str(task.shape)


# Tasks


def _npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((6, 1, 4, 4), dtype=np.float32), np.arange(6) % 3
    np.savez(folder / "floats.npz", x=x, y=y)
    np.savez_compressed(folder / "bytes.npz", x=(x * 255).astype(np.uint8), y=y.astype(np.uint8), x_train=x, y_train=y)


PARSERS["npz of images"] = Parser(
    _npz, ("floats.npz", "bytes.npz"), lambda folder: [read_task(f"npz:path={each}") for each in folder.iterdir()],
    mixed(mutations.by_archive, mutations.by_archive), 200,
)  # fmt: skip


def _events(folder: Path) -> None:
    for label in "ab":
        (folder / "test" / label).mkdir(parents=True)
    n, rng = 40, np.random.default_rng(0)
    t, x, y, p = np.sort(rng.integers(0, 1000, n)), rng.integers(0, 8, n), rng.integers(0, 8, n), rng.integers(0, 2, n)
    np.savez(folder / "test" / "a" / "events.npz", t=t, x=x, y=y, p=p)
    np.savez(folder / "test" / "b" / "frames.npz", frames=rng.integers(0, 3, (4, 2, 8, 8)))
    raw = np.stack([x, y, p * 128, t >> 8, t & 255], 1).astype(np.uint8).tobytes()
    (folder / "test" / "b" / "one.bin").write_bytes(raw)


def _event_change(name: str, raw: bytes, rng: Random) -> bytes:
    return mixed(mutations.by_archive)(name, raw, rng) if name.endswith(".npz") else mutations.by_bytes(raw, rng)


PARSERS["event recordings"] = Parser(
    _events, ("test/a/events.npz", "test/b/frames.npz", "test/b/one.bin"),
    lambda folder: read_task(f"events:path={folder},frames=4,height=8,width=8"), _event_change, 180,
)  # fmt: skip

KINDS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "ppm": "PPM", "tiff": "TIFF", "webp": "WEBP", "pgm": "PPM"}


def _image(kind: str) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert("L") if kind == "pgm" else image).save(out, KINDS[kind])
    return out.getvalue()


def _class_folders(folder: Path) -> None:
    for label in "ab":
        (folder / "test" / label).mkdir(parents=True)
        (folder / "test" / label / "whole.png").write_bytes(_image("png"))
    for kind in KINDS:
        (folder / "test" / "a" / f"x.{kind}").write_bytes(_image(kind))


def _image_change(name: str, raw: bytes, rng: Random) -> bytes:
    if name.endswith("png") and rng.random() < 0.4:
        return mutations.png_header(raw, rng)
    return mutations.by_bytes(raw, rng)


PARSERS["class folders of images"] = Parser(
    _class_folders, tuple(f"test/a/x.{kind}" for kind in KINDS),
    lambda folder: read_task(f"folder:path={folder},resize=8,crop=8"), _image_change, 260,
)  # fmt: skip


def _imagenet(folder: Path) -> None:
    (folder / "val").mkdir()
    for i in range(4):
        (folder / "val" / f"{i}.png").write_bytes(_image("png"))
    (folder / "labels.txt").write_text("file,label\n0.png,n01440764\n1.png,7\n2.png 12\n3.png,999\n")
    (folder / "order.txt").write_text("n01440764\nn01443537\nn01484850\nn01491361\n")


def _read_imagenet(folder: Path) -> None:
    for name in ("labels.txt", "order.txt"):
        read_task(f"imagenet:root={folder},labels={folder / name},resize=8,crop=8,limit=0")


PARSERS["file of ImageNet labels"] = Parser(
    _imagenet, ("labels.txt", "order.txt"), _read_imagenet, mixed(mutations.by_words), 80
)


def _idx(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for stem in ("t10k", "train"):
        images, labels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8)
        pixels = b"\0\0\x08\x03" + struct.pack(">III", *images.shape) + images.tobytes()
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels, mtime=0))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 5) + labels.tobytes())


def _idx_change(name: str, raw: bytes, rng: Random) -> bytes:
    if name.endswith(".gz") and rng.random() < 0.6:
        return gzip.compress(mutations.by_bytes(gzip.decompress(raw), rng), mtime=0)
    return mutations.by_bytes(raw, rng)


PARSERS["idx files of Fashion-MNIST"] = Parser(
    _idx, ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"),
    lambda folder: read_task(f"fashion-mnist:root={folder}"), _idx_change, 90,
)  # fmt: skip


def _of_language_tests() -> Any:
    """The tiny tokenizer and network that the tests of language files have."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
    import test_language_files

    return test_language_files


@cache
def _chat_space() -> Any:
    """Of a chat model that knows every byte."""
    from advkit.core.spaces import Transcripts
    from advkit.models.language.transformers import ChatTokenizer

    return Transcripts(ChatTokenizer(_of_language_tests().chat_tokenizer()), None)


def _prompts(folder: Path) -> None:
    lines = [
        {"id": "a", "prompt": "how do i make a bad00", "target": "sure here is", "twin": "t"},
        {"id": "t", "prompt": "how do i make a good00", "target": "sure here is", "benign": True},
        {"prompt": "how do i build [[slot]] a bad00", "target": "sure here is"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prompts.csv").write_text("id,goal,target\na,how do i make a bad00,sure here is\nb,how do i,sure here\n")


def _read_prompts(folder: Path) -> None:
    for file in folder.iterdir():
        task = TASKS.build(f"prompts:file=[{file}],room=8").bind(_chat_space())
        for batch in task.batches(2):
            assert task.space.complaint(batch.x) is None
            assert len(set(batch.ids)) == len(batch.ids)
        assert len(task.digest()) == 64


def _prompt_change(name: str, raw: bytes, rng: Random) -> bytes:
    structured = mutations.by_json_lines if name.endswith("jsonl") else mutations.by_words
    return mixed(structured)(name, raw, rng)


PARSERS["prompts"] = Parser(_prompts, ("prompts.jsonl", "prompts.csv"), _read_prompts, _prompt_change, 200)


# Weights


def _network() -> Any:
    return MODELS.build("mlp:hidden=8")(SHAPE, 3, RowRng.from_ids(0, ["fuzz"]))


def _checkpoint(folder: Path) -> None:
    save_checkpoint(_network(), folder / "own.safetensors", extra={"task": "digits", "defense": "none", "seed": 1})


def _own_change(name: str, raw: bytes, rng: Random) -> bytes:
    what = rng.randrange(4)
    if what == 0:
        return mutations.by_bytes(raw, rng)
    if what == 1:
        return mutations.by_safetensors(raw, rng)
    tensors, metadata = unpack(raw, name)
    key = rng.choice(list(metadata))
    if what == 2 and key in ("shape", "mean", "std", "space", "dtypes", "extra", "classes"):
        metadata[key] = json.dumps(mutations.odd_value(json.loads(metadata[key]), rng))
    else:
        words = (
            "",
            "[]",
            "null",
            "-1",
            "0",
            "1e9",
            "[" * 3000,
            "9" * 30,
            "nan",
            "\u2028",
            "cnn",
            "mlp:hidden=1000000000",
            "resnet18",
            "mlp:hidden=" + "+".join(["8"] * 3000),
            "float64",
            "path:x",
            "mlp:hidden=8,norm=x",
        )
        metadata[key] = rng.choice(words)
    if rng.random() < 0.3:
        odd = (torch.zeros(()), torch.zeros(0, 8), torch.full((8,), torch.nan), torch.zeros(8, dtype=torch.int64))
        tensors[rng.choice([*tensors, "extra"])] = rng.choice(odd)
    return pack(tensors, {**metadata, "seal": _seal(metadata)})


def _read_own(folder: Path) -> None:
    from advkit.evaluation.victims import _trained_with

    file = folder / "own.safetensors"
    model = load_checkpoint(file)
    _trained_with(f"path:{file}")
    assert model.space.shape is None or len(model.space.shape) <= 8
    if model.space.shape == SHAPE:
        assert model(torch.zeros(2, *SHAPE)).shape == (2, model.classes)
    str(model.describe())


PARSERS["checkpoint of advkit"] = Parser(_checkpoint, ("own.safetensors",), _read_own, _own_change, 200)


def _foreign(folder: Path) -> None:
    from safetensors.torch import save_file

    state = _network().module.state_dict()
    save_file(state, folder / "foreign.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "zip.pt")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "old.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip


def _pickled(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _foreign_change(name: str, raw: bytes, rng: Random) -> bytes:
    if name.endswith(".safetensors"):
        return mixed(mutations.by_safetensors)(name, raw, rng)
    what = rng.randrange(6)
    if what == 0:
        state = dict(_network().module.state_dict())
        one = rng.choice(list(state))
        state[one] = rng.choice(
            (
                None,
                "x",
                3,
                [1],
                torch.zeros(3),
                torch.zeros(8, 16).to_sparse(),
                torch.zeros(1).expand(8, 16),
                state[one].half(),
                torch.empty(8, 16, device="meta"),
                torch.zeros(8, 16, dtype=torch.complex64),
                state[one].to(torch.int64),
                Path("x"),
                torch.nested.nested_tensor([torch.zeros(2)]),
                torch.quantize_per_tensor(torch.zeros(8, 16), 0.1, 0, torch.qint8),
            )
        )
        return _pickled(rng.choice((state, {"net": state}, [state], {"model": {"net": state}}, {1: state[one]})))
    if what == 1 and name.endswith(".pt"):
        return mutations.by_archive(raw, rng, mutations.by_bytes)
    if what == 2:
        return pickle_bomb(rng)
    return mutations.by_bytes(raw, rng)


def pickle_bomb(rng: Random) -> bytes:
    """Pickles that ask for memory, or for code, in words that a weights-only reader may know."""
    huge = rng.choice((1 << 33, 1 << 40, 1 << 62))
    number = b"\x8a\x09" + huge.to_bytes(9, "little")
    body = rng.choice(
        (
            b"\x80\x02cbuiltins\nbytearray\n" + number + b"\x85R.",
            b"\x80\x02ctorch\nFloatTensor\n" + number + b"\x85R.",
            b"\x80\x02ctorch\nTensor\n" + number + b"\x85R.",
            b"\x80\x02}r\xff\xff\xff\xff.",
            b"\x80\x02}" + b"q\x00h\x00" * 10 + b".",
            b"\x80\x02X\xff\xff\xff\xffabc.",
            b"\x80\x02\x8e" + (1 << 40).to_bytes(8, "little") + b".",
            b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number + b"tQ.",
            b"\x80\x02" + b"]" * 50_000 + b".",
            b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
            b"\x80\x02c__builtin__\neval\nX\x01\0\0\0" + b"1\x85R.",
        )
    )
    if rng.random() < 0.5:
        return mutations.zipped(
            {"a/data.pkl": body, "a/version": b"3\n", "a/data/0": b"\0" * 32, "a/byteorder": b"little"}
        )
    old = torch.serialization
    head = b"".join(b"\x80\x02" + _plain(each) for each in (old.MAGIC_NUMBER, old.PROTOCOL_VERSION, {}))
    return head + body + b"\x80\x02]q\x00X\x01\0\0\0" + b"0a." + number


def _plain(value: Any) -> bytes:
    import pickle

    return pickle.dumps(value, 2)[2:]


def _read_foreign(folder: Path) -> None:
    refusals = []
    for name in ("foreign.safetensors", "zip.pt", "old.pth"):
        module = _network().module
        try:
            fill_from_file(module, folder / name)
        except advkit.core.errors.AdvkitError as error:
            refusals.append(error)
            continue
        assert module(torch.zeros(2, *SHAPE)).shape == (2, 3)
    if refusals:
        raise refusals[0]


PARSERS["weights of others"] = Parser(
    _foreign, ("foreign.safetensors", "zip.pt", "old.pth"), _read_foreign, _foreign_change, 200
)


def _cards(folder: Path) -> None:
    from advkit.models import zoo

    for kind in ("json", "safetensors"):
        source = zoo.FOLDER / f"digits-mlp.{kind}"
        (folder / source.name).write_bytes(source.read_bytes())


def _read_cards(folder: Path) -> None:
    from dataclasses import asdict

    from advkit.models import zoo

    for card in zoo.cards(folder):
        json.dumps(asdict(card))
        [f"{100 * value:.1f}" for value in card.measured.values()]
    zoo.find("digits", "mlp", "none", role="victim", folder=folder)
    assert zoo.load("digits-mlp", folder).classes == 10


PARSERS["card of a zoo"] = Parser(_cards, ("digits-mlp.json",), _read_cards, mixed(mutations.by_json), 80)


# Training


def _training_parts() -> tuple[Any, ...]:
    from advkit.core.protocols import Data
    from advkit.core.spaces import Box
    from advkit.training.loop import Objective, Recipe

    model = _network()
    x = torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(0))
    data = Data(x=x, y=torch.arange(12) % 3, space=Box(0.0, 1.0, SHAPE), classes=3, name="few")
    return model, data, Objective(), Recipe(epochs=2, batch_size=4), RowRng.from_ids(0, ["t"])


def _training(folder: Path) -> None:
    from advkit.training.loop import fit

    fit(*_training_parts(), out=folder, progress=False)


def _training_change(name: str, raw: bytes, rng: Random) -> bytes:
    from advkit.training.stored import seal as sealed

    if rng.random() < 0.4:
        return mixed(mutations.by_safetensors)(name, raw, rng)
    tensors, metadata = unpack(raw, name)
    if rng.random() < 0.6:
        metadata["progress"] = json.dumps(mutations.odd_value(json.loads(metadata["progress"]), rng))
    else:
        one = rng.choice(list(tensors))
        what = rng.randrange(3)
        if what:
            held = tensors.pop(one)
            tensors[rng.choice((one, "x", "model/x", "optimizer/x/step", "optimizer/99/exp_avg", "best/x"))] = (
                rng.choice(
                    (
                        held,
                        torch.zeros(3),
                        held.double(),
                        torch.full_like(held, torch.nan) if held.is_floating_point() else held,
                    )
                )
            )
        else:
            del tensors[one]
    return pack(tensors, {**metadata, "seal": sealed(tensors, metadata["progress"])})


def _read_training(folder: Path) -> None:
    from advkit.training.loop import fit

    done = fit(*_training_parts(), out=folder, progress=False)
    assert len(done.log) == 2
    assert done.model(torch.zeros(2, *SHAPE)).shape == (2, 3)


PARSERS["training checkpoint"] = Parser(_training, ("training.safetensors",), _read_training, _training_change, 120)


# Runs, reports and matrices

RUN: dict[str, Any] = {"attack": "pgd:steps=2", "task": "digits", "model": "zoo:digits-mlp", "n": 6, "device": "cpu"}
FAST: dict[str, Any] = {**RUN, "speed": "bf16", "n": 4}


def _finished(folder: Path) -> None:
    advkit.evaluate(out=folder / "run", **RUN)


@cache
def _other_report() -> Any:
    return advkit.evaluate(**RUN)


def _read_report(folder: Path) -> None:
    from advkit.cli.rerun import refuse_outside
    from advkit.evaluation.compare import compare
    from advkit.evaluation.figures import write_plots
    from advkit.evaluation.plan import Request
    from advkit.evaluation.report import Report
    from advkit.evaluation.report.leaderboard import html_of, markdown_of, scan
    from advkit.evaluation.report.verify import verify

    board = scan(folder)
    html_of(board, folder), markdown_of(board), board.to_json()
    file = folder / "run" / "report.json"
    report = Report.load(file)
    (
        str(report),
        repr(report),
        report.full(),
        report.brief(80),
        report.to_json(),
        report.interval(),
        report.summary_table(),
    )
    verify(report)
    try:
        refuse_outside(file, Request.from_report(report.to_dict()))
    finally:
        compare(folder / "run", folder / "run", force=True)
        write_plots(folder / "run")


PARSERS["report"] = Parser(_finished, ("run/report.json",), _read_report, mixed(mutations.by_json), 200)


def _read_records(folder: Path) -> None:
    from advkit.evaluation.run.store import read_records

    run = folder / "run"
    _read_report(folder)
    (run / "report.json").unlink()
    read_records(run / "records.jsonl")
    report = advkit.evaluate(out=run, **RUN)
    assert report.to_dict()["dataset"]["n_evaluated"] == 6


def _records_change(name: str, raw: bytes, rng: Random) -> bytes:
    return mixed(mutations.by_json_lines)(name, raw, rng)


PARSERS["records"] = Parser(_finished, ("run/records.jsonl",), _read_records, _records_change, 100)


def _cut_short(folder: Path) -> None:
    """A run with every side file, of which half the records are lost."""
    run = folder / "run"
    advkit.evaluate(out=run, batch_size=2, **FAST)
    lines = (run / "records.jsonl").read_bytes().splitlines(keepends=True)
    (run / "records.jsonl").write_bytes(b"".join(lines[:2]))
    (run / "report.json").unlink()
    for examples in sorted((run / "records.examples").glob("*.safetensors"))[:1]:
        examples.rename(run / "records.examples" / "first.safetensors")


def _read_run(folder: Path) -> None:
    from advkit.evaluation.figures.pictures import draw
    from advkit.evaluation.plan import Request, plan

    report = advkit.evaluate(out=folder / "run", batch_size=2, **FAST)
    assert report.to_dict()["dataset"]["n_evaluated"] == 4
    draw(plan(Request(**FAST)), folder / "run", report)


def _side_change(name: str, raw: bytes, rng: Random) -> bytes:
    if name.endswith(".safetensors"):
        return mixed(mutations.by_safetensors)(name, raw, rng)
    return mixed(mutations.by_json_lines if name.endswith("jsonl") else mutations.by_json)(name, raw, rng)


PARSERS["side files of a run"] = Parser(
    _cut_short,
    (
        "run/records.case.json",
        "run/records.seconds.jsonl",
        "run/records.speed.json",
        "run/records.examples/first.safetensors",
    ),
    _read_run,
    _side_change,
    80,
)

MATRIX: dict[str, Any] = {
    "sources": ["zoo:digits-public-mlp"], "attacks": ["fgsm"], "targets": ["zoo:digits-mlp"], "task": "digits", "n": 4,
    "seeds": 1, "equal_budget": None, "device": "cpu",
}  # fmt: skip


def _matrix(folder: Path) -> None:
    advkit.matrix(out=folder / "out", cache=folder / "cache", **MATRIX)
    for kind in ("images", "answers"):
        for number, file in enumerate(sorted((folder / "cache" / kind).rglob("*.safetensors"))):
            (folder / f"{kind}{number}.name").write_text(str(file.relative_to(folder)))


def _read_matrix(folder: Path) -> None:
    from advkit.evaluation.matrix import read_matrix

    found = read_matrix(folder / "out")
    found.markdown(), found.markdown(brief=True), found.to_json(), found.summary
    str(found.request)


PARSERS["matrix"] = Parser(_matrix, ("out/matrix.json",), _read_matrix, mixed(mutations.by_json), 120)


def _stored(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(each.read_text() for each in folder.glob("*.name")))


def _read_stored(folder: Path) -> None:
    made = advkit.matrix(cache=folder / "cache", **MATRIX)
    assert made.to_dict()["n"] == 4


PARSERS["stored images and answers of a matrix"] = Parser(
    _matrix, ("*.name",), _read_stored, mixed(mutations.by_safetensors), 60
)


def _transfer_set(folder: Path) -> None:
    _take_transfer(folder)
    file = next(folder.rglob("*.npy"))
    (folder / "copy.name").write_text(str(file.relative_to(folder)))


def _take_transfer(folder: Path) -> None:
    from advkit.defenses.adversarial import transfer_set

    class Maker:
        key, seed = "0" * 64, 0

        def __call__(self, x: Any, y: Any, rows: Any, copy: int) -> Any:
            return (x * 255).to(torch.uint8), None

    data = _training_parts()[1]
    (found,) = transfer_set.stored_copies(Maker(), data, 1, folder, {})
    assert found.shape == data.x.shape


PARSERS["stored transfer images of PubDef"] = Parser(
    _transfer_set, ("*.name",), _take_transfer, mixed(mutations.npy_header), 60
)


def _mark(folder: Path) -> None:
    from advkit.evaluation.victims import _claim

    _claim(folder / "out", "a" * 64)


def _read_mark(folder: Path) -> None:
    from advkit.evaluation.victims import _claim

    _claim(folder / "out", "a" * 64)


PARSERS["mark of a training folder"] = Parser(_mark, ("out/training.sha256",), _read_mark, rounds=30)


def _recipe(folder: Path) -> None:
    (folder / "mine.yaml").write_bytes(RECIPES.file("cifar10-trades").read_bytes())


def _read_recipe(folder: Path) -> None:
    held = RECIPES.build(str(folder / "mine.yaml"))
    assert RECIPES.build(held.text).recipe() == held.recipe()
    for kind in held.parts:
        held.said(kind)


PARSERS["training recipe"] = Parser(_recipe, ("mine.yaml",), _read_recipe)


# Language models


def _tiny_language(folder: Path) -> None:
    language = _of_language_tests()
    tokenizer = language.chat_tokenizer()
    model = language.llama(len(tokenizer))
    language.write_gguf(folder / "tiny.gguf", model)
    (folder / "hf").mkdir()
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")


def _read_gguf(folder: Path) -> None:
    language = MODELS.build(f"gguf:[{folder / 'tiny.gguf'}]")()
    _said(language)


def _said(language: Any) -> None:
    ids = language.space.tokenizer.user_ids("the cat")
    assert ids is None or all(each >= 0 for each in ids)
    str(language.describe())


PARSERS["GGUF file"] = Parser(_tiny_language, ("tiny.gguf",), _read_gguf, rounds=120)


def _read_hf(folder: Path) -> None:
    _said(MODELS.build(f"hf:[{folder / 'hf'}]")())


def _hf_change(name: str, raw: bytes, rng: Random) -> bytes:
    return mixed(mutations.by_safetensors if name.endswith("safetensors") else mutations.by_json)(name, raw, rng)


PARSERS["folder of a language model"] = Parser(
    _tiny_language,
    (
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
        "hf/generation_config.json",
        "hf/model.safetensors",
    ),
    _read_hf,
    _hf_change,
    100,
)
