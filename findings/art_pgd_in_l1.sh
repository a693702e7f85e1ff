#!/usr/bin/env bash
# adversarial-robustness-toolbox 1.20.1: ProjectedGradientDescent(norm=1) hardly gets stronger with eps on data in a box.
#
# One would expect that PGD in an L1 ball comes near the worst case where that is easy: on a linear classifier. A step
# moves the one coordinate whose gradient is largest, also where that coordinate has arrived at the border of clip_values
# and the step changes nothing. The gradient of a linear classifier keeps its largest coordinate, so the attack stays
# there until the end: the perturbation's L1 norm is about the width of the box, be eps 2 or 16. No warning is given.
# On digits in [0, 1] with logistic regression, accuracy stays at 0.758 from eps = 2 on; the exact worst case, a
# fractional knapsack per class, is 0.283 at eps = 2 and 0 at eps = 4. Whoever reports robustness in L1 by this attack
# reports too much of it. The attack on networks takes the same step.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'adversarial-robustness-toolbox==1.20.1' \
    'scikit-learn==1.9.1' 'scipy==1.17.1' 'numpy==2.3.5' 'packaging==26.0' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import art
import numpy as np
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import SklearnClassifier
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
model = LogisticRegression(max_iter=2000).fit(x[:1000], y[:1000])
right = model.predict(x[1000:1100]) == y[1000:1100]
x, y = x[1000:1100][right], y[1000:1100][right]


def falls(image, label, eps):
    """Whether some class overtakes the label within the L1 ball and the box: moves the best coordinates first."""
    scores = model.decision_function(image[None])[0]
    for other in set(range(10)) - {int(label)}:
        slope = model.coef_[other] - model.coef_[label]
        room = np.where(slope > 0, 1 - image, image)
        order = np.argsort(-np.abs(slope))
        before = np.concatenate([[0], np.cumsum(room[order])[:-1]])
        moved = np.clip(eps - before, 0, room[order])
        if scores[other] - scores[label] + np.abs(slope[order]) @ moved > 0:
            return True
    return False


classifier = SklearnClassifier(model, clip_values=(0, 1))
print(f"adversarial-robustness-toolbox {art.__version__}; {len(x)} digits that the classifier reads right")
seen = {}
for eps in (1.0, 2.0, 4.0, 16.0):
    attack = ProjectedGradientDescent(classifier, norm=1, eps=eps, eps_step=eps / 4, max_iter=40, verbose=False)
    moved = attack.generate(x, np.eye(10)[y])
    length = np.abs(moved - x).sum(axis=1)
    attacked = float((model.predict(moved) == y).mean())
    exact = 1 - float(np.mean([falls(image, label, eps) for image, label in zip(x, y, strict=True)]))
    seen[eps] = attacked, exact, float(length.max())
    print(f"eps {eps:g}: accuracy under the attack {attacked:.3f}, in the worst case {exact:.3f}; "
          f"L1 norm of the perturbations at most {length.max():.2f}, median {np.median(length):.2f}")
same = (
    seen[16.0][0] == seen[4.0][0] == seen[2.0][0] > 0.7
    and seen[4.0][1] == seen[16.0][1] == 0
    and seen[16.0][2] <= 2.0
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
