#!/usr/bin/env bash
# adversarial-robustness-toolbox 1.20.1: the scores of SpectralSignatureDefense change when all features are shifted alike.
#
# Spectral signatures (arXiv 1811.00636, algorithm 1) score a sample by its centred features along the first singular
# vector of the centred features. A number added to a feature of every sample is expected to change no score. Here the
# singular vector is that of the centred features, but the features multiplied with it are not centred, and the absolute
# value is taken. Where the mean lies on the same side as the poison it does no harm; where it lies on the other side, the
# defense finds the clean samples suspicious and lets the poison pass. Of 10 poisoned among 200, which stand out clearly,
# all 10 are among the 10 highest scores without a shift or with +10 on one feature, and none with -10.
# A network's features before its last layer have means far from zero, so detection rates of this defense, and of
# attacks against it, are measured with the wrong statistic.
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
from art.defences.detector.poison import SpectralSignatureDefense

features = np.random.default_rng(0).normal(size=(200, 5))
features[:10, 0] += 8  # the poison


def found(scores):
    return int((np.argsort(-scores)[:10] < 10).sum())


def published(matrix):
    centred = matrix - matrix.mean(axis=0)
    return (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2


print(f"adversarial-robustness-toolbox {art.__version__}")
seen = {}
for shift in (0, 10, -3, -10):
    matrix = features + np.array([shift, 0, 0, 0, 0])
    seen[shift] = found(SpectralSignatureDefense.spectral_signature_scores(matrix).ravel()), found(published(matrix))
    print(f"first feature shifted by {shift}: {seen[shift][0]} of 10 poisoned samples among the 10 highest scores, "
          f"{seen[shift][1]} by centred features")
same = seen == {0: (10, 10), 10: (10, 10), -3: (seen[-3][0], 10), -10: (0, 10)} and seen[-3][0] < 10
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
