"""Recipes by name: YAML files of this package that say how a model is trained, and those of users.

Nothing here imports torch: `advkit list recipes` reads the files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from advkit.core.registry import Argument, FieldInfo, Named, Registry, Signature, describe_type
from advkit.training.recipes.files import RecipeFile, opened, read_file

FOLDER = Path(__file__).parent
METHODS = (
    "pgd-at",
    "trades",
    "mart",
    "awp-pgd-at",
    "awp-trades",
    "doubly-robust",
    "fgsm-rs",
    "n-fgsm",
    "grad-align",
    "free-at",
    "aaer-fgsm-rs",
    "aaer-n-fgsm",
)
NAMES = (
    *(f"cifar10-{method}" for method in METHODS),
    *(f"cifar100-{method}" for method in METHODS),
    "imagenet-free-at",
    "imagenet-conadv",
)
BY_NAME = Named("advkit.training.recipes:settings", "NAME or FILE.yaml[,key=value...]")
"""For the annotation of a defense's `recipe`: it may be named."""


class Recipes(Registry[RecipeFile]):
    """The shipped recipes, and what a text may say in place of one: `FILE.yaml`, or settings alone."""

    def file(self, name: str) -> Path:
        """The file behind a name; UnknownName where there is none."""
        return FOLDER / self.target(name).partition(":")[2]

    @override
    def load(self, name: str) -> type[RecipeFile]:
        self.known(name)
        return RecipeFile

    @override
    def build(self, spec: str | RecipeFile) -> RecipeFile:
        """What `NAME[,key=value...]`, `FILE.yaml[,key=value...]` or `key=value,...` says.

        Raises UsageError for a file that is no recipe.
        """
        return opened(spec, self.shipped) if isinstance(spec, str) else spec

    def shipped(self, name: str, *, checked: bool = True) -> RecipeFile:
        """A recipe of this package; UnknownName where there is none of that name.

        checked: hold it against the fields of `Recipe`, which imports the training loop
        """
        return read_file(self.file(name), name, checked=checked)

    @override
    def summary(self, name: str) -> str:
        """The first sentence of what the file says about itself."""
        return self.shipped(name, checked=False).about.partition(". ")[0].rstrip(".") + "."

    @override
    def signature(self, name: str) -> Signature:
        """The recipe's fields, with this recipe's values for defaults; imports the training loop."""
        from advkit.core.registry.docs import field_docs
        from advkit.core.registry.fields import fields_of, shown
        from advkit.training.loop import Recipe

        known = self.known(name)
        held = self.shipped(known)
        made, described = held.recipe(), field_docs(Recipe)
        fields = tuple(
            FieldInfo(key, describe_type(kind), shown(getattr(made, key), kind), described.get(key, ""))
            for key, (_, kind) in fields_of(Recipe).items()
        )
        parts = [f"{kind}: {text}" for kind, text in held.parts.items() if text]
        doc = "\n\n".join([held.about, *parts])
        return Signature(self.kind, known, self.target(known), self.summary(known), doc, held.papers, fields)


RECIPES = Recipes("recipe", {name: f"advkit.training.recipes:{name}.yaml" for name in NAMES})


def settings(arguments: Sequence[Argument]) -> Sequence[Argument]:
    """The arguments with a leading name or file replaced by its settings; what follows it goes first."""
    return RECIPES.build(",".join(each.text for each in arguments)).settings
