"""The board and the one-page report driven in a browser: Debian's chromium, playwright and axe-playwright-python."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_examples import B, R, run_folder

import advkit
from advkit.evaluation.report import leaderboard as boards

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: extra browser")
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed: extra browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="chromium is not installed: apt-get install chromium"),
]
FLAG = {"flags": [{"id": "zero_gradient", "severity": "warning", "message": "on two samples"}]}
FEW = "#text=model-00"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ZOOMED = {"width": DESKTOP["width"] // 2, "height": DESKTOP["height"] // 2}
"""What a page has of a desktop's window at 200 %."""
PRINTED = {
    "board": ({"width": 1040, "height": 710}, (842, 595)),
    "report": ({"width": 687, "height": 1017}, (595, 842)),
}
"""Pixels of A4 inside the page's margins, and A4 in points."""
CARD = {"dataset": "cifar10", "eps": "8/255", "clean_acc": "89.69", "reported": "62.5", "autoattack_acc": "59.53"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A board of everything that a board shows, and a report with examples and plots."""
    root = tmp_path_factory.mktemp("board")
    for k in range(120):
        kept = (7 * k) % 21
        changes: dict[str, Any] = {
            "model": {"name": f"model-{k:03}", "state_sha256": f"{k:064x}"},
            "defense": {"name": "jpeg" if k % 2 else "none"},
            "diagnostics": FLAG if k % 5 == 0 else {"flags": []},
        }
        if k % 10 == 0:
            changes["threat_model"] = {"name": "l2", "norm": "L2", "eps": 0.5, "eps_string": "0.5"}
        run_folder(root / f"run-{k}", {"pgd": [R] * kept + [B] * (21 - kept)}, changes)
    shutil.copytree(root / "run-1", root / "copy")
    (root / "bad").mkdir()
    (root / "bad" / "report.json").write_text("{}")
    cards = root.with_name("cards") / "cifar10" / "Linf"
    cards.mkdir(parents=True)
    (cards / "Carmon2019Unlabeled.json").write_text(json.dumps(CARD))
    own = root / "own"
    common: dict[str, Any] = {"task": "digits", "n": 30, "device": "cpu"}
    report = advkit.evaluate("pgd:steps=5", threat_model="linf:eps=0.13", out=own, **common)
    advkit.evaluate("pgd:steps=5", threat_model="linf:eps=0.3", goal="targeted", out=root / "aimed", **common)
    (own / "plots").mkdir(exist_ok=True)
    for kind in ("per_class", "examples"):
        advkit.plots.save(report.plot(kind), own / "plots" / f"{kind}.png")
    (own / "report.html").write_text(advkit.Report.load(own).to_html())
    return {"board": boards.write(root, claims=cards.parents[1])[1][0], "report": own / "report.html"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        try:
            made = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        except playwright.Error as error:  # a container without shared memory, a missing library
            pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens pages; at the end none of them may have asked for anything or complained."""
    made = []

    def open_page(file: Path, address: str = "", **settings: Any) -> Any:
        page = browser.new_page(**settings)
        page.set_default_timeout(60_000)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri() + address)
        made.append((page, file))
        return page

    yield open_page
    for page, file in made:
        assert page.said == []
        outside = [url for url in page.asked if not url.startswith(("data:", "blob:"))]
        assert [url.partition("#")[0] for url in outside] == [file.as_uri()]
        page.close()


def models(page: Any) -> list[str]:
    return list(page.locator("button.open").all_inner_texts())


def open_entry(page: Any, name: str) -> Any:
    page.locator("button.open", has_text=name).first.click()
    page.wait_for_selector("tr.details section")
    return page.locator("tr.details").first


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.textContent"))


# Words of a selector's elements that lie on more than one line: letters of one word may not.
BROKEN_WORDS = """(selector) => [...document.querySelectorAll(selector)].flatMap((element) => {
  const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const broken = [];
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    for (const found of text.data.matchAll(/[A-Za-z]+/g)) {
      const range = document.createRange();
      range.setStart(text, found.index);
      range.setEnd(text, found.index + found[0].length);
      if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) broken.push(found[0]);
    }
  }
  return broken;
})"""
# Cells that stick out of the window, but for those in a box that scrolls by itself.
STICK_OUT = """() => [...document.querySelectorAll("h1, h2, p, dd, th, td, img, pre")].filter((each) =>
  !each.closest("[hidden], .scroll[role=region]") && each.checkVisibility()
  && each.getBoundingClientRect().right > innerWidth + 1
).map((each) => each.outerHTML.slice(0, 100))"""
FOCUS_IS_SEEN = """() => {
  const style = getComputedStyle(document.activeElement), box = document.activeElement.getBoundingClientRect();
  const inside = box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight;
  return style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2 && box.width > 0 && inside;
}"""


def test_sort_filter_open_and_a_link_that_keeps_them(opened: Any, pages: dict[str, Path]) -> None:
    page = opened(pages["board"])
    assert page.locator("#count").inner_text() == "121 victims shown"
    assert len(models(page)) == 100
    page.get_by_role("button", name="Next").first.click()
    assert len(models(page)) == 21
    page.locator("thead button", has_text="Victim").click()
    assert models(page)[:2] == ["model-000", "model-010"]  # sorted within its table
    page.locator("thead button", has_text="Victim").click()
    page.locator("#filter-norm").select_option("Linf")
    page.locator("#filter-text").fill("jpeg zero")
    shown = models(page)
    assert shown == [f"model-{k:03}" for k in range(115, 0, -10)]
    kept = opened(pages["board"], page.evaluate("location.hash"))
    assert models(kept) == shown
    assert kept.locator("#filter-text").input_value() == "jpeg zero"
    assert "Which gaps are real" in open_entry(kept, shown[0]).inner_text()
    kept.locator("a.skip").evaluate("link => link.click()")
    assert kept.evaluate("location.hash") == page.evaluate("location.hash")
    with kept.expect_download() as caught:
        kept.locator("#csv").click()
    head, *lines = csv.reader(io.StringIO(Path(caught.value.path()).read_text()))
    assert head[:9] == [
        *("table", "rank", "best_rank", "worst_rank", "model", "defense", "robust_accuracy", "low", "high")
    ]
    assert [(line[4], line[5]) for line in lines] == [(name, "jpeg") for name in shown]
    for line in lines:
        assert float(line[6]) == pytest.approx((7 * int(line[4][-3:])) % 21 / 21, abs=1e-6)
    # A text that a spreadsheet would compute, and one with a comma.
    assert kept.evaluate("[field('=1+1'), field('-0.5'), field('a,\"b\"')]") == ["'=1+1", "-0.5", '"a,""b"""']
    kept.locator("#reset").click()
    assert len(models(kept)) == 100
    assert kept.evaluate("location.hash") == "#sort=victim&down=1"


def test_keyboard_alone(opened: Any, pages: dict[str, Path]) -> None:
    page = opened(pages["board"], FEW)
    assert page.get_by_role("tab").count() == 2
    stops = []
    while not page.evaluate("document.activeElement.closest('table') !== null"):
        page.keyboard.press("Tab")
        stops.append(focused(page)[:20])
        assert page.evaluate(FOCUS_IS_SEEN), f"the focus is not seen on {stops[-1]!r}"
        assert len(stops) < 20
    heads = page.locator("table.board > thead button").count()
    controls = page.locator("form.filters label:visible").count() + page.locator(".bar-line button:visible").count()
    assert len(stops) == 1 + 1 + controls + 1 + 1  # skip link, the chosen tab, controls, contents, the first head
    while not page.evaluate("document.activeElement.classList.contains('open')"):
        page.keyboard.press("Tab")
        stops.append("")
        assert page.evaluate(FOCUS_IS_SEEN)
    assert len(stops) == 1 + 1 + controls + 1 + heads + 1
    # The short way: the skip link.
    page = opened(pages["board"], FEW)
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the table"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "Victim"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert focused(page) == "Victim"  # the head was drawn anew, the focus stays
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Victim")
    assert models(page) == ["model-000", *(f"model-{k:03}" for k in range(9, 0, -1))]  # of two tables
    while not page.evaluate("document.activeElement.classList.contains('open')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("tr.details section")
    page.keyboard.press("Space")
    assert page.locator("tr.details").count() == 0
    page.locator("#filter-text").focus()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("model-003")
    assert models(page) == ["model-003"]
    page.get_by_role("tab", selected=True).focus()
    page.keyboard.press("ArrowRight")
    assert "Attack success rate" in focused(page)
    assert page.locator("#count").inner_text() == "0 victims shown"
    page.locator("#reset").focus()
    page.keyboard.press("Enter")
    assert models(page) == ["digits-mlp"]


@pytest.mark.parametrize("name", ["board", "report"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_and_axe_finds_nothing_serious(
    opened: Any, pages: dict[str, Path], name: str, scheme: str
) -> None:
    entry = "digits-mlp" if scheme == "light" else "model-005"
    page = opened(pages[name], f"#text={entry}" if name == "board" else "", viewport=DESKTOP, color_scheme=scheme)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", color))) for color in (ink, paper)]
    assert (light[0] < light[1]) is (scheme == "light")
    if name == "board":
        details = open_entry(page, entry)
        assert details.locator("img").count() == (2 if entry == "digits-mlp" else 0)
        lists = page.locator("main > h2").all_inner_texts()
        assert lists == ["Claimed, not measured", "Not ranked", "Invalid reports"]
    # Evaluated, not injected: the page's content policy lets no other script in.
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    for size in (DESKTOP, ZOOMED, PHONE):
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.evaluate(STICK_OUT) == []
        assert page.evaluate(BROKEN_WORDS, "thead th, table.figures th, dt, h2, h3, .badge") == []
        found = page.evaluate("axe.run().then((told) => told.violations)")
        grave = [each for each in found if each["impact"] in ("serious", "critical")]
        assert grave == [], [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in grave]


@pytest.mark.parametrize("name", ["board", "report"])
def test_print_on_a4_cuts_nothing(opened: Any, pages: dict[str, Path], name: str) -> None:
    size, paper = PRINTED[name]
    page = opened(pages[name], FEW if name == "board" else "", viewport=size, color_scheme="dark")
    if name == "board":
        open_entry(page, "model-005")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    # On paper nothing scrolls, so no box is left out here.
    assert page.evaluate(STICK_OUT.replace(", .scroll[role=region]", "")) == []
    assert page.evaluate(BROKEN_WORDS, "thead th, table.figures th, dt, h2, h3, .badge") == []
    heads = page.locator("table.board > thead th")
    assert all(heads.nth(i).is_visible() for i in range(heads.count()))
    printed = page.pdf(prefer_css_page_size=True)
    boxes = {tuple(float(x) for x in found) for found in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed)}
    assert [tuple(round(side) for side in box) for box in boxes] == [paper]
