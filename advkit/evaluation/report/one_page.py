"""A report on one page, for somebody who decides: what was tested, a verdict, three figures, five examples, limits, how
to repeat it. The page stands alone: it loads nothing and runs no script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advkit.core.errors import ReportError
from advkit.core.text import printable_values
from advkit.evaluation.report.examples import Examples
from advkit.evaluation.report.previews import csp_hash, find_plots, preview, uri_of
from advkit.evaluation.report.render import Row, environment, findings, rows, sentence, verdict
from advkit.evaluation.report.schema import HERE
from advkit.evaluation.report.text import describe_threat, level_text, shorten, spell

SHOWN, _HELD, _FIGURES, _PLOTS = 5, 2, 3, 4
_LEAST_SIDE = 160
"""Pixels of a picture's side; smaller ones are enlarged by a whole factor, so that each of their pixels stays one."""
_STATES = {"unreliable": "Do not rely on this.", "warning": "Read with care.", "info": "No reliability flag."}
_REPEATED = ("No reliability flag was raised. ", "No reliability flag was raised.")
_WORDS = {"broken": "broken", "robust": "held", "wrong": "wrong when clean"}


def html_of(
    data: Mapping[str, Any], examples: Examples | ReportError, path: Path | None = None, *, python: str = ""
) -> str:
    """The page of a completed document.

    examples: that were kept, or what is said where there are none
    path:     of the report, whose plots are shown where they lie beside it
    python:   the call that makes the same run
    """
    from markupsafe import Markup

    style = "".join((HERE / "templates" / name).read_text(encoding="utf-8") for name in ("base.css", "one_page.css"))
    flags = findings(data)
    state = flags[0].severity if flags else "info"
    names = _class_names(data)
    shown = examples.some(SHOWN, _HELD) if isinstance(examples, Examples) else []
    bounds = data["dataset"].get("input_range") or (0.0, 1.0)
    pictures = [_picture(examples, i, names, bounds) for i in shown] if isinstance(examples, Examples) else []
    made = {
        "heading": _heading(data),
        "state": state,
        "state_words": _STATES[state],
        "verdict": _sentence(data),
        "figures": [_drawn(row) for row in _figures(data)],
        "level": level_text(data["metrics"]),
        "tested": list(_tested(data)),
        "pictures": [each for each in pictures if each is not None],
        "texts": [_text(examples, i) for i in shown] if isinstance(examples, Examples) else [],
        "examples_words": _examples_words(examples, shown),
        "plots": _plots(path),
        "findings": [each._asdict() for each in flags],
        "limits": list(_limits(data)),
        "command": data["reproducibility"]["command"],
        "python": python,
        "made": list(_made(data)),
    }
    # Of Examples come texts that no report has checked: every one is made printable here.
    return (
        environment()
        .get_template("one_page.html")
        .render(style=Markup(style), style_hash=csp_hash(style), **printable_values(made))
    )


def _heading(data: Mapping[str, Any]) -> str:
    return f"{data['model']['name']}, defense {data['defense']['name']}, on {data['dataset']['name']}"


def _sentence(data: Mapping[str, Any]) -> str:
    """The scenario's sentence, with the threat model where it does not name it."""
    said = sentence(data)
    threat = describe_threat(data["threat_model"])
    return said if threat in said else f"{said} Threat model: {threat}."


def _defense(data: Mapping[str, Any]) -> str:
    params = {key: value for key, value in data["defense"]["params"].items() if not isinstance(value, (dict, list))}
    return spell(data["defense"]["name"], params)


def _figures(data: Mapping[str, Any]) -> list[Row]:
    """Three figures: the headline among what the scenario names first."""
    named = [row for row in rows(data) if row.section in ("headline", "table", "companion")]
    first = named[:_FIGURES]
    headline = next((row for row in named if row.section == "headline"), None)
    return first if headline is None or headline in first else [headline, *first[: _FIGURES - 1]]


def _drawn(row: Row) -> dict[str, Any]:
    drawn = row.value.endswith("%") and row.share is not None
    return {
        "label": row.label[:1].upper() + row.label[1:],
        "value": row.value,
        "interval": row.interval.strip("[]").replace(", ", " to "),
        "counts": row.counts,
        "share": row.share,
        "low": row.low,
        "high": row.high,
        "drawn": drawn,
    }


def _tested(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    dataset, model = data["dataset"], data["model"]
    own = [attack["name"] for attack in data["attacks"] if not attack["beside"]]
    yield "Model", f"{model['name']}, {model['n_parameters']:,} parameters"
    yield "Defense", _defense(data)
    yield "Data", f"{dataset['name']}, {dataset['n_evaluated']} of {dataset['n_total']} samples of {dataset['split']}"
    yield "Threat model", describe_threat(data["threat_model"])
    asked = data["protocol"].get("name")
    listed = shorten(", ".join(own) or "none", 300)
    yield "Attack", f"{asked}: {listed}" if asked and own != [asked] and own else listed


def _limits(data: Mapping[str, Any]) -> Iterator[str]:
    """What the number does not say."""
    threat = f"Threat model: {describe_threat(data['threat_model'])}."
    said = verdict(data).removeprefix(sentence(data)).strip().removeprefix(threat).strip()
    for repeated in _REPEATED:
        said = said.replace(repeated, "")
    if said.strip():
        yield said.strip()
    n = data["dataset"]["n_evaluated"]
    if data["defense"].get("certified"):
        yield f"It holds for these {n} samples; the intervals say what it may be on others like them."
        return
    yield (
        f"It holds for these {n} samples, this threat model and these attacks. A stronger attack can only lower "
        "robustness; the intervals say what it may be on other samples like these."
    )


def _made(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    made = data["reproducibility"]
    yield "Seed", str(made["seed"])
    yield "Weights", f"sha256 {data['model']['state_sha256'][:16]}"
    yield "Samples", f"sha256 {data['dataset']['sha256'][:16]}"
    yield "Software", f"advkit {data['advkit_version']}, Python {made['python']}, {made['device']}"
    yield "Made", str(data["created_utc"])


def _plots(path: Path | None) -> list[tuple[str, str]]:
    found = [] if path is None else find_plots(path)
    made = [(name, preview(file, 900, 75)) for name, file in found if name != "examples"]
    return [(name, uri) for name, uri in made if uri is not None][:_PLOTS]


# Examples


def _examples_words(examples: Examples | ReportError, shown: Sequence[int]) -> str:
    if not isinstance(examples, Examples):
        return f"No examples: {examples}"
    broken = sum(each == "broken" for each in examples.outcomes)
    held = sum(each == "robust" for each in examples.outcomes)
    return (
        f"{len(shown)} of {len(examples)} kept samples, before and after the attack; of those kept {broken} broke and "
        f"{held} held."
    )


def _ended(examples: Examples, i: int) -> str:
    return _WORDS.get(examples.outcomes[i], examples.outcomes[i].replace("_", " "))


def _picture(examples: Examples, i: int, names: Sequence[str], bounds: Sequence[float]) -> dict[str, Any] | None:
    """A sample before and after as two pictures; None where samples are no images."""
    pair = [_image(of[i].numpy(), *bounds) for of in (examples.clean, examples.adversarial)]
    if any(each is None for each in pair):
        return None
    before, after = (_name(each[i], names) for each in (examples.clean_answers, examples.adversarial_answers))
    turned = before if before == after else f"{before} \u2192 {after}"
    change = float(np.abs(examples.adversarial[i].float().numpy() - examples.clean[i].float().numpy()).max())
    margin = examples.margins[i]
    words = [turned, f"largest change {change:.3g}", *([] if margin is None else [f"margin {margin:.2g}"])]
    return {
        "id": examples.ids[i],
        "clean": uri_of(pair[0], lossless=True),
        "adversarial": uri_of(pair[1], lossless=True),
        "broken": bool(examples.broken[i]),
        "ended": _ended(examples, i),
        "words": ", ".join(words),
    }


def _name(answer: int | None, names: Sequence[str]) -> str:
    if answer is None:
        return "?"
    return names[answer] if 0 <= answer < len(names) else f"class {answer}"


def _class_names(data: Mapping[str, Any]) -> list[str]:
    """As the report's figures by class have them, where it has one for each class."""
    if names := data["dataset"].get("class_names"):
        return list(names)
    prefix = "robust_accuracy_class_"
    found = [name.removeprefix(prefix).replace("_", " ") for name in data["metrics"] if name.startswith(prefix)]
    return found if len(found) == data["dataset"].get("n_classes") else []


def _image(pixels: np.ndarray[Any, Any], low: float, high: float) -> Any:
    """A Pillow image of [C, H, W] with C 1 or 3; None for anything else."""
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not np.issubdtype(pixels.dtype, np.floating):
        return None
    values = np.clip(np.nan_to_num((pixels - low) / (high - low)), 0, 1)
    whole = np.round(255 * np.moveaxis(values, 0, -1)).astype(np.uint8)
    image = Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole).convert("RGB")
    factor = max(1, -(-_LEAST_SIDE // max(image.size)))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((320, 320))
    return image


def _text(examples: Examples, i: int) -> dict[str, Any]:
    said = [(key.replace("_", " "), shorten(text, 400)) for key, text in examples.texts[i].items() if text]
    return {"id": examples.ids[i], "broken": bool(examples.broken[i]), "ended": _ended(examples, i), "said": said}
