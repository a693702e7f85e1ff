#!/usr/bin/env bash
# scikit-learn 1.9.1: SVC.fit without random_state moves numpy's global generator, though it learns without randomness.
#
# The documentation of SVC says of random_state: "Controls the pseudo random number generation for shuffling the data for
# probability estimates. Ignored when `probability` is False." One would expect that SVC().fit(X, y), whose probability is
# False and whose solver draws nothing, leaves random numbers alone. It draws one number from the generator that numpy's
# functions share, and hands it to a solver that never uses it: the model is the same bit by bit, and every draw of
# numpy.random that comes later in the program is another one. With random_state=0 it is not so. NuSVC does the same.
# Whoever shuffles or samples with numpy.random after training an SVC gets other data when the training is left out.
#
# Exit 0 while this is so, 1 when it changed, 2 where the package can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'scikit-learn==1.9.1' 'numpy==2.3.5' || exit 2
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.datasets import load_iris
from sklearn.svm import SVC, NuSVC

x, y = load_iris(return_X_y=True)


def next_draw(train):
    """The first number of numpy's shared generator after a training, from the same start."""
    np.random.seed(0)
    model = train()
    return float(np.random.rand()), model


untouched, _ = next_draw(lambda: None)
seen = {
    "scikit-learn": sklearn.__version__,
    "no training": untouched,
    "SVC()": next_draw(lambda: SVC().fit(x, y))[0],
    "SVC(random_state=0)": next_draw(lambda: SVC(random_state=0).fit(x, y))[0],
    "NuSVC()": next_draw(lambda: NuSVC(nu=0.3).fit(x, y))[0],
}
one, other = (next_draw(lambda: SVC(random_state=seed).fit(x, y))[1] for seed in (0, 1))
seen["seeds 0 and 1 give one model"] = bool((one.decision_function(x) == other.decision_function(x)).all())
for name, value in seen.items():
    print(f"{name}: {value}")
same = (
    seen["SVC()"] != untouched
    and seen["NuSVC()"] != untouched
    and seen["SVC(random_state=0)"] == untouched
    and seen["seeds 0 and 1 give one model"]
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
