"""Spaces: what they contain, and what they say of what they do not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from advkit.core.errors import BadInput, UsageError
from advkit.core.spaces import Binary, Box, Product, Rows, Tokens


def test_box_contains_its_edges_and_round_off_only():
    box = Box(0, 1)
    rows = torch.tensor([[0.0, 1.0], [0.5, 1 + 5e-7], [0.5, 1 + 1e-5], [-1e-5, 0.5], [float("nan"), 0.5]])
    assert box.contains(rows).tolist() == [True, True, False, False, False]
    assert box.contains(torch.tensor([[float("inf"), 0.0]])).tolist() == [False]
    assert Box(0, 255).contains(torch.tensor([[255 + 1e-4], [255 + 1e-3]])).tolist() == [True, False]
    assert box.contains(torch.empty(0, 3)).shape == (0,)
    assert box.contains(torch.tensor([0.5, 2.0])).tolist() == [True, False]


def test_per_feature_bounds():
    low, high = torch.tensor([0.0, -1.0, 5.0]), torch.tensor([1.0, 1.0, 5.0])
    box = Box(low, high, shape=(3,))
    rows = torch.tensor([[0.5, -0.5, 5.0], [0.5, -0.5, 5.1], [-0.5, 0.5, 5.0]])
    assert box.contains(rows).tolist() == [True, False, False]
    assert torch.equal(box.clamp(torch.tensor([[2.0, -3.0, 0.0]])), torch.tensor([[1.0, -1.0, 5.0]]))
    assert box.extent == (-1.0, 5.0)
    images = Box(torch.zeros(3, 1, 1), torch.tensor([1.0, 2.0, 3.0])[:, None, None], shape=(3, 4, 4))
    x = torch.full((2, 3, 4, 4), 1.5)
    assert torch.equal(images.clamp(x)[0, :, 0, 0], torch.tensor([1.0, 1.5, 1.5]))
    for bound, expected in zip(images.bounds_like(x.double()), ((0, 0, 0), (1, 2, 3)), strict=True):
        assert bound.dtype == torch.float64
        assert (bound + 0 * x[0].double())[:, 0, 0].tolist() == list(expected)


def test_unbounded_features():
    box = Box(float("-inf"), torch.tensor([0.0, float("inf")]))
    rows = torch.tensor([[-1e9, 1e9], [1.0, 0.0], [float("-inf"), 0.0]])
    assert box.contains(rows).tolist() == [True, False, False]
    assert not box.bounded
    assert Box(0, 1).bounded


def test_box_does_not_follow_the_callers_tensor():
    low = torch.zeros(2)
    box = Box(low, 1.0)
    low += 5
    assert box.contains(torch.tensor([[0.5, 0.5]])).all()


def test_boxes_compare_by_value():
    assert Box(0, 1) == Box(0.0, 1.0)
    assert Box(0, 1) != Box(0, 1, shape=(3,))
    assert Box(torch.zeros(2), 1) == Box(torch.zeros(2), 1)
    assert Box(torch.zeros(2), 1) != Box(torch.tensor([0.0, 0.1]), 1)
    assert hash(Box(torch.zeros(2), 1)) == hash(Box(torch.zeros(2), 1))
    box = Box(torch.zeros(2), 1, levels=255)
    box.bounds_like(torch.zeros(1, 2))
    assert pickle.loads(pickle.dumps(box)) == box
    assert copy.deepcopy(box) == box


@pytest.mark.parametrize(
    ("x", "parts"),
    [
        (torch.tensor([[-2.1, 2.6]]), ["[-2.1, 2.6]", "this model wants Box(0, 1)", "already normalised", "undo it"]),
        (torch.tensor([[0.0, 255.0]]), ["values up to 255", "8-bit images", "divide by 255"]),
        (torch.tensor([[0, 200]], dtype=torch.uint8), ["8-bit images", "divide by 255"]),
        (torch.tensor([[-1.0, 1.0]]), ["[-1, 1]", "x / 2 + 0.5"]),
        (torch.tensor([[0.5, float("nan")], [0.1, 0.2]]), ["1 NaN values in 1 of 2 samples"]),
        (torch.tensor([[float("inf"), float("nan")]]), ["1 NaN and 1 infinite"]),
        (torch.tensor([[0.5, 90000.0]]), ["9e+04", "rescale"]),
    ],
)
def test_complaints_name_range_and_cause(x, parts):
    complaint = Box(0, 1).complaint(x)
    assert complaint is not None
    for part in parts:
        assert part in complaint


def test_complaints_about_shape():
    box = Box(0, 1, shape=(3, 32, 32))
    assert "reshape" in str(box.complaint(torch.zeros(2, 3 * 32 * 32)))
    assert "permute" in str(box.complaint(torch.zeros(2, 32, 32, 3)))
    assert "x[None]" in str(box.complaint(torch.zeros(3, 32, 32)))
    assert "(1, 28, 28)" in str(box.complaint(torch.zeros(2, 1, 28, 28)))
    assert not box.contains(torch.zeros(2, 1, 28, 28)).any()
    assert "list" in str(box.complaint([0.5]))
    assert "scalar" in str(box.complaint(torch.tensor(0.5)))
    assert box.complaint(torch.zeros(2, 3, 32, 32)) is None
    assert box.complaint(torch.zeros(0, 3, 32, 32)) is None


def test_complaint_about_shuffled_columns():
    box = Box(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 20.0]))
    assert "columns" in str(box.complaint(torch.tensor([[15.0, 0.5]])))


def test_complaint_is_none_exactly_where_all_rows_are_contained():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.2, 0.5, 0.6, 2.0, 100.0):
        x = 0.5 + scale * (torch.rand(4, 5, generator=generator) * 2 - 1)
        assert (Box(0, 1).complaint(x) is None) == bool(Box(0, 1).contains(x).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Box(1, 0),
        lambda: Box(float("nan"), 1),
        lambda: Box(torch.tensor([0.0, 2.0]), 1),
        lambda: Box(torch.zeros(2), torch.ones(3)),
        lambda: Box(torch.zeros(2), 1, shape=(3,)),
        lambda: Box(0, 1, levels=0),
        lambda: Tokens(0),
        lambda: Product({}),
    ],
)
def test_senseless_spaces_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_binary():
    space = Binary((2,))
    assert space.contains(torch.tensor([[0.0, 1.0], [0.5, 1.0], [0.0, float("nan")]])).tolist() == [True, False, False]
    assert space.complaint(torch.tensor([[0.0, 1.0]])) is None
    assert "0.5" in str(space.complaint(torch.tensor([[0.5, 1.0]])))
    assert "(3,)" in str(space.complaint(torch.zeros(1, 3)))


def test_binary_answers_what_a_box_does():
    space, box = Binary((3,)), Box(0.0, 1.0, (3,))
    x = torch.tensor([[0.5, 0.51, -3.0], [7.0, torch.nan, 1.0]])
    assert space.clamp(x).tolist() == [[0, 1, 0], [1, 0, 1]]
    bits = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.equal(space.clamp(bits), bits)
    assert space.clamp(bits).dtype == torch.float64
    assert space.contains(space.clamp(x)).all()
    for mine, other in zip(space.bounds_like(bits), box.bounds_like(bits), strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == torch.float64
    assert (space.extent, space.bounded, space.levels) == (box.extent, box.bounded, box.levels)
    assert space == Binary((3,)) != Binary((4,))
    assert hash(space) == hash(Binary((3,)))
    assert "0, 1" in space.text()
    assert "divide" not in str(space.complaint(torch.full((1, 3), torch.inf)))
    assert "counts" in str(space.complaint(torch.tensor([[0.0, 1.0, 4.0]])))
    assert "threshold" in str(space.complaint(torch.tensor([[0.0, 0.3, 1.0]])))
    assert space.complaint(torch.zeros(0, 3)) is None
    with pytest.raises(UsageError):
        Binary((0, 2))


def test_tokens():
    space = Tokens(10, 3)
    assert space.contains(torch.tensor([[0, 9, 3], [0, 10, 3], [-1, 2, 3]])).tolist() == [True, False, False]
    assert not space.contains(torch.tensor([[0, 1]])).any()
    assert not space.contains(torch.tensor([[0.0, 1.0, 2.0]])).any()
    assert "float" in str(space.complaint(torch.zeros(1, 3)))
    assert "from 0 to 12" in str(space.complaint(torch.tensor([[0, 12, 3]])))
    assert "3 ids" in str(space.complaint(torch.tensor([[0, 1]])))
    assert Tokens(3).contains(torch.tensor([0, 2, 3])).tolist() == [True, True, False]


def test_rows():
    space = Rows(3, Tokens(2))
    assert space.contains(torch.tensor([0, 1, 1])).all()
    assert not space.contains(torch.tensor([0, 1])).any()
    assert "2 samples" in str(space.complaint(torch.tensor([0, 1])))
    assert "from 0 to 4" in str(space.complaint(torch.tensor([0, 1, 4])))
    assert space.complaint(torch.tensor([0, 1, 1])) is None


def test_product():
    space = Product({"image": Box(0, 1), "text": Tokens(5)})
    good = {"image": torch.zeros(2, 3), "text": torch.tensor([[1, 2], [3, 5]])}
    assert space.contains(good).tolist() == [True, False]
    assert str(space.complaint(good)).startswith("text: ids from 1 to 5")
    assert space.complaint({**good, "text": good["text"] - 1}) is None
    assert "mapping" in str(space.complaint(good["image"]))
    assert "image, text" in str(space.complaint({"image": good["image"]}))
    uneven = {"image": torch.zeros(3, 3), "text": torch.zeros(2, 2, dtype=torch.long)}
    assert "same number" in str(space.complaint(uneven))
    with pytest.raises(BadInput):
        space.contains(uneven)
    assert space == Product({"text": Tokens(5), "image": Box(0, 1)})
