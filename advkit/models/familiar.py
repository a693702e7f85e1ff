"""What users write for a model that is none of advkit's names, and how it is named here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from advkit.core.registry.familiar import Familiar, Setting, settings

_ROBUSTBENCH: Final = re.compile(r"[A-Z][a-z]+20\d\d[A-Z]\w*")
_WEIGHTS: Final = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl")

SETTINGS: Final = settings(
    ("checkpoint_path ckpt weights state_dict file path", Setting(here=("checkpoint",))),
    ("num_classes n_classes nb_classes classes", Setting(otherwise="the number of classes is the task's")),
    (
        "normalize normalization",
        Setting(here=("mean",), words="It goes with std: mean=0.5,std=0.5, one per channel joined by +"),
    ),
    ("device", Setting(otherwise="the device is an option of the run: --device cuda")),
)


def _guess(name: str) -> str | None:
    """A file, a module or the name of another package's model."""
    path = Path(name)
    if path.suffix in _WEIGHTS:
        return f"a file of weights is path:{name}"
    if path.suffix == ".gguf":
        return f"did you mean 'gguf:{name}'?"
    if path.suffix == ".py":
        return f"what a Python file holds is python:{path.stem}:NAME"
    if path.is_dir():
        return _of_folder(path)
    if "/" in name:
        return f"a language model of the hub or of a folder is hf:{name}, one of timm's timm:hf_hub:{name}"
    if re.fullmatch(r"\w+(\.\w+)+", name):
        return f"what a Python module holds is python:{name}:NAME"
    if _ROBUSTBENCH.fullmatch(name):
        return f"a model of RobustBench is robustbench:{name}"
    return _of_packages(name)


def _of_folder(path: Path) -> str:
    """A folder that is there."""
    if (path / "config.json").is_file():
        return f"a folder of transformers is hf:{path}"
    if (path / "model.safetensors").is_file():
        return f"the weights in it are path:{path / 'model.safetensors'}"
    weights = sorted(each for each in path.iterdir() if each.suffix in _WEIGHTS)
    if weights:
        return f"the weights in it are path:{weights[0]}"
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return f"the weights in it are gguf:{ggufs[0]}"
    if (path / "report.json").is_file():
        return "that is the folder of a run, which holds no weights: name the model that was evaluated"
    return f"that folder holds no weights (.safetensors, .pt, .gguf); a folder of transformers is hf:{path}"


def _of_packages(name: str) -> str | None:
    try:
        import timm
        import torchvision.models
    except ImportError:
        return None
    homes = []
    if name in torchvision.models.list_models(module=torchvision.models):
        homes.append(f"torchvision:{name}")
    if timm.is_model(name):
        homes.append(f"timm:{name}")
    return f"other packages' models are {' or '.join(homes)}" if homes else None


def what_it_is(thing: Any) -> str:
    """What to do with an object that is no model; "" where nothing is known of it."""
    if isinstance(thing, type):
        return "a class: call it first"
    if isinstance(thing, Mapping):
        return (
            "a state dict holds weights without their network: module.load_state_dict(weights), then model=module, or "
            "save it and name its architecture with path:FILE,architecture=..."
        )
    if isinstance(thing, Path):
        return f"a file is named as path:{thing}"
    if isinstance(thing, (list, tuple)):
        return "several models are one as advkit.models.ensemble.Ensemble(models)"
    if type(thing).__module__.partition(".")[0] == "art":
        return "hand over the torch module that it was made of, or classifier.model"
    if hasattr(thing, "predict_proba"):
        return (
            "wrap it in a function from samples to log-probabilities: lambda x: "
            "torch.tensor(model.predict_proba(x.flatten(1).numpy())).log(); attacks on it need scores alone, as square"
        )
    return ""


FAMILIAR: Final = Familiar(settings=SETTINGS, guess=_guess)
