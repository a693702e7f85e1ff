from dataclasses import dataclass
from typing import ClassVar

from mine import model, x, y
from torch.nn.functional import avg_pool2d, interpolate

import advkit
from advkit.attacks.base import Best
from advkit.core.protocols import Access
from advkit.defenses.inputs.base import InputDefense


@dataclass(frozen=True, kw_only=True)
class Ray:
    needs: ClassVar[Access] = Access.GRADIENTS
    points: int = 10

    def __call__(self, oracle, x, goal, ball, rng):
        best = Best(x, goal)
        loss, gradient, answer = oracle.gradient(x, goal)
        best.offer(x, answer, loss)
        downhill = ball.steepest(-gradient, x)
        for point in range(1, self.points + 1):
            z = ball.project(x + point / self.points * downhill, x)
            best.offer(z, oracle(z))
        return best.x


@dataclass(frozen=True, kw_only=True)
class Mosaic(InputDefense):
    def transform(self, x):
        return interpolate(avg_pool2d(x, 2), scale_factor=2)


print(advkit.evaluate(Ray(), Mosaic(), task=(x, y), model=model, threat_model="linf:eps=0.15"))
