"""Pairs of RAW and RGB to train on: photographs, camera RAW files that the tests write, and the Zurich layout."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.rng import RowRng
from advkit.models import raw
from advkit.training import raw_pairs
from advkit.training.raw_pairs import pairs, read_camera_raw, read_rgb, shipped_photographs, sources, synthetic_pair

sys.path.insert(0, str(Path(__file__).parent))
from dng import write_dng

RNG = RowRng.from_ids(0, ["test"])


def photo(folder: Path, name: str, height: int = 40, width: int = 52, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder / name


def test_the_photographs_of_packages_are_colour_and_large_enough() -> None:
    held = shipped_photographs()
    assert {"china.jpg", "flower.jpg"} <= {path.name for path in held}
    assert all(min(read_rgb(path).shape[1:]) >= 96 for path in held)
    data = pairs(RNG, crops=4, crop=32)
    assert data.x.shape == (4, 7, 16, 16)
    assert data.space.complaint(data.x) is None
    assert torch.equal(data.x, pairs(RNG, crops=4, crop=32).x)
    assert not torch.equal(data.x, pairs(RowRng.from_ids(1, ["test"]), crops=4, crop=32).x)


def test_a_synthetic_pair_is_what_the_pipeline_makes_of_its_planes() -> None:
    # without texture nothing is lost, so that the pipeline must give the image back, but for the drawn white balance
    flat = torch.tensor([0.5, 0.4, 0.3])[:, None, None].expand(3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(40):
        pair = synthetic_pair(flat, generator, 32)
        image, planes = pair[:3, 4, 4], pair[3:, 4, 4]
        linear = torch.linalg.solve(torch.tensor(raw.MATRIX), raw.from_srgb(image))
        gains.append(linear / planes[[0, 1, 3]])
        assert planes[1] == planes[2]
        assert 0.7 - 1e-3 <= (raw.from_srgb(image) / raw.from_srgb(flat[:, 0, 0])).mean() <= 1.1 + 1e-3
    spread = torch.stack(gains) / torch.tensor(raw.GAINS)
    assert 0.9 - 1e-3 <= spread.min() < 0.93
    assert 1.07 < spread.max() <= 1.1 + 1e-3


@pytest.mark.parametrize("pattern", raw.PATTERNS)
def test_a_camera_file_is_read_in_its_pattern(tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("rawpy", reason="the extra raw brings rawpy")
    # a flat scene: every plane has one value, whatever the pattern
    scene = torch.tensor([0.2, 0.5, 0.3])[None, :, None, None].expand(1, 3, 24, 30)
    sensor = (64 + 959 * raw.mosaic(scene, pattern)[0]).round().numpy().astype(np.uint16)
    shot = read_camera_raw(write_dng(tmp_path / "shot.dng", sensor, pattern))
    assert (shot.pattern, shot.black, shot.white) == (pattern, (64.0,) * 4, 1023.0)
    wanted = torch.tensor([0.2, 0.5, 0.5, 0.3])[:, None, None]
    assert (shot.planes - wanted).abs().max() < 1e-3
    assert shot.rgb.shape[1:] == shot.planes.shape[1:]
    inner = shot.rgb[:, 2:-2, 2:-2]
    assert inner.std((1, 2)).max() < 1e-3
    # neutral in the camera's white balance (2, 1, 1.6): 0.4, 0.5, 0.48, so red is the least
    assert inner.mean((1, 2)).argmin() == 0


def test_a_camera_files_planes_are_its_pixels(tmp_path: Path) -> None:
    pytest.importorskip("rawpy", reason="the extra raw brings rawpy")
    sensor = np.random.default_rng(0).integers(64, 1024, (24, 30)).astype(np.uint16)
    linear = (torch.from_numpy(sensor.astype(np.float32)) - 64) / 959
    shot = read_camera_raw(write_dng(tmp_path / "a.dng", sensor, "RGGB"))
    assert torch.allclose(shot.planes, raw.pack(linear[None])[0])
    # blue first: the first red pixel is one line down and one to the right
    shifted = read_camera_raw(write_dng(tmp_path / "b.dng", sensor, "BGGR"))
    assert torch.allclose(shifted.planes, raw.pack(linear[None, 1:23, 1:29])[0])
    assert read_camera_raw(tmp_path / "a.dng", black=100.0).planes.amin() == 0


def test_what_a_camera_file_does_not_say_is_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("rawpy", reason="the extra raw brings rawpy")
    sensor = np.random.default_rng(0).integers(200, 1024, (24, 30)).astype(np.uint16)
    silent = write_dng(tmp_path / "silent.dng", sensor, black=None)
    with pytest.raises(BadInput, match=r"says no black level, and its darkest pixel is 20. of 1023: give black="):
        read_camera_raw(silent)
    assert read_camera_raw(silent, black=0.0).black == (0.0,) * 4
    trans = write_dng(tmp_path / "trans.dng", sensor, "GGRGGBGGBGGRBRGRBGGGBGGRGGRGGBRBGBRG", cells=(6, 6))
    with pytest.raises(BadInput, match=r"no Bayer pattern .*6 x 6 pixels"):
        read_camera_raw(trans)
    over = write_dng(tmp_path / "over.dng", sensor, black=1023)
    with pytest.raises(BadInput, match="black level 1023 and white level 1023; expected black below white"):
        read_camera_raw(over)
    broken = tmp_path / "broken.dng"
    broken.write_bytes(b"II*\0 no camera")
    with pytest.raises(BadInput, match=r"broken\.dng is no readable camera RAW file"):
        read_camera_raw(broken)


def test_without_rawpy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rawpy", None)
    (tmp_path / "shot.dng").write_bytes(b"")
    with pytest.raises(MissingExtra, match=r"advkit\[raw\]"):
        sources(tmp_path)


def test_a_folder_may_hold_photographs_and_camera_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("rawpy", reason="the extra raw brings rawpy")
    below = tmp_path / "below"
    below.mkdir()
    photo(tmp_path, "one.png")
    photo(below, "two.png", seed=1)
    photo(tmp_path, "small.png", 20, 20)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    sensor = np.random.default_rng(0).integers(64, 1024, (40, 44)).astype(np.uint16)
    write_dng(tmp_path / "shot.dng", sensor)
    with caplog.at_level(logging.WARNING, logger="advkit"):
        held = sources(tmp_path, crop=32)
    assert [name for name, _ in held] == ["two.png", "one.png", "shot.dng"]
    assert "1 of 4 images are smaller than 32 pixels" in caplog.text
    data = pairs(RNG, tmp_path, crops=6, crop=32)
    assert data.x.shape == (6, 7, 16, 16)
    # the third and the sixth are cuts of the camera file: its planes, as they are
    planes = raw.pack(((torch.from_numpy(sensor.astype(np.float32)) - 64) / 959)[None])[0]
    found = [
        torch.allclose(planes[:, top : top + 16, left : left + 16], data.x[2, 3:])
        for top in range(5)
        for left in range(7)
    ]
    assert any(found)


def test_zurichs_layout_is_read(tmp_path: Path) -> None:
    for name in (raw_pairs.ZURICH_RAW, raw_pairs.ZURICH_RGB):
        (tmp_path / "train" / name).mkdir(parents=True)
    mosaic = np.random.default_rng(0).integers(0, 1021, (32, 32)).astype(np.uint16)
    Image.fromarray(mosaic).save(tmp_path / "train" / raw_pairs.ZURICH_RAW / "0.png")
    image = photo(tmp_path / "train" / raw_pairs.ZURICH_RGB, "0.jpg", 32, 32)
    ((name, cut),) = sources(tmp_path, crop=32)
    pair = cut(torch.Generator(), 32)
    assert name == "0.png"
    assert torch.equal(pair[:3], F.avg_pool2d(read_rgb(image)[None], 2)[0])
    assert torch.allclose(pair[3:], raw.pack(torch.from_numpy(mosaic.astype(np.float32))[None] / 1020)[0])
    image.unlink()
    with pytest.raises(BadInput, match=r"0\.png has no partner"):
        sources(tmp_path, crop=32)
    photo(tmp_path / "train" / raw_pairs.ZURICH_RGB, "0.jpg", 32, 36)
    with pytest.raises(BadInput, match=r"is \[32, 32\] and 0\.jpg \[32, 36\]; expected one size"):
        pairs(RNG, tmp_path, crops=1, crop=32)
    photo(tmp_path / "train" / raw_pairs.ZURICH_RGB, "0.jpg", 32, 32)
    with pytest.raises(BadInput, match=r"0\.png has 32 x 32 pixels; expected at least 48 x 48"):
        pairs(RNG, tmp_path, crops=1, crop=48)


def test_only_so_many_bytes_of_images_stay_in_memory(tmp_path: Path) -> None:
    read = []

    def once(path: Path) -> torch.Tensor:
        read.append(path.name)
        return torch.zeros(100)  # 400 bytes

    held = raw_pairs._Decoded(limit=1000)
    for name in "aabbacab":
        held.get(Path(name), once)
    assert "".join(read) == "abcab"


def test_folders_with_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*none"):
        sources(tmp_path / "none")
    photo(tmp_path, "small.png", 20, 20)
    with pytest.raises(UsageError, match="holds no image of at least 96 x 96 pixels"):
        sources(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match=r"bad\.png is no readable image"):
        sources(tmp_path)
