#!/usr/bin/env bash
# torchattacks 3.5.1: an attack in a training step puts layers that were frozen in evaluation mode back into training mode.
#
# One would expect that an attack leaves the mode of every layer as it was. The attack puts the whole model into
# evaluation mode and afterwards, where the model was in training mode, calls train() on the whole of it. A batch
# normalisation that was frozen by eval(), as is usual in fine-tuning and in adversarial training with frozen statistics,
# is in training mode from the first attack on: it normalises by the batch and moves its running statistics, with no warning.
# The other way round, a model in evaluation mode whose dropout or batch normalisation was put into training mode
# is left without it. set_model_training_mode changes nothing of that.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
install() { "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
install 'torch==2.13.0' 'numpy==2.3.5' 'scipy==1.17.1' 'tqdm==4.67.1' || exit 2
install --no-deps 'torchattacks==3.5.1' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import torch
import torchattacks
from torch import nn

torch.manual_seed(0)
x, y = torch.rand(32, 3, 8, 8), torch.randint(0, 10, (32,))


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))


print(f"torchattacks {version('torchattacks')}, torch {torch.__version__}")
frozen = network().train()
frozen[1].eval()
attack = torchattacks.PGD(frozen, eps=8 / 255, alpha=2 / 255, steps=3)
attack.set_model_training_mode(model_training=True, batchnorm_training=False, dropout_training=True)
before = frozen[1].training
attack(x, y)
after, mean = frozen[1].training, frozen[1].running_mean.clone()
frozen(x)
moved = float((frozen[1].running_mean - mean).abs().max())
print(f"frozen batch normalisation: training {before} before the attack, {after} after it; "
      f"its running mean moves by {moved:.3f} in the next forward pass")

drawing = network().eval()
drawing[3].train()
dropout = drawing[3].training
torchattacks.PGD(drawing, eps=8 / 255, alpha=2 / 255, steps=3)(x, y)
left = drawing[3].training
print(f"dropout kept on in a model in evaluation mode: training {dropout} before the attack, {left} after it")
same = (before, after, dropout, left) == (False, True, True, False) and moved > 0
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
