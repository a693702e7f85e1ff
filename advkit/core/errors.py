"""The exception tree: each message says what was seen, what was expected and what to do."""

from __future__ import annotations

from typing_extensions import override

from advkit.core.text import one_line


class AdvkitError(Exception):
    """Base of every error advkit raises on purpose; the command line prints it as one line."""

    exit_code = 2

    @override
    def __str__(self) -> str:
        """The message on one line; what it quotes of files and names is made printable, and cut where it is long."""
        return one_line(super().__str__())


class UsageError(AdvkitError):
    """The request itself is off: a wrong option, value or combination of parts."""


class UnknownName(UsageError):
    """A name that no registry holds; the message suggests the nearest ones."""


class SpecError(UsageError):
    """A spec string (`name:key=value,...`) that does not parse or does not fit the fields it fills."""


class BadInput(UsageError):
    """Data outside what the model or the threat model accepts: range, NaN, labels, shape."""


class BadModel(UsageError):
    """A model that can't be evaluated as it is: training mode, wrong number of classes, not differentiable."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, corrupted, foreign, or whose hash differs from its card."""


class NoTrainingData(UsageError):
    """A defense needs training data and the task has none."""


class StaleRun(UsageError):
    """A run folder that belongs to another case."""


class RunInUse(UsageError):
    """A folder that another process is writing to."""


class EndedElsewhere(AdvkitError):
    """Another process of the same training ended it and says why."""


class LostProcess(AdvkitError):
    """Another process of the same training is gone or does not answer."""


class ModelChanged(AdvkitError):
    """An attack left a model other than it was: weights, modes or hooks."""


class RunInterrupted(AdvkitError):
    """A run that could not go on (a worker process that was killed, no memory); what is recorded is kept."""


class AccessDenied(AdvkitError):
    """An attack asked the oracle for more than the threat model grants (gradients, scores)."""


class BudgetExhausted(AdvkitError):
    """An attack asked more queries of a row than the threat model allows."""


class MissingExtra(UsageError):
    """An optional package is not installed; the message names the extra that brings it."""


class ReportError(AdvkitError):
    """A report that does not validate against the schema or does not agree with its records."""
