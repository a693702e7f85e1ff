#!/usr/bin/env bash
# foolbox 3.3.4: L2FMNAttack never projects onto its ball, so the minimum norms that it reports are far too large.
#
# Fast minimum-norm attacks (arXiv 2102.12827) step along the gradient and cut the perturbation to a radius that shrinks
# with each success. In L2 the factor that should cut is a norm divided by the same norm: 1, whatever the radius. The
# perturbation grows by a whole step at a time and is never shortened, and the smallest one that was adversarial on the
# way is returned. On a linear classifier, where the distance is known, the answer is 3.3 times too large in the median
# (default settings), DDNAttack's 1.00 times; LInfFMNAttack, which does cut, is at 1.00. What one sees is an attack that
# always succeeds; the distances, and the robust accuracy at every radius read off them, are the attack's and not the
# model's.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'uv==0.9.26' || exit 2
install() { "$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" "$@"; }
install 'foolbox==3.3.4' 'torch==2.14.1' 'numpy==2.3.5' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import foolbox
import torch

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
x = 0.4 + 0.2 * torch.rand(40, 3, 8, 8)
with torch.no_grad():
    weight = model[1].weight[1] - model[1].weight[0]
    model[1].bias[0] += (model(x)[:, 1] - model(x)[:, 0]).max() + 0.2 * weight.norm()  # all are of class 0
    y = model(x).argmax(1)
    margin = model(x)[:, 0] - model(x)[:, 1]
exact = {"L2": margin / weight.norm(), "Linf": margin / weight.abs().sum()}
victim = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
print(f"foolbox {foolbox.__version__}, torch {torch.__version__}; true L2 distances {exact['L2'].min():.3f} to {exact['L2'].max():.3f}")
seen = {}
for name, norm in (("L2FMNAttack", "L2"), ("DDNAttack", "L2"), ("LInfFMNAttack", "Linf")):
    point, _, success = getattr(foolbox.attacks, name)()(victim, x, y, epsilons=None)
    length = (point - x).flatten(1).norm(p=2 if norm == "L2" else float("inf"), dim=1)
    seen[name] = float((length / exact[norm]).median())
    print(f"{name}: {int(success.sum())} of {len(x)} samples fall; median distance over the true one: {seen[name]:.3f}")
same = seen["L2FMNAttack"] > 1.5 and seen["DDNAttack"] < 1.1 and seen["LInfFMNAttack"] < 1.1
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
