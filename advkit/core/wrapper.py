"""A model around another one that passes on what the other can do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from advkit.core.lanes import Lanes
from advkit.core.protocols import Averages, CountsTokens, Headed, Shaped


class Wrapper(Shaped, CountsTokens, Averages, Headed):
    """What wrappers share that change how a model computes and nothing of what it says.

    model: the model inside. It answers for shapes of calls, tokens, passes and the last layer, for the neutral value
           where it has no such ability, and for whatever else is asked of the wrapper
    """

    model: Any = None

    @property
    def space(self) -> Any:
        """The model's."""
        return self.model.space

    @property
    @override
    def lanes(self) -> Lanes | None:
        return Lanes.own(self.model)

    @property
    @override
    def tokens(self) -> int:
        return self.model.tokens if isinstance(self.model, CountsTokens) else 0

    @property
    @override
    def passes(self) -> int:
        return self.model.passes if isinstance(self.model, Averages) else 1

    @override
    def head(self) -> Tensor | None:
        return self.model.head() if isinstance(self.model, Headed) else None

    def describe(self) -> Any:
        """The model's."""
        return self.model.describe()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy or a pickle in the making asks before there is a model
            raise AttributeError(name)
        return getattr(self.model, name)
