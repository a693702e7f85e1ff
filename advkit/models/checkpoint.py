"""Weights on disk: safetensors with everything that rebuilds the model, checked before it is believed. No pickle.

A checkpoint of ours carries the architecture's spec, the shape of a row, classes, normalisation, space, and a hash over
weights and metadata together, so that any changed byte is an error. That is a plain hash: it tells of damage, and
anyone can make another. What a file says is therefore never obeyed beyond data: it may name advkit's own architectures
alone, and the sizes it declares are held against its tensors before memory is taken. Files of others are read by name
and shape alone: foreign safetensors, or `.pt`/`.pth` through torch's weights-only reader, always with an explicit
architecture and strictly.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from advkit.core.errors import BadModel, CheckpointError, UsageError
from advkit.core.files import why, write_whole
from advkit.core.protocols import Rng, Sized
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary, Box
from advkit.core.strict_json import read_object
from advkit.core.text import first_line
from advkit.models.pickles import check_pickled
from advkit.models.recognised import PREFIXES, advice
from advkit.models.torch import TorchModel

FORMAT = "advkit-model-1"
_HEADER_LIMIT = 100_000_000  # bytes: what the safetensors format itself allows


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; refuses NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_atomically(path: Path, content: bytes) -> None:
    """All of the content or, after a crash, what was there before; CheckpointError where it can't be written."""
    try:
        write_whole(Path(path), content)
    except OSError as error:
        raise CheckpointError(f"can't write {path} ({why(error)}); name a folder that you may write") from error


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; tensors that share memory are written once each.

    The same tensors and metadata give the same bytes: the library writes metadata in an order that changes from call to
    call, so the header is written again with its keys sorted.
    """
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(held, dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = canonical_json(json.loads(content[8 : 8 + length])).encode()
    header += b" " * (-len(header) % 8)  # the format aligns what follows
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def unpack(content: bytes, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file held in memory; CheckpointError where it is none."""
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(_HEADER_LIMIT, len(content) - 8):
            raise ValueError("the header's length does not fit the file")
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is no intact safetensors file ({first_line(error)}); it is damaged or of another kind: fetch it "
            "again"
        ) from error
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def read_checked(path: str | Path, sha256: str = "") -> bytes:
    """The content of a file, once its sha256 is the one expected (where one is given): nothing is parsed before."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}; expected a checkpoint file") from error
    if sha256:
        seen = hashlib.sha256(content).hexdigest()
        if seen != sha256.strip().lower():
            raise CheckpointError(
                f"{path} has sha256 {seen}, expected {sha256}: it is not the file that was meant, and was not opened"
            )
    return content


def _space_to_json(space: Any) -> dict[str, Any]:
    if isinstance(space, Binary):
        return {"kind": "binary", "shape": None if space.shape is None else list(space.shape)}
    if not isinstance(space, Box):
        raise CheckpointError(
            f"a checkpoint holds models whose space is a Box or Binary, this one's is {type(space).__name__}; "
            "save the module's state dict yourself"
        )
    described: dict[str, Any] = {"kind": "box"}
    for side in ("low", "high"):
        value = space.low if side == "low" else space.high
        described[side] = value.tolist() if isinstance(value, Tensor) else float(value)
    described["shape"] = None if space.shape is None else list(space.shape)
    described["levels"] = space.levels
    return described


def _space_from_json(described: Mapping[str, Any]) -> Box | Binary:
    if described["kind"] == "binary":
        shape = described["shape"]
        return Binary(None if shape is None else tuple(shape))
    if described["kind"] != "box":
        raise ValueError(f"unknown space {described['kind']!r}")
    low, high = (
        torch.tensor(side, dtype=torch.float64) if isinstance(side, list) else float(side)
        for side in (described["low"], described["high"])
    )
    shape = described["shape"]
    return Box(low, high, None if shape is None else tuple(shape), levels=described["levels"])


def _seal(metadata: Mapping[str, str]) -> str:
    """Hash of all metadata but the seal itself; the weights take part through their own hash in it."""
    rest = {key: value for key, value in metadata.items() if key != "seal"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    """The state dict's tensors, refusing whatever else a module may put there."""
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} of the model's state is a {type(value).__name__}, only tensors are stored")
    return dict(state)


def save_checkpoint(
    model: TorchModel,
    path: str | Path,
    architecture: str = "",
    extra: Mapping[str, Any] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    half: bool = False,
) -> str:
    """Write a model to a safetensors file, atomically, and return the file's sha256.

    architecture: spec that builds the module (default: the model's own)
    extra:        anything JSON can say: task, defense, seed, figures
    shape:        of one row (default: the one its space says)
    half:         store floating weights in float16; the model that is loaded has the rounded weights in float32

    Raises CheckpointError where the architecture or shape is unknown, the path can't be written, or weights do not fit
    float16.
    """
    architecture = architecture or model.architecture
    if not architecture:
        raise CheckpointError("the model does not say its architecture; pass architecture='cnn:width=16' or the like")
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"checkpoints are safetensors files, got {path}; end the name in .safetensors")
    shape = shape or (model.space.shape if isinstance(model.space, Sized) else None)
    if shape is None or (model.classes is None and not model.answer_shape):
        raise CheckpointError(
            "a checkpoint says the shape of a sample and the number of classes; the model knows neither"
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in _persistent(model.module).items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    stored = model
    if half:
        stored = model.copy()
        rounded = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded.values() if tensor.is_floating_point()):
            raise CheckpointError("some weights are beyond float16's range (65504); save with half=False")
        tensors = rounded
        stored.module.load_state_dict({name: t.to(getattr(torch, dtypes[name])) for name, t in rounded.items()})
    metadata = {
        "format": FORMAT,
        "architecture": architecture,
        "shape": canonical_json(list(shape)),
        "classes": str(model.classes or 0),  # 0: answers are samples
        "mean": canonical_json(list(model.mean)),
        "std": canonical_json(list(model.std)),
        "space": json.dumps(_space_to_json(model.space), sort_keys=True),  # bounds may be infinite
        "name": model.name,
        "source": model.source,
        "license": model.license,
        "dtypes": canonical_json(dtypes),
        "state_sha256": stored.state_sha256(),
        "extra": canonical_json(dict(extra or {})),
    }
    metadata["seal"] = _seal(metadata)
    content = pack(tensors, metadata)
    write_atomically(Path(path), content)
    return hashlib.sha256(content).hexdigest()


def load_checkpoint(
    path: str | Path,
    *,
    sha256: str = "",
    architecture: str = "",
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> TorchModel:
    """The model of a checkpoint file, on the CPU and in evaluation mode.

    sha256:         of the file; checked before anything is parsed
    architecture:   spec that builds the module; needed for files that advkit did not write and for networks that are
                    not advkit's own (`timm:`, `python:`...), an assertion for the others
    shape, classes: likewise

    Raises CheckpointError where the file is missing, damaged, of another kind or does not fit, BadModel where it holds
    a model for other rows or classes than the ones said.
    """
    path = Path(path)
    _check_kind(path)
    content = read_checked(path, sha256)
    if path.suffix != ".safetensors":
        return _load_foreign(_read_pickle(content, path), path, architecture, shape, classes)
    tensors, metadata = unpack(content, path)
    if metadata.get("format") != FORMAT:
        if str(metadata.get("format", "")).startswith("advkit-"):
            raise CheckpointError(f"{path} is of format {metadata['format']!r}, expected {FORMAT!r}")
        return _load_foreign(tensors, path, architecture, shape, classes)
    return _load_own(tensors, metadata, path, architecture, shape, classes)


def _check_kind(path: Path) -> None:
    if path.suffix not in (".safetensors", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path} is neither .safetensors nor .pt/.pth/.ckpt; other kinds are not read, convert it"
        )


def checkpoint_extra(path: str | Path, *, sha256: str = "") -> dict[str, Any]:
    """What was said beside the weights when the checkpoint was written."""
    _, metadata = unpack(read_checked(path, sha256), path)
    _check_seal(metadata, path)
    try:
        return read_object(metadata["extra"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this version ({first_line(error)})") from error


def _check_seal(metadata: Mapping[str, str], path: Path | str) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by save_checkpoint (format {metadata.get('format')!r})")
    if metadata.get("seal") != _seal(metadata):
        raise CheckpointError(f"{path} is damaged: its metadata does not match its seal; fetch or train it again")


def _load_own(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    path: Path,
    architecture: str,
    shape: tuple[int, ...] | None,
    classes: int | None,
) -> TorchModel:
    _check_seal(metadata, path)
    try:
        held_shape = tuple(int(length) for length in json.loads(metadata["shape"]))
        held_classes = int(metadata["classes"])
        mean, std = (tuple(float(value) for value in json.loads(metadata[name])) for name in ("mean", "std"))
        space = _space_from_json(json.loads(metadata["space"]))
        dtypes = {str(name): _dtype(text) for name, text in json.loads(metadata["dtypes"]).items()}
        described = {name: metadata[name] for name in ("name", "source", "license", "state_sha256")}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this version ({first_line(error)})") from error
    if shape is not None and tuple(shape) != held_shape:
        raise BadModel(
            f"{path.name} was trained on samples of shape {list(held_shape)}, this task's are {list(shape)}; "
            "choose the task it was made for"
        )
    if classes is not None and classes != held_classes:
        answers = f"{held_classes} classes" if held_classes else "samples"
        wanted = f"has {classes} classes" if classes else "wants reconstructed samples"
        raise BadModel(f"{path.name} answers {answers}, this task {wanted}")
    spec = metadata.get("architecture", "")
    if not _trusted(spec, architecture, path):
        spec = architecture
    if set(dtypes) != set(tensors):
        raise CheckpointError(f"{path} is damaged: its tensors are not the ones that its metadata lists")
    built = _build(spec, held_shape, held_classes, tensors, path)
    module = built.module
    _fill(module, {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}, path, spec)
    model = TorchModel(
        module,
        space,
        held_classes or None,
        mean,
        std,
        described["name"],
        described["source"],
        described["license"],
        architecture=spec,
        answer_shape=built.answer_shape,
    )
    model = type(built).of(model)  # a spiking network is one again
    if model.state_sha256() != described["state_sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights do not match their hash; fetch or train it again")
    return model


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{text!r} is no dtype")
    return found


def _trusted(spec: str, asked: str, path: Path) -> bool:
    """Whether the spec in a file may be built as it stands; where not, the one asked for says the same.

    Raises CheckpointError where the file names what is not advkit's own and nobody asked for it, or another network
    than the one asked for. Nothing is imported or built for what the file says before that.
    """
    own = _is_own(spec, path)
    if not asked:
        if not own:
            raise CheckpointError(
                f"{path} names the architecture {spec!r}, which is not advkit's own: a file may not choose what code "
                f"runs here; where you trust it, name it yourself: path:{path},architecture=[...], or "
                "load_checkpoint(..., architecture=...)"
            )
        return True
    # Text for text where the file's spec may not be built.
    same = _canonical(asked) == _canonical(spec) if own else asked.strip() == spec.strip()
    if not same:
        raise CheckpointError(f"{path} holds {spec!r}, not {asked!r}; leave the architecture out")
    return own


def _is_own(spec: str, path: Path) -> bool:
    from advkit.models import own_architecture

    try:
        return own_architecture(spec)
    except UsageError as error:
        raise CheckpointError(f"{path} names no architecture: {error}") from error


def _canonical(spec: str) -> str:
    from advkit.models import MODELS

    return MODELS.spec(MODELS.build(spec))


def _build(
    spec: str, shape: tuple[int, ...], classes: int, tensors: Mapping[str, Tensor], path: Path | str
) -> TorchModel:
    """The untrained network of a spec, once its names and shapes are known to be the tensors'."""
    from advkit.models import MODELS
    from advkit.models.torch import Architecture, shapes_alone

    name = spec.partition(":")[0].strip().casefold()
    if name in ("path", "zoo"):  # a file that names itself, or another file, would be followed for ever
        raise CheckpointError(f"{spec!r} is a stored model, not an architecture; expected one such as cnn:width=16")
    part, rng = MODELS.build(spec), RowRng.from_ids(0, ["checkpoint"])
    if isinstance(part, Architecture):
        try:
            with shapes_alone():
                blank = part(shape, classes, rng)
        except (RuntimeError, OverflowError, TypeError, ValueError) as error:  # sizes that no tensor can have
            raise CheckpointError(f"{path} declares sizes that no network has ({first_line(error)})") from error
        _check_fit(blank.module, _without_prefix(dict(tensors), blank.module), path, spec)
    built = part(shape, classes, rng)
    if not isinstance(built, TorchModel):
        raise CheckpointError(f"{spec!r} builds a {type(built).__name__}; weights go into torch models only")
    return built


def _check_fit(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str, spec: str) -> None:
    """Strictly: every name, every shape, and no conversion of integers to floats or back."""
    wanted = _persistent(module)
    missing = sorted(set(wanted) - set(tensors))
    unknown = sorted(set(tensors) - set(wanted))
    if missing or unknown:
        said = [f"lacks {_few(missing)}"] if missing else []
        said += [f"has {_few(unknown)} that the model does not know"] if unknown else []
        raise CheckpointError(f"{path} does not fit {spec}: it {' and '.join(said)}")
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise CheckpointError(
                f"{path} does not fit {spec}: {name} is a {_layout(tensor)}, no plain array of numbers"
            )
        if tensor.shape != wanted[name].shape or tensor.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{path} does not fit {spec}: {name} is {_kind(tensor)}, the model's is {_kind(wanted[name])}"
            )


def _is_plain(tensor: Tensor) -> bool:
    """Whether numbers lie in memory, one after the other: not sparse, nested, quantized or without storage."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "empty"
        return f"{kind} tensor"
    return f"tensor of layout {str(tensor.layout).removeprefix('torch.')}"


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str, spec: str) -> None:
    _check_fit(module, tensors, path, spec)
    module.load_state_dict(dict(tensors), strict=True)
    module.eval()


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _read_pickle(content: bytes, path: Path) -> dict[str, Tensor]:
    """The state dict in a .pt file, by torch's reader that builds tensors and plain containers and runs nothing."""
    try:
        check_pickled(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive makes the reader raise nearly anything
        held = re.search(r"GLOBAL ([\w.]{1,80}) was not", str(error))
        what = f"it holds {held[1]}" if held else first_line(error)
        raise CheckpointError(
            f"{path} can't be read as weights alone ({what}): it is damaged or holds Python objects, which "
            "could run code and are not loaded; store its state_dict() as safetensors where you trust it"
        ) from error
    return _state_dict(loaded, path)


WRAPPED = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the weights."""


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    held = loaded
    for key in WRAPPED:
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
            break
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise CheckpointError(
            f"{path} holds no state dict, names and tensors, on top or under {', '.join(WRAPPED)}: it holds "
            f"{_contents(held)}; save the one that is meant by itself"
        )
    return {str(name): value for name, value in held.items()}


def _contents(loaded: Any) -> str:
    """What there is in place of a state dict."""
    if not isinstance(loaded, dict):
        return f"a {type(loaded).__name__}"
    keys = [f"{str(key)[:40]} ({type(value).__name__})" for key, value in list(loaded.items())[:8]]
    return f"the keys {', '.join(keys) or 'none'}" + (" and more" if len(loaded) > 8 else "")


def fill_from_file(module: nn.Module, path: str | Path, sha256: str = "", name: str = "the model") -> None:
    """Load somebody's weights into a module strictly: safetensors, or .pt/.pth through the weights-only reader.

    What training left before every name (`module.`, `_orig_mod.`, `model.`, `net.`) is dropped.
    """
    path = Path(path)
    _check_kind(path)
    content = read_checked(path, sha256)
    tensors = unpack(content, path)[0] if path.suffix == ".safetensors" else _read_pickle(content, path)
    _fill(module, _without_prefix(tensors, module), path, name)


def _without_prefix(tensors: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """The tensors without what stands before every name and is no part of the module's own names."""
    wanted = _persistent(module)
    while tensors and not set(tensors) & set(wanted):
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _load_foreign(
    tensors: dict[str, Tensor], path: Path, architecture: str, shape: tuple[int, ...] | None, classes: int | None
) -> TorchModel:
    if not architecture or shape is None or classes is None:
        known = "" if architecture else advice(tensors, path)
        raise CheckpointError(
            f"{path} was not written by advkit and does not say what it holds; "
            + (
                known
                or f"give the architecture, such as path:{path},architecture=resnet18, together with a task; a "
                "network of yours is architecture=[python:MODULE:NAME]"
            )
        )
    try:
        model = _build(architecture, tuple(shape), classes, tensors, path)
        _fill(model.module, _without_prefix(tensors, model.module), path, architecture)
    except CheckpointError as error:
        if known := advice(tensors, path):
            raise CheckpointError(f"{error}; {known}") from error
        raise
    model.name, model.source = path.stem, "a weights file of the user's"
    return model


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """Checkpoint file: one that save_checkpoint wrote, or others' weights with an explicit architecture.

    file:         .safetensors, or .pt/.pth read by torch's weights-only reader
    architecture: spec that builds the module, in brackets where it has commas; for files that advkit did not write, and
                  for networks that are not advkit's own (timm:, python:...), which no file may name by itself
    sha256:       of the file; checked before it is opened
    """

    file: str
    architecture: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.file:
            raise UsageError("path: needs the name of a file, such as path:victim.safetensors")

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        model = load_checkpoint(
            self.file, sha256=self.sha256, architecture=self.architecture, shape=tuple(shape), classes=classes
        )
        if space is not None and model.source == "a weights file of the user's":
            model.space = space
        return model
