"""Plots beside a report: which there are, and small pictures of them for pages that stand alone."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

_MOST_PLOTS = 12
_MOST_PLOT_BYTES = 4_000_000
_MOST_PIXELS = 40_000_000
_STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b""}


def find_plots(report_path: Path) -> list[tuple[str, Path]]:
    """(name, file) of plots/*.png and *.svg beside a report; links and oversized files are passed over."""
    folder = report_path.parent / "plots"
    found: list[tuple[str, Path]] = []
    if folder.is_dir() and not folder.is_symlink():
        for file in sorted(folder.iterdir()):
            start = _STARTS.get(file.suffix.lower())
            if start is None or file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_PLOT_BYTES:
                continue
            with file.open("rb") as opened:
                fits = opened.read(len(start)) == start
            if fits and len(found) < _MOST_PLOTS:
                found.append((file.stem.replace("_", " "), file))
    return found


def preview(file: Path, width: int = 480, quality: int = 50) -> str | None:
    """A small copy of a PNG as a data URI; None for other files, and for those that can't be read.

    width: of the copy, in pixels, at most; quality: of WebP, 1 to 100
    """
    from PIL import Image

    if file.suffix.lower() != ".png":
        return None
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            whole = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    paper = Image.new("RGB", whole.size, "white")
    paper.paste(whole, mask=whole.getchannel("A"))
    paper.thumbnail((width, 4 * width))
    return uri_of(paper, quality)


def uri_of(image: object, quality: int = 80, lossless: bool = False) -> str:
    """A Pillow image as a data URI, in WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=lossless, method=4)  # type: ignore[attr-defined]
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def csp_hash(text: str) -> str:
    """What a page's content policy calls a script or a style that stands in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
