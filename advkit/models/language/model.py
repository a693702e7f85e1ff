"""A language model as the harness sees it: transcripts in, "held back" or "said" out (arXiv 2307.15043, 2402.15570).

A transcript is a row [2, W] of token ids and roles. The model reads template, user's words, template and the wanted
reply, and answers two scores: a classifier of two classes, of which the second wins where greedy decoding begins
with that reply.

Rows are evaluated in groups that differ in their slot alone. Group by group (`merge` off) the shapes are exact: nothing
is padded, and a row's bits depend on the candidates of its own prompt that travel with it, never on other rows. Merged,
groups share the calls of the network, padded on the right, where a causal model never looks. Identical rows go through
once, and so do the tokens that many candidates of one prompt begin with.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from advkit.core.errors import BadInput, UsageError
from advkit.core.oracle import Lanes
from advkit.core.protocols import ModelInfo, Rng
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER, Transcripts
from advkit.core.speed import Speed
from advkit.models.language.decoder import Network
from advkit.models.language.tokenizers import Tokenizer
from advkit.models.torch import device_of, named_tensors, same_device, tensors_sha256

CLASS_NAMES = ("held", "said")
PREFIXES = 64
"""Prefixes whose keys and values are kept, memory permitting."""
PADDED = 1.5
"""Groups that go through together take at most so many times the tokens that they would take one by one."""
# A second call costs its operations' start, whatever it carries. On one CPU core it pays from about 180 tokens on in a
# decoder of width 64 and from 60 in one of width 576, for any number of layers, since both sides grow with them.
SAVED = 256
"""Tokens that must be saved before what rows begin with goes through ahead of the rest."""

Loss = Literal["ce", "mellowmax"]
Columns = NDArray[np.intp]


class View:
    """One way to ask a model; the oracle calls it like a model and freezes the same modules."""

    def __init__(self, model: LanguageModel, ask: Callable[[Tensor], Tensor], name: str) -> None:
        self.model = model
        self.lanes = model.lanes
        self._ask = ask
        self._name = name

    def __call__(self, x: Tensor) -> Tensor:
        return self._ask(x)

    def __repr__(self) -> str:
        return f"{self.model.name}.{self._name}"

    @property
    def space(self) -> Any:
        """The model's."""
        return self.model.space

    def modules(self) -> tuple[nn.Module, ...]:
        """Those of the model."""
        return self.model.modules()


@dataclass
class _Group:
    """Rows that differ in their slot alone.

    rows:   which rows of the batch, long [N]
    of:     which text each of them has, long [N]
    text:   the different texts, user's words and slot [U, t], on the CPU
    where:  columns of the batch that the text stands in
    slot:   places of the slot's tokens in the text
    shared: how many leading tokens of the text are the same throughout: those before the slot
    reply:  ids of the wanted reply
    """

    rows: Tensor
    of: Tensor
    text: Tensor
    where: Columns
    slot: Columns
    shared: int
    reply: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Job:
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
class _Prefix:
    """A prefix that has gone through the network: its past, the logits [1, 1, V] after it, and log-probabilities."""

    past: Any
    logits: Tensor
    bytes: int
    likelihood: Tensor | None = None


_Known = dict[tuple[int, ...], _Prefix]
_LogP = dict[tuple[int, ...], Tensor]


@dataclass
class _Kept:
    """The prefixes used last, for weights that have not changed since."""

    stamp: int = 0
    bytes: int = 0
    held: OrderedDict[tuple[Any, ...], _Prefix] = field(default_factory=OrderedDict)


class _Begun(NamedTuple):
    """Where jobs that go through together stand.

    past:     of one sequence each, up to where the shortest `begins` ends; None where nothing is remembered
    rests:    what each of them still has to send
    prefixes: theirs, where they are remembered
    """

    past: Any
    rests: list[Tensor]
    prefixes: list[_Prefix]


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


class LanguageModel:
    """A causal language model behind a chat template.

    network:   runs the tokens; its mode, weights and flags are never changed here
    tokenizer: reads and writes text and holds the template
    name, source, license, architecture: for reports
    cache:     keep keys and values of prefixes that several rows share
    memory:    bytes that one call of the network may take, about; larger groups go through in parts
    merge:     groups of rows share calls of the network; None: on an accelerator, not on the CPU

    `tokens` counts the tokens really sent through the network, padding included. Merged or not, answers are the same up
    to round-off. Raises BadInput for rows that are no transcripts.
    """

    classes = 2
    lanes = Lanes(chunk=2**30, multiple=1)

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        source: str = "",
        license: str = "",
        architecture: str = "",
        cache: bool = True,
        memory: int = 2**29,
        merge: bool | None = None,
    ) -> None:
        if tokenizer.vocabulary > network.vocabulary:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocabulary} ids and the network {network.vocabulary}: they do not "
                "belong together"
            )
        self.network = network
        self.tokenizer = tokenizer
        self.name = name or type(network).__name__
        self.source = source
        self.license = license
        self.architecture = architecture
        self.cache = cache
        self.memory = int(memory)
        self.merge = merge
        self.tokens = 0
        self._kept = _Kept()

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}, vocabulary={self.tokenizer.vocabulary})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        return self._with(copy.deepcopy(self.network, memo))

    def _with(self, network: Network, **changes: Any) -> LanguageModel:
        said = ("name", "source", "license", "architecture", "cache", "memory", "merge")
        settings = {name: getattr(self, name) for name in said}
        return LanguageModel(network, self.tokenizer, **settings | changes)

    def using(self, **running: Any) -> LanguageModel:
        """The same weights, run otherwise: cache, memory, merge."""
        return self._with(self.network, **running)

    def under_speed(self, speed: Speed) -> LanguageModel:
        """A copy in the precision of a speed, compiled where it says so; log-probabilities stay float32 at least."""
        network = copy.deepcopy(self.network).requires_grad_(False)
        if speed.precision != "fp32":
            network = network.to(torch.bfloat16 if speed.precision == "bf16" else torch.float16)
        if speed.compile:
            network.compile(dynamic=True)  # candidates grow by a token a step: no two steps have one shape
        return self._with(network)

    @property
    def batch(self) -> int:
        """Rows worth having in flight at once: those of shared calls, or one, so that a stopped run has lost little."""
        return 16 if self.merges else 1

    @property
    def space(self) -> Transcripts:
        """Transcripts in this tokenizer's ids."""
        return Transcripts(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.network) or torch.device("cpu")

    @property
    def merges(self) -> bool:
        """Whether groups of rows share calls of the network."""
        wanted = self.device.type != "cpu" if self.merge is None else self.merge
        return wanted and self.network.gathers

    def attacker_view(self) -> Self:
        """Itself: what it computes is what an attacker asks."""
        return self

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    def describe(self) -> ModelInfo:
        tensors = list(named_tensors(self.network).items())
        # the tokenizer and its template decide every answer too
        digest = torch.tensor(list(bytes.fromhex(self.tokenizer.digest)), dtype=torch.uint8)
        return ModelInfo(
            name=self.name,
            architecture=self.architecture or type(self.network).__name__,
            state_sha256=tensors_sha256([*tensors, ("tokenizer.digest", digest)]),
            n_parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            classes=self.classes,
            source=self.source,
            license=self.license,
        )

    def to(self, device: torch.device | str) -> LanguageModel:
        """Itself where its weights are there already, else a copy there."""
        target = torch.device(device)
        if all(same_device(tensor.device, target) for tensor in named_tensors(self.network).values()):
            return self
        return self._with(copy.deepcopy(self.network).to(target))

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [B, 2] of transcripts [B, 2, W].

        s is the mean over the reply of log p(token | all before it), lead the least logit of a wanted token above its
        strongest rival; the scores are (s, s + lead), so that "said" wins exactly where greedy decoding begins with
        the reply. A tie counts as held back.
        """
        return self._scored(x, "ce", 1.0)

    def under(self, loss: Loss, alpha: float = 1.0) -> View:
        """x -> [B, 2] with another first score: minus the mellowmax of minus the wanted tokens' logits (`loss`)."""
        _known(loss, alpha)
        return View(self, lambda x: self._scored(x, loss, alpha), f"under({loss})")

    def continuing(self, until: int | None = None) -> View:
        """x -> [B, V]: logits of the token that would follow the user's words and slot, no template after them.

        until: only what stands in columns before this one is read; None reads all
        """
        return View(self, lambda x: self._continued(x, until), "continuing()")

    def relaxed(self, row: Tensor, loss: Loss = "ce", alpha: float = 1.0) -> View:
        """E -> [N, 2]: the row [2, W] with mixtures E [N, l, V] of tokens in place of its l slot tokens.

        Of rows [N, 2, W], row i takes mixture i; all have l slot tokens. Differentiable with respect to E; at one-hot E
        it is the model's own answer. loss, alpha: see `under`.
        """
        _known(loss, alpha)
        return View(self, lambda mixture: self._mixed(row, mixture, loss, alpha), f"relaxed({loss})")

    def likelihood(self) -> View:
        """x -> [B, W]: log p of every token of the user's words and slot given all before it; 0 elsewhere.

        The first token is given the template; where there is none it has nothing before it and scores 0.
        """
        return View(self, self._likelihood, "likelihood()")

    def answering(self, replies: Tensor) -> View:
        """x -> [B, 1]: mean negative log-likelihood of replies [B, R] (-1 padded) in place of the rows' own."""
        return View(self, lambda x: self._answered(x, replies), "answering()")

    def sampling(self, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> View:
        """x -> long [B, T]: replies of T tokens, drawn by inverting the distribution at uniforms [B, T].

        Ids that would end a reply are left out, so that every reply has T tokens.
        """
        _legal(temperature, top_p)
        return View(self, lambda x: self._sampled(x, uniforms, temperature, top_p), "sampling()")

    def generate(self, x: Tensor, samples: int, rng: Rng, **settings: Any) -> list[list[str]]:
        """The texts of `generate_ids`, and its settings."""
        ids = self.generate_ids(x, samples, rng, **settings)
        return [[self.tokenizer.decode(reply) for reply in row] for row in ids]

    def generate_ids(
        self,
        x: Tensor,
        samples: int,
        rng: Rng,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 300,
        min_new_tokens: int = 0,
        greedy: bool = False,
    ) -> list[list[list[int]]]:
        """Replies to every row, `samples` each, without the id that ended them.

        The rows' own wanted replies are not read. Each row draws from its own streams, so what it says does not depend
        on its batch; merged, rows whose prompts have the same number of tokens are written together.

        temperature, top_p: of the sampling; min_new_tokens: no reply ends before; greedy: the most likely token always
        """
        _legal(temperature, top_p)
        if samples < 1 or max_new_tokens < 1:
            raise UsageError(f"asked for {samples} replies of up to {max_new_tokens} tokens; expected one at least")
        like = torch.zeros((len(x), max_new_tokens), dtype=torch.float64)
        drawn = [] if greedy else [rng.at("sample", each).uniform(like) for each in range(samples)]
        count = 1 if greedy else samples
        jobs = []
        for row in range(len(x)):
            (group,) = self._groups(x[row : row + 1], reply=False)
            jobs.append(_Job(self._before(group), self._rest(group.text, group.shared).expand(count, -1), 1))
        uniforms = None if greedy or not jobs else torch.stack(drawn, 1).flatten(0, 1)
        ids = self._written(jobs, _Chooser(temperature, top_p, uniforms), max_new_tokens, min_new_tokens)
        return [[list(ids[row * count + each % count]) for each in range(samples)] for row in range(len(x))]

    # --- reading transcripts

    def _groups(
        self, x: Tensor, *, reply: bool = True, until: int | None = None, lengths: Sequence[int] | None = None
    ) -> list[_Group]:
        """The rows of a batch by what they share. `lengths`: of other replies than the rows' own, told apart too."""
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != 2 or x.is_floating_point():
            seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise BadInput(f"got {seen}; expected transcripts, integer ids and roles [B, 2, W]")
        host = x.detach().cpu().numpy()
        ids, roles = host[:, 0], host[:, 1]
        full = roles != NOTHING
        if host.size and (roles.min() < 0 or roles.max() > REREAD or (full & ((ids < 0) | (ids >= self._limit))).any()):
            raise BadInput(f"ids or roles out of range; expected ids in [0, {self._limit - 1}] and roles 0 to {REREAD}")
        # A row without a slot, or read anew, shares its words with nobody but its copies.
        free = (roles == SLOT) & ~(roles == REREAD).any(1, keepdims=True)
        keys = np.concatenate((np.where(free, -2, np.where(full, ids, -1)), roles), axis=1)
        members: dict[tuple[bytes, int], list[int]] = {}
        for row, key in enumerate(keys):
            members.setdefault((key.tobytes(), -1 if lengths is None else lengths[row]), []).append(row)
        return [self._group(ids, roles, rows, reply, until) for rows in members.values()]

    @property
    def _limit(self) -> int:
        return self.tokenizer.vocabulary

    def _group(
        self, ids: NDArray[np.int64], roles: NDArray[np.int64], rows: list[int], reply: bool, until: int | None
    ) -> _Group:
        role = roles[rows[0]]
        spoken = np.isin(role, (USER, SLOT, REREAD))
        if until is not None:
            spoken &= np.arange(len(role)) < until
        where, wanted = np.nonzero(spoken)[0], np.nonzero(role == REPLY)[0]
        if reply and not len(wanted):
            raise BadInput("a transcript holds no wanted reply (role 3): the model has nothing to score")
        if not len(where) and not self.tokenizer.before:
            raise BadInput("a transcript holds no words, and the model has no template to begin with")
        shaped = np.nonzero(np.isin(role[where], (SLOT, REREAD)))[0]
        texts = ids[rows][:, where]
        known: dict[bytes, int] = {}
        of = [known.setdefault(text.tobytes(), len(known)) for text in texts]
        first = [of.index(each) for each in range(len(known))] if len(known) < len(rows) else list(range(len(rows)))
        return _Group(
            torch.tensor(rows),
            torch.tensor(of),
            torch.from_numpy(np.ascontiguousarray(texts[first], dtype=np.int64)),
            where,
            np.nonzero(role[where] == SLOT)[0],
            int(shaped[0]) if len(shaped) else len(where),
            tuple(int(each) for each in ids[rows[0], wanted]),
        )

    # --- the network

    def _run(self, inputs: Tensor, past: Any, keep: int) -> Tensor:
        self.tokens += inputs.shape[0] * inputs.shape[1]
        # networks pad their tables: what has no text can't be said
        return self.network.run(inputs, past, keep)[..., : self._limit]

    def _extend(self, inputs: Tensor, past: Any, keep: int, consume: bool = False) -> tuple[Tensor, Any]:
        self.tokens += inputs.shape[0] * inputs.shape[1]
        logits, past = self.network.extend(inputs, past, keep, consume=consume)
        return logits[..., : self._limit], past

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

    def _prefixes(self, kept: _Kept, many: Sequence[tuple[int, ...]]) -> list[_Prefix]:
        """Prefixes, one id long at least, that have gone through the network, kept for the next time."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

        def key(ids: tuple[int, ...]) -> tuple[Any, ...]:
            return ids, self.network.training, autocast

        found: dict[tuple[int, ...], _Prefix] = {}
        for ids in many:
            if key(ids) in kept.held:
                kept.held.move_to_end(key(ids))
                found[ids] = kept.held[key(ids)]
        missing = [_Job((), torch.tensor([ids]), 1) for ids in dict.fromkeys(many) if ids not in found]
        for bundle in self._bundles(missing, False):
            for entry, index in zip(self._made([missing[index] for index in bundle]), bundle, strict=True):
                ids = tuple(missing[index].rest[0].tolist())
                found[ids] = kept.held[key(ids)] = entry
                kept.bytes += entry.bytes
        while len(kept.held) > 1 and (len(kept.held) > PREFIXES or kept.bytes > self.memory // 4):
            kept.bytes -= kept.held.popitem(last=False)[1].bytes
        return [found[ids] for ids in many]

    def _made(self, jobs: Sequence[_Job]) -> Iterator[_Prefix]:
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
                yield _Prefix(own, last, self.network.past_bytes(own))

    def _parts(self, rows: int, new: int, past: int, keep: int) -> Iterator[slice]:
        """Row ranges whose passage fits the memory."""
        most = max(1, self.memory // max(1, self.network.row_bytes(new, past, keep)))
        for start in range(0, rows, most):
            yield slice(start, min(start + most, rows))

    def _taken(self, jobs: Sequence[_Job], more: int = 0) -> Iterator[tuple[list[int], _Known | None]]:
        """Which jobs go through together, and the prefixes that are remembered of them.

        more: tokens that will follow each row's own
        """
        kept = self._remembered()
        for some in self._flights(jobs):
            known: _Known | None = None
            if kept is not None:
                many = list(dict.fromkeys(jobs[index].begins for index in some if jobs[index].begins))
                known = dict(zip(many, self._prefixes(kept, many), strict=True))
            for bundle in self._bundles([jobs[index] for index in some], known is not None, more):
                yield [some[index] for index in bundle], known

    def _flights(self, jobs: Sequence[_Job]) -> Iterator[list[int]]:
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

    def _bundles(self, jobs: Sequence[_Job], cached: bool, more: int = 0) -> Iterator[list[int]]:
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

    def _begun(self, jobs: Sequence[_Job], known: _Known | None) -> _Begun:
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

    def _logits(self, jobs: Sequence[_Job]) -> Iterator[tuple[int, slice, Tensor]]:
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

    def _through(self, jobs: Sequence[_Job], known: _Known | None) -> list[Tensor]:
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

    def _asked(self, jobs: Sequence[_Job], read: Callable[[int, slice, Tensor], Tensor]) -> list[Tensor]:
        """What is read in the logits of every job's rows."""
        found: list[list[Tensor]] = [[] for _ in jobs]
        for index, part, logits in self._logits(jobs):
            found[index].append(read(index, part, logits))
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in found]

    def _before(self, group: _Group) -> tuple[int, ...]:
        """Ids of the prefix: the template and the words before the slot."""
        return (*self.tokenizer.before, *group.text[0, : group.shared].tolist())

    def _rest(self, text: Tensor, shared: int, reply: Tensor | None = None) -> Tensor:
        """What follows the prefix: the remaining text, the template, and the reply [N or 1, R] but for its last id."""
        after = torch.tensor([self.tokenizer.after], dtype=text.dtype).expand(len(text), -1)
        parts = [text[:, shared:], after]
        if reply is not None:
            parts.append(reply[:, :-1].expand(len(text), -1))
        return torch.cat(parts, 1)

    # --- the answers

    def _scored(self, x: Tensor, loss: Loss, alpha: float) -> Tensor:
        groups = self._groups(x)
        jobs = [
            _Job(
                self._before(group),
                self._rest(group.text, group.shared, torch.tensor([group.reply])),
                len(group.reply),
            )
            for group in groups
        ]

        def read(index: int, part: slice, logits: Tensor) -> Tensor:
            reply = torch.tensor([groups[index].reply], device=logits.device)
            return _scores(logits, reply.expand(len(logits), -1), loss, alpha)

        answer = torch.empty((len(x), 2), dtype=_wide(x.device), device=x.device)
        for group, found in zip(groups, self._asked(jobs, read), strict=True):
            answer[group.rows.to(x.device)] = _each(group, found).to(answer)
        return answer

    def _continued(self, x: Tensor, until: int | None) -> Tensor:
        groups = self._groups(x, reply=False, until=until)
        jobs = [_Job(self._before(group), group.text[:, group.shared :], 1) for group in groups]
        asked = self._asked(jobs, lambda index, part, logits: _full(logits[:, -1]))
        dtype = asked[0].dtype if asked else None
        answer = torch.empty((len(x), self._limit), dtype=dtype, device=x.device)
        for group, found in zip(groups, asked, strict=True):
            answer[group.rows.to(x.device)] = _each(group, found).to(answer)
        return answer

    def _mixed(self, row: Tensor, mixture: Tensor, loss: Loss, alpha: float) -> Tensor:
        counts = set((row[..., 1, :] == SLOT).sum(-1).view(-1).tolist())
        if mixture.ndim != 3 or counts - {mixture.shape[1]} or mixture.shape[2] != self._limit:
            held = " or ".join(str(each) for each in sorted(counts))
            raise BadInput(
                f"mixtures of shape {list(mixture.shape)}; the row has {held} slot tokens, so [N, {held}, "
                f"{self._limit}] was expected"
            )
        rows = row.expand(len(mixture), -1, -1) if row.ndim == 2 else row
        if len(rows) != len(mixture):
            raise BadInput(f"{len(mixture)} mixtures for {len(rows)} rows; expected one for each")
        groups = self._groups(rows)
        jobs: list[_Job] = []
        table = self.network.table()[: self._limit]
        for group in groups:
            rest = self._rest(group.text[group.of], group.shared, torch.tensor([group.reply]))
            places = torch.from_numpy(group.slot - group.shared).to(self.device)
            mixed = mixture[group.rows.to(mixture.device)].to(table) @ table
            rest = self.network.embed(rest.to(self.device)).index_copy(1, places, mixed)
            jobs.append(_Job(self._before(group), rest, len(group.reply)))

        def read(index: int, part: slice, logits: Tensor) -> Tensor:
            reply = torch.tensor([groups[index].reply], device=logits.device)
            return _scores(logits, reply.expand(len(logits), -1), loss, alpha)

        answer = torch.empty((len(rows), 2), dtype=_wide(mixture.device), device=mixture.device)
        for group, found in zip(groups, self._asked(jobs, read), strict=True):
            answer[group.rows.to(answer.device)] = found.to(answer)
        return answer

    def _likelihood(self, x: Tensor) -> Tensor:
        answer = torch.zeros((len(x), x.shape[2]), dtype=_wide(x.device), device=x.device)
        groups = [group for group in self._groups(x, reply=False) if len(group.where)]
        begins = [self._before(group) for group in groups]
        known = self._prefix_likelihoods([ids for ids, group in zip(begins, groups, strict=True) if group.shared])
        jobs: list[_Job] = []
        wanted: list[Tensor] = []
        of: dict[int, int] = {}
        for index, (ids, group) in enumerate(zip(begins, groups, strict=True)):
            rest = group.text[:, group.shared :]
            # the prefix's last logits speak of the first token; those after the last token speak of nothing
            keep = rest.shape[1] if ids else rest.shape[1] - 1
            if keep > 0:
                of[index] = len(jobs)
                jobs.append(_Job(ids, rest[:, :-1], keep))
                wanted.append(rest[:, -keep:])
        told = self._asked(
            jobs, lambda index, part, logits: _log_p(logits, wanted[index][part].to(logits.device)).to(answer.dtype)
        )
        for index, (ids, group) in enumerate(zip(begins, groups, strict=True)):
            parts = []
            if group.shared:
                parts.append(known[ids][-group.shared :].expand(len(group.text), -1))
            if missing := group.text.shape[1] - group.shared - (jobs[of[index]].keep if index in of else 0):
                parts.append(torch.zeros((len(group.text), missing), dtype=answer.dtype, device=self.device))
            if index in of:
                parts.append(told[of[index]])
            found = _each(group, torch.cat(parts, 1)).to(answer)
            rows = group.rows.to(x.device)
            answer[rows[:, None], torch.from_numpy(group.where).to(x.device)] = found
        return answer

    def _prefix_likelihoods(self, many: Sequence[tuple[int, ...]]) -> _LogP:
        """log p [len(ids)] of the tokens of prefixes, the first one's 0; kept beside their pasts."""
        found: _LogP = {}
        whole = [_Job(ids, torch.empty((1, 0), dtype=torch.long), 1) for ids in dict.fromkeys(many)]
        for some in self._flights(whole):
            found |= self._told([whole[index].begins for index in some])
        return found

    def _told(self, several: Sequence[tuple[int, ...]]) -> _LogP:
        """The same of prefixes that may be held at the same time."""
        kept = self._remembered()
        entries = {} if kept is None else dict(zip(several, self._prefixes(kept, several), strict=True))
        found = {ids: entry.likelihood for ids, entry in entries.items() if entry.likelihood is not None}
        left = [ids for ids in several if ids not in found]
        for ids in left:
            found[ids] = torch.zeros(len(ids), dtype=_wide(self.device), device=self.device)
        longer = [ids for ids in left if len(ids) > 1]
        with torch.no_grad():
            told = self._asked(
                [_Job((), torch.tensor([ids[:-1]]), len(ids) - 1) for ids in longer],
                lambda index, part, logits: _log_p(logits, torch.tensor([longer[index][1:]], device=logits.device)),
            )
        for ids, log_p in zip(longer, told, strict=True):
            found[ids][1:] = log_p[0].to(found[ids])
        for ids in left:
            if ids in entries:
                entries[ids].likelihood = found[ids]
        return found

    def _answered(self, x: Tensor, replies: Tensor) -> Tensor:
        if replies.ndim != 2 or len(replies) != len(x):
            raise BadInput(f"{len(x)} rows and replies of shape {list(replies.shape)}; expected one reply per row")
        replies = replies.cpu()
        lengths = (replies >= 0).sum(1).tolist()
        if min(lengths, default=1) < 1:
            raise BadInput("an empty reply has no likelihood; expected one token at least")
        groups = self._groups(x, reply=False, lengths=lengths)
        wanted = [replies[group.rows, : lengths[int(group.rows[0])]] for group in groups]
        jobs = [
            _Job(self._before(group), self._rest(group.text[group.of], group.shared, each), each.shape[1])
            for group, each in zip(groups, wanted, strict=True)
        ]
        answer = torch.empty((len(x), 1), dtype=_wide(x.device), device=x.device)
        asked = self._asked(
            jobs,
            lambda index, part, logits: (
                -_log_p(logits, wanted[index][part].to(logits.device)).to(answer.dtype).mean(1, keepdim=True)
            ),
        )
        for group, found in zip(groups, asked, strict=True):
            answer[group.rows.to(x.device)] = found.to(answer)
        return answer

    # --- writing replies

    def _sampled(self, x: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
        if uniforms.ndim != 2 or len(uniforms) != len(x):
            raise BadInput(f"{len(x)} rows and uniforms of shape {list(uniforms.shape)}; expected [{len(x)}, T]")
        answer = torch.empty(uniforms.shape, dtype=torch.long, device=x.device)
        groups = self._groups(x, reply=False)
        if groups:
            jobs = [_Job(self._before(group), self._rest(group.text[group.of], group.shared), 1) for group in groups]
            rows = torch.cat([group.rows for group in groups])
            choose = _Chooser(temperature, top_p, uniforms[rows.to(uniforms.device)])
            ids = self._written(jobs, choose, uniforms.shape[1], uniforms.shape[1])
            answer[rows.to(x.device)] = torch.tensor(ids, device=x.device)
        return answer

    @torch.no_grad()
    def _written(self, jobs: Sequence[_Job], choose: _Chooser, most: int, least: int) -> list[list[int]]:
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
        jobs: Sequence[_Job],
        known: _Known | None,
        choose: _Chooser,
        most: int,
        least: int,
    ) -> None:
        ends = torch.tensor(sorted(self.tokenizer.ends), dtype=torch.long, device=self.device)
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
            scores = _full(logits)
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


class _Chooser:
    """Tokens from logits: the largest, or the inverse of the distribution at given uniforms [N, T]."""

    def __init__(self, temperature: float, top_p: float, uniforms: Tensor | None) -> None:
        self.temperature, self.top_p, self.uniforms = temperature, top_p, uniforms

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> Tensor:
        """Long [n] from logits [n, V] of rows [n]."""
        if self.uniforms is None:
            return logits.argmax(1)
        p = (logits.to(_wide(logits.device)) / self.temperature).softmax(1)
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


def _each(group: _Group, found: Tensor) -> Tensor:
    """What was found of a group's texts, for each of its rows."""
    return found[group.of.to(found.device)]


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


def _wide(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """log p [N, R] of ids [N, R] under logits [N, R, V], in float32 at least."""
    return _full(logits).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _scores(logits: Tensor, reply: Tensor, loss: Loss, alpha: float) -> Tensor:
    """(s, s + lead) [N, 2] of replies [N, R] under logits [N, R, V]."""
    logits = _full(logits)
    wide = _wide(logits.device)
    places = reply.unsqueeze(-1)
    wanted = logits.gather(-1, places).squeeze(-1)
    rival = logits.scatter(-1, places, -torch.inf).amax(-1)
    lead = (wanted - rival).amin(1).to(wide)
    if loss == "ce":
        score = _log_p(logits, reply).to(wide).mean(1)
    else:
        minus = -wanted.to(wide)
        score = -(torch.logsumexp(alpha * minus, 1) - float(np.log(reply.shape[1]))) / alpha
    return torch.stack((score, score + lead), 1)


def _known(loss: str, alpha: float) -> None:
    if loss not in ("ce", "mellowmax") or not alpha > 0:
        raise UsageError(f"loss={loss}, alpha={alpha}; expected ce or mellowmax and a positive alpha")


def _legal(temperature: float, top_p: float) -> None:
    if not temperature > 0 or not 0 < top_p <= 1:
        raise UsageError(f"temperature={temperature}, top_p={top_p}; expected a positive one and a share up to 1")
