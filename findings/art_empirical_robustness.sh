#!/usr/bin/env bash
# adversarial-robustness-toolbox 1.20.1: empirical_robustness is 0 where the attack never succeeds.
#
# The metric is documented as the minimal perturbation that an attacker must introduce, relative to the input's norm: a
# more robust model is expected to get a larger number. Samples that the attack does not break are left out of the mean,
# and where it breaks none the answer is 0.0, the number of a model that falls to nothing. So of two classifiers, one
# whose samples fall to a change of 0.02 per feature and one whose samples need 0.3, FGSM up to eps = 0.05 rates the first
# 0.125 and the second 0.000; with eps = 0.5 the second gets 1.5. Where half of the samples are out of reach, the number
# is that of the other half alone. Whoever ranks models by it, or follows one during training, can rank them backwards.
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
from art.estimators.classification import SklearnClassifier
from art.metrics import empirical_robustness
from sklearn.linear_model import LogisticRegression

x = np.full((40, 10), 0.2, dtype=np.float32)
x[20:, 0] = 0.8
y = np.repeat([0, 1], 20)
clean = x[:20]


def falls_at(change, samples=clean):
    """A linear classifier of class 0, whose samples become class 1 when each feature moves by `change`."""
    model = LogisticRegression().fit(x, y)
    model.intercept_ = -model.coef_[0] @ samples[0] - change * np.abs(model.coef_[0]).sum()
    assert (model.predict(samples) == 0).all()
    return model


def rated(model, eps, samples=clean):
    classifier = SklearnClassifier(model, clip_values=(0, 1))
    return float(empirical_robustness(classifier, samples, "fgsm", {"eps": eps, "eps_step": 0.005}))


print(f"adversarial-robustness-toolbox {art.__version__}")
seen = {(change, eps): rated(falls_at(change), eps) for change in (0.02, 0.3) for eps in (0.05, 0.5)}
for (change, eps), value in seen.items():
    print(f"samples fall to a change of {change} per feature, FGSM up to eps {eps}: {value:.3f}")
further = clean.copy()
further[10:, 0] = 0.0  # ten of the samples lie further away from the boundary
half = rated(falls_at(0.02, clean), 0.05, further), rated(falls_at(0.02, clean), 0.05, further[:10])
print(f"half of them out of reach: {half[0]:.3f}; the other half alone: {half[1]:.3f}")
same = (
    seen[0.3, 0.05] == 0 < seen[0.02, 0.05] == seen[0.02, 0.5] < seen[0.3, 0.5]
    and half[0] == half[1] > 0
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
