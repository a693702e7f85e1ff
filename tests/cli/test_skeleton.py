"""`advkit init-attack` and `init-defense`: what they write installs, is listed, keeps the laws; what they refuse."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import advkit as package
from advkit.core.errors import UsageError
from advkit.core.registry import Registry
from advkit.skeleton.package import TEMPLATES

KINDS = ("attack", "defense")


def table(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kind", "cls"), [("attack", "MyMethod"), ("defense", "MyMethod")])
def test_the_files_are_a_package_whose_entry_point_leads_to_the_class(advkit: Any, kind: str, cls: str) -> None:
    said = advkit(f"init-{kind}", "my-method", "--json")
    assert (said.code, said.err) == (0, "")
    folder = Path("advkit-my-method")
    assert said.json == {
        "kind": kind,
        "name": "my-method",
        "folder": "advkit-my-method",
        "files": [
            f"advkit-my-method/{name}"
            for name in ("pyproject.toml", "README.md", "advkit_my_method.py", "tests/test_my_method.py")
        ],
        "entry_point": f"advkit_my_method:{cls}",
    }
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(map(Path, said.json["files"]))
    project = table(folder)["project"]
    assert project["name"] == "advkit-my-method"
    assert project["entry-points"] == {f"advkit.{kind}s": {"my-method": f"advkit_my_method:{cls}"}}
    assert table(folder)["tool"]["setuptools"] == {"py-modules": ["advkit_my_method"]}
    for file in folder.rglob("*.py"):
        ast.parse(file.read_text(encoding="utf-8"))
    for page in folder.rglob("*.*"):
        assert "{{" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tensor", "input-defense", "A1", "False", "search", "x" * 50])
def test_the_module_builds_under_every_name(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the class would be called as something that the module imports."""
    make = {"attack": package.init_attack, "defense": package.init_defense}[kind]
    made = make(name, tmp_path / "new" / "deep")
    monkeypatch.syspath_prepend(made.folder)
    monkeypatch.delitem(sys.modules, made.module, raising=False)
    registry: Registry[Any] = Registry(kind, {name: f"{made.module}:{made.cls}"})
    part = registry.build(name)
    assert type(part).__name__ == made.cls
    assert registry.summary(name).endswith("(an example to be replaced).")
    assert all(field.doc for field in registry.signature(name).fields)
    sys.modules.pop(made.module)


def test_an_empty_folder_will_do_and_the_next_command_is_said(advkit: Any) -> None:
    Path("a folder").mkdir()
    said = advkit("init-attack", "ray", "--out", "a folder")
    assert said.code == 0
    *files, last = said.out.splitlines()
    assert all(Path(file).is_file() for file in files)
    assert shlex.split(last)[1:3] == ["cd", "a folder"]


@pytest.mark.parametrize(
    ("command", "name", "says"),
    [
        ("init-attack", "3d", "such as my_method"),
        ("init-attack", "my method", "such as my_method"),
        ("init-attack", "_hidden", "such as my_method"),
        ("init-attack", "größe", "such as my_method"),
        ("init-attack", "a/../b", "such as my_method"),
        ("init-attack", "x" * 51, "at most 50"),
        ("init-attack", "", "such as my_method"),
        ("init-attack", "pgd", "already a registered attack 'pgd'"),
        ("init-attack", "APGD_ce", "already a registered attack 'apgd-ce'"),
        ("init-attack", "foolbox", "already a registered attack 'foolbox'"),
        ("init-defense", "trades", "already a registered defense 'trades'"),
        ("init-attack", "python", "means something else"),
        ("init-attack", "none", "means something else"),
    ],
)
def test_names_that_a_new_part_cannot_have(advkit: Any, command: str, name: str, says: str) -> None:
    said = advkit(command, "--out", "made", "--", name)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not Path("made").exists()


def test_folders_that_are_taken(advkit: Any) -> None:
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    Path("file").write_text("mine")
    for out, says in (("full", "is not empty"), ("file", "is no folder"), ("file/below", "is no path")):
        said = advkit("init-attack", "ray", "--out", out)
        assert (said.code, said.out) == (2, "")
        assert f"{out} {says}" in said.err.replace("--out: ", "")
        assert said.err.count("\n") == 1
    assert [path.name for path in Path("full").iterdir()] == ["mine"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_a_folder_without_write_access(advkit: Any) -> None:
    Path("locked").mkdir(mode=0o500)
    for out in ("locked", "locked/new"):
        said = advkit("init-defense", "guard", "--out", out)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert "can't be written" in said.err
    assert not [*Path("locked").iterdir()]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.skeleton import package as module

    written = module.write_whole

    def full(path: Path, content: str) -> None:
        if path.suffix == ".py":
            raise OSError(28, "No space left on device")
        written(path, content)

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(UsageError, match="disk is full"):
        package.init_attack("ray", tmp_path / "new")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_installed_packages_are_listed_and_keep_the_laws(tmp_path: Path) -> None:
    """Their own tests are the contract kit."""
    pytest.importorskip("setuptools")
    made = [
        package.init_attack("ray-search", tmp_path / "made" / "attack"),
        package.init_defense("soft_round", tmp_path / "made" / "defense"),
    ]
    home = tmp_path / "installed"
    root = Path(package.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(home), str(root)))}

    def run(*arguments: object, folder: Path = tmp_path / "made") -> str:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            capture_output=True, text=True, cwd=folder, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for each in made:
        run("ruff", "check", "--isolated", "--select", "F,I,W,UP", ".", folder=each.folder)
        run("ruff", "format", "--isolated", "--check", ".", folder=each.folder)
    run("pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", home, "./attack", "./defense")
    for each in made:
        assert (home / f"{each.module}.py").is_file()
        assert run("advkit", "list", f"{each.kind}s", each.name).startswith(each.name)
    # pytest reads no settings but these: the two packages have their own
    tests = [each.folder / "tests" for each in made]
    assert "10 passed" in run("pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:xdist", *tests)


def test_the_templates_are_part_of_what_is_installed() -> None:
    """The wheel is the package's folder, whole: a template is missing where its folder or its suffix is left out."""
    root = Path(package.__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert wheel["wheel"] == {"packages": ["advkit"]}
    assert {file.name for file in TEMPLATES.iterdir()} == {
        "README.md.jinja",
        "attack.py.jinja",
        "defense.py.jinja",
        "pyproject.toml.jinja",
        "test_attack.py.jinja",
        "test_defense.py.jinja",
    }
