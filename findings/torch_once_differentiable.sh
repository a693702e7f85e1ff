#!/usr/bin/env bash
# torch 2.13.0: a second derivative through a function marked @once_differentiable can be silently wrong.
#
# One would expect the error "trying to differentiate twice a function that was marked with @once_differentiable"
# whenever a second derivative needs the function's own. It comes in one of three cases:
#   1. the gradient that comes in does not depend on anything (the function's output is summed): no error, by
#      torch.autograd.grad and by backward() alike; the function's own second derivative is missing from the answer;
#   2. the gradient that comes in does, and torch.autograd.grad is asked for single tensors: no error, the same is missing;
#   3. the gradient that comes in does, and backward() is called: the error.
# Whoever penalises input gradients (gradient alignment, implicit differentiation) through a layer with such a backward
# pass, as many hand-written CUDA layers have, trains on a wrong gradient. Finite differences or case 3 tell.
#
# Exit 0 while this is so, 1 when it changed, 2 where the package can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.3.5' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        (z,) = ctx.saved_tensors
        return 2 * z * incoming


def slope(square, outer):
    """d/dx of outer((w x)^2) + w x^2 at w = 3, x = 2, as a function of w."""
    w = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    x = torch.tensor(2.0, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(outer(square(w * x)) + w * x * x, x, create_graph=True)
    return gradient, w


def by_grad(square, outer):
    gradient, w = slope(square, outer)
    return float(torch.autograd.grad(gradient, w)[0])


def by_backward(square, outer):
    gradient, w = slope(square, outer)
    try:
        gradient.backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return float(w.grad)


plain = lambda z: z * z
summed = lambda z: z
squared = lambda z: z * z
seen = {
    "torch": torch.__version__.partition("+")[0],
    "summed, plain": by_grad(plain, summed),
    "summed, grad": by_grad(Square.apply, summed),
    "summed, backward": by_backward(Square.apply, summed),
    "squared, plain": by_grad(plain, squared),
    "squared, grad": by_grad(Square.apply, squared),
    "squared, backward": by_backward(Square.apply, squared),
}
for name, value in seen.items():
    print(f"{name}: {value}")
same = (
    seen["summed, plain"] == 28
    and seen["summed, grad"] == seen["summed, backward"] == 16
    and seen["squared, plain"] != seen["squared, grad"]
    and "once_differentiable" in str(seen["squared, backward"])
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
