"""The board and the one-page report driven in a browser: Debian's chromium, playwright and axe-playwright-python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_examples import B, R, run_folder

from advkit.evaluation.report import Report
from advkit.evaluation.report import leaderboard as boards

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="chromium is not installed: apt-get install chromium"),
]
FLAG = {"flags": [{"id": "zero_gradient", "severity": "warning", "message": "on two samples"}]}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return boards.write(root)[1][0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield made
        made.close()


def opened(browser: Any, file: Path, address: str = "", **settings: Any) -> Any:
    page = browser.new_page(**settings)
    page.set_default_timeout(60_000)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(file.as_uri() + address)
    return page


def models(page: Any) -> list[str]:
    return list(page.locator("button.open").all_inner_texts())


def test_sort_filter_open_and_a_link_that_keeps_them(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file)
    assert page.locator("#count").inner_text() == "120 victims shown"
    assert len(models(page)) == 100
    page.get_by_role("button", name="Next").first.click()
    assert len(models(page)) == 20
    page.locator("thead button", has_text="Victim").click()
    assert models(page)[:2] == ["model-000", "model-010"]  # sorted within its table
    page.locator("thead button", has_text="Victim").click()
    assert models(page)[0] == "model-110"
    page.locator("#filter-norm").select_option("Linf")
    page.locator("#filter-text").fill("jpeg zero")
    shown = models(page)
    assert len(shown) == 12
    kept = opened(browser, page_file, page.evaluate("location.hash"))
    assert models(kept) == shown
    assert kept.locator("#filter-text").input_value() == "jpeg zero"
    kept.locator("button.open").first.click()
    kept.wait_for_selector("tr.details section")
    assert "Which gaps are real" in kept.locator("tr.details").inner_text()
    with kept.expect_download() as caught:
        kept.locator("#csv").click()
    lines = Path(caught.value.path()).read_text().splitlines()
    assert len(lines) == 1 + 12
    assert lines[0].startswith("table,rank,best_rank,worst_rank,model,defense,robust_accuracy,low,high")
    assert page.said == kept.said == []


def test_keyboard_alone(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('open')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("tr.details section")
    page.keyboard.press("Enter")
    assert page.locator("tr.details").count() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"viewport": {"width": 390, "height": 844}},
        {"viewport": {"width": 640, "height": 450}},  # 1280 pixels at 200 %
        {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    ],
)
def test_nothing_is_cut_and_axe_finds_nothing_serious(browser: Any, page_file: Path, settings: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    report = page_file.with_name("one.html")
    report.write_text(Report.load(page_file.parent / "run-5").to_html())
    for file in (page_file, report):
        page = opened(browser, file, **settings)
        if file == page_file:
            page.locator("button.open").first.click()
            page.wait_for_selector("tr.details section")
        width = settings["viewport"]["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if file == page_file:
            score = page.locator("td.score").first.bounding_box()
            assert score["x"] + score["width"] <= width
        # Evaluated, not injected: the page's content policy lets no other script in.
        page.evaluate(_axe(axe))
        found = page.evaluate("axe.run().then((told) => told.violations)")
        grave = [each for each in found if each["impact"] in ("serious", "critical")]
        assert grave == [], [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in grave]


def _axe(module: Any) -> str:
    return (Path(module.__file__).parent / "axe.min.js").read_text()


def test_print_on_a4_cuts_no_column(browser: Any, page_file: Path) -> None:
    page = opened(browser, page_file, viewport={"width": 1040, "height": 720})  # A4, landscape, inside the margins
    page.emulate_media(media="print")
    assert page.evaluate("document.querySelector('table.board').getBoundingClientRect().right") <= 1040
    assert page.evaluate("document.documentElement.scrollWidth") <= 1040
    heads = page.locator("table.board > thead th")
    assert all(heads.nth(i).is_visible() for i in range(heads.count()))
    printed = page.pdf(prefer_css_page_size=True)
    boxes = {tuple(float(x) for x in found) for found in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed)}
    assert [tuple(round(side) for side in box) for box in boxes] == [(842, 595)]
