"""The pages of docs/: commands parse, links and anchors lead somewhere, snippets run, made pages are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from advkit.attacks import ATTACKS
from advkit.cli.list import registry_of
from advkit.cli.main import COMMANDS, load_command, run
from advkit.defenses import DEFENSES
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
TESTED_ELSEWHERE = {
    f"{name}.md"
    for name in (
        "adversarial_training", "certification", "convex_relu_at", "eigenshield", "floral", "image_text",
        "other_attacks", "poisoning", "raw_isp", "sweeps", "zo_ae_ds",
    )
}  # fmt: skip
"""Pages whose commands have a test beside those of their tables."""
RUN = ("faq.md", "first_evaluation.md", "report_schema.md", "your_model.md")
RUN_SLOWLY = ("pubdef.md", "your_parts.md")
"""Pages whose snippets run here; those of other pages have tests beside what they are about."""
REGISTRIES: dict[str, Any] = {
    "attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "task": TASKS, "goal": GOALS,
}  # fmt: skip
NO_METHOD = {("defenses", "none"), ("goals", "untargeted"), ("goals", "targeted")}
FILLED_IN = re.compile(r"\b[A-Z]{3,}\b|python:|maite:|path=|\.yaml")  # for readers to fill in, or a module of theirs
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, *languages: str) -> list[str]:
    return [code for language, code in FENCED.findall(PAGES[page]) if language in languages]


def commands(page: str) -> list[list[str]]:
    """The arguments of every `advkit` command of a page, in order."""
    lines = "\n".join(blocks(page, "console", "bash", "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines if line.startswith("advkit ")]


@pytest.mark.parametrize("page", sorted(set(PAGES) - TESTED_ELSEWHERE))
def test_every_command_and_part_exists(page: str) -> None:
    for name, *rest in commands(page):
        assert name in COMMANDS, name
        asked = load_command(name).make_context(name, rest).params
        for option, registry in REGISTRIES.items():
            spec = asked.get(option)
            if isinstance(spec, str) and spec and not FILLED_IN.search(spec):  # "" stands for the attack's own task
                registry.build(spec)


@pytest.mark.parametrize("page", [*sorted(PAGES), "README.md"])
def test_every_command_that_the_prose_names_exists(page: str) -> None:
    text = PAGES[page] if page in PAGES else (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`advkit ([a-z][a-z-]*)", FENCED.sub("", text))
    assert {*named} <= {*COMMANDS}


def slug(heading: str) -> str:
    """The anchor that GitHub and the site make of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    prose = FENCED.sub("", text)
    return {slug(heading) for heading in re.findall(r"^#{1,6} (.*)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", PAGES[page]))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / path).resolve() if path else DOCS / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_site_shows_every_page_once() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs' file names a Python function; here it is read as data."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def pages(nav: Any) -> Iterator[str]:
        for entry in nav if isinstance(nav, list) else nav.values():
            if isinstance(entry, str):
                yield entry
            else:
                yield from pages(entry)

    shown = list(pages(settings["nav"]))
    assert len(shown) == len(set(shown))
    assert set(shown) - {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} == set(PAGES)
    assert settings["strict"]
    assert all((ROOT / hook).is_file() for hook in settings["hooks"])


@pytest.fixture(scope="module")
def script() -> Any:
    return loaded("reference_pages")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["methods.md", "cli.md", "report_schema.md"])
def test_made_pages_are_current(script: Any, page: str) -> None:
    assert PAGES[page] == script.PAGES[page](), "run python scripts/reference_pages.py"


def test_every_method_has_a_page_that_tells_of_it(script: Any) -> None:
    """Presets of transfer attacks are told of as a family."""
    for kind in ("attacks", "defenses", "threat-models", "goals"):
        registry = registry_of(kind)
        for name in registry.table:
            page = script.page_of(kind, name)
            assert page in PAGES
            if ".transfer.presets" not in registry.target(name) and name != "logreg":
                assert re.search(rf"(?<![\w-]){re.escape(name.rstrip(':'))}(?![\w-])", PAGES[page]), (name, page)


def section(page: str, heading: str) -> str:
    """What stands under the headings of the second level that a pattern matches, up to the next one."""
    parts = re.split(r"^## (.*)$", PAGES[page], flags=re.MULTILINE)
    return "\n".join(text for title, text in zip(parts[1::2], parts[2::2], strict=True) if re.fullmatch(heading, title))


def lacking(page: str) -> list[str]:
    """The parts of a method's page that this one is without."""
    opening = PAGES[page].partition("\n## ")[0]
    prose = FENCED.sub("", opening).partition("\n")[2]
    measured = section(page, "Measured")
    has = {
        "what it is, before the first heading": len(prose.split()) >= 15,
        "## Threat model": len(section(page, "Threat model").split()) >= 15,
        "a command that runs": bool(commands(page)),
        "a table under ## Measured, or a link to one": bool(
            re.search(r"^\|[ -]+\||\]\([\w.]*#", measured, re.MULTILINE)
        ),
        "## Where it fails, or they fail, point by point": section(page, "Where (it fails|they fail)").count("\n- ")
        >= 3,
        "a link to its notebook": bool(re.search(r"^Notebook: .*\]\(\.\./notebooks/", PAGES[page], re.MULTILINE)),
        "a link to the paper": bool(re.search(r"\]\(https://arxiv\.org/abs/\d{4}\.\d{4,5}\)", PAGES[page])),
    }
    return [part for part, there in has.items() if not there]


def method_pages(script: Any) -> set[str]:
    """The pages that registered parts stand on, but for those of parts that are no method."""
    kinds = ("attacks", "defenses", "threat-models", "goals")
    parts = {(kind, name) for kind in kinds for name in registry_of(kind).table}
    return {script.page_of(*part) for part in parts - NO_METHOD}


def test_every_page_of_a_method_has_its_parts(script: Any) -> None:
    pages = method_pages(script)
    assert len(pages) > 20
    assert {page: lacking(page) for page in pages if lacking(page)} == {}


def test_a_part_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PAGES["suites.md"]
    for part, cut in (
        ("## Threat model", re.sub(r"^## Threat model\n", "", whole, flags=re.MULTILINE)),
        ("a command that runs", whole.replace("```console", "```text")),
        ("a table under ## Measured, or a link to one", whole.replace("## Measured", "## Figures")),
        ("## Where it fails, or they fail, point by point", whole.replace("## Where they fail", "## Limits")),
        ("a link to its notebook", whole.replace("Notebook: ", "See ")),
        ("a link to the paper", whole.replace("https://arxiv.org/abs/", "arXiv ")),
    ):
        monkeypatch.setitem(PAGES, "suites.md", cut)
        assert lacking("suites.md") == [part]


def test_the_page_of_options_tells_every_command_and_option() -> None:
    text = PAGES["cli.md"]
    for name in COMMANDS:
        (section,) = re.findall(rf"^## advkit {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        for parameter in load_command(name).params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert all(f"`{each}`" in section for each in (*parameter.opts, *parameter.secondary_opts))


def test_install_tells_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.*?) \|", PAGES["install.md"], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w[\w-]*)`", row)} == set(extras)


def test_lists_are_as_mkdocs_wants_them() -> None:
    listed = loaded("site_hooks")._listed
    assert listed("Findings:\n- a\n  more\n- b\n\n- c") == "Findings:\n\n- a\n  more\n- b\n\n- c\n"
    assert listed("- a\n  - b") == "- a\n    - b\n"
    assert listed("```text\nx\n- y\n```") == "```text\nx\n- y\n```\n"
    assert listed("a\n1. b") == "a\n\n1. b\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; modules that snippets put there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def saved(page: str) -> list[str]:
    """Write the modules of a page (their first line is their name) and hand back its other Python, in order."""
    rest = []
    for code in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            Path(name[1]).write_text(code, encoding="utf-8")
        else:
            rest.append(code)
    return rest


@pytest.mark.parametrize("page", [*RUN, *(pytest.param(page, marks=pytest.mark.slow) for page in RUN_SLOWLY)])
def test_the_python_of_a_page_runs(page: str, here: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    snippets = saved(page)
    assert snippets
    for number, code in enumerate(snippets):
        exec(compile(code, f"docs/{page}, python block {number + 1}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["faq.md", "first_evaluation.md", "methodology.md", "your_model.md", "your_parts.md"])
def test_the_commands_of_a_page_run(page: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(page)
    for arguments in commands(page):
        plain = ["--no-plots"] if arguments[0] == "evaluate" else []
        code = run([*arguments, *plain])
        said = capsys.readouterr()
        # an untrained network may have findings; that doctor tells of them is no failure of the page
        assert code in ((0, 3) if arguments[0] == "doctor" else (0,)), (arguments, said.err)
