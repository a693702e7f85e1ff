"""A language model as the harness sees it: transcripts in, "held back" or "said" out (arXiv 2307.15043, 2402.15570).

A transcript is a row [2, W] of token ids and roles. The model reads template, user's words, template and the wanted
reply, and answers two scores: a classifier of two classes, of which the second wins where greedy decoding begins
with that reply.

Rows are evaluated in groups that differ in their slot alone, in exact shapes: nothing is padded, and a row's bits
depend on the candidates of its own prompt that travel with it, never on other rows. Identical rows go through once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advkit.core.errors import BadInput, UsageError
from advkit.core.oracle import Lanes
from advkit.core.protocols import ModelInfo, Rng
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER, Transcripts
from advkit.models.language.decoder import Network
from advkit.models.language.tokenizers import Tokenizer
from advkit.models.torch import device_of, named_tensors, same_device, tensors_sha256

CLASS_NAMES = ("held", "said")
PREFIXES = 64
"""Prefixes whose keys and values are kept, memory permitting."""

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
    text:   the different texts, user's words and slot [U, t]
    where:  columns of the batch that the text stands in
    shared: how many leading tokens of the text are the same throughout: those before the slot
    reply:  ids of the wanted reply
    """

    rows: Tensor
    of: Tensor
    text: Tensor
    where: Columns
    shared: int
    reply: tuple[int, ...]


@dataclass
class _Prefix:
    """A prefix that has gone through the network: its past, the logits [1, 1, V] after it, and log-probabilities."""

    past: Any
    logits: Tensor
    bytes: int
    likelihood: Tensor | None = None


@dataclass
class _Kept:
    """The prefixes used last, for weights that have not changed since."""

    stamp: int = 0
    bytes: int = 0
    held: OrderedDict[tuple[Any, ...], _Prefix] = field(default_factory=OrderedDict)


class LanguageModel:
    """A causal language model behind a chat template.

    network:   runs the tokens; its mode, weights and flags are never changed here
    tokenizer: reads and writes text and holds the template
    name, source, license, architecture: for reports
    cache:     keep keys and values of prefixes that several rows share
    memory:    bytes that one call of the network may take, about; larger groups go through in parts

    `tokens` counts the tokens really sent through the network. Raises BadInput for rows that are no transcripts.
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
        self.tokens = 0
        self._kept = _Kept()

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}, vocabulary={self.tokenizer.vocabulary})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        return self._with(copy.deepcopy(self.network, memo))

    def _with(self, network: Network) -> LanguageModel:
        return LanguageModel(
            network,
            self.tokenizer,
            name=self.name,
            source=self.source,
            license=self.license,
            architecture=self.architecture,
            cache=self.cache,
            memory=self.memory,
        )

    @property
    def space(self) -> Transcripts:
        """Transcripts in this tokenizer's ids."""
        return Transcripts(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return device_of(self.network) or torch.device("cpu")

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

        Differentiable with respect to E; at one-hot E it is the model's own answer. loss, alpha: see `under`.
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

    def generate(
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
    ) -> list[list[str]]:
        """The texts of `generate_ids`."""
        ids = self.generate_ids(
            x,
            samples,
            rng,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            greedy=greedy,
        )
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

        The rows' own wanted replies are not read. Each row goes by itself and draws from its own streams, so what it
        says does not depend on its batch.

        temperature, top_p: of the sampling; min_new_tokens: no reply ends before; greedy: the most likely token always
        """
        _legal(temperature, top_p)
        if samples < 1 or max_new_tokens < 1:
            raise UsageError(f"asked for {samples} replies of up to {max_new_tokens} tokens; expected one at least")
        like = torch.zeros((len(x), max_new_tokens), dtype=torch.float64)
        drawn = [] if greedy else [rng.at("sample", each).uniform(like) for each in range(samples)]
        replies: list[list[list[int]]] = []
        for row in range(len(x)):
            (group,) = self._groups(x[row : row + 1], reply=False)
            count = 1 if greedy else samples
            uniforms = None if greedy else torch.stack([each[row] for each in drawn])
            choose = _Chooser(temperature, top_p, uniforms)
            with torch.no_grad():
                ids = self._written(group.text.expand(count, -1), group.shared, choose, max_new_tokens, min_new_tokens)
            replies.append([list(ids[0]) for _ in range(samples)] if greedy else ids)
        return replies

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
            torch.from_numpy(np.ascontiguousarray(texts[first])).to(self.device),
            where,
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

    def _prefix(self, ids: tuple[int, ...]) -> _Prefix | None:
        """A prefix that has gone through, kept for the next time; None where there is nothing to keep."""
        parameters = list(self.network.parameters())
        live = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
        if not ids or not self.cache or live:  # what is kept has no graph: weights being trained need one
            return None
        stamp = hash(tuple((each.data_ptr(), _version(each)) for each in parameters))
        if stamp != self._kept.stamp:  # the weights have moved: what they made of a prefix holds no more
            self._kept = _Kept(stamp)
        kept = self._kept
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (ids, self.network.training, autocast)
        if key in kept.held:
            kept.held.move_to_end(key)
            return kept.held[key]
        # outside inference mode: a past born inside it could not be part of a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            inputs = torch.tensor([ids], device=self.device)
            logits, past = self._extend(inputs, None, 1)
        entry = _Prefix(past, logits, self.network.past_bytes(past))
        kept.held[key] = entry
        kept.bytes += entry.bytes
        while len(kept.held) > 1 and (len(kept.held) > PREFIXES or kept.bytes > self.memory // 4):
            kept.bytes -= kept.held.popitem(last=False)[1].bytes
        return entry

    def _parts(self, rows: int, new: int, past: int, keep: int) -> Iterator[slice]:
        """Row ranges whose passage fits the memory."""
        most = max(1, self.memory // max(1, self.network.row_bytes(new, past, keep)))
        for start in range(0, rows, most):
            yield slice(start, min(start + most, rows))

    def _logits(self, ids: tuple[int, ...], rest: Tensor, keep: int) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, keep, V] at the last positions of the prefix followed by rest [N, m] or [N, m, D], in parts.

        Position -1 - len(rest) is the prefix's own last one.
        """
        prefix = self._prefix(ids)
        rows, new = rest.shape[:2]
        if prefix is None and ids:
            start = torch.tensor([ids], device=rest.device)
            start = self.network.embed(start) if rest.is_floating_point() else start
            rest = torch.cat((start.expand(rows, *start.shape[1:]), rest), 1)
            new = rest.shape[1]
        inside = min(keep, new)
        for part in self._parts(rows, new, 0 if prefix is None else len(ids), keep):
            size = part.stop - part.start
            pieces = []
            if keep > new and prefix is not None:
                pieces.append(prefix.logits.expand(size, -1, -1))
            if inside:
                pieces.append(self._run(rest[part], None if prefix is None else prefix.past, inside))
            yield part, pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _before(self, group: _Group) -> tuple[int, ...]:
        """Ids of the prefix: the template and the words before the slot."""
        return (*self.tokenizer.before, *group.text[0, : group.shared].tolist())

    def _rest(self, text: Tensor, shared: int, reply: Tensor | None = None) -> Tensor:
        """What follows the prefix: the remaining text, the template, and the reply [N or 1, R] but for its last id."""
        after = torch.tensor([self.tokenizer.after], dtype=text.dtype, device=text.device).expand(len(text), -1)
        parts = [text[:, shared:], after]
        if reply is not None:
            parts.append(reply[:, :-1].expand(len(text), -1))
        return torch.cat(parts, 1)

    # --- the answers

    def _scored(self, x: Tensor, loss: Loss, alpha: float) -> Tensor:
        answer = torch.empty((len(x), 2), dtype=_wide(x.device), device=x.device)
        for group in self._groups(x):
            reply = torch.tensor([group.reply], device=self.device)
            rest = self._rest(group.text, group.shared, reply)
            parts = [
                _scores(logits, reply.expand(len(logits), -1), loss, alpha)
                for _, logits in self._logits(self._before(group), rest, len(group.reply))
            ]
            answer[group.rows.to(x.device)] = torch.cat(parts)[group.of.to(self.device)].to(answer)
        return answer

    def _continued(self, x: Tensor, until: int | None) -> Tensor:
        answer: Tensor | None = None
        for group in self._groups(x, reply=False, until=until):
            rest = group.text[:, group.shared :]
            logits = torch.cat([part[:, -1] for _, part in self._logits(self._before(group), rest, 1)])
            logits = _full(logits)
            if answer is None:
                answer = torch.empty((len(x), logits.shape[1]), dtype=logits.dtype, device=x.device)
            answer[group.rows.to(x.device)] = logits[group.of.to(self.device)].to(answer)
        return torch.empty((0, self._limit), device=x.device) if answer is None else answer

    def _mixed(self, row: Tensor, mixture: Tensor, loss: Loss, alpha: float) -> Tensor:
        (group,) = self._groups(row[None])
        role = row[1].cpu().numpy()[group.where]
        slot = np.nonzero(role == SLOT)[0]
        if mixture.ndim != 3 or mixture.shape[1:] != (len(slot), self._limit):
            raise BadInput(
                f"mixtures of shape {list(mixture.shape)}; the row has {len(slot)} slot tokens, so [N, {len(slot)}, "
                f"{self._limit}] was expected"
            )
        reply = torch.tensor([group.reply], device=self.device)
        rest = self.network.embed(self._rest(group.text, group.shared, reply)).expand(len(mixture), -1, -1)
        table = self.network.table()[: self._limit]
        places = torch.from_numpy(slot - group.shared).to(self.device)
        rest = rest.index_copy(1, places, mixture.to(table) @ table)
        parts = [
            _scores(logits, reply.expand(len(logits), -1), loss, alpha)
            for _, logits in self._logits(self._before(group), rest, len(group.reply))
        ]
        return torch.cat(parts).to(device=mixture.device, dtype=_wide(mixture.device))

    def _likelihood(self, x: Tensor) -> Tensor:
        answer = torch.zeros((len(x), x.shape[2]), dtype=_wide(x.device), device=x.device)
        for group in self._groups(x, reply=False):
            if not len(group.where):
                continue
            ids = self._before(group)
            parts = []
            if group.shared:
                known = self._prefix_likelihood(ids)[-group.shared :]
                parts.append(known.expand(len(group.text), -1))
            rest = group.text[:, group.shared :]
            if rest.shape[1]:
                keep = rest.shape[1] if ids else rest.shape[1] - 1
                # the prefix's last logits speak of the first token; those after the last token speak of nothing
                told = rest.new_zeros((len(rest), rest.shape[1]), dtype=_wide(self.device), device=self.device)
                if keep:
                    for part, logits in self._logits(ids, rest[:, :-1], keep):
                        told[part, -keep:] = _log_p(logits, rest[part, -keep:]).to(told)
                parts.append(told)
            found = torch.cat(parts, 1)[group.of.to(self.device)].to(answer)
            rows = group.rows.to(x.device)
            answer[rows[:, None], torch.from_numpy(group.where).to(x.device)] = found
        return answer

    def _prefix_likelihood(self, ids: tuple[int, ...]) -> Tensor:
        """log p [len(ids)] of a prefix's own tokens, the first one's 0; kept beside its past."""
        prefix = self._prefix(ids)
        if prefix is not None and prefix.likelihood is not None:
            return prefix.likelihood
        found = torch.zeros(len(ids), dtype=_wide(self.device), device=self.device)
        if len(ids) > 1:
            inputs = torch.tensor([ids], device=self.device)
            with torch.no_grad():
                logits = self._run(inputs[:, :-1], None, len(ids) - 1)
                found[1:] = _log_p(logits, inputs[:, 1:])[0].to(found)
        if prefix is not None:
            prefix.likelihood = found
        return found

    def _answered(self, x: Tensor, replies: Tensor) -> Tensor:
        if replies.ndim != 2 or len(replies) != len(x):
            raise BadInput(f"{len(x)} rows and replies of shape {list(replies.shape)}; expected one reply per row")
        lengths = (replies >= 0).sum(1).tolist()
        if min(lengths, default=1) < 1:
            raise BadInput("an empty reply has no likelihood; expected one token at least")
        answer = torch.empty((len(x), 1), dtype=_wide(x.device), device=x.device)
        for group in self._groups(x, reply=False, lengths=lengths):
            wanted = replies[group.rows.to(replies.device), : lengths[int(group.rows[0])]].to(self.device)
            rest = self._rest(group.text[group.of.to(self.device)], group.shared, wanted)
            for part, logits in self._logits(self._before(group), rest, wanted.shape[1]):
                found = -_log_p(logits, wanted[part]).to(answer.dtype).mean(1)
                answer[group.rows[part].to(x.device), 0] = found.to(answer)
        return answer

    # --- writing replies

    def _sampled(self, x: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
        if uniforms.ndim != 2 or len(uniforms) != len(x):
            raise BadInput(f"{len(x)} rows and uniforms of shape {list(uniforms.shape)}; expected [{len(x)}, T]")
        answer = torch.empty(uniforms.shape, dtype=torch.long, device=x.device)
        for group in self._groups(x, reply=False):
            texts = group.text[group.of.to(self.device)]
            drawn = uniforms[group.rows.to(uniforms.device)]
            with torch.no_grad():
                ids = self._written(
                    texts, group.shared, _Chooser(temperature, top_p, drawn), uniforms.shape[1], uniforms.shape[1]
                )
            answer[group.rows.to(x.device)] = torch.tensor(ids, device=x.device)
        return answer

    def _written(self, texts: Tensor, shared: int, choose: _Chooser, most: int, least: int) -> list[list[int]]:
        """Replies to texts [N, t], one each; those that have ended leave the batch."""
        ids = (*self.tokenizer.before, *texts[0, :shared].tolist())
        written: list[list[int]] = [[] for _ in texts]
        cost_past = len(ids) + texts.shape[1] + len(self.tokenizer.after) - shared + most
        for part in self._parts(len(texts), 1, cost_past, 1):
            self._write(written, part, texts[part], ids, shared, choose, most, least)
        return written

    def _write(
        self,
        written: list[list[int]],
        part: slice,
        texts: Tensor,
        ids: tuple[int, ...],
        shared: int,
        choose: _Chooser,
        most: int,
        least: int,
    ) -> None:
        ends = torch.tensor(sorted(self.tokenizer.ends), dtype=torch.long, device=self.device)
        rest = self._rest(texts, shared)
        same = bool((rest == rest[:1]).all())
        rest = rest[:1] if same else rest  # samples of one text: it goes through once
        prefix = self._prefix(ids)
        if prefix is None:
            start = torch.tensor([ids], dtype=rest.dtype, device=rest.device).expand(len(rest), -1)
            logits, past = self._extend(torch.cat((start, rest), 1), None, 1)
        elif rest.shape[1]:
            logits, past = self._extend(rest, prefix.past, 1)
        else:
            logits, past = prefix.logits, prefix.past
        live = torch.arange(part.start, part.stop)
        logits = logits[:, -1].expand(len(live), -1)
        single = len(rest) == 1  # the past is that of one sequence, which all continue
        mine = prefix is None or past is not prefix.past  # nobody else holds it: the network may write into it
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
