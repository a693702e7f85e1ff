"""Tasks by name. Adding one is one file below this package and one line here."""

from __future__ import annotations

from advkit.core.protocols import Task
from advkit.core.registry import Registry

TASKS: Registry[Task] = Registry(
    "task",
    {
        "fashion-mnist": "advkit.tasks.fashion_mnist:FashionMNIST",
        "fashion-mnist-captions": "advkit.tasks.captions:FashionMNISTCaptions",
        "digits": "advkit.tasks.digits:Digits",
        "cifar10": "advkit.tasks.cifar:CIFAR10",
        "cifar100": "advkit.tasks.cifar:CIFAR100",
        "imagenet": "advkit.tasks.imagenet:ImageNet",
        "imagenet-samples": "advkit.tasks.imagenet:ImageNetSamples",
        "folder": "advkit.tasks.folder:Folder",
        "npz": "advkit.tasks.npz:Npz",
        "maite:": "advkit.tasks.maite:MaiteData",
        "digits-pair": "advkit.tasks.pools:DigitsPair",
        "fashion-mnist-pair": "advkit.tasks.pools:FashionMNISTPair",
        "text": "advkit.tasks.texts:TextFile",
        "moons": "advkit.tasks.pools:Moons",
        "fashion-mnist-dvs": "advkit.tasks.events:FashionMNISTDVS",
        "digits-dvs": "advkit.tasks.events:DigitsDVS",
        "events": "advkit.tasks.events:EventFolder",
        "digits-reconstruction": "advkit.tasks.reconstruction:DigitsReconstruction",
        "fashion-mnist-reconstruction": "advkit.tasks.reconstruction:FashionMNISTReconstruction",
        "prompts": "advkit.tasks.prompts:Prompts",
    },
    group="advkit.tasks",
    contract=Task,
    objects=True,
    familiar="advkit.tasks.familiar:FAMILIAR",
)
