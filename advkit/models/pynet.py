"""PyNET, the five-level network from RAW planes to RGB (Ignatov, Van Gool and Timofte, arXiv 2002.05509)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkit.core.errors import UsageError

MULTIPLE = 16
"""Heights and widths must be multiples of this, and at least twice as much."""


class _Convolution(nn.Sequential):
    """A mirrored border, a convolution, instance normalisation where asked for, a leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: bool) -> None:
        layers: list[nn.Module] = [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel)]
        layers += [nn.InstanceNorm2d(outputs, affine=True)] if norm else []
        super().__init__(*layers, nn.LeakyReLU(0.2))


class MultiBlock(nn.Module):
    """Two convolutions of every odd size from 3 to the largest, side by side; answers all of them concatenated."""

    def __init__(self, inputs: int, outputs: int, largest: int, norm: bool = True) -> None:
        super().__init__()
        self.sides = nn.ModuleList(
            nn.Sequential(
                _Convolution(inputs, outputs, kernel, norm),
                _Convolution(outputs, outputs, kernel, norm),
            )
            for kernel in range(3, largest + 1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([side(x) for side in self.sides], dim=1)


class _Up(nn.Sequential):
    """Twice the height and width, and a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), _Convolution(inputs, outputs, 3, False)
        )


class PyNET(nn.Module):
    """Planes [B, 4, H, W] to RGB [B, 3, H, W] in (0, 1); H and W multiples of 16, at least 32.

    Level 1 is the output at the planes' own size, level l that at 1/2**(l - 1) of it, level 0 that at twice the size.
    """

    def __init__(self) -> None:
        super().__init__()
        block = MultiBlock
        self.down = nn.ModuleList(
            [block(4, 32, 3, norm=False), block(32, 64, 3), block(64, 128, 3), block(128, 256, 3)]
        )
        self.level5 = nn.ModuleList(
            [block(256, 512, 3), block(512, 512, 3), block(512, 512, 3), block(512, 512, 3)],
        )
        self.level4 = nn.ModuleList(
            [block(512, 256, 3), block(256, 256, 3), block(256, 256, 3), block(256, 256, 3), block(512, 256, 3)]
        )
        self.level3 = nn.ModuleList([*(block(256, 128, 5) for _ in range(4)), block(512, 128, 3)])
        self.level2 = nn.ModuleList(
            [block(128, 64, 5), *(block(192, 64, 7) for _ in range(4)), block(256, 64, 5), block(192, 64, 3)]
        )
        self.level1 = nn.ModuleList(
            [
                block(64, 32, 5, norm=False),
                block(96, 32, 7),
                block(96, 32, 9),
                *(block(128, 32, 9) for _ in range(3)),
                block(128, 32, 7),
                block(128, 32, 5),
                block(128, 32, 3, norm=False),
            ]
        )
        widths = {5: 512, 4: 256, 3: 128, 2: 64}  # of what each level hands up, twice
        self.up_a = nn.ModuleDict({str(level): _Up(width, width // 2) for level, width in widths.items()})
        self.up_b = nn.ModuleDict({str(level): _Up(width, width // 2) for level, width in widths.items()})
        self.up_last = _Up(32, 16)
        last = {5: 512, 4: 256, 3: 128, 2: 64, 1: 32, 0: 16}
        self.out = nn.ModuleDict(
            {str(level): nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(width, 3, 3)) for level, width in last.items()}
        )

    def forward(self, planes: Tensor, level: int = 1) -> Tensor:
        """The output of a level, 0 to 5."""
        height, width = planes.shape[2:]
        if height % MULTIPLE or width % MULTIPLE or min(height, width) < 2 * MULTIPLE:
            raise UsageError(
                f"pynet got planes of {height} x {width}; expected multiples of {MULTIPLE}, at least {2 * MULTIPLE}"
            )
        return torch.sigmoid(self.out[str(level)](self._features(planes, level)))

    def _features(self, planes: Tensor, level: int) -> Tensor:
        e1 = self.down[0](planes)
        e2 = self.down[1](F.max_pool2d(e1, 2))
        e3 = self.down[2](F.max_pool2d(e2, 2))
        e4 = self.down[3](F.max_pool2d(e3, 2))
        x: Tensor = F.max_pool2d(e4, 2)
        for each in self.level5:
            x = each(x)
        if level == 5:
            return x

        x, b = self._handed(x, e4, 5)
        first, second, third, fourth, fifth = self.level4
        x = first(x)
        x = second(x) + x
        x = third(x) + x
        x = fifth(torch.cat((fourth(x), b), 1))
        if level == 4:
            return x

        x, b = self._handed(x, e3, 4)
        first, second, third, fourth, fifth = self.level3
        x = first(x) + x
        x = second(x) + x
        x = third(x) + x
        x = fifth(torch.cat((fourth(x), e3, b), 1))
        if level == 3:
            return x

        x, b = self._handed(x, e2, 3)
        first, second, third, fourth, fifth, sixth, seventh = self.level2
        x = torch.cat((first(x), e2), 1)
        x = second(x) + x
        x = third(x) + x
        x = fourth(x) + x
        x = sixth(torch.cat((fifth(x), e2), 1))
        x = seventh(torch.cat((x, b), 1))
        if level == 2:
            return x

        x, b = self._handed(x, e1, 2)
        first, second, third, fourth, fifth, sixth, seventh, eighth, ninth = self.level1
        x = second(torch.cat((first(x), e1), 1))
        x = third(x)
        x = fourth(x) + x
        x = fifth(x) + x
        x = sixth(x) + x
        x = eighth(torch.cat((seventh(x), e1), 1))
        x = ninth(torch.cat((x, b, e1), 1))
        if level == 1:
            return x
        x = self.up_last(x)
        return x

    def _handed(self, x: Tensor, beside: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """What a level gets from the one below, with its own encoder's features; and what it takes in at its end."""
        return torch.cat((beside, self.up_a[str(level)](x)), 1), self.up_b[str(level)](x)
