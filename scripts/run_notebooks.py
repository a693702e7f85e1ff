"""Run the notebooks from top to bottom in fresh kernels and keep what they show: what a reader sees without running.

    python scripts/run_notebooks.py [PART OF A NAME ...]

The tests run every notebook again and compare: the same kinds of outputs, cell by cell, and nearly the same words.
Needs the extra `notebooks`.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
ALIKE = 0.8
"""The least share of words that a printed text has in common with the one that is kept; figures do not count."""

LARGE = 200_000
"""Characters of a picture in base64 from which on it is stored with fewer colours."""


def executed(path: Path, folder: Path, kernel: str = "python3") -> Any:
    """The notebook after every cell ran in a fresh kernel in `folder`; raises with the cell where one fails."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name=kernel, resources=resources, record_timing=False, store_widget_state=False
    )
    client.execute()
    notebook.metadata.pop("language_info", None)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def passing(output: Any) -> bool:
    """Whether an output is standard error or a run's progress; both differ between machines."""
    if output.output_type == "stream":
        return bool(output.name == "stderr")
    return bool(output.output_type == "display_data" and set(output.data) == {"text/plain"})


def shown(cell: Any) -> list[tuple[str, str]]:
    """What a code cell shows for good, in order: the kind of each output, and its text where it is one.

    Streams that follow one another are one.
    """
    found: list[tuple[str, str]] = []
    for output in cell.outputs:
        if passing(output):
            continue
        if output.output_type == "stream":
            if found and found[-1][0] == "stream":
                found[-1] = ("stream", found[-1][1] + output.text)
            else:
                found.append(("stream", output.text))
        elif output.output_type == "error":
            found.append(("error", output.ename))
        else:
            data = output.data
            kind = next((kind for kind in ("image/png", "image/gif", "text/html") if kind in data), "text/plain")
            found.append((kind, "" if kind.startswith("image/") else data[kind]))
    return found


def words(text: str) -> list[str]:
    """The words of a text; figures, bars and addresses in memory differ between machines."""
    return re.findall(r"[A-Za-z_]{2,}", re.sub(r"<[^>]*>|0x[0-9a-f]+", " ", text))


def differences(kept: Any, fresh: Any) -> list[str]:
    """What a run shows otherwise than the notebook that is kept, cell by cell."""
    found = []
    for number, (old, new) in enumerate(zip(code_cells(kept), code_cells(fresh), strict=True), 1):
        before, after = shown(old), shown(new)
        if [kind for kind, _ in before] != [kind for kind, _ in after]:
            found.append(f"cell {number} shows {[k for k, _ in after]}; kept is {[k for k, _ in before]}")
            continue
        for (_, said), (_, says) in zip(before, after, strict=True):
            alike = difflib.SequenceMatcher(None, words(said), words(says), autojunk=False).ratio()
            if alike < ALIKE:
                found.append(f"cell {number} says {says[:200]!r}; kept is {said[:200]!r}")
    return found


def kept(notebook: Any) -> Any:
    """The notebook as it is stored: without what is `passing`."""
    for cell in code_cells(notebook):
        cell.outputs = [each for each in cell.outputs if not passing(each)]
        for output in cell.outputs:
            data = output.get("data", {})
            if len(data.get("image/png", "")) > LARGE:
                data["image/png"] = _smaller(data["image/png"])
        cell.metadata.pop("execution", None)
    return notebook


def _smaller(picture: str) -> str:
    """A PNG in base64 with 256 colours: photographs are a third as large."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as full:
        full.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Run and store those that are asked for, or all."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args().names
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ.pop("MPLBACKEND", None)
    os.environ.pop("ADVKIT_DATA", None)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if asked and not any(part in path.stem for part in asked):
            continue
        with tempfile.TemporaryDirectory(prefix="advkit-") as folder:
            os.environ["ADVKIT_CACHE"] = str(Path(folder) / "cache")
            here = Path(folder) / "here"
            here.mkdir()
            nbformat.write(kept(executed(path, here)), path)
        sys.stdout.write(f"{path.name}: {path.stat().st_size / 1024:.0f} kB\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
