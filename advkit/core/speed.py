"""Speed switches of the attacker's search: low precision, memory layout, compilation. None of them decides a verdict.

The attack's oracle may speak for a faster view of the model; what the protected victim says stays full precision, and
rows that only the view believed fallen are attacked again without it (see evaluation.run.batch). A view computes on a
copy wherever a switch would touch weights or modules; the caller's model is never changed.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from advkit.core.errors import SpecError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import UnderSpeed
from advkit.core.state import frozen
from advkit.core.wrapper import Wrapper

log = logging.getLogger("advkit")

WORDS = ("fp32", "bf16", "fp16", "channels_last", "compile")
BREAK_EVEN = 400_000
"""Rows to be sent through a model from which compiling it, 10 to 25 CPU seconds for a small network, can pay."""
GAIN = 0.97
"""Another memory layout is kept where it takes less than this share of the time."""
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_RESOLUTION = {"fp32": 0.0, "bf16": 2.0**-6, "fp16": 2.0**-9}
_REPETITIONS = 5
_TRIED = 1024
"""Most rows that a view is tried on: some models take any number in one call."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How the attacker's oracle computes.

    precision:     "fp32", or autocast to "bf16" or "fp16" with answers cast back to float32
    channels_last: images and weights with channels last, where that is measured to be faster
    compile:       torch.compile, where the planned passes exceed BREAK_EVEN. On CUDA with mode "reduce-overhead", which
                   makes CUDA graphs; that path has been written from torch's documentation and NEVER RUN, since no
                   device was at hand

    A row that stands far from the boundary stood against a search in this precision alone (see `resolution`).
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False

    @classmethod
    def parse(cls, spec: str | Speed) -> Speed:
        """A spec such as "bf16+compile"; raises SpecError for words it does not know or that exclude each other."""
        if isinstance(spec, Speed):
            return spec
        expected = f"expected fp32, or some of {', '.join(WORDS[1:])} joined by '+'"
        words = [word.strip() for word in spec.split("+")]
        for word in words:
            if word not in WORDS:
                near = get_close_matches(word, WORDS, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SpecError(f"speed {spec!r} has no switch {word!r}: {expected}{hint}")
        precisions = [word for word in dict.fromkeys(words) if word in WORDS[:3]]
        if len(precisions) > 1:
            raise SpecError(f"speed {spec!r} names two precisions, {' and '.join(precisions)}: choose one")
        precision: Any = precisions[0] if precisions else "fp32"
        return cls(precision=precision, channels_last="channels_last" in words, compile="compile" in words)

    @property
    def switches(self) -> tuple[str, ...]:
        """Names of the switches that are on, precision first; none is plain full precision."""
        on = (self.precision != "fp32", self.channels_last, self.compile)
        return tuple(name for name, holds in zip((self.precision, *WORDS[3:]), on, strict=True) if holds)

    def __str__(self) -> str:
        return "+".join(self.switches) or "fp32"

    @property
    def resolution(self) -> float:
        """Margins below this share of the scores' spread are not told from zero in this precision.

        Four times the largest error seen on convolutional networks of up to five layers: 0.0039 in bf16, a rounding.
        """
        return _RESOLUTION[self.precision]

    def without(self, switch: str) -> Self:
        """The same with one switch off."""
        if switch in _HALF:
            return replace(self, precision="fp32")
        changed: dict[str, Any] = {switch: False}
        return replace(self, **changed)

    def view(self, model: Any, sample: Tensor) -> Any:
        """The model as the attack's oracle asks it, with every switch of this Speed applied.

        sample: rows on the device where the view will be asked

        A model whose rows are no numbers, and which is asked in more ways than one, says itself what it is under these
        switches (`under_speed(speed)`); any other gets a View. Raises UsageError where the model can't be copied for a
        switch that needs a copy.
        """
        return model.under_speed(self) if isinstance(model, UnderSpeed) else View(model, self, sample.device.type)

    def settled(
        self, model: Any, sample: Tensor, planned: float = float("inf"), backward: bool = True
    ) -> tuple[Self, Any | None]:
        """The switches worth applying to this model, and its view; None where no switch stays.

        sample:   rows of the task [B, ...] to try the view on
        planned:  rows that the whole evaluation means to send through the model
        backward: the attack may ask for gradients

        A switch is dropped, and the log says so, where it brings nothing (a layout that is not faster, a compilation
        that can't pay off) or where a row's bits would depend on its batch. Raises UsageError where the model does not
        run under the precision asked for, or can't be compiled.
        """
        kept = self
        if kept.compile and planned <= BREAK_EVEN:
            log.info("not compiled: %.3g samples are planned, it pays from %d", planned, BREAK_EVEN)
            kept = kept.without("compile")
        if kept.channels_last and not self._lays_out(model, sample, backward):
            kept = kept.without("channels_last")
        if not kept.switches:
            return kept, None
        view = kept.view(model, sample)
        try:
            _ask(view, _filled(sample, min(kept.lanes(view, sample, backward).chunk, _TRIED)), backward)
        except Exception as error:  # whatever a compiler or a kernel throws
            raise UsageError(
                f"the model can't be computed under speed {kept} ({_first_line(error)}): choose another, "
                f"{'e.g. without compile (it needs a C++ compiler)' if kept.compile else 'e.g. fp32'}"
            ) from error
        if steady(view, sample, kept.lanes(view, sample, backward), backward):
            return kept, view
        log.warning("speed %s is not applied: under it the bits of a sample depend on its batch", kept)
        if kept.channels_last and len(kept.switches) > 1:
            return kept.without("channels_last").settled(model, sample, planned, backward)
        return type(self)(), None

    def lanes(self, view: Any, sample: Tensor, backward: bool = True) -> Lanes:
        """Shapes of the view's calls: one shape where it is compiled, for every other would be compiled too."""
        if self.compile and Lanes.own(view) is None:
            size = Lanes.fitting(sample).chunk if sample.device.type == "cpu" else 256
            return Lanes(chunk=size, multiple=size)
        return Lanes.probed(view, sample, backward)

    def _lays_out(self, model: Any, sample: Tensor, backward: bool) -> bool:
        """Whether channels_last is faster here: the median of interleaved ratios, under the same precision."""
        if sample.ndim != 4 or not any(isinstance(m, nn.Conv2d) for top in model.modules() for m in top.modules()):
            log.info("channels_last is not applied: it is for convolutions on images")
            return False
        rows = _filled(sample, Lanes.fitting(sample).chunk)
        try:
            plain: Any = replace(self, channels_last=False, compile=False).view(model, sample)
            other: Any = replace(self, compile=False).view(model, sample)
        except UsageError as error:
            log.info("channels_last is not applied: %s", error)
            return False
        ratios = []
        with frozen(*model.modules()):
            for repetition in range(_REPETITIONS + 1):
                first, second = (plain, other) if repetition % 2 else (other, plain)
                begin = clock(sample.device)
                _ask(first, rows, backward)
                middle = clock(sample.device)
                _ask(second, rows, backward)
                spent = (middle - begin, clock(sample.device) - middle)
                if repetition:  # the first warms up
                    ratios.append(spent[1] / spent[0] if repetition % 2 else spent[0] / spent[1])
        ratio = statistics.median(ratios)
        if ratio >= GAIN:
            log.info("channels_last is not applied: it takes %.2f of the time", ratio)
        return ratio < GAIN


class View(Wrapper):
    """A model under speed switches; everything else about it (space, description) is the model's own.

    Raises UsageError where a switch needs a copy and the model can't be copied.
    """

    def __init__(self, model: Any, speed: Speed, device: str) -> None:
        self.model = model
        self.speed = speed
        self._device = device
        self._dtype = _HALF.get(speed.precision)
        self._graphs = speed.compile and device == "cuda"
        self._inner = model
        if speed.channels_last or speed.compile:
            self._inner = _copied(model, speed)
            for module in self._inner.modules():
                if speed.channels_last:
                    module.to(memory_format=torch.channels_last)
                if speed.compile:
                    module.compile(mode="reduce-overhead" if self._graphs else None, dynamic=False)

    def __repr__(self) -> str:
        return f"View({self.model!r}, {self.speed})"

    def __call__(self, x: Tensor) -> Tensor:
        """Answers as float32 where a precision is set."""
        held: list[Tensor] = []
        if self.speed.precision == "fp16" and x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)
            # Small gradients would underflow: rows travel backward at length one and get their length back here.
            x.register_hook(lambda gradient: _scaled(gradient, held[0]) if held else gradient)  # type: ignore[no-untyped-call]
        if self.speed.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self._cast():
            answer: Tensor = self._inner(x)
        if self._graphs:
            answer = answer.clone()  # a graph writes its next answer into the same memory
        if self._dtype is None or not answer.is_floating_point():
            return answer
        answer = answer.float()
        if self.speed.precision == "fp16" and answer.requires_grad:
            answer = answer.view_as(answer)

            def shorten(gradient: Tensor) -> Tensor:
                length = gradient.abs().flatten(1).amax(1)
                length = torch.where(length > 0, length, 1.0)
                held[:] = [length]
                return _scaled(gradient, 1 / length)

            answer.register_hook(shorten)  # type: ignore[no-untyped-call]
        return answer

    def _cast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        # The cache of cast weights serves training: it holds leaves that require a gradient, and none does here.
        return torch.autocast(self._device, dtype=self._dtype, cache_enabled=False)

    def attacker_view(self) -> View:
        return self

    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that really compute."""
        return tuple(self._inner.modules())


def steady(view: Callable[[Tensor], Tensor], x: Tensor, lanes: Lanes, backward: bool = True) -> bool:
    """Whether rows get the same bits wherever they stand among others, in calls of these shapes.

    Always where lanes are of any size: there nobody promises it (accelerators).
    """
    if (lanes.multiple == 1 and not lanes.sizes) or not x.is_floating_point() or x.device.type != "cpu":
        return True
    rows = _filled(x, lanes.chunk)
    turned = torch.arange(lanes.chunk).roll(lanes.multiple // 2 + 3)
    whole, moved = _ask(view, rows, backward), _ask(view, rows[turned], backward)
    if not all(torch.equal(a[turned], b) for a, b in zip(whole, moved, strict=True)):
        return False
    few = rows[:1].expand(lanes.multiple, *rows.shape[1:]).clone()
    return all(torch.equal(a[:1], b[:1]) for a, b in zip(whole, _ask(view, few, backward), strict=True))


def _filled(x: Tensor, rows: int) -> Tensor:
    """As many rows, those at hand over and over."""
    return x.detach()[torch.arange(rows, device=x.device) % len(x)]


def _ask(view: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """The answer and, where asked for, the input gradient of its squares."""
    if not backward or not x.is_floating_point():
        with torch.no_grad():
            return (view(x),)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        answer = view(leaf)
        total = answer.square().sum()
        if not total.requires_grad:
            return answer.detach(), torch.zeros_like(leaf)
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0]
    return answer.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def _copied(model: Any, speed: Speed) -> Any:
    """The model with modules of its own, frozen; raises UsageError where they would still be the caller's."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise UsageError(
            f"speed {speed} needs a copy of the model, which can't be made ({_first_line(error)})"
        ) from error
    own, theirs = list(twin.modules()), list(model.modules())
    mine = {id(t) for m in own for t in chain(m.modules(), m.parameters(), m.buffers())}
    shared = mine & {id(t) for m in theirs for t in chain(m.modules(), m.parameters(), m.buffers())}
    if shared:
        raise UsageError(
            f"speed {speed} needs a copy of the model, and a copy of {type(model).__name__} still holds the original's "
            "modules: choose a speed without channels_last and compile"
        )
    for module in own:
        module.requires_grad_(False)
    return twin


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    return rows * factor.view(-1, *(1 for _ in rows.shape[1:]))


def clock(device: torch.device) -> float:
    """A moment: CPU seconds on a CPU, where others share it; wall seconds of finished work elsewhere."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
