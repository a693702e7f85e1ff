#!/usr/bin/env bash
# torch 2.13.0, torch.distributed with gloo: all_reduce with MAX or MIN loses a NaN, depending on which rank holds it.
#
# One would expect what torch.maximum does on one process: NaN. With two processes, MAX and MIN give NaN where rank 0 holds
# it, and the other rank's number where rank 1 does; both ranks agree on it. SUM gives NaN in both cases. A training
# that asks "is the largest loss over all processes finite?" by ReduceOp.MAX goes on after the NaN of one process, and so do a
# largest gradient norm and a smallest margin. Reduce a flag instead (1 where not torch.isfinite), by MAX or SUM.
#
# Exit 0 while this is so, 1 when it changed, 2 where the package can't be installed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.3.5' || exit 2
cat >"$work/reduce.py" <<'PY'
import math
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

OPS = {"MAX": dist.ReduceOp.MAX, "MIN": dist.ReduceOp.MIN, "SUM": dist.ReduceOp.SUM}


def work(rank, store, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=2)
    for name, op in OPS.items():
        for holder in (0, 1):
            value = torch.tensor([math.nan if rank == holder else 1.0])
            dist.all_reduce(value, op)
            answers.put((name, holder, rank, value.item()))
    dist.destroy_process_group()


if __name__ == "__main__":
    alone = torch.maximum(torch.tensor(math.nan), torch.tensor(1.0)).item()
    with tempfile.TemporaryDirectory() as store:
        answers = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, args=(store, answers), nprocs=2)
        got = sorted(answers.get() for _ in range(12))
    print(f"torch {torch.__version__}; torch.maximum of NaN and 1 on one process: {alone}")
    for name, holder, rank, value in got:
        print(f"{name}, NaN held by rank {holder}: rank {rank} gets {value}")
    lost = {(name, holder) for name, holder, _, value in got if value == 1.0}
    kept = {(name, holder) for name, holder, _, value in got if math.isnan(value)}
    same = (
        math.isnan(alone)
        and lost == {("MAX", 1), ("MIN", 1)}
        and kept == {("MAX", 0), ("MIN", 0), ("SUM", 0), ("SUM", 1)}
    )
    print("as described" if same else "CHANGED")
    sys.exit(not same)
PY
"$work/venv/bin/python" "$work/reduce.py"
