"""A model behind HTTP: samples go out as JSON, logits, probabilities or labels come back.

A request is `POST URL` with `{"inputs": [[...], ...]}`, rows nested as the samples are. The answer is an object with
one of these:

    {"logits": [[...], ...]}            a number per class, for each row
    {"probabilities": [[...], ...]}     likewise; their logarithms are what the model answers here
    {"labels": [3, 0, ...]}             a class per row, which becomes a one-hot row
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import at_least, at_least_one, check, not_negative, positive
from advkit.core.errors import BadModel, MissingExtra, RunInterrupted, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import Batched, CountsQueries, KnowsClasses, ModelInfo, Rng, Shaped
from advkit.core.spaces import Box
from advkit.core.text import first_line

KINDS = ("logits", "probabilities", "labels")
LONGEST_WAIT = 60.0
"""Seconds that a retry waits at most, whatever the service asks for."""
_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class HTTP:
    """Model behind an HTTP endpoint, asked in JSON; see `advkit.models.http` for what goes out and comes back.

    url:     http://HOST/PATH (or https://); in brackets where it has commas
    field:   name of the rows in a request
    batch:   samples of a request, >= 1
    rate:    requests per second at most; 0 for no limit
    retries: how often a request is sent again after an answer 429 or 5xx, a timeout or a lost connection, >= 0
    backoff: seconds before the first retry, doubled for each further one; Retry-After is heeded
    timeout: seconds for one request
    key:     environment variable that holds the API key; the key itself is never written anywhere
    header:  that the key is sent in: after the word Bearer in Authorization, as it is in others

    A sample counts as one query once it is answered, however often it was sent. Raises UsageError for values out of
    range and a variable that is not set, RunInterrupted where the service does not answer, BadModel for answers that
    are not what was asked for.
    """

    scheme: ClassVar[str] = "http"

    url: str
    field: str = "inputs"
    batch: int = 64
    rate: float = 0.0
    retries: int = 6
    backoff: float = 0.5
    timeout: float = 30.0
    key: str = ""
    header: str = "Authorization"

    def __post_init__(self) -> None:
        at_least_one(self, "batch")
        at_least(self, 0, "retries")
        not_negative(self, "rate", "backoff")
        positive(self, "timeout", what="number of seconds")
        check(self, "field", bool(self.field), "a name")
        check(self, "header", bool(self.header), "a name")
        if self.url.startswith("//"):
            object.__setattr__(self, "url", f"{self.scheme}:{self.url}")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{self.url!r} is no address of a service; expected http://HOST/PATH")
        if parts.username or parts.password:
            raise UsageError("the address holds a user or a password: put a key into an environment variable, key=NAME")

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> HTTPModel:
        return HTTPModel(self, Box(0.0, 1.0, tuple(shape)) if space is None else space, classes)


class HTTPS(HTTP):
    """Model behind an HTTPS endpoint: `https://HOST/PATH` as it stands; the settings are those of `http:`."""

    scheme: ClassVar[str] = "https"


class HTTPModel(KnowsClasses, Shaped, Batched, CountsQueries):
    """A web service as a model: logits, or log-probabilities, or one-hot rows of labels, float [B, classes].

    service:  how it is asked
    space:    legal inputs
    classes:  how many it answers; other answers are refused
    requests: that were sent, `retried` of them again
    """

    classes: int | None = None
    answered: int = 0
    retried: int = 0

    def __init__(self, service: HTTP, space: Any, classes: int) -> None:
        self.service = service
        self.space = space
        self.classes = classes
        self.requests = 0
        self._client: Any = None
        self._next = 0.0

    def __repr__(self) -> str:
        return f"HTTPModel({self.service!r}, classes={self.classes})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_client": None, "_next": 0.0}  # a connection does not travel to another process

    @property
    @override
    def batch(self) -> int:
        return self.service.batch

    @property
    @override
    def lanes(self) -> Lanes:
        """Every row is a query: none is added to fill a shape."""
        return Lanes(chunk=self.service.batch, multiple=1)

    def attacker_view(self) -> HTTPModel:
        """Itself: there is nothing to differentiate."""
        return self

    def modules(self) -> tuple[nn.Module, ...]:
        return ()

    def to(self, device: torch.device | str) -> HTTPModel:
        """Itself: it runs where it runs."""
        return self

    def describe(self) -> ModelInfo:
        """Known by its address; what is behind it may change."""
        parts = urlsplit(self.service.url)
        place = f"{parts.scheme}://{parts.netloc}{parts.path}"
        return ModelInfo(
            name=place,
            architecture="web service",
            state_sha256=hashlib.sha256(f"http|{self.service.url}|{self.service.field}".encode()).hexdigest(),
            n_parameters=0,
            classes=self.classes,
            source="web service",
            differentiable=False,
        )

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach().to("cpu", torch.float32)
        parts = [self._answers(part) for part in torch.split(rows, self.service.batch)] if len(rows) else []
        answer = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, self.classes or 0)
        return answer.to(x.device)

    def _answers(self, rows: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What the service answers for the rows of one request."""
        body = json.dumps({self.service.field: rows.tolist()}, allow_nan=False).encode()
        found = self._read(self._sent(body), len(rows))
        self.answered += len(rows)
        return found

    def _sent(self, body: bytes) -> str:
        """The text of the answer, once there is one."""
        client, tries = self._connected(), 1 + self.service.retries
        last = ""
        for attempt in range(tries):
            if attempt:
                self.retried += 1
            self._wait_for_turn()
            self.requests += 1
            asked = 0.0
            try:
                answer = client.post(self.service.url, content=body)
            except _http().TransportError as error:  # timeouts, and connections that are refused or lost
                last = f"{type(error).__name__}: {first_line(error)}"
            else:
                status = int(answer.status_code)
                text = self._cleared(str(answer.text))  # as a whole: a part of the key would not be found
                if status == 200:
                    return text
                last = f"status {status}"
                if status != 429 and status < 500:
                    raise BadModel(f"{self._place} refuses the request ({last}): {_short(text)}")
                asked = _seconds(answer.headers.get("Retry-After", ""))
            if attempt + 1 < tries:
                time.sleep(min(LONGEST_WAIT, max(asked, self.service.backoff * 2**attempt)))
        raise RunInterrupted(
            self._cleared(
                f"{self._place} did not answer in {tries} tries (the last: {last}); {self.answered:,} samples were "
                "answered before. Start again when it does, or raise retries"
            )
        )

    def _wait_for_turn(self) -> None:
        if self.service.rate:
            now = time.monotonic()
            if now < self._next:
                time.sleep(self._next - now)
            self._next = max(now, self._next) + 1 / self.service.rate

    @property
    def _place(self) -> str:
        return self.describe().name

    @property
    def _key(self) -> str:
        """The API key; UsageError where its variable is not set."""
        if not self.service.key:
            return ""
        key = os.environ.get(self.service.key, "").strip()
        if not key:
            raise UsageError(f"the environment variable {self.service.key} is not set; it is to hold the API key")
        return key

    def _cleared(self, text: str) -> str:
        """A message without the key, which a service may send back."""
        key = self._key
        if key:
            for form in (key, json.dumps(key)[1:-1], json.dumps(key)[1:-1].replace("/", r"\/")):
                text = text.replace(form, "***")
        return text

    def _connected(self) -> Any:
        if self._client is None:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            if key := self._key:
                headers[self.service.header] = (
                    f"Bearer {key}" if self.service.header.casefold() == "authorization" else key
                )
            self._client = _http().Client(headers=headers, timeout=self.service.timeout)
        return self._client

    def _read(self, text: str, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The answer for so many rows, float32 [rows, classes]; BadModel where it is none."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise self._bad(f"no JSON ({first_line(error)}): {_short(text)}") from error
        kinds = [kind for kind in KINDS if isinstance(found, dict) and kind in found]
        if len(kinds) != 1:
            seen = f"an object with {', '.join(map(repr, found)) or 'nothing'}" if isinstance(found, dict) else "a list"
            seen = seen if isinstance(found, (dict, list)) else _short(text)
            raise self._bad(f"{seen}; expected an object with one of {', '.join(KINDS)}")
        (kind,) = kinds
        try:
            values = np.asarray(found[kind], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise self._bad(f"{kind} that are no array of numbers: {_short(json.dumps(found[kind]))}") from error
        if kind == "labels":
            return self._one_hot(values, rows)
        if values.shape != (rows, self.classes):
            raise self._bad(f"{kind} {list(values.shape)} for {rows} samples; expected [{rows}, {self.classes}]")
        if not np.isfinite(values).all():
            raise self._bad(f"NaN or infinity for {int((~np.isfinite(values)).any(1).sum())} of {rows} samples")
        if kind == "probabilities":
            if (values < 0).any() or not np.allclose(values.sum(1), 1, atol=1e-3):
                raise self._bad("probabilities that are negative or do not sum to 1")
            values = np.log(np.maximum(values, 1e-30))
        return _single(values)

    def _one_hot(
        self, labels: np.ndarray[Any, np.dtype[np.float64]], rows: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        classes = self.classes or 0
        if labels.shape != (rows,):
            raise self._bad(f"labels {list(labels.shape)} for {rows} samples; expected [{rows}]")
        if not ((labels == np.floor(labels)) & (labels >= 0) & (labels < classes)).all():
            raise self._bad(f"labels that are no whole numbers from 0 to {classes - 1}")
        return _single(np.eye(classes)[labels.astype(np.int64)])

    def _bad(self, what: str) -> BadModel:
        return BadModel(self._cleared(f"{self._place} answers {what}"))


def _http() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise MissingExtra("models behind HTTP need the package httpx2: pip install 'advkit[http]'") from error
    return httpx2


def _seconds(text: str) -> float:
    """Retry-After in seconds; 0 where it says none or a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


def _short(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]


def _single(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(values, dtype=np.float32)
