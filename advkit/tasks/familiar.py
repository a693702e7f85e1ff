"""What users hand over for a task that is no task, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.registry.familiar import Familiar, Setting, settings
from advkit.core.text import first_line
from advkit.tasks.arrays import Arrays
from advkit.tasks.npz import MEMORY

_EXPECTED: Final = "a task is a spec, a Task, a data set or a loader of torch, or a pair (x, y) of samples and labels"
_COLLECT: Final = "x, y = (torch.cat(part) for part in zip(*{}))"

NAMES: Final[dict[str, str]] = {
    **dict.fromkeys(("fmnist", "fashion"), "did you mean 'fashion-mnist'?"),
    "mnist": "MNIST is not embedded; fashion-mnist and digits are, and npz:path=FILE reads arrays x and y of yours",
    "cifar": "say cifar10 or cifar100, with root=FOLDER",
    **dict.fromkeys(("imagenet1k", "ilsvrc2012", "ilsvrc"), "did you mean 'imagenet:root=FOLDER'?"),
    **dict.fromkeys(("svhn", "stl10", "tinyimagenet", "celeba", "gtsrb"), "save arrays x and y: npz:path=FILE"),
    **dict.fromkeys(("advbench", "harmbench", "jailbreakbench"), "read its file with prompts:file=FILE"),
    **dict.fromkeys(("nmnist", "dvsgesture", "cifar10dvs"), "read your recordings with events:path=FOLDER"),
}
SETTINGS: Final = settings(
    ("dir data data_dir folder", Setting(here=("root", "path"))),
    ("file filename", Setting(here=("path", "file"))),
    ("n_classes num_classes nb_classes", Setting(here=("classes",))),
    ("train", Setting(here=("split",))),
    ("n size num_samples samples", Setting(otherwise="the number of samples is an option of the run: --n 100")),
    ("batch_size", Setting(otherwise="samples in flight are an option of the run: --batch-size 64")),
)


def _guess(name: str) -> str | None:
    """A path where a name belongs."""
    path = Path(name)
    if path.suffix in (".npz", ".npy"):
        return f"a file of arrays is npz:path={name}"
    if path.suffix in (".jsonl", ".csv"):
        return f"a file of prompts is prompts:file={name}"
    if path.is_dir():
        return f"a folder of class folders is folder:path={name}"
    if path.is_file():
        return f"a task is no {path.suffix or 'such'} file: arrays are npz:path=FILE, images folder:path=FOLDER"
    if name.startswith((".", "/", "~")) or "/" in name:
        return f"there is no folder and no file {name}; a folder of class folders is folder:path=FOLDER"
    return None


def _other(part: Any) -> Arrays:
    """The task of a pair of arrays; BadInput says how to make one of anything else."""
    from torch.utils.data import DataLoader, Dataset

    kind = type(part).__name__
    if isinstance(part, DataLoader):
        return _of_loader(part, kind)
    if isinstance(part, Dataset):
        return _of_loader(DataLoader(part, batch_size=256), kind)
    if isinstance(part, (Tensor, np.ndarray)):
        raise BadInput(f"{_EXPECTED}, not one {kind} of shape {list(part.shape)}: the labels are missing")
    if isinstance(part, Path):
        raise BadInput(f"{_EXPECTED}, not a {kind}; a file is named as npz:path={part}, folder:path={part}...")
    if isinstance(part, Mapping):
        raise BadInput(f"{_EXPECTED}, not a {kind} with {', '.join(map(str, list(part)[:4]))}; take its two arrays")
    if isinstance(part, (tuple, list)):
        return _of_sequence(part)
    if isinstance(part, Iterable) and not hasattr(part, "batches"):
        raise BadInput(f"{_EXPECTED}, not a {kind}; collect its samples first: {_COLLECT.format('batches')}")
    if part is None or isinstance(part, (int, float)):
        raise BadInput(f"{_EXPECTED}, not {part!r}")
    return None  # type: ignore[return-value]  # the registry says which members it lacks


def _of_loader(loader: Any, kind: str) -> Arrays:
    """All samples of a loader, in memory."""
    from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

    if isinstance(loader.sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise BadInput(
            f"the {kind} draws its order anew at every run: make it with shuffle=False, without such a sampler"
        )
    xs, ys, size = [], [], 0
    try:
        for batch in loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(b, Tensor) for b in batch):
                raise BadInput(f"{_EXPECTED}; this {kind} gives a {_shown(batch)}, not (samples, labels)")
            xs.append(batch[0])
            ys.append(batch[1])
            size += batch[0].nbytes
            if size > MEMORY:
                raise UsageError(
                    f"the {kind} has more than {MEMORY / 2**30:.0f} GiB of samples, which are read into memory: take a "
                    "torch.utils.data.Subset of it, or folder:path=FOLDER, whose images are decoded as they are needed"
                )
        return Arrays(torch.cat(xs), torch.cat(ys))
    except AdvkitError:
        raise
    except Exception as error:  # data sets run code of others, and images of several sizes do not go together
        said = first_line(error)
        advice = "; images become tensors by transform=torchvision.transforms.ToTensor()" if "PIL" in said else ""
        raise BadInput(f"the {kind} gives no samples in batches ({type(error).__name__}: {said}){advice}") from error


def _shown(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(each).__name__ for each in batch[:4])}"
    return f"{type(batch).__name__}"


def _of_sequence(part: tuple[Any, ...] | list[Any]) -> Arrays:
    pairs = [one for one in part if isinstance(one, (tuple, list)) and len(one) == 2]
    if (len(part) > 2 and len(pairs) == len(part)) or (len(part) == 2 and len(pairs) == 2 and _sample_first(pairs[0])):
        raise BadInput(
            f"{_EXPECTED}, not a {type(part).__name__} of {len(part)} pairs; put them together first: "
            + (
                _COLLECT.format("pairs")
                if _rows(pairs[0][1])
                else "x = torch.stack([sample for sample, _ in pairs]); y = torch.tensor([label for _, label in pairs])"
            )
        )
    if len(part) != 2:
        raise BadInput(f"a task of {len(part)} parts; expected a spec, a Task, or a pair (x, y)")
    x, y = part
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == 1 < y.ndim:
        raise BadInput("a task is a pair (x, y): samples first, then labels; these are the other way round")
    from torch.utils.data import DataLoader, Dataset

    for one in part:
        if isinstance(one, (DataLoader, Dataset)):
            raise BadInput(f"{_EXPECTED}; {type(one).__name__} brings its labels: hand it over alone")
    return Arrays(x, y)


def _sample_first(pair: Any) -> bool:
    return isinstance(pair[0], (Tensor, np.ndarray))


def _rows(labels: Any) -> bool:
    return isinstance(labels, (Tensor, np.ndarray)) and labels.ndim > 0


FAMILIAR: Final = Familiar(names=NAMES, settings=SETTINGS, guess=_guess, other=_other)
