#!/usr/bin/env bash
# torch 2.14.1 on a CPU: silu, sigmoid, softplus and gelu(approximate="tanh") of one number depend on where it stands.
#
# An elementwise function is expected to give equal results for equal inputs. What does not fill a vector register at the
# end of a tensor is computed by other code, whose last bit differs in one number of some hundreds. So a row of 75
# features has other bits in a batch of 16 than in a batch of 32, with no matrix product in between; tanh, exp and relu
# do not differ. Seen with AVX2 and with AVX-512, and with torch 2.6.0; not with ATEN_CPU_CAPABILITY=default. Whoever
# promises results that do not depend on the batch has to call such models with numbers of rows that leave no rest.
#
# Exit 0 while this is so, 1 when it changed, 2 where the package can't be installed or the CPU has no AVX2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.14.1' 'numpy==2.3.5' || exit 2
ATEN_CPU_CAPABILITY=avx2 "$work/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn import functional

if torch.backends.cpu.get_cpu_capability() != "AVX2":
    print("this CPU has no AVX2")
    sys.exit(2)
torch.set_num_threads(1)
x = torch.randn(4096, 75, generator=torch.Generator().manual_seed(0))
differ = {}
for name, function in {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "softplus": functional.softplus,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "relu": torch.relu,
}.items():
    whole = function(x)
    for rows in (1, 31, 32):
        parts = torch.cat([function(part.contiguous()) for part in x.split(rows)])
        differ[name, rows] = int((parts != whole).sum())
    print(f"torch {torch.__version__}, {name}: of {x.numel()} numbers differ from those of one call, in calls of",
          ", ".join(f"{rows} rows {differ[name, rows]}" for rows in (1, 31, 32)))
moved = all(differ[name, 1] > 0 and differ[name, 31] > 0 for name in ("silu", "sigmoid", "gelu tanh", "softplus"))
kept = all(differ[name, rows] == 0 for name in ("tanh", "exp", "relu") for rows in (1, 31, 32))
even = all(differ[name, 32] == 0 for name in ("silu", "sigmoid", "gelu tanh", "softplus"))
sys.exit(0 if moved and kept and even else 1)
PY
