"""A model with a filter at one of its layers: places, hooks, gradients, what stays unchanged."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advkit.core.errors import BadInput, BadModel, CheckpointError, UsageError
from advkit.core.protocols import Embeds, Headed, TakesCaptions, Undefended
from advkit.evaluation.sources import weights_of
from advkit.models import zoo
from advkit.models.projected import (
    Projected,
    changed,
    collected,
    default_place,
    embeddings,
    layer,
    load_projected,
    projected,
)
from advkit.models.spectral import Filter, Place, SpectralFilter
from advkit.models.torch import FunctionModel, TorchModel
from advkit.tasks import TASKS
from advkit.testing.victims import network, uniform


def filter_of(d: int, k: int = 2, seed: int = 0) -> Filter:
    """A filter onto k drawn directions of d."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(50, k)) @ rng.normal(size=(k, d)) * 5 + 0.1 * rng.normal(size=(50, d))
    return SpectralFilter(q=1.0, edge="topk", top=k).fit(rows)


class Odd(nn.Module):
    """Layers whose outputs are a tuple, a mapping and a text, and one that is given its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.mapping, self.text, self.named = Pair(), Output(), Text(), Named()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.text(x)
        return self.head(self.named(hidden=self.mapping(self.pair(x)[0])["pooler_output"]))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "rest"


class Output(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": x, "pooler_output": x}


class Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


class Named(nn.Module):
    def forward(self, *, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize(
    "place", [Place("pair"), Place("mapping"), Place("named", before=True), Place("head", before=True)]
)
def test_embeddings_are_changed_wherever_they_are(place: Place) -> None:
    net, x = Odd().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    projection = filter_of(4).projection
    with changed(net, place, projection):
        assert torch.allclose(net(x), net.head(projection(x)))
    assert torch.equal(net(x), net.head(x))
    with collected(net, place) as found:
        net(x)
    assert torch.equal(found[0], x)


def test_the_hook_is_gone_where_a_call_raises() -> None:
    net = Odd().eval()
    with pytest.raises(BadModel, match="the output of text is a str"), changed(net, Place("text"), lambda z: z):
        net(torch.zeros(1, 4))
    assert not net.text._forward_hooks


def test_an_unknown_layer_is_answered_with_near_names() -> None:
    net = nn.Module()
    net.vision = nn.Module()
    net.vision.projector = nn.Linear(2, 2)
    for asked in ("projector", "vision.projecter", "Vision.Projector"):
        with pytest.raises(UsageError, match=f"no layer '{asked}'; did you mean 'vision.projector'"):
            layer(net, asked)
    with pytest.raises(UsageError, match="has no layer 'x'"):
        layer(nn.Linear(1, 1), "x")
    assert layer(net, "vision.projector") is net.vision.projector


def test_the_default_place_is_what_enters_the_logits_or_what_the_network_names() -> None:
    assert default_place(zoo.load("fashion-mnist-cnn")) == Place("8", before=True)
    assert default_place(zoo.load("fashion-mnist-dual-encoder")) == Place("image")
    with pytest.raises(UsageError, match="module=NAME"):
        default_place(TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), classes=10))
    with pytest.raises(BadModel, match="no torch module"):
        default_place(FunctionModel(lambda x: x))


def test_embeddings_of_a_classifier_s_penultimate_layer() -> None:
    model, x = zoo.load("fashion-mnist-cnn"), uniform(1, 7, 1, 28, 28)
    z = embeddings(model, x, Place("8", before=True), batch=3)
    assert torch.allclose(model.module[8](z), model(x), atol=1e-5)
    assert torch.equal(z, embeddings(model, x, Place("7"), batch=3))
    assert not z.requires_grad


def test_a_layer_that_runs_twice_or_mixes_samples_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    with pytest.raises(BadModel, match="asked for 2 times"):
        embeddings(TorchModel(Twice()), torch.zeros(3, 2), Place("inner"))


@pytest.fixture(scope="module")
def guarded() -> Projected:
    return projected(zoo.load("fashion-mnist-cnn"), filter_of(64, 9), Place("8", before=True))


def test_it_computes_the_projection_before_the_head(guarded: Projected) -> None:
    x = uniform(2, 6, 1, 28, 28).requires_grad_()
    body, head = guarded.model.module[:8], guarded.model.module[8]
    answer, expected = guarded(x), head(guarded.fitted.projection(body(x)))
    assert torch.allclose(answer, expected, atol=1e-6)
    got, wanted = (torch.autograd.grad(each.square().sum(), x)[0] for each in (answer, expected))
    assert got.abs().max() > 0
    assert torch.allclose(got, wanted, atol=1e-6)


def test_it_is_a_model_and_the_one_inside_is_unchanged(guarded: Projected) -> None:
    inside = guarded.undefended
    plain, x = zoo.load("fashion-mnist-cnn"), uniform(3, 4, 1, 28, 28)
    assert torch.equal(inside(x), plain(x))
    assert inside.state_sha256() == plain.state_sha256()
    assert guarded.describe().state_sha256 != plain.state_sha256()
    assert plain.state_sha256() in weights_of(guarded)  # a source of the same weights is white box
    assert isinstance(guarded, Undefended)
    assert isinstance(guarded, Headed)
    assert torch.equal(guarded.head(), plain.head())
    assert (guarded.classes, guarded.space, guarded.passes, guarded.lanes) == (10, plain.space, 1, None)
    view = guarded.attacker_view()
    assert view is not guarded
    assert view.attacker_view() is view
    assert torch.equal(view(x), guarded(x))
    other = projected(plain, filter_of(64, 9, seed=1), guarded.place)
    assert other.describe().state_sha256 != guarded.describe().state_sha256
    assert guarded.to("cpu") is guarded
    with pytest.raises(BadInput, match="fitted to embeddings of 64 dimensions"):
        projected(plain, guarded.fitted, Place("6", before=True))(x)
    with pytest.raises(UsageError, match="no layer '80'"):
        projected(plain, guarded.fitted, Place("80"))


def test_a_copy_on_another_device_takes_its_filter_along(guarded: Projected) -> None:
    moved = projected(guarded.model, guarded.fitted, guarded.place).to("meta")
    assert {each.device.type for top in moved.modules() for each in top.buffers()} == {"meta"}
    assert guarded.fitted.projection.mean.device.type == "cpu"
    assert torch.equal(copy.deepcopy(guarded.fitted.projection).basis, guarded.fitted.projection.basis)


def test_a_stored_filter_belongs_to_its_weights(guarded: Projected, tmp_path: Path) -> None:
    path = tmp_path / "filter.safetensors"
    guarded.save(path)
    again, x = load_projected(path, zoo.load("fashion-mnist-cnn")), uniform(4, 4, 1, 28, 28)
    assert torch.equal(again(x), guarded(x))
    assert again.describe() == guarded.describe()
    with pytest.raises(BadModel, match="other weights"):
        load_projected(path, network())


def test_cards_with_a_base_hold_the_filter_alone(guarded: Projected, tmp_path: Path) -> None:
    base = zoo.publish(guarded.model, {"name": "plain", "task": "fashion-mnist"}, tmp_path)
    inside = zoo.load("plain", tmp_path)
    filtered = projected(inside, guarded.fitted, guarded.place)
    told = {"name": "guarded", "task": "fashion-mnist", "defense": "eigenshield"}
    card = zoo.publish(filtered, {**told, "base": "plain"}, tmp_path)
    assert zoo.Card.from_json(card.to_json()) == card
    assert "base" not in base.to_json()
    assert card.size < 40_000
    x = uniform(5, 4, 1, 28, 28)
    assert torch.equal(zoo.load("guarded", tmp_path)(x), filtered(x))
    zoo.publish(filtered, {**told, "task": "digits", "base": "plain"}, tmp_path)
    with pytest.raises(CheckpointError, match="its base plain is cnn for fashion-mnist"):
        zoo.load("guarded", tmp_path)


def test_an_image_text_model_stays_one() -> None:
    model = zoo.load("fashion-mnist-dual-encoder")
    guarded, x = projected(model, filter_of(128, 9), default_place(model)), uniform(6, 4, 1, 28, 28)
    assert isinstance(guarded, Embeds)
    assert isinstance(guarded, TakesCaptions)
    z = nn.functional.normalize(guarded.fitted.projection(model.network.image(x)), dim=1)
    assert torch.allclose(guarded(x), 10 * z @ model.texts().T, atol=1e-5)
    vector = torch.randn(128, generator=torch.Generator().manual_seed(0))
    toward = guarded.toward(vector)
    assert torch.allclose(toward(x).mean(1), z @ nn.functional.normalize(vector, dim=0), atol=1e-5)
    assert torch.allclose(toward(x).softmax(1), guarded(x).softmax(1), atol=1e-5)
    task = TASKS.build("fashion-mnist-captions")
    assert guarded.with_captions(task.captions, task.class_names()) is guarded
