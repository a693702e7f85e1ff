"""Bad input gets one clear line on standard error and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from advkit.evaluation.run.store import read_records

QUICK = ("evaluate", "--task", "digits", "--attack", "fgsm", "--n", 16, "--device", "cpu")


def refused(advkit: Any, *arguments: object, says: tuple[str, ...]) -> str:
    """The one line that a refused command prints; fails where it printed more, wrote anything, or left a traceback."""
    before = written()
    said = advkit(*arguments)
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("advkit: error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    for part in says:
        assert part in said.err, (part, said.err)
    assert written() == before
    return str(said.err)


def written() -> dict[str, bytes]:
    """Every file and folder below the working directory's parent, with its content."""
    top = Path.cwd().parent
    return {str(p.relative_to(top)): p.read_bytes() if p.is_file() else b"" for p in sorted(top.rglob("*"))}


def trained(**changes: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Digits as arrays: x [32, 1, 8, 8] in [0, 1], y [32]."""
    from advkit.tasks import TASKS

    batch = next(iter(TASKS.build("digits").batches(32)))
    assert batch.labels is not None
    return batch.x.numpy().copy(), batch.labels.numpy().copy()


@pytest.mark.parametrize("attack", ["fgsm", "mifgsm", "pgd", "square"])
def test_an_attack_within_a_radius_where_there_is_none(advkit: Any, victim: str, attack: str) -> None:
    """Known before anything is written, also where the attack itself notices at its first step."""
    asked = ("evaluate", "--task", "digits", "--model", victim, "--n", 16, "--device", "cpu", "--out", "here")
    refused(advkit, *asked, "--attack", attack, "--threat-model", "minimum-l2", says=("inimum",))


def archive(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> str:
    """The spec of a task that reads these arrays."""
    np.savez("rows.npz", x=x, y=y)
    return "npz:path=rows.npz"


@pytest.mark.parametrize(
    ("option", "name", "near"),
    [
        ("--attack", "pgdd", "'pgd'"),
        ("--attack", "apgd", "'apgd-ce'"),
        ("--defense", "pubdeff", "'pubdef'"),
        ("--defense", "pgd-att", "'pgd_at'"),
        ("--task", "fashionmnist", "'fashion-mnist'"),
        ("--model", "resnet81", "'resnet18'"),
        ("--model", "zoo:fashion-mnist-public-cmm", "'fashion-mnist-public-cnn'"),
        ("--threat-model", "linff:eps=0.1", "'linf'"),
        ("--goal", "untargetted", "'untargeted'"),
        ("--attack", "pgd:step=10", "'steps'"),
        ("--threat-model", "linf:epsilon=0.1", "'eps'"),
    ],
)
def test_an_unknown_name_gets_its_nearest(advkit: Any, option: str, name: str, near: str) -> None:
    refused(advkit, *QUICK, option, name, says=("did you mean", near))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--epsilon", ("--threat-model linf:eps=8/255",)),
        ("--norm", ("--threat-model l2:eps=0.5",)),
        ("--iterations", ("--attack pgd:steps=...",)),
        ("--num-steps", ("--attack pgd:steps=...",)),
        ("--alpha", ("--attack pgd:step_size=...",)),
        ("--dataset", ("did you mean --task?",)),
        ("--targeted", ("--goal targeted:how=next",)),
        ("--batchsize", ("did you mean --batch-size?",)),
        ("--gpu", ("did you mean --device?",)),
    ],
)
def test_options_of_other_tools(advkit: Any, option: str, says: tuple[str, ...]) -> None:
    refused(advkit, "evaluate", option, "1", says=(f"no option {option}", *says))


def test_an_option_that_nobody_has_shows_the_usage(advkit: Any) -> None:
    said = advkit("evaluate", "--frobnicate", "1")
    assert said.code == 2
    assert "--frobnicate" in said.err
    assert "Usage" in said.err


def test_an_unknown_command_gets_its_nearest(advkit: Any) -> None:
    refused(advkit, "evalute", says=("did you mean", "'evaluate'"))


@pytest.mark.parametrize(
    ("threat", "says"),
    [
        ("linf:eps=8", ("eps=8", "8/255")),
        ("linf:eps=-0.1", ("eps is -0.1", ">= 0")),
        ("linf:eps=nan", ("eps", "nan")),
        ("linf:eps=inf", ("eps", "inf")),
        ("l2:eps=9", ("eps=9", "8")),
        ("l0:eps=65", ("65", "64")),
        ("linf:eps=8/0", ("eps", "8/0")),
        ("linf:eps=abc", ("eps", "abc")),
        ("transfer:sources=zoo:digits-public-cnn,eps=8", ("eps=8",)),
    ],
)
def test_an_eps_out_of_range(advkit: Any, victim: str, threat: str, says: tuple[str, ...]) -> None:
    refused(advkit, *QUICK, "--model", victim, "--threat-model", threat, "--out", "run", says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--attack", "pgd:steps=0"), ("steps", "at least 1")),
        (("--attack", "pgd:steps=ten"), ("steps", "ten")),
        (("--attack", "pgd:loss=logit"), ("loss", "logit")),
        (("--n", 0), ("n", "1")),
        (("--n", -5), ("n", "-5")),
        (("--batch-size", 0), ("batch", "1")),
        (("--device", "gpu"), ("gpu", "cuda")),
        (("--device", "cuda:99"), ("cuda:99",)),
        (("--attack", "pgd", "--threat-model", "linf:eps=0.1,access=scores"), ("gradients", "scores")),
    ],
)
def test_a_setting_out_of_range(advkit: Any, victim: str, options: tuple[object, ...], says: tuple[str, ...]) -> None:
    refused(advkit, *QUICK, "--model", victim, "--out", "run", *options, says=says)


def test_images_on_255_levels_in_floats(advkit: Any, victim: str) -> None:
    x, y = trained()
    task = archive(x * 255, y)
    refused(advkit, *QUICK, "--task", task, "--model", victim, "--out", "run", says=("rows", "255", "Box(0, 1)"))


def test_images_that_are_normalised_already(advkit: Any, victim: str) -> None:
    x, y = trained()
    task = archive((x - 0.3) / 0.37, y)
    line = refused(advkit, *QUICK, "--task", task, "--model", victim, "--out", "run", says=("Box(0, 1)", "normalised"))
    assert "-0.8" in line, "the range that was seen"


def test_nan_inputs(advkit: Any, victim: str) -> None:
    x, y = trained()
    x[3, 0, 2, 2] = np.nan
    refused(advkit, *QUICK, "--task", archive(x, y), "--model", victim, "--out", "run", says=("NaN",))


def test_labels_out_of_range(advkit: Any, victim: str) -> None:
    x, y = trained()
    refused(advkit, *QUICK, "--task", archive(x, y - 1), "--model", victim, "--out", "run", says=("labels", "-1"))
    refused(advkit, *QUICK, "--task", archive(x, y + 1), "--model", victim, "--out", "run", says=("10 classes", "11"))
    refused(advkit, *QUICK, "--task", archive(x, y + 0.5), "--model", victim, "--out", "run", says=("whole numbers",))


def test_archives_that_hold_something_else(advkit: Any, victim: str) -> None:
    rest = ("--model", victim, "--out", "run")
    refused(advkit, *QUICK, "--task", "npz:path=absent.npz", *rest, says=("no file absent.npz",))
    Path("text.npz").write_text("hello")
    refused(advkit, *QUICK, "--task", "npz:path=text.npz", *rest, says=("text.npz", "no archive"))
    np.savez("keys.npz", images=np.zeros(3))
    refused(advkit, *QUICK, "--task", "npz:path=keys.npz", *rest, says=("images", "x and y"))
    np.savez("object.npz", x=np.array([Danger()], dtype=object), y=np.zeros(1, dtype=np.int64))
    refused(advkit, *QUICK, "--task", "npz:path=object.npz", *rest, says=("object.npz", "no archive"))
    assert not Path("ran").exists()


@pytest.fixture
def factories(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of model factories in the working directory."""
    Path("bad_factories.py").write_text(
        "from torch import nn\n"
        "from advkit.models.torch import TorchModel\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Dropout(0.5))\n"
        "def training(): return TorchModel(net(10).train(), classes=10)\n"
        "def seven(): return net(7)\n"
        "def wide(): return nn.Linear(100, 10)\n"
        "def nothing(): return None\n"
        "def pair(): return nn.Sequential(nn.Flatten(), nn.LSTM(64, 10))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "bad_factories", raising=False)
    return "python:bad_factories"


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("training", ("training mode", ".eval()")),
        ("seven", ("7 classes", "10")),
        ("wide", ("shape", "[1, 8, 8]")),
        ("nothing", ("NoneType",)),
        ("pair", ("tuple", "logits")),
        ("absent", ("absent",)),
    ],
)
def test_a_model_that_gives_no_number(advkit: Any, factories: str, factory: str, says: tuple[str, ...]) -> None:
    refused(advkit, *QUICK, "--model", f"{factories}:{factory}", "--out", "run", says=says)


def test_a_model_of_another_task(advkit: Any, victim: str) -> None:
    refused(
        advkit, *QUICK, "--task", "fashion-mnist", "--model", victim, "--out", "run", says=("[1, 8, 8]", "[1, 28, 28]")
    )


def test_a_module_that_is_not_there(advkit: Any) -> None:
    refused(advkit, *QUICK, "--model", "python:no_such_module:make", says=("no Python module", "no_such_module"))
    refused(advkit, *QUICK, "--model", "python:no_such_module", says=("python:MODULE:NAME",))


def checkpoint(victim: str) -> Path:
    copy = Path("copy.safetensors")
    shutil.copy(victim.removeprefix("path:"), copy)
    return copy


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_a_checkpoint_with_a_flipped_byte(advkit: Any, victim: str, place: float) -> None:
    file = checkpoint(victim)
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x10
    file.write_bytes(bytes(content))
    refused(advkit, *QUICK, "--model", f"path:{file}", "--out", "run", says=("copy.safetensors",))


def test_a_checkpoint_that_is_cut_off_empty_or_absent(advkit: Any, victim: str) -> None:
    file = checkpoint(victim)
    file.write_bytes(file.read_bytes()[:-100])
    refused(advkit, *QUICK, "--model", f"path:{file}", "--out", "run", says=("copy.safetensors", "damaged"))
    file.write_bytes(b"")
    refused(advkit, *QUICK, "--model", f"path:{file}", "--out", "run", says=("copy.safetensors", "damaged"))
    refused(advkit, *QUICK, "--model", "path:absent.safetensors", "--out", "run", says=("absent.safetensors",))


def test_a_checkpoint_whose_hash_is_not_the_one_meant(advkit: Any, victim: str) -> None:
    file = checkpoint(victim)
    refused(advkit, *QUICK, "--model", f"path:{file},sha256={'0' * 64}", says=("sha256", "not opened"))


def test_a_foreign_file(advkit: Any) -> None:
    Path("notes.txt").write_text("hello")
    refused(advkit, *QUICK, "--model", "path:notes.txt", "--out", "run", says=("notes.txt", ".safetensors"))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, "foreign.safetensors")
    refused(advkit, *QUICK, "--model", "path:foreign.safetensors", "--out", "run", says=("architecture",))
    refused(
        advkit,
        *QUICK,
        "--model",
        "path:foreign.safetensors,architecture=mlp",
        "--out",
        "run",
        says=("does not fit", "lacks"),
    )


class Danger:
    """Pickles into a call that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_a_pickle_that_would_run_code(advkit: Any, suffix: str) -> None:
    torch.save({"state_dict": Danger()}, f"bad.{suffix}")
    spec = f"path:bad.{suffix},architecture=mlp"
    refused(advkit, *QUICK, "--model", spec, "--out", "run", says=("Python objects",))
    Path(f"bad.{suffix}").write_bytes(pickle.dumps(Danger()))
    refused(advkit, *QUICK, "--model", spec, "--out", "run", says=(f"bad.{suffix}",))
    torch.save(nn.Linear(2, 2), f"bad.{suffix}")
    refused(advkit, *QUICK, "--model", spec, "--out", "run", says=("Python objects",))
    assert not Path("ran").exists()


@pytest.mark.parametrize("command", ["evaluate", "attack", "train"])
def test_an_output_folder_below_a_file(advkit: Any, victim: str, command: str) -> None:
    Path("file").write_text("mine")
    options = ("--task", "digits", "--model", victim if command != "train" else "mlp:hidden=8", "--device", "cpu")
    refused(advkit, command, *options, "--out", "file/run", says=("file/run", "can't be written", "--out"))
    assert Path("file").read_text() == "mine"


def test_an_output_folder_below_a_file_for_the_other_commands(advkit: Any, victim: str) -> None:
    Path("file").write_text("mine")
    assert advkit(*QUICK, "--model", victim, "--out", "run", "--no-plots").code == 0
    refused(advkit, "rerun", "run", "--out", "file/run", says=("can't be written",))
    refused(advkit, "leaderboard", "run", "--out", "file/board", says=("file/board",))
    refused(
        advkit, "doctor", "--task", "digits", "--model", victim, "--rows", 4, "--draws", 2, "--out", "file/doctor",
        says=("can't be written",),
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_an_output_folder_without_permission(advkit: Any, victim: str) -> None:
    Path("locked").mkdir(mode=0o500)
    refused(advkit, *QUICK, "--model", victim, "--out", "locked/run", says=("can't be written",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--seed", 1), ("seed",)),
        (("--attack", "pgd:steps=3"), ("specs",)),
        (("--threat-model", "linf:eps=0.05"), ("threat",)),
        (("--n", 17), ("n",)),
    ],
)
def test_a_run_folder_of_another_case(
    advkit: Any, victim: str, options: tuple[object, ...], says: tuple[str, ...]
) -> None:
    assert advkit(*QUICK, "--model", victim, "--out", "run", "--no-plots").code == 0
    refused(advkit, *QUICK, "--model", victim, "--out", "run", *options, says=("run", "another case", "--out", *says))


@pytest.mark.slow
def test_a_training_folder_of_another_training(advkit: Any) -> None:
    train = ("train", "--task", "digits", "--model", "mlp:hidden=8", "--recipe", "epochs=1", "--out", "run")
    assert advkit(*train).code == 0
    refused(advkit, *train, "--seed", 1, says=("another training", "--out"))
    refused(advkit, *train, "--recipe", "epochs=2", says=("another training",))


def test_records_without_a_case_are_not_taken_over(advkit: Any, victim: str) -> None:
    Path("run").mkdir()
    Path("run/records.jsonl").write_text('{"id": "somebody else"}\n')
    refused(advkit, *QUICK, "--model", victim, "--out", "run", says=("records", "--out"))


def test_a_defense_that_needs_training_data_which_the_task_lacks(advkit: Any) -> None:
    defense = "pubdef:loss=topk"
    task = ("--task", "fashion-mnist", "--device", "cpu", "--out", "run")
    says = ("training data", "fashion-mnist", "root=FOLDER")
    refused(advkit, "evaluate", *task, "--defense", defense, says=says)
    refused(advkit, "train", *task, "--defense", defense, says=says)
    refused(advkit, "evaluate", "--task", "fashion-mnist:root=nowhere", "--defense", defense, says=("nowhere",))


def test_a_training_that_cannot_start_leaves_no_folder(advkit: Any) -> None:
    x, y = trained()
    np.savez("both.npz", x=x, y=y, x_train=x, y_train=y)
    train = ("train", "--task", "npz:path=both.npz", "--device", "cpu", "--out", "run")
    refused(advkit, *train, "--defense", "pubdef", says=("no public models", "sources="))
    refused(advkit, *train, "--recipe", "epochs=0", says=("epochs",))
    refused(advkit, *train, "--recipe", "epoch=3", says=("'epochs'",))


def test_a_source_of_tapm_that_the_zoo_lacks(advkit: Any, victim: str) -> None:
    x, y = trained()
    threat = ("--threat-model", "tapm:eps=0.1")
    refused(advkit, *QUICK, "--task", archive(x, y), "--model", victim, *threat, says=("public surrogates", "sources="))
    refused(
        advkit, "attack", "--task", "digits", "--model", victim, *threat, "--out", "run",
        says=("transfer:sources=",),
    )  # fmt: skip


def test_files_that_are_no_reports(advkit: Any) -> None:
    Path("empty").mkdir()
    Path("wrong.json").write_text('{"robust_accuracy": 1.0}')
    Path("text.json").write_text("hello")
    for name in ("absent", "empty", "wrong.json", "text.json"):
        refused(advkit, "show", name, says=(name,))
        refused(advkit, "rerun", name, says=(name,))
        refused(advkit, "compare", name, name, says=(name,))
    refused(advkit, "leaderboard", "absent", says=("absent",))


def test_a_bug_is_a_traceback_and_no_usage_error(advkit: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation import plan

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(plan, "plan", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        advkit(*QUICK, "--model", victim)


def test_ctrl_c_in_process(advkit: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation.run import engine

    options = (*QUICK, "--model", victim, "--batch-size", 4, "--no-plots", "--out")
    assert advkit(*options, "whole").code == 0
    real, calls = engine.run_alone, []

    def impatient(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(engine, "run_alone", impatient)
    said = advkit(*options, "cut")
    assert said.code == 130
    assert [line for line in said.err.splitlines() if line.startswith("advkit: ")] == [
        "advkit: interrupted; what is done is kept, resume with the same command"
    ]
    assert "Traceback" not in said.err
    assert len(read_records(Path("cut/records.jsonl"))) == 8
    assert not Path("cut/report.json").exists()
    assert advkit(*options, "cut").code == 0
    assert Path("cut/records.jsonl").read_bytes() == Path("whole/records.jsonl").read_bytes()


@pytest.mark.slow
def test_ctrl_c_of_a_process(victim: str, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "advkit", "evaluate", "--task", "digits", "--model", victim, "--no-plots", "--device",
        "cpu", "--attack", "pgd:steps=400,stop=false", "--n", "50", "--batch-size", "2", "--out",
    ]  # fmt: skip
    # Long enough that a busy machine can't be through before the signal comes.
    env = {**os.environ, "ADVKIT_CACHE": str(tmp_path / "cache")}
    # What a shell starts in the background ignores Ctrl-C, and so would what is started from there.
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    records = tmp_path / "cut" / "records.jsonl"
    end = time.monotonic() + 120
    while not (records.exists() and records.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert b"advkit: interrupted; what is done is kept, resume with the same command" in err
    assert 0 < len(read_records(records)) < 50
    for name in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, env=env, capture_output=True)
    assert records.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
