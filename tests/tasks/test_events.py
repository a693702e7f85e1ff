"""The simulated sensor's laws, tasks made with it, recorded files, and an evaluation on events."""

from __future__ import annotations

import contextlib
import math
import sys
import zipfile
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.protocols import Outcome
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary
from advkit.evaluation.run.store import read_records
from advkit.tasks import TASKS
from advkit.tasks.events import (
    EventFolder,
    Events,
    crossings,
    decode_aedat,
    frames_by_number,
    path,
    read_events_npz,
    read_frames_npz,
    read_nmnist,
    shifted,
    simulate_dvs,
    simulate_events,
)

IMAGES = torch.rand(5, 9, 11, generator=torch.Generator().manual_seed(0)) ** 2


# The simulator


def test_a_still_image_makes_no_events():
    assert not simulate_dvs(IMAGES, 4, amplitude=0).any()


def test_on_a_closed_path_as_many_on_as_off_events_fall_on_every_pixel():
    for amplitude in (1.0, 3.0, 2.7):
        counts = simulate_dvs(IMAGES, 5, amplitude=amplitude, threshold=0.13, binary=False)
        assert counts.sum() > 100
        assert torch.equal(counts[:, :, 0].sum(1), counts[:, :, 1].sum(1))


def test_after_every_step_less_than_a_threshold_is_left():
    threshold, floor, pad, steps = 0.2, 0.05, 2, 17
    first = torch.log(nn.functional.pad(IMAGES.double(), (pad,) * 4) + floor)
    reference = first.clone()
    padded = nn.functional.pad(IMAGES.double(), (pad,) * 4)
    for step, events in enumerate(crossings(IMAGES, steps, 2.0, pad, threshold, floor), 1):
        reference += threshold * events
        now = torch.log(shifted(padded, *path(Fraction(step, steps), 2.0)) + floor)
        assert float((now - reference).abs().max()) <= threshold * (1 + 1e-6)


def test_a_monotone_ramp_fires_as_often_as_its_logarithm_holds_thresholds():
    """The first leg moves a bright left half to the right, by one pixel here: the pixel beside it lights up slowly."""
    image = torch.zeros(1, 40, 40)
    image[:, :, :20] = 1.0
    threshold, floor, amplitude = 0.25, 0.05, 2.0
    events = torch.stack(list(crossings(image, 300, amplitude, 0, threshold, floor)))[:100, 0]
    pixel = events[:, 30, 20]
    assert bool((pixel >= 0).all())
    expected = math.floor((math.log(1 + floor) - math.log(floor)) / threshold)
    assert abs(int(pixel.sum()) - expected) <= 1


def test_binary_is_one_where_anything_fired():
    counts = simulate_dvs(IMAGES, 4, threshold=0.1, binary=False)
    assert counts.max() > 1
    assert torch.equal(simulate_dvs(IMAGES, 4, threshold=0.1), (counts >= 1).float())


def test_rows_do_not_depend_on_the_others_and_noise_is_seeded(monkeypatch):
    from advkit.tasks import events

    rng = RowRng.from_ids(0, list("abcde"))
    settings = {"noise_rate": 0.02, "jitter": 0.1}
    whole = simulate_dvs(IMAGES, 4, rng=rng, **settings)
    part = simulate_dvs(IMAGES[2:4], 4, rng=rng.take(torch.tensor([2, 3])), **settings)
    assert torch.equal(part, whole[2:4])
    monkeypatch.setattr(events, "AT_ONCE", 1)
    assert torch.equal(simulate_dvs(IMAGES, 4, rng=rng, **settings), whole)
    assert torch.equal(simulate_dvs(IMAGES, 4), simulate_dvs(IMAGES, 4))
    clean = simulate_dvs(IMAGES, 4)
    noisy = simulate_dvs(IMAGES, 4, rng=rng, noise_rate=0.05)
    silent = clean == 0
    assert bool((noisy >= clean).all())
    assert 0.04 < float(noisy[silent].mean()) < 0.06
    assert not torch.equal(simulate_dvs(IMAGES, 4, rng=rng, jitter=0.1), clean)


def test_bilinear_shifts():
    image = torch.zeros(1, 4, 4)
    image[0, 1, 1] = 1.0
    assert shifted(image, 1.0, 2.0)[0, 2, 3] == 1
    half = shifted(image, 0.5, 0.25)[0]
    expected = torch.zeros(4, 4)
    expected[1:3, 1:3] = torch.tensor([[0.375, 0.125], [0.375, 0.125]])
    torch.testing.assert_close(half, expected)
    assert shifted(image, 9.0, 0.0).sum() == 0


@pytest.mark.slow
def test_raw_events_are_the_frames_events():
    events = simulate_events(IMAGES[0], 20, threshold=0.1)
    counts = simulate_dvs(IMAGES[:1], 20, 1, threshold=0.1, binary=False)[0]
    made = torch.zeros_like(counts)
    frame = events.t * 20 // 300_000 - 1
    for j, p, y, x in zip(frame, events.p, events.y, events.x, strict=True):
        made[j, p, y, x] += 1
    assert torch.equal(made, counts)
    assert (np.diff(events.t) >= 0).all()


def test_senseless_settings_are_refused():
    for settings in (
        {"frames": 0},
        {"frames": 2, "threshold": 0.0},
        {"frames": 2, "noise_rate": 1.0},
        {"frames": 2, "noise_rate": 0.1},
    ):
        with pytest.raises(UsageError):
            simulate_dvs(IMAGES, **settings)
    with pytest.raises(BadInput):
        simulate_dvs(2 * IMAGES, 2)
    with pytest.raises(BadInput):
        simulate_dvs(IMAGES[0], 2)


# Tasks


@pytest.fixture(scope="module")
def dvs():
    return TASKS.build("digits-dvs")


@pytest.mark.slow
def test_digits_dvs(dvs):
    batch = next(iter(dvs.batches(40)))
    assert batch.x.shape == (40, 8, 2, 20, 20)
    assert dvs.space == Binary((8, 2, 20, 20))
    assert dvs.space.complaint(batch.x) is None
    assert 0.17 < float(batch.x.mean()) < 0.2
    assert batch.ids[0].startswith("digits-dvs/test/")
    still = TASKS.build("digits")
    assert torch.equal(batch.labels, next(iter(still.batches(40))).labels)
    assert (len(dvs), dvs.classes) == (360, 10)
    assert TASKS.build("digits-dvs").digest() == dvs.digest()
    assert TASKS.build("digits-dvs:threshold=0.3").digest() != dvs.digest()
    assert dvs.defaults.threat_model == "flips"


def test_fashion_mnist_dvs_films_the_embedded_images(monkeypatch):
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    task = TASKS.build("fashion-mnist-dvs:test=40")
    batch = next(iter(task.batches(64)))
    assert batch.x.shape == (40, 10, 2, 34, 34)
    assert 0.075 < float(batch.x.mean()) < 0.1
    assert torch.equal(batch.labels, next(iter(TASKS.build("fashion-mnist").batches(40))).labels)
    assert task.training() is None
    assert task.class_names()[9] == "Ankle boot"
    short = TASKS.build("fashion-mnist-dvs:test=3,frames=4,pad=1")
    assert next(iter(short.batches(3))).x.shape == (3, 4, 2, 30, 30)


# Recorded files


def write_bin(file, events, overflow=None):
    rows = []
    for i in range(len(events)):
        t = int(events.t[i])
        rows.append([events.x[i], events.y[i], int(events.p[i]) << 7 | t >> 16 & 0x7F, t >> 8 & 0xFF, t & 0xFF])
        if overflow is not None and i == overflow:
            rows.append([0, 240, 0, 0, 0])
    file.write_bytes(np.array(rows, dtype=np.uint8).tobytes())


RECORDING = Events(
    np.arange(23, dtype=np.int64) * 1000 + 70_000,
    np.arange(23, dtype=np.int64) % 34,
    np.arange(23, dtype=np.int64) * 3 % 34,
    np.arange(23, dtype=np.int64) % 2,
)


def test_nmnist_files(tmp_path):
    file = tmp_path / "one.bin"
    write_bin(file, RECORDING)
    events = read_nmnist(file)
    for name in ("t", "x", "y", "p"):
        assert (getattr(events, name) == getattr(RECORDING, name)).all()
    write_bin(file, RECORDING, overflow=4)
    events = read_nmnist(file)
    assert len(events) == 23
    assert (events.t - RECORDING.t).tolist() == [0] * 5 + [2**13] * 18
    file.write_bytes(b"\x01\x02\x03")
    with pytest.raises(BadInput, match="five"):
        read_nmnist(file)
    with pytest.raises(BadInput):
        read_nmnist(tmp_path / "none.bin")


def test_archives_of_events_and_frames(tmp_path):
    file = tmp_path / "events.npz"
    np.savez(file, t=RECORDING.t, x=RECORDING.x, y=RECORDING.y, p=2 * RECORDING.p - 1)
    assert (read_events_npz(file).p == RECORDING.p).all()
    np.savez(file, frames=np.full((3, 2, 5, 5), 2))
    assert torch.equal(read_frames_npz(file), torch.full((3, 2, 5, 5), 2.0))
    for arrays in ({"frames": np.zeros((3, 5, 5))}, {"frames": -np.ones((3, 2, 5, 5))}, {"x": np.zeros(3)}):
        np.savez(file, **arrays)
        with pytest.raises(BadInput):
            read_frames_npz(file)
    with pytest.raises(BadInput, match="t, x, y and p"):
        read_events_npz(file)
    np.savez(file, t=np.arange(3), x=np.arange(2), y=np.arange(3), p=np.arange(3))
    with pytest.raises(BadInput, match="length"):
        read_events_npz(file)
    file.write_bytes(b"no archive")
    with pytest.raises(BadInput):
        read_events_npz(file)


def saved(file, **changed):
    """RECORDING as an archive, some of its columns others."""
    np.savez(file, **{name: getattr(RECORDING, name) for name in "txyp"} | changed)
    return file


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("unit", [1, 1e-6, np.float32(1)])
def test_events_out_of_order_are_put_in_order(tmp_path, order, unit):
    places = np.arange(23)[::-1] if order == "reversed" else np.random.default_rng(0).permutation(23)
    t = np.arange(23) * unit
    right = frames_by_number(read_events_npz(saved(tmp_path / "a.npz", t=t)), 4, 34, 34)
    columns = {name: getattr(RECORDING, name)[places] for name in "xyp"}
    read = read_events_npz(saved(tmp_path / "b.npz", t=t[places], **columns))
    assert torch.equal(frames_by_number(read, 4, 34, 34), right)
    assert (read.x == RECORDING.x).all()
    loose = Events(t[places], *columns.values())
    assert torch.equal(frames_by_number(loose, 4, 34, 34), right)


@pytest.mark.parametrize(
    "p",
    [
        RECORDING.p + 1, 2 * RECORDING.p, np.where(RECORDING.p == 1, 1, 255).astype(np.uint8), RECORDING.p * 0.5,
        np.where(RECORDING.p == 1, "ON", "OFF"), np.where(RECORDING.p == 1, b"1", b"0"), RECORDING.p + 0j,
    ],
    ids=["1 and 2", "0 and 2", "255", "halves", "words", "bytes", "complex"],
)  # fmt: skip
def test_polarities_that_would_be_a_guess_are_refused(tmp_path, p):
    with pytest.raises(BadInput, match="p "):
        read_events_npz(saved(tmp_path / "a.npz", p=p))


def test_polarities_that_are_known(tmp_path):
    for p in (RECORDING.p, RECORDING.p.astype(bool), 2 * RECORDING.p - 1, 2.0 * RECORDING.p - 1, np.ones(23)):
        read = read_events_npz(saved(tmp_path / "a.npz", p=p))
        assert (read.p == (np.asarray(p) > 0)).all()


@pytest.mark.parametrize("key", ["x", "y"])
def test_scaled_coordinates_are_refused(tmp_path, key):
    with pytest.raises(BadInput, match="scaling"):
        read_events_npz(saved(tmp_path / "a.npz", **{key: getattr(RECORDING, key) / 34}))
    whole = read_events_npz(saved(tmp_path / "a.npz", **{key: getattr(RECORDING, key).astype(np.float32)}))
    assert (getattr(whole, key) == getattr(RECORDING, key)).all()
    np.savez(tmp_path / "b.npz", frames=np.full((3, 2, 5, 5), 0.5))
    with pytest.raises(BadInput, match="scaling"):
        read_frames_npz(tmp_path / "b.npz")


def test_archives_that_declare_more_than_they_hold(tmp_path):
    """One line each, and no memory taken for what is only declared."""

    def declared(shape, dtype="<f8"):
        word = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
        body = word.encode() + b" " * (117 - len(word)) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + b"\0" * 16

    for content in (
        declared((1 << 40,)), declared((-1,)), declared((2,), "|O"), declared((3,)), declared("(2,"),
        declared("__import__('os')"), b"\x93NUMPY\x09\x00", b"",
    ):  # fmt: skip
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as held:
            for key in "txyp":
                held.writestr(f"{key}.npy", content)
        with pytest.raises(BadInput, match="no archive"):
            read_events_npz(tmp_path / "a.npz")
    raw = saved(tmp_path / "b.npz").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(raw)
        for place in generator.integers(0, len(raw), 4):
            damaged[place] = generator.integers(0, 256)
        (tmp_path / "c.npz").write_bytes(damaged[: int(generator.integers(1, len(raw) + 1))])
        with contextlib.suppress(BadInput):
            read_events_npz(tmp_path / "c.npz")


def test_folders_and_files_that_are_no_recordings(tmp_path, caplog):
    for label in ("0", "1"):
        (tmp_path / "test" / label).mkdir(parents=True)
        saved(tmp_path / "test" / label / "a.npz")
    right = EventFolder(path=str(tmp_path)).ids
    for helper in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "test" / helper).mkdir()
        saved(tmp_path / "test" / helper / "a.npz")
        (tmp_path / "test" / "1" / helper).mkdir()
    saved(tmp_path / "test" / "1" / "._a.npz")
    with caplog.at_level("WARNING", logger="advkit"):
        task = EventFolder(path=str(tmp_path))
        assert (task.class_names(), task.ids) == (("0", "1"), right)
    assert not caplog.records
    (tmp_path / "test" / "0" / "b.aedat4").write_bytes(b"x")
    (tmp_path / "test" / "0" / "user").mkdir()
    (tmp_path / "test" / "0" / "a.npz").rename(tmp_path / "test" / "0" / "a.NPZ")
    with caplog.at_level("WARNING", logger="advkit"):
        assert len(EventFolder(path=str(tmp_path))) == 2
        assert EventFolder(path=str(tmp_path)).fetch([0, 1])[1].sum() == 1
    assert "2 entries" in caplog.text
    assert ".aedat4, folders" in caplog.text
    (tmp_path / "test" / "2").mkdir()
    with pytest.raises(UsageError, match=r"without a recording \(2\)"):
        len(EventFolder(path=str(tmp_path)))


def test_an_empty_recording_is_an_error(tmp_path):
    (tmp_path / "test" / "0").mkdir(parents=True)
    none = np.zeros(0, dtype=np.int64)
    for file, write in (("a.npz", lambda f: np.savez(f, t=none, x=none, y=none, p=none)),
                        ("b.npz", lambda f: np.savez(f, frames=np.zeros((10, 2, 34, 34)))),
                        ("c.bin", lambda f: f.write_bytes(b""))):  # fmt: skip
        write(tmp_path / "test" / "0" / file)
        with pytest.raises(BadInput, match=f"{file} holds no event"):
            EventFolder(path=str(tmp_path)).decode(tmp_path / "test" / "0" / file)


def test_frames_hold_equal_numbers_of_events():
    frames = frames_by_number(RECORDING, 4, 34, 34)
    assert frames.sum((1, 2, 3)).tolist() == [5, 5, 5, 8]
    assert frames.sum() == 23
    for i in (0, 4, 5, 22):
        j = min(i // 5, 3)
        assert frames[j, RECORDING.p[i], RECORDING.y[i], RECORDING.x[i]] >= 1
    few = Events(*(getattr(RECORDING, name)[:3] for name in ("t", "x", "y", "p")))
    assert frames_by_number(few, 4, 34, 34).sum((1, 2, 3)).tolist() == [0, 0, 0, 3]
    with pytest.raises(BadInput, match="height"):
        frames_by_number(RECORDING, 4, 10, 10)


def test_a_folder_of_recordings(tmp_path):
    root = tmp_path / "mine"
    for split in ("train", "test"):
        for label in ("0", "2", "10"):
            (root / split / label).mkdir(parents=True)
            for i in range(2):
                write_bin(root / split / label / f"{i}.bin", RECORDING)
    np.savez(root / "test" / "2" / "events.npz", t=RECORDING.t, x=RECORDING.x, y=RECORDING.y, p=RECORDING.p)
    np.savez(root / "test" / "10" / "frames.npz", frames=np.full((4, 2, 34, 34), 3, dtype=np.int64))
    task = TASKS.build(f"events:path={root},frames=4")
    assert (len(task), task.classes, task.class_names()) == (8, 3, ("0", "2", "10"))
    batch = next(iter(task.batches(8)))
    assert task.space.complaint(batch.x) is None
    bits = (frames_by_number(RECORDING, 4, 34, 34) >= 1).float()
    for row, name in enumerate(batch.ids):
        expected = torch.ones(4, 2, 34, 34) if name.endswith("frames.npz") else bits
        assert torch.equal(batch.x[row], expected)
        assert task.class_names()[int(batch.labels[row])] == name.split("/")[2]
    assert len(task.training()) == 6
    assert len(TASKS.build(f"events:path={root},frames=4,limit=3")) == 3
    assert len(TASKS.build(f"events:path={root}/test,split=.,frames=4")) == 8
    with pytest.raises(BadInput, match="frames="):
        TASKS.build(f"events:path={root},frames=5").fetch(range(8))
    for missing in (
        f"events:path={root}/none",
        f"events:path={root},split=validation",
        f"events:path={tmp_path}/mine/test/0,split=.",
    ):
        with pytest.raises(UsageError):
            len(TASKS.build(missing))


def test_aedat_goes_through_spikingjelly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spikingjelly", None)
    with pytest.raises(MissingExtra, match="spiking"):
        decode_aedat("dvs-gesture", str(tmp_path), 6)
    with pytest.raises(UsageError):
        decode_aedat("n-caltech", str(tmp_path), 6)
    made = []

    def maker(root, **settings):
        made.append(settings)
        (tmp_path / "frames_number_6_split_by_number" / "x").mkdir(parents=True, exist_ok=True)

    module = ModuleType("spikingjelly.datasets.dvs128_gesture")
    module.DVS128Gesture = maker
    for name in ("spikingjelly", "spikingjelly.datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "spikingjelly.datasets.dvs128_gesture", module)
    folder = decode_aedat("dvs-gesture", str(tmp_path), 6)
    assert folder.name == "frames_number_6_split_by_number"
    assert [each["train"] for each in made] == [True, False]
    assert decode_aedat("dvs-gesture", str(tmp_path), 6) == folder
    assert len(made) == 2


# An evaluation on events


@pytest.fixture(scope="module")
def reader():
    """A linear reader of short digit films, fitted by least squares."""
    task = TASKS.build("digits-dvs:frames=2,substeps=4")
    data = task.training()
    x = data.x.flatten(1).double()
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    wanted = nn.functional.one_hot(data.y, 10).double() - 0.1
    gram = design.T @ design + 30 * torch.eye(design.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, design.T @ wanted).float()
    layer = nn.Linear(len(weight) - 1, 10)
    with torch.no_grad():
        layer.weight.copy_(weight[:-1].T)
        layer.bias.copy_(weight[-1])
    return task, nn.Sequential(nn.Flatten(), layer).eval()


@pytest.mark.slow
def test_evaluate_sda_on_events(reader, tmp_path):
    task, module = reader
    report = advkit.evaluate(attack="sda", task=task, model=module, n=12, device="cpu", out=tmp_path / "run")
    records = read_records(tmp_path / "run" / "records.jsonl")
    metrics = report.to_dict()["metrics"]
    contested = [r for r in records if r.outcome != Outcome.WRONG]
    broken = [r for r in contested if r.outcome == Outcome.BROKEN]
    assert len(broken) >= 8
    asr = metrics["attack_success_rate"]
    assert (asr["numerator"], asr["denominator"]) == (len(broken), len(contested))
    flips = sorted(r.measures["l0"] for r in broken)
    assert metrics["l0_mean"]["value"] == pytest.approx(np.mean(flips))
    assert metrics["l0_median"]["value"] == pytest.approx(np.median(flips))
    assert metrics["l0_percent_median"]["value"] == pytest.approx(100 * np.median(flips) / 1600)
    for name, levels in (("l0", (200, 800)), ("l0_percent", (0.05, 0.1, 0.25, 0.5, 1))):
        for level in levels:
            rate = metrics[f"attack_success_rate_{name}_{level:g}"]
            assert rate["denominator"] == len(contested)
            assert rate["numerator"] == sum(r.measures[name] <= level for r in broken)
    assert metrics["attack_success_rate_l0_200"]["numerator"] == sum(f <= 200 for f in flips)
    assert report.to_dict()["attacks"][0]["within"]["attack_success_rate_l0_800"]["denominator"] == len(contested)
    one_by_one = advkit.evaluate(
        attack="sda", task=task, model=module, n=12, device="cpu", batch_size=1, out=tmp_path / "single"
    )
    same = ("attack_success_rate", "l0_mean", "robust_accuracy")
    assert [one_by_one.to_dict()["metrics"][m] for m in same] == [metrics[m] for m in same]
    first = {r.id: (r.measures, r.forwards) for r in records}
    assert {r.id: (r.measures, r.forwards) for r in read_records(tmp_path / "single" / "records.jsonl")} == first


def test_budgets_targets_and_wrong_threat_models_on_events(reader):
    task, module = reader
    common = {"task": task, "model": module, "n": 8, "device": "cpu"}
    bound = advkit.evaluate(attack="sda", threat_model="flips:n=3", **common).to_dict()
    assert bound["attacks"][0]["perturbation"]["max"] <= 3
    assert bound["threat_model"]["eps"] == 3
    aimed = advkit.evaluate(attack="sda:k_init=20", goal="targeted:how=next", **common).to_dict()
    assert aimed["metrics"]["attack_success_rate"]["numerator"] > 0
    for attack, threat in (("pgd", "flips"), ("sda", "linf:eps=0.1"), ("sda:surrogate=atan", "flips")):
        with pytest.raises(UsageError):
            advkit.evaluate(attack=attack, threat_model=threat, **common)
    drawn = advkit.evaluate(attack="random_flips", threat_model="flips:access=labels", **common).to_dict()
    assert drawn["attacks"][0]["cost"]["backward"] == 0
