"""Captions of classes: what a text encoder is given in place of a class's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from advkit.core.errors import UsageError

TEMPLATES = ("a photo of a {}",)
Captions = tuple[tuple[str, ...], ...]
"""For every class, in the order of the labels, the captions that describe it; as many for each."""


def captions_of(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Captions:
    """The captions of classes of these names, in every template; a template has the name in place of its {}.

    Raises UsageError for a template without {}, or with more than one, and where there is no template at all.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(
                f"the template {template!r} has {template.count('{}')} places {{}}; expected one, for the name"
            )
    if not templates:
        raise UsageError("there is no template; expected at least one, such as 'a photo of a {}'")
    return tuple(tuple(template.replace("{}", name) for template in templates) for name in names)


def captions_sha256(captions: Captions) -> bytes:
    """32 bytes that tell captions apart."""
    return hashlib.sha256(json.dumps(captions, ensure_ascii=True).encode()).digest()
