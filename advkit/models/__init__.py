"""Models by name: architectures to train, and prefixes that load one (`timm:NAME`, `path:FILE`, `zoo:NAME`)."""

from __future__ import annotations

from typing import Any

from advkit.core.protocols import ModelBuilder
from advkit.core.registry import Registry, outside, parse_spec

MODELS: Registry[Any] = Registry(
    "model",
    {
        "cnn": "advkit.models.cnn:CNN",
        "mlp": "advkit.models.mlp:MLP",
        "reconstructor": "advkit.models.reconstructor:Reconstructor",
        "resnet8": "advkit.models.resnet:ResNet8",
        "resnet18": "advkit.models.resnet:ResNet18",
        "wrn-28-10": "advkit.models.resnet:WRN28x10",
        "dual-encoder": "advkit.models.image_text:DualEncoder",
        "efficientnet-lite0": "advkit.models.efficientnet:EfficientNetLite0",
        "snn": "advkit.models.spiking.nets:SmallSNN",
        "snn-resnet18": "advkit.models.spiking.nets:SpikingResNet18",
        "snn-vgg11": "advkit.models.spiking.nets:SpikingVGG11",
        "vggsnn": "advkit.models.spiking.nets:VGGSNN",
        "toychat": "advkit.models.language.toychat:ToyChat",
        "gguf:": "advkit.models.language.gguf:GGUF",
        "hf:": "advkit.models.language.transformers:HuggingFace",
        "timm:": "advkit.models.external:Timm",
        "torchvision:": "advkit.models.external:TorchVision",
        "robustbench:": "advkit.models.robustbench:RobustBench",
        "python:": "advkit.models.external:PythonFactory",
        "maite:": "advkit.models.maite:MaiteModel",
        "clip:": "advkit.models.clip:TransformersCLIP",
        "open_clip:": "advkit.models.clip:OpenCLIP",
        "http:": "advkit.models.http:HTTP",
        "https:": "advkit.models.http:HTTPS",
        "path:": "advkit.models.checkpoint:CheckpointFile",
        "zoo:": "advkit.models.zoo:ZooModel",
    },
    group="advkit.models",
    contract=ModelBuilder,
    familiar="advkit.models.familiar:FAMILIAR",
)


def own_architecture(spec: str) -> bool:
    """Whether a spec names one of advkit's own architectures and nothing else at any nesting; read from its text alone.

    Only these may be named by a file: the others run code, reach the network or open further files.
    """
    name = parse_spec(spec).name
    known = name in MODELS and MODELS.known(name) in MODELS.table and MODELS.known(name) != "toychat"
    return known and not MODELS.known(name).endswith(":") and not outside(spec)
