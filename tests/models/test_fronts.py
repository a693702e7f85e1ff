"""Fronts: shapes of the paper's networks, the identity at first, counted queries, files."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from advkit.core.errors import BadModel, BudgetExhausted, CheckpointError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.fronts import Denoised, Networks, Queries, load_front, save_front
from advkit.models.smoothed import Smoothed, Smoothing
from advkit.models.torch import FunctionModel, NumpyModel, TorchModel
from advkit.testing.victims import linear, network

SHAPE = (2, 6, 6)
SMALL = Networks(autoencoder="mlp", width=8, d_z=3, hidden=9)


def front(networks: Networks = SMALL, shape: tuple[int, ...] = SHAPE):
    torch.manual_seed(1)
    return networks.build(shape).eval()


def chain(victim=None, networks: Networks = SMALL) -> Denoised:
    return Denoised(front(networks), network() if victim is None else victim, networks)


@pytest.mark.parametrize(
    ("networks", "shape"),
    [
        (Networks(), (1, 28, 28)),
        (Networks(depth=1, width=5), (7,)),
        (Networks(denoiser="dncnn", depth=4, width=6), (3, 8, 8)),
    ],
)
def test_a_denoiser_is_the_identity_at_first_and_learns(networks, shape):
    made = networks.build(shape).train()
    x = torch.rand(5, *shape)
    assert torch.equal(made(x), x)
    made(x).square().sum().backward()
    last = [each for each in made.denoiser.net.modules() if hasattr(each, "weight")][-1]
    assert float(last.weight.grad.abs().max()) > 0


def test_dncnn_is_that_of_the_paper():
    made = Networks(denoiser="dncnn").build((3, 32, 32)).denoiser
    kinds = [type(each).__name__ for each in made.net]
    assert kinds.count("Conv2d") == 17
    assert kinds.count("BatchNorm2d") == 15
    assert made.net[0].weight.shape == (64, 3, 3, 3)
    inner = made.net[2].weight.flatten(1)
    torch.testing.assert_close(inner @ inner.T, torch.eye(64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "d_z"), [((3, 32, 32), 192), ((1, 28, 28), 192)])
def test_the_convolutional_auto_encoders_have_192_numbers_between(shape, d_z):
    made = Networks(autoencoder="conv").build(shape)
    x = torch.rand(2, *shape)
    z = made.encode(x)
    back = made.decode(z).detach()
    assert z.shape == (2, d_z)
    assert back.shape == x.shape
    assert 0 <= float(back.min()) <= float(back.max()) <= 1


def test_the_mlp_auto_encoder_of_fashion_mnist():
    made = Networks(autoencoder="mlp").build((1, 28, 28))
    assert made.encode(torch.rand(2, 1, 28, 28)).shape == (2, 32)
    sizes = [tuple(each.shape) for each in made.encoder.parameters()]
    assert sizes == [(128, 784), (128,), (32, 128), (32,)]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Networks(denoiser="unet"), "expected one of mlp, dncnn"),
        (lambda: Networks(denoiser="dncnn", depth=1), "depth is 1; expected at least 2"),
        (lambda: Networks(autoencoder="conv", d_z=32), "d_z is 32; expected 192"),
        (lambda: Networks(width=-1), "width is -1; expected"),
        (lambda: Networks(autoencoder="conv").build((3, 64, 64)), "3x32x32 or 1x28x28"),
        (lambda: Networks(denoiser="dncnn").build((12,)), "use mlp"),
    ],
)
def test_networks_that_do_not_exist_are_refused_in_words(made, words):
    with pytest.raises(UsageError, match=words):
        made()


def test_frozen_parts_stay_in_evaluation_mode():
    made = Networks(denoiser="dncnn", depth=3, width=4, autoencoder="mlp").build(SHAPE)
    made.decoder.requires_grad_(False)
    made.train()
    assert made.denoiser.training
    assert not made.decoder.training


def test_a_chain_is_the_model_behind_the_front_and_counts():
    one = chain()
    x = torch.rand(4, *SHAPE)
    assert torch.equal(one(x), one.victim(one.front(x)))
    assert one.answered == 4
    twin = one.copy()
    twin(x)
    assert one.answered == twin.answered == 8
    assert one.apart().answered == 0
    assert one.undefended is one.model is one.victim


def test_another_model_or_front_is_another_chain():
    one = chain()
    assert one.describe().state_sha256 == one.copy().describe().state_sha256
    assert one.describe().state_sha256 != chain(network(seed=1)).describe().state_sha256
    other = one.copy()
    with torch.no_grad():
        next(iter(other.front.parameters())).add_(1)
    assert one.describe().state_sha256 != other.describe().state_sha256
    assert one.describe().n_parameters > network().describe().n_parameters


def test_the_limit_is_kept_before_the_model_is_asked():
    one = chain()
    with one.queries.within(5):
        one(torch.rand(4, *SHAPE))
        with pytest.raises(BudgetExhausted, match="allows 1 more queries of the model, and 2 are needed"):
            one(torch.rand(2, *SHAPE))
    assert one.answered == 4
    one(torch.rand(2, *SHAPE))
    assert (one.answered, one.queries.limit) == (6, None)
    assert Queries().limit is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.zeros(len(x), 4), "answers 4 classes; expected 3"),
        (lambda x: torch.full((len(x), 3), torch.nan), "NaN or infinity for 2 of 2 samples"),
        (lambda x: torch.zeros(len(x), dtype=torch.long), "answers decisions"),
        (lambda x: torch.zeros(1, 3), "for 2 inputs"),
    ],
)
def test_answers_that_are_none_are_refused_in_words(function, words):
    one = chain(FunctionModel(function, Box(shape=SHAPE), 3))
    with pytest.raises(BadModel, match=words):
        one.ask(torch.rand(2, *SHAPE))


def test_an_evaluation_gets_nan_as_it_is():
    """An attack must not be able to end a run; the harness has an outcome for such answers."""
    one = chain(FunctionModel(lambda x: torch.full((len(x), 3), torch.nan), Box(shape=SHAPE), 3))
    assert bool(one(torch.rand(2, *SHAPE)).isnan().all())


def test_a_numpy_function_is_a_model_without_a_gradient():
    seen = []

    def f(x):
        seen.append((type(x), x.dtype))
        return x.reshape(len(x), -1)[:, :3]

    model = NumpyModel(f, Box(shape=SHAPE), 3)
    x = torch.rand(2, *SHAPE, requires_grad=True)
    assert torch.equal(model(x), x.detach().flatten(1)[:, :3])
    assert seen == [(np.ndarray, np.float32)]
    assert not model.describe().differentiable
    assert not chain(model).describe().differentiable


def test_only_networks_get_rows_that_fill_a_shape():
    """A padded row is a query: a smoothed chain asks a function for as many copies as the vote has."""
    assert chain().lanes is None
    one = chain(FunctionModel(lambda x: x.flatten(1)[:, :3], Box(shape=SHAPE), 3))
    assert one.lanes == Lanes(1024, 1)
    tally = Smoothed(one, Smoothing(sigma=0.5)).tally(torch.rand(SHAPE), 7, 70)
    assert int(tally.votes.sum()) == one.answered == 70


def test_the_smoothed_chain_without_its_defense_is_the_model_alone():
    one = chain()
    assert Smoothed(one, Smoothing(sigma=0.5)).undefended is one.victim
    plain = network()
    assert Smoothed(plain, Smoothing(sigma=0.5)).undefended is plain


def test_the_adaptive_attacker_differentiates_the_whole_chain():
    one = chain()
    x = torch.rand(2, *SHAPE, requires_grad=True)
    Smoothed(one, Smoothing(sigma=0.1)).attacker_view()(x).square().sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_a_front_comes_back_from_its_file(tmp_path, caplog):
    one, path = chain(), tmp_path / "front.safetensors"
    with torch.no_grad():
        for each in one.front.parameters():
            each.add_(0.01)
    save_front(one, path, SHAPE, {"task": "toy"})
    before = torch.get_rng_state()
    again = load_front(path, network(), SMALL)
    assert torch.equal(before, torch.get_rng_state())
    x = torch.rand(3, *SHAPE)
    assert torch.equal(again(x), one(x))
    assert again.describe() == one.describe()
    with caplog.at_level(logging.WARNING, "advkit"):
        load_front(path, network(seed=2), SMALL)
    assert "trained for another model" in caplog.text


def test_files_that_hold_no_such_front_are_refused(tmp_path):
    one, path = chain(), tmp_path / "front.safetensors"
    save_front(one, path, SHAPE, {})
    with pytest.raises(CheckpointError, match="the defense asks for"):
        load_front(path, network(), Networks())
    with pytest.raises(BadModel, match=r"samples \[2, 6, 6\], and this model takes \[8\]"):
        load_front(path, linear(space=Box(shape=(8,))), SMALL)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_front(path, network(), SMALL)
    from advkit.models.checkpoint import pack

    path.write_bytes(pack({"a": torch.zeros(1)}, {"format": "other"}))
    with pytest.raises(CheckpointError, match="holds no front"):
        load_front(path, network(), SMALL)
    with pytest.raises(CheckpointError, match="can't read"):
        load_front(tmp_path / "none.safetensors", network(), SMALL)


def test_a_dncnn_comes_back_too(tmp_path):
    networks = Networks(denoiser="dncnn", depth=4, width=5, autoencoder="mlp", d_z=2, hidden=4)
    one, path = chain(networks=networks), tmp_path / "front.safetensors"
    save_front(one, path, SHAPE, {})
    x = torch.rand(3, *SHAPE)
    assert torch.equal(load_front(path, network(), networks)(x), one(x))


@pytest.mark.parametrize("shape", [(2, 6, 7), (2**20, 2**20, 2**20), (), (-1, 6, 6)])
def test_sizes_that_a_file_declares_are_held_against_its_weights(shape, tmp_path):
    path = tmp_path / "front.safetensors"
    save_front(chain(), path, shape, {})
    with pytest.raises(CheckpointError):
        load_front(path, network(), SMALL)


def test_it_goes_where_its_model_goes():
    one = chain()
    assert one.to("cpu") is not None
    assert isinstance(one.copy(), Denoised)
    assert isinstance(one, TorchModel)
    keys = RowRng.from_ids(0, ["a"]).keys()
    assert len(keys) == 1
