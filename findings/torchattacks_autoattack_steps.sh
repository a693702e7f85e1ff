#!/usr/bin/env bash
# torchattacks 3.5.1: AutoAttack runs its gradient stages for 10 steps, where AutoAttack has 100.
#
# One would expect that AutoAttack(version="standard") is the suite of the paper, whose APGD and FAB take 100 steps each.
# The class leaves the steps of APGD, targeted APGD and FAB at the defaults of torchattacks' own classes, which are 10, and
# has no argument for them; Square has its 5,000 queries. Its robust accuracy is no figure of AutoAttack and not to be
# compared with those of a leaderboard. pyautoattack 0.2.0 takes 100 steps.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install() { "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install 'torch==2.13.0' 'numpy==2.3.5' 'scipy==1.17.1' 'tqdm==4.67.1' || exit 2
install --no-deps 'torchattacks==3.5.1' 'pyautoattack==0.2.0' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
import torchattacks
from pyautoattack import AutoAttack
from torch import nn

torch.manual_seed(0)
x = torch.rand(4, 3, 8, 8)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
with torch.no_grad():
    model[1].weight.mul_(0.01)
    model[1].bias[0] = 5  # no small change of a sample changes its answer
y = model(x).argmax(1)
passes = [0]
model.register_forward_hook(lambda module, inputs, answer: passes.__setitem__(0, passes[0] + len(answer)))


def spent(run):
    passes[0] = 0
    run()
    return passes[0] / len(x)


one = torchattacks.AutoAttack(model, norm="Linf", eps=2 / 255, version="standard", n_classes=10, seed=0)
other = AutoAttack(model, norm="Linf", eps=2 / 255, version="custom", attacks=["apgd-ce"], device="cpu", seed=0)
stages = one._autoattack.attacks
steps = [getattr(each, "steps", None) for each in stages]
first = spent(lambda: stages[0](x, y))
other.apgd.n_restarts = 1
second = spent(lambda: other.run_standard_evaluation(x, y, batch_size=4))
print(f"torchattacks {version('torchattacks')}, pyautoattack {version('pyautoattack')}, torch {torch.__version__}")
print(f"stages of torchattacks' AutoAttack: {[each.attack for each in stages]}, steps {steps}")
print(f"steps of pyautoattack's APGD, targeted APGD, FAB: {other.apgd.n_iter}, {other.apgd_targeted.n_iter}, {other.fab.n_iter}")
print(f"APGD on the cross-entropy, forward passes of a sample that stays robust: {first:.0f} and {second:.0f}")
same = steps[:3] == [10, 10, 10] and other.apgd.n_iter == other.fab.n_iter == 100 and second > 5 * first > 0
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
