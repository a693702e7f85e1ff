"""Figures of attacked events say what was flipped, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from advkit.core.errors import UsageError
from advkit.evaluation.figures.event_plots import animate, film_strip, flips_figure, flips_over_time, frame_picture


@pytest.fixture
def rows():
    clean = (torch.rand(3, 6, 2, 7, 8, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    attacked = clean.clone()
    for j, p, y, x in ((0, 0, 1, 1), (0, 1, 2, 2), (4, 1, 3, 3)):
        attacked[:2, j, p, y, x] = 1 - attacked[:2, j, p, y, x]
    return clean, attacked


def test_flips_per_frame(rows):
    clean, attacked = rows
    flips = flips_over_time(clean, attacked)
    total = flips["added"] + flips["deleted"]
    assert total.tolist() == [[2, 0, 0, 0, 1, 0]] * 2 + [[0] * 6]
    assert flips["added"].sum() == (attacked > clean).sum()
    one = flips_over_time(clean[0], attacked[0].numpy())
    assert one["added"].tolist() == flips["added"][:1].tolist()
    with pytest.raises(UsageError):
        flips_over_time(clean, attacked[:2])
    with pytest.raises(UsageError):
        flips_over_time(clean[:, :, 0], attacked[:, :, 0])


def test_the_figure_shows_the_mean_of_the_changed_rows(rows):
    figure = flips_figure(*rows)
    (axes,) = figure.axes
    heights = np.array([bar.get_height() for bar in axes.patches])
    flips = flips_over_time(*rows)
    expected = np.concatenate([flips["added"][:2].mean(0), -flips["deleted"][:2].mean(0)])
    np.testing.assert_allclose(heights, expected)
    assert "2 attacked rows, median 3" in axes.get_title()
    with pytest.raises(UsageError, match="no row"):
        flips_figure(rows[0], rows[0])


def test_pictures_tell_polarities_and_flips_apart():
    frame = np.zeros((2, 2, 2), dtype=np.float32)
    frame[0, 0, 0] = frame[1, 0, 1] = 1
    frame[:, 1, 0] = 1
    colours = frame_picture(frame)
    assert len({tuple(colours[y, x]) for y in range(2) for x in range(2)}) == 4
    assert tuple(colours[1, 1]) == (1, 1, 1)
    flipped = np.zeros((2, 2, 2), dtype=bool)
    flipped[0, 0, 0] = flipped[0, 1, 1] = True
    marked = frame_picture(frame, flipped)
    assert tuple(marked[0, 0]) == (0, 0, 0)
    assert tuple(marked[1, 1]) not in ((1, 1, 1), (0, 0, 0))
    assert (marked[0, 1] == colours[0, 1]).all()


@pytest.mark.slow
def test_film_strip(rows, tmp_path):
    figure = film_strip(*rows, row=1, clean_name="shirt", adversarial_name="coat")
    assert len(figure.axes) == 12
    assert "3 of 672 bits" in figure.get_suptitle()
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == [
        f"{n} flips" for n in (2, 0, 0, 0, 1, 0)
    ]
    figure.savefig(tmp_path / "strip.png", dpi=40)
    assert len(film_strip(*rows, frames=[0, 4]).axes) == 4
    for senseless in ({"row": 3}, {"frames": [6]}, {"frames": []}):
        with pytest.raises(UsageError):
            film_strip(*rows, **senseless)


def test_animation(rows, tmp_path):
    file = animate(*rows, tmp_path / "plots" / "row.gif", scale=2, milliseconds=100)
    with Image.open(file) as film:
        assert film.n_frames == 6
        assert film.size == (2 * (8 + 1 + 8), 14)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    left, right = frames[0][:, :16], frames[0][:, 18:]
    assert (left != right).any()
    assert (frames[1][:, :16] == frames[1][:, 18:]).all()
    with pytest.raises(UsageError):
        animate(*rows, tmp_path / "x.gif", scale=0)
