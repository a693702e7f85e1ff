#!/usr/bin/env bash
# colour-demosaicing 0.2.7: bilinear and Malvar demosaicing of one plain colour is wrong along the image's borders.
#
# Interpolating between equal samples is expected to give that value back. Inside the image all three methods do; along
# the borders the mosaic is continued by repeating the outermost pixels, so that a red sample lies where the pattern has a
# green one, and samples of a colour are counted twice or not at all. A plain image of (0.9, 0.5, 0.1) comes back from
# demosaicing_CFA_Bayer_bilinear with 2.025 for red in a corner, more than twice the truth and outside of [0, 1], and
# from demosaicing_CFA_Bayer_Malvar2004 wrong by up to 0.55 in the two outermost rows and columns. Menon2007, which
# continues its mosaic the other way round, is exact. On crops, as sensor pipelines are tested on them, the border is
# much of the image (a quarter of the pixels of 32 x 32 for Malvar), and its error dominates PSNR.
#
# Exit 0 while this is so, 1 when it changed, 2 where the packages can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'colour-demosaicing==0.2.7' 'colour-science==0.4.7' \
    'scipy==1.17.1' 'numpy==2.3.5' || exit 2
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import colour_demosaicing
import numpy as np

plain = np.ones((32, 32, 3)) * [0.9, 0.5, 0.1]
mosaic = colour_demosaicing.mosaicing_CFA_Bayer(plain, "RGGB")
print(f"colour-demosaicing {colour_demosaicing.__version__}; a plain image of (0.9, 0.5, 0.1), 32 x 32 pixels, RGGB")
seen = {}
for name in ("bilinear", "Malvar2004", "Menon2007"):
    image = getattr(colour_demosaicing, f"demosaicing_CFA_Bayer_{name}")(mosaic, "RGGB")
    error = np.abs(image - plain).max(axis=2)
    wrong = error > 1e-6
    seen[name] = error.max(), error[2:-2, 2:-2].max(), wrong.sum()
    psnr = -10 * np.log10(max(np.mean((image - plain) ** 2), 1e-30))
    print(f"{name}: largest value {image.max():.3f}, largest error {error.max():.3f}, two pixels inside {seen[name][1]:.1e}; "
          f"{wrong.sum()} of {wrong.size} pixels wrong, PSNR {psnr:.1f} dB")
same = (
    seen["bilinear"][0] > 1
    and seen["Malvar2004"][0] > 0.5
    and seen["Menon2007"][0] < 1e-9
    and all(inside < 1e-9 for _, inside, _ in seen.values())
)
print("as described" if same else "CHANGED")
sys.exit(not same)
PY
