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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.errors import BadInput, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import (
    Batched,
    Generates,
    KnowsClasses,
    Likelihood,
    ModelInfo,
    Modular,
    Rng,
    Shaped,
    UnderSpeed,
)
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER, Transcripts
from advkit.core.speed import Speed
from advkit.models.language.decoder import Network
from advkit.models.language.passes import Chooser, Job, Passes, full, wide
from advkit.models.language.tokenizers import Tokenizer
from advkit.models.torch import named_tensors, same_device, tensors_sha256

CLASS_NAMES = ("held", "said")

Loss = Literal["ce", "mellowmax"]
Columns = NDArray[np.intp]


class View(Shaped, Modular):
    """One way to query a model; the oracle calls it like a model and freezes the same modules."""

    lanes: Lanes = Lanes()

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

    @override
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


_LogP = dict[tuple[int, ...], Tensor]


class LanguageModel(Passes, Shaped, Batched, UnderSpeed, Likelihood, Generates, KnowsClasses):
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
        super().__init__(network, tokenizer.vocabulary, tokenizer.ends, cache=cache, memory=memory, merge=merge)
        self.tokenizer = tokenizer
        self.name = name or type(network).__name__
        self.source = source
        self.license = license
        self.architecture = architecture

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

    @override
    def under_speed(self, speed: Speed) -> LanguageModel:
        """A copy in the precision of a speed, compiled where it says so; log-probabilities stay float32 at least."""
        network = copy.deepcopy(self.network).requires_grad_(False)
        if speed.precision != "fp32":
            network = network.to(torch.bfloat16 if speed.precision == "bf16" else torch.float16)
        if speed.compile:
            network.compile(dynamic=True)  # candidates grow by a token a step: no two steps have one shape
        return self._with(network)

    @property
    @override
    def batch(self) -> int:
        """Rows worth having in flight at once: those of shared calls, or one, so that a stopped run has lost little."""
        return 16 if self.merges else 1

    @property
    def space(self) -> Transcripts:
        """Transcripts in this tokenizer's ids."""
        return Transcripts(self.tokenizer)

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

    @override
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

    @override
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
            jobs.append(Job(self._before(group), self._rest(group.text, group.shared).expand(count, -1), 1))
        uniforms = None if greedy or not jobs else torch.stack(drawn, 1).flatten(0, 1)
        ids = self._written(jobs, Chooser(temperature, top_p, uniforms), max_new_tokens, min_new_tokens)
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
        if host.size and (roles.min() < 0 or roles.max() > REREAD or (full & ((ids < 0) | (ids >= self.limit))).any()):
            raise BadInput(f"ids or roles out of range; expected ids in [0, {self.limit - 1}] and roles 0 to {REREAD}")
        # A row without a slot, or read anew, shares its words with nobody but its copies.
        free = (roles == SLOT) & ~(roles == REREAD).any(1, keepdims=True)
        keys = np.concatenate((np.where(free, -2, np.where(full, ids, -1)), roles), axis=1)
        members: dict[tuple[bytes, int], list[int]] = {}
        for row, key in enumerate(keys):
            members.setdefault((key.tobytes(), -1 if lengths is None else lengths[row]), []).append(row)
        return [self._group(ids, roles, rows, reply, until) for rows in members.values()]

    def _group(
        self, ids: NDArray[np.int64], roles: NDArray[np.int64], rows: list[int], reply: bool, until: int | None
    ) -> _Group:
        role = roles[rows[0]]
        spoken = np.isin(role, (USER, SLOT, REREAD))
        if until is not None:
            spoken &= np.arange(len(role)) < until
        where, wanted = np.nonzero(spoken)[0], np.nonzero(role == REPLY)[0]
        if reply and not len(wanted):
            raise BadInput("a transcript holds no target reply (role 3): the model has nothing to score")
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
            Job(
                self._before(group),
                self._rest(group.text, group.shared, torch.tensor([group.reply])),
                len(group.reply),
            )
            for group in groups
        ]

        def read(index: int, part: slice, logits: Tensor) -> Tensor:
            reply = torch.tensor([groups[index].reply], device=logits.device)
            return _scores(logits, reply.expand(len(logits), -1), loss, alpha)

        answer = torch.empty((len(x), 2), dtype=wide(x.device), device=x.device)
        for group, found in zip(groups, self._asked(jobs, read), strict=True):
            answer[group.rows.to(x.device)] = _each(group, found).to(answer)
        return answer

    def _continued(self, x: Tensor, until: int | None) -> Tensor:
        groups = self._groups(x, reply=False, until=until)
        jobs = [Job(self._before(group), group.text[:, group.shared :], 1) for group in groups]
        asked = self._asked(jobs, lambda index, part, logits: full(logits[:, -1]))
        dtype = asked[0].dtype if asked else None
        answer = torch.empty((len(x), self.limit), dtype=dtype, device=x.device)
        for group, found in zip(groups, asked, strict=True):
            answer[group.rows.to(x.device)] = _each(group, found).to(answer)
        return answer

    def _mixed(self, row: Tensor, mixture: Tensor, loss: Loss, alpha: float) -> Tensor:
        counts = set((row[..., 1, :] == SLOT).sum(-1).view(-1).tolist())
        if mixture.ndim != 3 or counts - {mixture.shape[1]} or mixture.shape[2] != self.limit:
            held = " or ".join(str(each) for each in sorted(counts))
            raise BadInput(
                f"mixtures of shape {list(mixture.shape)}; the sample has {held} slot tokens, so [N, {held}, "
                f"{self.limit}] was expected"
            )
        rows = row.expand(len(mixture), -1, -1) if row.ndim == 2 else row
        if len(rows) != len(mixture):
            raise BadInput(f"{len(mixture)} mixtures for {len(rows)} samples; expected one for each")
        groups = self._groups(rows)
        jobs: list[Job] = []
        table = self.network.table()[: self.limit]
        for group in groups:
            rest = self._rest(group.text[group.of], group.shared, torch.tensor([group.reply]))
            places = torch.from_numpy(group.slot - group.shared).to(self.device)
            mixed = mixture[group.rows.to(mixture.device)].to(table) @ table
            rest = self.network.embed(rest.to(self.device)).index_copy(1, places, mixed)
            jobs.append(Job(self._before(group), rest, len(group.reply)))

        def read(index: int, part: slice, logits: Tensor) -> Tensor:
            reply = torch.tensor([groups[index].reply], device=logits.device)
            return _scores(logits, reply.expand(len(logits), -1), loss, alpha)

        answer = torch.empty((len(rows), 2), dtype=wide(mixture.device), device=mixture.device)
        for group, found in zip(groups, self._asked(jobs, read), strict=True):
            answer[group.rows.to(answer.device)] = found.to(answer)
        return answer

    def _likelihood(self, x: Tensor) -> Tensor:
        answer = torch.zeros((len(x), x.shape[2]), dtype=wide(x.device), device=x.device)
        groups = [group for group in self._groups(x, reply=False) if len(group.where)]
        begins = [self._before(group) for group in groups]
        known = self._prefix_likelihoods([ids for ids, group in zip(begins, groups, strict=True) if group.shared])
        jobs: list[Job] = []
        wanted: list[Tensor] = []
        of: dict[int, int] = {}
        for index, (ids, group) in enumerate(zip(begins, groups, strict=True)):
            rest = group.text[:, group.shared :]
            # the prefix's last logits speak of the first token; those after the last token speak of nothing
            keep = rest.shape[1] if ids else rest.shape[1] - 1
            if keep > 0:
                of[index] = len(jobs)
                jobs.append(Job(ids, rest[:, :-1], keep))
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
        whole = [Job(ids, torch.empty((1, 0), dtype=torch.long), 1) for ids in dict.fromkeys(many)]
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
            found[ids] = torch.zeros(len(ids), dtype=wide(self.device), device=self.device)
        longer = [ids for ids in left if len(ids) > 1]
        with torch.no_grad():
            told = self._asked(
                [Job((), torch.tensor([ids[:-1]]), len(ids) - 1) for ids in longer],
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
            raise BadInput(
                f"{len(x)} samples and replies of shape {list(replies.shape)}; expected one reply per sample"
            )
        replies = replies.cpu()
        lengths = (replies >= 0).sum(1).tolist()
        if min(lengths, default=1) < 1:
            raise BadInput("an empty reply has no likelihood; expected one token at least")
        groups = self._groups(x, reply=False, lengths=lengths)
        wanted = [replies[group.rows, : lengths[int(group.rows[0])]] for group in groups]
        jobs = [
            Job(self._before(group), self._rest(group.text[group.of], group.shared, each), each.shape[1])
            for group, each in zip(groups, wanted, strict=True)
        ]
        answer = torch.empty((len(x), 1), dtype=wide(x.device), device=x.device)
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
            raise BadInput(f"{len(x)} samples and uniforms of shape {list(uniforms.shape)}; expected [{len(x)}, T]")
        answer = torch.empty(uniforms.shape, dtype=torch.long, device=x.device)
        groups = self._groups(x, reply=False)
        if groups:
            jobs = [Job(self._before(group), self._rest(group.text[group.of], group.shared), 1) for group in groups]
            rows = torch.cat([group.rows for group in groups])
            choose = Chooser(temperature, top_p, uniforms[rows.to(uniforms.device)])
            ids = self._written(jobs, choose, uniforms.shape[1], uniforms.shape[1])
            answer[rows.to(x.device)] = torch.tensor(ids, device=x.device)
        return answer


def _each(group: _Group, found: Tensor) -> Tensor:
    """What was found of a group's texts, for each of its rows."""
    return found[group.of.to(found.device)]


def _log_p(logits: Tensor, ids: Tensor) -> Tensor:
    """log p [N, R] of ids [N, R] under logits [N, R, V], in float32 at least."""
    return full(logits).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _scores(logits: Tensor, reply: Tensor, loss: Loss, alpha: float) -> Tensor:
    """(s, s + lead) [N, 2] of replies [N, R] under logits [N, R, V]."""
    logits = full(logits)
    dtype = wide(logits.device)
    places = reply.unsqueeze(-1)
    wanted = logits.gather(-1, places).squeeze(-1)
    rival = logits.scatter(-1, places, -torch.inf).amax(-1)
    lead = (wanted - rival).amin(1).to(dtype)
    if loss == "ce":
        score = _log_p(logits, reply).to(dtype).mean(1)
    else:
        minus = -wanted.to(dtype)
        score = -(torch.logsumexp(alpha * minus, 1) - float(np.log(reply.shape[1]))) / alpha
    return torch.stack((score, score + lead), 1)


def _known(loss: str, alpha: float) -> None:
    if loss not in ("ce", "mellowmax") or not alpha > 0:
        raise UsageError(f"loss={loss}, alpha={alpha}; expected ce or mellowmax and a positive alpha")


def _legal(temperature: float, top_p: float) -> None:
    if not temperature > 0 or not 0 < top_p <= 1:
        raise UsageError(f"temperature={temperature}, top_p={top_p}; expected a positive one and a fraction up to 1")
