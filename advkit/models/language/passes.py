"""How token sequences go through a network: prefixes remembered, sequences that go together, beginnings sent once.

Sequence by sequence (`merge` off) the shapes are exact: nothing is padded. Merged, they share the calls of the network,
padded on the right, where a causal model never looks. What many sequences begin with goes through once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from advkit.core.errors import BadInput
from advkit.core.protocols import CountsTokens
from advkit.models.language.decoder import Network
from advkit.models.torch import device_of

PREFIXES = 64
"""Prefixes whose keys and values are kept, memory permitting."""
PADDED = 1.5
"""Groups that go through together take at most so many times the tokens that they would take one by one."""
# A second call costs its operations' start, whatever it carries. On one CPU core it pays from about 180 tokens on in a
# decoder of width 64 and from 60 in one of width 576, for any number of layers, since both sides grow with them.
SAVED = 256
"""Tokens that must be saved before what rows begin with goes through ahead of the rest."""


@dataclass(frozen=True, eq=False)
class Job:
    """Rows that go through the network alike.

    begins: ids that all of them begin with
    rest:   what follows: ids [U, m] on the CPU, or embeddings [U, m, D]
    keep:   at how many last positions logits are wanted; position -1 - m is the last one of `begins`
    """

    begins: tuple[int, ...]
    rest: Tensor
    keep: int

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.rest)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return len(self.begins) + self.rest.shape[1]


@dataclass
class Prefix:
    """A prefix that has gone through the network: its past, the logits [1, 1, V] after it, and log-probabilities."""

    past: Any
    logits: Tensor
    bytes: int
    likelihood: Tensor | None = None


Known = dict[tuple[int, ...], Prefix]


@dataclass
class _Kept:
    """The prefixes used last, for weights that have not changed since."""

    stamp: int = 0
    bytes: int = 0
    held: OrderedDict[tuple[Any, ...], Prefix] = field(default_factory=OrderedDict)


class _Begun(NamedTuple):
    """Where jobs that go through together stand.

    past:     of one sequence each, up to where the shortest `begins` ends; None where nothing is remembered
    rests:    what each of them still has to send
    prefixes: theirs, where they are remembered
    """

    past: Any
    rests: list[Tensor]
    prefixes: list[Prefix]


class _Trunks(NamedTuple):
    """What rows begin with.

    length: tokens of a trunk
    first:  one row of each trunk [D]
    of:     which trunk each row has [N]
    """

    length: int
    first: NDArray[np.intp]
    of: NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a language model runs.

    cache:  keep keys and values of prompts between calls
    memory: bytes that one call may take, about
    merge:  prompts share calls of the network; none does on an accelerator, and keeps exact shapes on the CPU, where a
            row's bits then do not depend on other prompts
    """

    cache: bool = True
    memory: int = 2**30
    merge: bool | None = None

    @property
    def running(self) -> dict[str, Any]:
        """As LanguageModel takes them."""
        return {"cache": self.cache, "memory": self.memory, "merge": self.merge}


class Passes(CountsTokens):
    """A network, and how sequences go through it.

    network: runs the tokens; its mode, weights and flags are never changed here
    limit:   ids of the tokenizer: networks pad their tables, and what has no text can't be said
    ends:    ids that end a reply
    cache:   keep keys and values of prefixes that several rows share
    memory:  bytes that one call of the network may take, about; larger groups go through in parts
    merge:   sequences that begin otherwise share calls; None: on an accelerator, not on the CPU

    `tokens` counts the tokens really sent through the network, padding included.
    """

    tokens: int = 0

    def __init__(
        self,
        network: Network,
        limit: int,
        ends: Iterable[int],
        *,
        cache: bool,
        memory: int,
        merge: bool | None,
    ) -> None:
        self.network = network
        self.limit = limit
        self.ends = sorted(ends)
        self.cache = cache
        self.memory = int(memory)
        self.merge = merge
        self._kept = _Kept()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.network) or torch.device("cpu")

    @property
    def merges(self) -> bool:
        """Whether groups of rows share calls of the network."""
        wanted = self.device.type != "cpu" if self.merge is None else self.merge
        return wanted and self.network.gathers

    def _run(self, inputs: Tensor, past: Any, keep: int) -> Tensor:
        self.tokens += inputs.shape[0] * inputs.shape[1]
        # networks pad their tables: what has no text can't be said
        return self.network.run(inputs, past, keep)[..., : self.limit]

    def _extend(self, inputs: Tensor, past: Any, keep: int, consume: bool = False) -> tuple[Tensor, Any]:
        self.tokens += inputs.shape[0] * inputs.shape[1]
        logits, past = self.network.extend(inputs, past, keep, consume=consume)
        return logits[..., : self.limit], past

    def _remembered(self) -> _Kept | None:
        """What is kept of prefixes; None where nothing may be."""
        parameters = list(self.network.parameters())
        live = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
        if not self.cache or live:  # what is kept has no graph: weights being trained need one
            return None
        stamp = hash(tuple((each.data_ptr(), _version(each)) for each in parameters))
        if stamp != self._kept.stamp:  # the weights have moved: what they made of a prefix holds no more
            self._kept = _Kept(stamp)
        return self._kept

    def _prefixes(self, kept: _Kept, many: Sequence[tuple[int, ...]]) -> list[Prefix]:
        """Prefixes, one id long at least, that have gone through the network, kept for the next time."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        def key(ids: tuple[int, ...]) -> tuple[Any, ...]:
            return ids, self.network.training, autocast

        found: dict[tuple[int, ...], Prefix] = {}
        for ids in many:
            if key(ids) in kept.held:
                kept.held.move_to_end(key(ids))
                found[ids] = kept.held[key(ids)]
        missing = [Job((), torch.tensor([ids]), 1) for ids in dict.fromkeys(many) if ids not in found]
        for bundle in self._bundles(missing, False):
            for entry, index in zip(self._made([missing[index] for index in bundle]), bundle, strict=True):
                ids = tuple(missing[index].rest[0].tolist())
                found[ids] = kept.held[key(ids)] = entry
                kept.bytes += entry.bytes
        while len(kept.held) > 1 and (len(kept.held) > PREFIXES or kept.bytes > self.memory // 4):
            kept.bytes -= kept.held.popitem(last=False)[1].bytes
        return [found[ids] for ids in many]

    def _made(self, jobs: Sequence[Job]) -> Iterator[Prefix]:
        """Prefixes that go through together."""
        lengths = [job.length for job in jobs]
        width, least = max(lengths), min(lengths)
        # outside inference mode: a past born inside it could not be part of a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            inputs = torch.cat([_padded(job.rest, width) for job in jobs]).to(self.device)
            logits, past = self._extend(inputs, None, width - least + 1)
            for index, length in enumerate(lengths):
                own = past
                if len(jobs) > 1:
                    one = self.network.select(past, torch.tensor([index], device=self.device))
                    own = self.network.gathered([one], length)
                last = logits[index : index + 1, length - least : length - least + 1].clone()
                yield Prefix(own, last, self.network.past_bytes(own))

    def _parts(self, rows: int, new: int, past: int, keep: int) -> Iterator[slice]:
        """Row ranges whose passage fits the memory."""
        most = max(1, self.memory // max(1, self.network.row_bytes(new, past, keep)))
        for start in range(0, rows, most):
            yield slice(start, min(start + most, rows))

    def _taken(self, jobs: Sequence[Job], more: int = 0) -> Iterator[tuple[list[int], Known | None]]:
        """Which jobs go through together, and the prefixes that are remembered of them.

        more: tokens that will follow each row's own
        """
        self._fit(max((job.length for job in jobs), default=0) + max(0, more - 1), more)
        kept = self._remembered()
        for some in self._flights(jobs):
            known: Known | None = None
            if kept is not None:
                many = list(dict.fromkeys(jobs[index].begins for index in some if jobs[index].begins))
                known = dict(zip(many, self._prefixes(kept, many), strict=True))
            for bundle in self._bundles([jobs[index] for index in some], known is not None, more):
                yield [some[index] for index in bundle], known

    def _fit(self, length: int, more: int) -> None:
        """BadInput where a sequence is longer than what the network was made for."""
        window = self.network.window
        if window is not None and length > window:
            what = (
                f"a chat and a reply of up to {more} tokens have" if more else "template, prompt, suffix and reply have"
            )
            raise BadInput(
                f"{what} {length} tokens together, more than the model's context window of {window}: take shorter "
                "prompts or replies (max_tokens=), or fewer tokens in the suffix (n=)"
            )

    def _flights(self, jobs: Sequence[Job]) -> Iterator[list[int]]:
        """Jobs whose prefixes may be made, and held, at the same time."""
        if not self.merges:
            yield from ([index] for index in range(len(jobs)))
            return
        some: list[int] = []
        begins: set[tuple[int, ...]] = set()
        taken = 0
        for index in sorted(range(len(jobs)), key=lambda each: len(jobs[each].begins)):
            ids = jobs[index].begins
            cost = 0 if ids in begins else self.network.row_bytes(len(ids), 0, 1)
            if some and (taken + cost > self.memory or len(begins | {ids}) > PREFIXES):
                yield some
                some, begins, taken = [], set(), 0
                cost = self.network.row_bytes(len(ids), 0, 1)
            some.append(index)
            begins.add(ids)
            taken += cost
        if some:
            yield some

    def _bundles(self, jobs: Sequence[Job], cached: bool, more: int = 0) -> Iterator[list[int]]:
        """Which jobs go through together: one, or as many as padding and memory allow."""
        if not self.merges:
            yield from ([index] for index in range(len(jobs)))
            return
        begun = [len(job.begins) if cached else 0 for job in jobs]
        bundle: list[int] = []
        shared = width = rows = exact = free = 0
        for index in sorted(range(len(jobs)), key=lambda each: (begun[each], jobs[each].length)):
            job, alone = jobs[index], jobs[index].length - begun[index]
            if not alone:  # nothing to send: what is kept answers
                yield [index]
                continue
            if bundle:
                # what the shortest `begins` leaves of the longer ones goes through as well
                sent = job.length - shared
                wide, many, least = max(width, sent), rows + job.size, exact + job.size * alone
                unasked = min(free, sent - min(job.keep, sent))
                each = self.network.row_bytes(shared + wide + more, 0, wide - unasked)
                if many * wide <= PADDED * least and many * each <= self.memory:
                    bundle.append(index)
                    width, rows, exact, free = wide, many, least, unasked
                    continue
                yield bundle
            bundle, shared, width, rows = [index], begun[index], alone, job.size
            exact, free = rows * alone, alone - min(job.keep, alone)
        if bundle:
            yield bundle

    def _begun(self, jobs: Sequence[Job], known: Known | None) -> _Begun:
        """The past that jobs share in length, and what is left to send."""
        shared = 0 if known is None else min(len(job.begins) for job in jobs)
        prefixes, past = [], None
        if known is not None and shared:
            prefixes = [known[job.begins] for job in jobs]
            past = prefixes[0].past
            if len(jobs) > 1:
                past = self.network.gathered([each.past for each in prefixes], shared)
        rests = []
        for job in jobs:
            rest = job.rest
            if len(job.begins) > shared:
                start = torch.tensor([job.begins[shared:]])
                start = self.network.embed(start.to(rest.device)) if rest.is_floating_point() else start
                rest = torch.cat((start.expand(len(rest), *start.shape[1:]), rest), 1)
            rests.append(rest)
        return _Begun(past, rests, prefixes)

    def _grown(
        self, inputs: Tensor, past: Any, owner: NDArray[np.intp], most: int, cached: bool
    ) -> tuple[Tensor, Any, bool]:
        """What is left to send of inputs [N, n], on which past, and whether that past is nobody else's.

        past: of as many sequences as there are owners; owner: which of them each row continues, [N]
        most: no more than so many of a row's tokens may go through ahead

        Rows that begin alike send what they have in common once.
        """
        trunks = None
        if cached and self.network.gathers and not inputs.is_floating_point():
            trunks = _trunks(inputs.numpy(), owner, most)
        inputs = inputs.to(self.device)
        several = past is not None and int(owner[-1]) > 0
        if trunks is None:
            if several and int(owner[-1]) + 1 < len(owner):
                past = self.network.select(past, torch.from_numpy(owner).to(self.device))
            return inputs, past, several
        first = torch.from_numpy(trunks.first).to(self.device)
        if several:
            past = self.network.select(past, torch.from_numpy(owner[trunks.first]).to(self.device))
        _, past = self._extend(inputs[first, : trunks.length], past, 1, consume=several)
        if len(first) > 1:
            past = self.network.select(past, torch.from_numpy(trunks.of).to(self.device))
        return inputs[:, trunks.length :], past, True

    def _logits(self, jobs: Sequence[Job]) -> Iterator[tuple[int, slice, Tensor]]:
        """Which job, which of its rows, and their logits [n, keep, V]; the rows of a job come in order."""
        for bundle, known in self._taken(jobs):
            if len(bundle) > 1:
                for index, logits in zip(bundle, self._through([jobs[each] for each in bundle], known), strict=True):
                    yield index, slice(0, len(logits)), logits
                continue
            (index,), job = bundle, jobs[bundle[0]]
            past = 0 if known is None else len(job.begins)
            for part in self._parts(job.size, job.length - past, past, job.keep):
                (logits,) = self._through([replace(job, rest=job.rest[part])], known)
                yield index, part, logits

    def _through(self, jobs: Sequence[Job], known: Known | None) -> list[Tensor]:
        """Logits [U, keep, V] of every job that goes through with the others."""
        past, rests, prefixes = self._begun(jobs, known)
        sent = [rest.shape[1] for rest in rests]
        inside = [min(job.keep, new) for job, new in zip(jobs, sent, strict=True)]
        width, free = max(sent), min(new - most for new, most in zip(sent, inside, strict=True))
        logits: Tensor | None = None
        if width:
            inputs = torch.cat([_padded(rest, width) for rest in rests]) if len(jobs) > 1 else rests[0]
            owner = np.repeat(np.arange(len(jobs)), [job.size for job in jobs])
            left, past, mine = self._grown(inputs, past, owner, free, known is not None)
            if mine:
                logits, _ = self._extend(left, past, width - free, consume=True)
            else:
                logits = self._run(left, past, width - free)
        answers, row = [], 0
        for index, job in enumerate(jobs):
            pieces = []
            if job.keep > sent[index]:
                pieces.append(prefixes[index].logits.expand(job.size, -1, -1))
            if logits is not None and inside[index]:
                last = sent[index] - free
                pieces.append(logits[row : row + job.size, last - inside[index] : last])
            answers.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))
            row += job.size
        return answers

    def _asked(self, jobs: Sequence[Job], read: Callable[[int, slice, Tensor], Tensor]) -> list[Tensor]:
        """What is read in the logits of every job's rows."""
        found: list[list[Tensor]] = [[] for _ in jobs]
        for index, part, logits in self._logits(jobs):
            found[index].append(read(index, part, logits))
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in found]

    @torch.no_grad()
    def _written(self, jobs: Sequence[Job], choose: Chooser, most: int, least: int) -> list[list[int]]:
        """Replies to the rows of all jobs, one after the other; those that have ended leave the batch."""
        starts = np.cumsum([0, *(job.size for job in jobs)]).tolist()
        rows = [torch.arange(start, stop) for start, stop in pairwise(starts)]
        written: list[list[int]] = [[] for _ in range(starts[-1])]
        # without padding every row's next token stands in the same place
        alike: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            alike.setdefault(job.length, []).append(index)
        for same in alike.values():
            for bundle, known in self._taken([jobs[index] for index in same], most):
                chosen = [same[each] for each in bundle]
                if len(chosen) > 1:
                    live = torch.cat([rows[index] for index in chosen])
                    self._write(written, live, [jobs[index] for index in chosen], known, choose, most, least)
                    continue
                (index,), job = chosen, jobs[chosen[0]]
                for part in self._parts(job.size, 1, job.length + most, 1):
                    cut = replace(job, rest=job.rest[part])
                    self._write(written, rows[index][part], [cut], known, choose, most, least)
        return written

    def _write(
        self,
        written: list[list[int]],
        live: Tensor,
        jobs: Sequence[Job],
        known: Known | None,
        choose: Chooser,
        most: int,
        least: int,
    ) -> None:
        ends = torch.tensor(self.ends, dtype=torch.long, device=self.device)
        # samples of one text: it goes through once
        once = [replace(job, rest=job.rest[:1]) if bool((job.rest == job.rest[:1]).all()) else job for job in jobs]
        past, rests, prefixes = self._begun(once, known)
        sizes = [job.size for job in once]
        sent = sum(sizes)
        if rests[0].shape[1]:
            owner = np.repeat(np.arange(len(once)), sizes)
            most_shared = rests[0].shape[1] - 1
            inputs, past, mine = self._grown(torch.cat(rests), past, owner, most_shared, known is not None)
            logits, past = self._extend(inputs, past, 1, consume=mine)
            mine = True
        else:
            logits, past, mine = prefixes[0].logits, prefixes[0].past, False
        logits = logits[:, -1]
        if 1 < sent < len(live):
            places = np.concatenate(
                [
                    first + np.arange(job.size) % size
                    for first, job, size in zip(np.cumsum([0, *sizes[:-1]]), jobs, sizes, strict=True)
                ]
            )
            of = torch.from_numpy(places).to(self.device)
            logits, past = logits[of], self.network.select(past, of)
        logits = logits.expand(len(live), -1)
        single = sent == 1  # the past is that of one sequence, which all continue
        for t in range(most):
            scores = full(logits)
            if t < least and len(ends):
                scores = scores.index_fill(1, ends, -torch.inf)
            token = choose(scores, live, t)
            stopped = torch.isin(token, ends)
            for row, one, stop in zip(live.tolist(), token.tolist(), stopped.tolist(), strict=True):
                if not stop:
                    written[row].append(one)
            if t + 1 == most or bool(stopped.all()):
                return
            going = (~stopped).nonzero().squeeze(1)
            if len(going) < len(live):
                live, token = live[going.cpu()], token[going]
                if not single:
                    past = self.network.select(past, going)
            # a past that nobody else holds may be written into
            logits, past = self._extend(token[:, None], past, 1, consume=mine)
            logits, single, mine = logits[:, -1], False, True


class Chooser:
    """Tokens from logits: the largest, or the inverse of the distribution at given uniforms [N, T]."""

    def __init__(self, temperature: float, top_p: float, uniforms: Tensor | None) -> None:
        self.temperature, self.top_p, self.uniforms = temperature, top_p, uniforms

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> Tensor:
        """Long [n] from logits [n, V] of rows [n]."""
        if self.uniforms is None:
            return logits.argmax(1)
        p = (logits.to(wide(logits.device)) / self.temperature).softmax(1)
        order = None
        if self.top_p < 1.0:
            p, order = p.sort(dim=1, descending=True, stable=True)
            # the token that takes the sum over the bound still belongs to the nucleus
            p = torch.where(p.cumsum(1) - p < self.top_p, p, 0.0)
        sums = p.cumsum(1)
        aim = self.uniforms[rows.to(self.uniforms.device), t].to(sums) * sums[:, -1]
        found = torch.searchsorted(sums, aim[:, None], right=True)
        # round-off may aim at the very end: the last token that has any probability
        last = (p > 0).long().cumsum(1).argmax(1, keepdim=True)
        found = torch.minimum(found, last)
        return (found if order is None else order.gather(1, found)).squeeze(1)


def _padded(rest: Tensor, width: int) -> Tensor:
    """Ids [U, m] or embeddings [U, m, D], zeros behind them up to a width."""
    missing = width - rest.shape[1]
    return functional.pad(rest, (0, 0, 0, missing) if rest.ndim == 3 else (0, missing)) if missing else rest


def _trunks(ids: NDArray[np.int64], owner: NDArray[np.intp], most: int) -> _Trunks | None:
    """How rows [N, n] of ids that begin alike send the least: the tokens they share once, the rest of each.

    owner: rows of different owners [N] never begin alike; most: of a row's first tokens, how many may be shared
    """
    rows = len(ids)
    if rows * most < SAVED:
        return None
    head = ids[:, :most]
    order = np.lexsort((*head.T[::-1], owner))
    ranked, held = head[order], owner[order]
    same = np.minimum.accumulate(ranked[1:] == ranked[:-1], axis=1).sum(1)
    same[held[1:] != held[:-1]] = -1
    # trunks of t tokens: one, and another wherever neighbours share fewer than t
    lengths = np.arange(1, most + 1)
    different = 1 + np.bincount(same + 1, minlength=most + 2).cumsum()[1 : most + 1]
    saved = (rows - different) * lengths
    best = int(saved.argmax())
    if saved[best] < SAVED:
        return None
    fresh = np.concatenate(([True], same < lengths[best]))
    of = np.empty(rows, dtype=np.intp)
    of[order] = fresh.cumsum() - 1
    return _Trunks(int(lengths[best]), order[fresh], of)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
