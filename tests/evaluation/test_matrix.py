"""The transfer matrix: aggregates against plain numpy, images made once, resumed runs, white-box and missing cells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import advkit
from advkit.core.errors import BadInput, ReportError, UsageError
from advkit.core.protocols import Access
from advkit.evaluation.matrix import Matrix, MatrixRequest, api, execute, read_matrix
from advkit.evaluation.matrix.images import Rows
from advkit.evaluation.matrix.participants import named_attacks, split_sum
from advkit.evaluation.matrix.rates import NO_DECISION, cell_rates, errors_of, over_seeds
from advkit.evaluation.stats import wilson
from advkit.models import zoo
from advkit.tasks import TASKS
from advkit.threat_models.tapm import TransferGrid

CNN, MLP, CNN_B = "zoo:digits-public-cnn", "zoo:digits-public-mlp", "zoo:digits-public-cnn-b"
TWO = ("fgsm", "pgd:steps=3,step_size=0.5")


def small(folder: Path, **changes: Any) -> Matrix:
    """Two sources, two attacks, two targets (one is a source), 40 rows: two pieces of images each."""
    settings: dict[str, Any] = {
        "sources": [CNN, MLP],
        "attacks": TWO,
        "targets": [CNN_B, MLP],
        "task": "digits",
        "n": 40,
        "seeds": 3,
        "equal_budget": None,
        "cache": folder,
        "device": "cpu",
    }
    return advkit.matrix(**{**settings, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, Path]:
    """A finished matrix and its cache."""
    folder = tmp_path_factory.mktemp("matrix")
    return small(folder), folder


def pieces(folder: Path) -> dict[str, int]:
    """Every image file and when it was written."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted((folder / "images").rglob("*.safetensors"))
    }


def test_aggregates_equal_plain_numpy() -> None:
    rng = np.random.default_rng(0)
    seeds, s, a, n = 3, 4, 5, 37
    wrong = rng.random((seeds, s, a, n)) < rng.random((1, s, a, 1))
    names, attacks = [f"s{i}" for i in range(s)], [f"a{i}" for i in range(a)]
    groups = ("normal", "linf", "normal", "linf")
    grid = TransferGrid(
        sources=tuple(names),
        attacks=tuple(attacks),
        groups=groups,
        seen=frozenset({"s0", "s3"}),
        white_box=frozenset({"s2"}),
    )
    found = over_seeds(grid, wrong.astype(float))

    def expected(rows: list[int], columns: list[int]) -> tuple[float, float, float]:
        right = ~wrong[:, rows][:, :, columns]
        cells = right.mean(3).reshape(seeds, -1)
        return cells.mean(), cells.min(1).mean(), right.reshape(seeds, -1, n).all(1).mean()

    every, other = list(range(a)), [0, 1, 3]
    table = {
        ("overall",): (other, every),
        ("seen",): ([0, 3], every),
        ("unseen",): ([1], every),
        ("by_group", "normal"): ([0], every),
        ("by_group", "linf"): ([1, 3], every),
        **{("by_source", name): ([i], every) for i, name in enumerate(names)},
        **{("by_attack", name): (other, [j]) for j, name in enumerate(attacks)},
    }
    for path, (rows, columns) in table.items():
        block = found
        for key in path:
            block = block[key]
        told = tuple(block[kind]["value"] for kind in ("avg", "best", "union"))
        assert told == pytest.approx(expected(rows, columns), abs=1e-12), path
        assert block["cells"] == len(rows) * len(columns)
        assert told[2] <= told[1] <= told[0]
    per_seed = (~wrong[:, other]).reshape(seeds, -1, n).all(1).sum(1)
    assert found["overall"]["union"]["counts"] == [[int(k), n] for k in per_seed]
    assert found["overall"]["union"]["range"] == [per_seed.min() / n, per_seed.max() / n]
    assert found["overall"]["union"]["ci"]["low"] == wilson(int(per_seed[0]), n).low
    assert found["overall"]["avg"]["ci"] is None
    cell = (~wrong[0, other]).mean(2)
    row, column = np.unravel_index(cell.argmin(), cell.shape)
    assert (found["overall"]["best"]["s"], found["overall"]["best"]["a"]) == (names[other[row]], attacks[column])


def test_aggregates_do_not_depend_on_the_order_of_images_sources_and_attacks() -> None:
    rng = np.random.default_rng(1)
    errors = (rng.random((2, 3, 4, 25)) < 0.4).astype(float)
    sources, attacks = np.array(["x", "y", "z"]), np.array(["a", "b", "c", "d"])
    groups = np.array(["one", "two", "one"])

    def figures(p: Any, q: Any, r: Any) -> dict[str, Any]:
        grid = TransferGrid(
            sources=tuple(sources[p].tolist()),
            attacks=tuple(attacks[q].tolist()),
            groups=tuple(groups[p].tolist()),
            seen=frozenset({"y"}),
            white_box=frozenset({"z"}),
        )
        return over_seeds(grid, errors[:, p][:, :, q][..., r])

    found = figures(np.arange(3), np.arange(4), np.arange(25))
    assert found == figures(rng.permutation(3), rng.permutation(4), rng.permutation(25))


def test_a_missing_cell_counts_neither_way_and_a_missing_row_leaves_the_rest() -> None:
    errors = np.zeros((2, 2, 2, 10))
    errors[:, 0, 0] = 1.0  # always wrong: were the missing cell counted as 0 % or 100 %, averages would show it
    errors[1, 1, 1] = np.nan  # gone under one seed: gone
    grid = TransferGrid(sources=("x", "y"), attacks=("a", "b"))
    found = over_seeds(grid, errors)
    assert found["overall"]["cells"] == 3
    assert found["overall"]["avg"]["value"] == pytest.approx(2 / 3)
    assert found["by_attack"]["b"]["avg"]["value"] == 1.0
    assert found["by_attack"]["b"]["cells"] == 1
    errors[0, 0, 1, :4] = np.nan
    found = over_seeds(grid, errors)
    assert (found["rows"], found["incomplete"]) == ([6, 10], [4, 0])
    one = TransferGrid(sources=("x",), attacks=("a",))
    assert over_seeds(one, np.full((1, 1, 1, 3), np.nan))["overall"] is None


def test_three_success_rates_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0])
    clean = np.array([0, 0, 0, 0, 1, NO_DECISION], dtype=np.int16)
    answers = np.array([[0, 1, 2, NO_DECISION, 0, 0], [0, 0, 1, 0, 1, -1]], dtype=np.int16)
    found = cell_rates(answers, clean, labels, wanted=np.full(6, 1))
    # First seed: 4 rows count (the unanswered one and the one without a clean answer do not), 2 right; of the 3 right
    # untouched 2 fell, and one of the wrong ones turned right.
    assert found["acc"]["counts"] == [[2, 4], [3, 5]]
    assert found["asr_all"]["counts"] == [[2, 4], [2, 5]]
    assert found["asr_cond"]["counts"] == [[2, 3], [1, 4]]
    assert found["fooling"] == pytest.approx(((3 - 2) / 3 + (4 - 3) / 4) / 2)
    assert found["targeted"]["counts"] == [[1, 3], [1, 4]]
    assert errors_of(answers, labels)[0, :4].tolist()[:3] == [0.0, 1.0, 1.0]
    assert np.isnan(errors_of(answers, labels)[0, 3])


@pytest.mark.slow
def test_cells_are_what_the_targets_say_of_the_stored_images(made: tuple[Matrix, Path]) -> None:
    matrix, folder = made
    data, task = matrix.to_dict(), TASKS.build("digits")
    rows = Rows.of(task, 40)
    checked = 0
    for told in data["sets"]:
        files = list((folder / "images" / told["file_hash"][:2] / told["file_hash"]).iterdir())
        assert len(files) == 2, "32 rows and the other 8"
        parts = sorted((load_file(file) for file in files), key=lambda part: -len(part["images"]))
        images = torch.cat([part["images"] for part in parts])
        assert images.dtype == torch.uint8
        moved = (images.float() / 255 - rows.x).abs().flatten(1).amax(1)
        assert float(moved.max()) <= 0.2 + 1e-6, "eps holds after rounding"
        assert told["eps_used"] == pytest.approx(float(moved.max()), abs=1e-6)
        seed = data["seeds"].index(told["seed"])
        for name in (CNN_B, MLP):
            target = zoo.load(name[4:])
            with torch.no_grad():
                right = int((target(images.float() / 255).argmax(1) == rows.labels).sum())
            assert matrix.cell(name, told["s"], told["a"])["acc"]["counts"][seed] == [right, 40]
            checked += 1
    assert checked == 2 * (2 * 1 + 2 * 3), "fgsm under one seed, pgd under three"


def test_fgsm_cells_are_those_of_the_harness(made: tuple[Matrix, Path]) -> None:
    matrix, _ = made
    threat = f"tapm:eps=0.2,sources={CNN}+{MLP},attacks=fgsm"
    report = advkit.evaluate(task="digits", model=CNN_B, threat_model=threat, n=40, beside=False, device="cpu")
    for attack in report.attacks:
        told = attack["params"]
        told_right = attack["robust_accuracy"]["numerator"]
        cell = matrix.cell(CNN_B, told["source"], "fgsm")
        assert cell["acc"]["counts"][0][0] >= told_right, "right under attack includes rows that were wrong before"
    block = matrix.summary[CNN_B]["by_attack"]["fgsm"]
    assert block["avg"]["counts"][0][0] == report.metrics["tapm_acc_avg"]["numerator"]
    assert block["best"]["counts"][0][0] == report.metrics["tapm_acc_best_attack"]["numerator"]
    assert block["union"]["counts"][0][0] == report.metrics["tapm_acc_per_sample"]["numerator"]


def test_white_box_cells_are_marked_and_left_out(made: tuple[Matrix, Path]) -> None:
    matrix, _ = made
    data = matrix.to_dict()
    assert {(c["t"], c["s"]) for c in data["cells"] if c["whitebox"]} == {(MLP, MLP)}
    told = matrix.summary[MLP]
    assert told["white_box"] == [MLP]
    assert told["overall"]["cells"] == 2
    alone = np.mean([matrix.cell(MLP, CNN, attack)["acc"]["value"] for attack in TWO])
    assert told["overall"]["avg"]["value"] == pytest.approx(alone)
    assert told["by_source"][MLP]["best"]["value"] < told["overall"]["best"]["value"]
    assert " w |" in matrix.markdown()


@pytest.mark.slow
def test_the_same_weights_are_white_box_behind_a_transformation_and_in_an_ensemble(tmp_path: Path) -> None:
    matrix = small(
        tmp_path, sources=[CNN, f"{CNN}+{MLP}", MLP], targets=[f"bit-depth@{CNN}"], attacks=["fgsm"], n=8, seeds=1
    )
    assert matrix.summary[f"bit-depth@{CNN}"]["white_box"] == [CNN, f"{CNN}+{MLP}"]
    assert matrix.to_dict()["sources"][1]["group"] == "ensemble"
    assert matrix.summary[f"bit-depth@{CNN}"]["overall"]["cells"] == 1


@pytest.mark.slow
def test_seen_sources_come_from_the_cards_or_from_the_caller(tmp_path: Path) -> None:
    pubdef, settings = "zoo:digits-mlp-pubdef", {"attacks": ["fgsm"], "n": 8, "seeds": 1}
    known = {s: "pubdef" in zoo.card(s[4:]).seen_by for s in (CNN, CNN_B)}
    found = small(tmp_path, sources=[CNN, CNN_B], targets=[pubdef], **settings)
    assert {c["s"]: c["seen"] for c in found.to_dict()["cells"]} == known
    found = small(tmp_path, sources=[CNN, CNN_B], targets=[pubdef], seen={pubdef: [CNN_B]}, **settings)
    assert {c["s"]: c["seen"] for c in found.to_dict()["cells"]} == {CNN: False, CNN_B: True}
    with pytest.raises(UsageError, match="seen names"):
        small(tmp_path, targets=[pubdef], seen={pubdef: ["nobody"]}, **settings)


@pytest.mark.slow
def test_a_grid_knows_its_sources_as_a_matrix_does(tmp_path: Path) -> None:
    """The same cells, groups, seen sources and white box, behind a transformation too, from records and from images."""
    model, sources = "bit-depth@" + CNN, [CNN, CNN_B, "zoo:digits-mlp-pgd_at"]
    matrix = small(tmp_path, sources=sources, targets=[model], attacks=["fgsm"], seen={model: [CNN_B]}, seeds=1)
    threat = f"tapm:eps=0.2,sources={'+'.join(sources)},attacks=fgsm,seen={CNN_B}"
    report = advkit.evaluate(
        task="digits", model=CNN, defense="bit-depth", threat_model=threat, n=40, beside=False, device="cpu"
    )
    summary = matrix.summary[model]
    blocks = {"": "overall", "_seen": "seen", "_unseen": "unseen"}
    told = {f"tapm_acc_best_attack{suffix}": summary[name] for suffix, name in blocks.items()}
    told |= {f"tapm_acc_best_attack_group_{group}": block for group, block in summary["by_group"].items()}
    assert summary["white_box"] == [CNN]
    assert set(summary["by_group"]) == {"normal", "linf"}
    found = {name for name in report.metrics if name.startswith("tapm_acc_best_attack")}
    assert found == set(told)
    for name, block in told.items():
        counts = [report.metrics[name]["numerator"], report.metrics[name]["denominator"]]
        assert counts == block["best"]["counts"][0], name


def test_nothing_is_made_twice(
    made: tuple[Matrix, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    matrix, folder = made
    before = pieces(folder)
    caplog.set_level("INFO", logger="advkit")
    # Noise and pgd: 3 seeds of 2 pieces. fgsm: 2 pieces, and one of the second seed, which shows that it draws nothing.
    assert len(before) == 3 * 2 + 2 * (3 * 2) + 2 * (2 + 1)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr("advkit.evaluation.run.engine.run_alone", never)
        patch.setattr("advkit.evaluation.matrix.answers.Judge", never)
        assert small(folder).text == matrix.text
        # The second seed's first piece of pgd is looked at first, and then again with the rest.
        assert f"0 pieces made, {len(before) + 2} found" in caplog.text
        fewer = small(folder, targets=[MLP], attacks=["fgsm"])
    assert pieces(folder) == before
    assert fewer.cell(MLP, CNN, "fgsm") == matrix.cell(MLP, CNN, "fgsm")


def test_a_larger_n_takes_the_pieces_of_a_smaller_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sources": [MLP], "targets": [CNN_B], "attacks": ["fgsm"], "seeds": 1}
    small(tmp_path, n=140, **settings)
    before = pieces(tmp_path)
    small(tmp_path, n=200, **settings)
    after = pieces(tmp_path)
    assert {k: after[k] for k in before} == before
    assert len(before) == 2 * 3
    assert len(after) == 2 * 4, "32 and 96 rows are there; the rows from 128 on end elsewhere"


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(
    made: tuple[Matrix, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from advkit.evaluation.run import engine

    class Killed(BaseException):
        pass

    real, calls = engine.run_alone, 0

    def mortal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(engine, "run_alone", mortal)
    deaths = 0
    while True:
        try:
            matrix = small(tmp_path)
            break
        except Killed:
            deaths += 1
    assert deaths == 7
    assert files(tmp_path) == files(made[1])
    assert untimed(matrix) == untimed(made[0])


def files(folder: Path) -> list[tuple[str, str]]:
    """Image files and a hash of their tensors; how long they took is not compared."""
    return [
        (name, str({k: v.tolist() for k, v in sorted(load_file(folder / name).items())})) for name in pieces(folder)
    ]


def untimed(matrix: Matrix) -> dict[str, Any]:
    data = matrix.to_dict()
    for part in (data, data["equal_budget"] or {"sets": []}):
        for told in part["sets"]:
            del told["seconds"]
    return data


@pytest.mark.slow
def test_workers_make_the_same_images(made: tuple[Matrix, Path], tmp_path: Path) -> None:
    assert untimed(small(tmp_path, workers=2)) == untimed(made[0])


@dataclass(frozen=True, kw_only=True)
class Picky:
    """Refuses rows whose mean is above a limit, and says so."""

    needs: ClassVar[Access] = Access.GRADIENTS
    limit: float = 0.0

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        if float(x.mean(dim=(1, 2, 3)).max()) > self.limit:
            raise (UsageError if self.limit == 0 else ValueError)("too bright for this attack")
        return x


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Moves every row by the sign of the batch's mean gradient: what it makes of one depends on the others."""

    needs: ClassVar[Access] = Access.GRADIENTS
    together: ClassVar[bool] = True

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        gradient = oracle.gradient(x, goal)[1].mean(0, keepdim=True).expand_as(x)
        return ball.project(x + ball.steepest(-gradient, x), x)


@pytest.mark.slow
def test_an_attack_on_all_rows_together_gets_those_of_a_piece(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sources": [MLP], "attacks": [Shared()], "targets": [CNN_B], "seeds": 1}
    small(tmp_path, n=128, **settings)
    before = pieces(tmp_path)
    whole = small(tmp_path, n=140, **settings)
    assert before.items() <= pieces(tmp_path).items(), "rows that came later changed no image of the pieces before"
    assert untimed(small(tmp_path / "anew", n=140, **settings)) == untimed(whole)


@pytest.mark.slow
def test_an_unsupported_pair_is_listed_with_its_reason(tmp_path: Path) -> None:
    matrix = small(tmp_path, attacks=["fgsm", Picky()], seeds=2, equal_budget=4)
    data = matrix.to_dict()
    name = data["attacks"][1]["name"]
    assert {(m["t"], m["s"], m["a"]) for m in data["missing"]} == {(None, s, name) for s in (CNN, MLP)}
    assert all(m["reason"] == "too bright for this attack" for m in data["missing"])
    assert {cell["a"] for cell in data["cells"]} == {"fgsm"}
    assert matrix.summary[CNN_B]["by_attack"][name] is None
    assert matrix.summary[CNN_B]["overall"]["cells"] == 2
    assert "too bright" in matrix.markdown()
    with pytest.raises(UsageError, match="no cell"):
        matrix.cell(CNN_B, CNN, name)
    matrix.plot()


def test_a_row_that_raises_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    rows = Rows.of(TASKS.build("digits"), 40)
    bright = rows.x.mean(dim=(1, 2, 3))
    limit = float(bright.sort().values[-4:-2].mean())
    matrix = small(tmp_path, attacks=["fgsm", Picky(limit=limit)], seeds=1, targets=[CNN_B])
    assert [(made["a"], made["raised"]) for made in matrix.to_dict()["sets"] if made["s"] == CNN][1][1] == 3
    assert matrix.summary[CNN_B]["rows"] == [37]
    assert matrix.summary[CNN_B]["incomplete"] == [3]
    folder = tmp_path / "images"
    whole = [told["file_hash"] for told in matrix.to_dict()["sets"] if told["a"] == "fgsm"]
    kept = {told["file_hash"]: told["raised"] for told in matrix.to_dict()["sets"]}
    counts = {key: len(list((folder / key[:2] / key).glob("*"))) for key in kept if (folder / key[:2] / key).exists()}
    assert all(counts[key] == 2 for key in whole)
    assert all(counts.get(key, 0) < 2 for key in set(kept) - set(whole)), "pieces with rows that raised are not kept"


@pytest.mark.slow
def test_gradients_are_metered_and_scaled_to_a_budget(tmp_path: Path) -> None:
    attacks = ["fgsm", "mifgsm", "pgd:steps=20,step_size=0.25", "apgd-ce:steps=10,restarts=2"]
    matrix = small(tmp_path, attacks=attacks, seeds=1, sources=[MLP], targets=[CNN_B], n=20, equal_budget=8)
    told = {attack["name"]: attack["grads_per_image"] for attack in matrix.to_dict()["attacks"]}
    assert (told["fgsm"], told["mifgsm"], told[attacks[2]]) == (1, 10, 20)
    second = matrix.to_dict()["equal_budget"]
    assert second["budget"] == 8
    scaled = {attack["name"]: attack for attack in second["attacks"]}
    assert scaled["mifgsm"]["grads_per_image"] == 8
    assert scaled[attacks[2]]["grads_per_image"] == 8
    assert scaled[attacks[2]]["params"]["step_size"] * 8 == pytest.approx(0.25 * 20), "the path stays as long"
    assert 6 <= scaled[attacks[3]]["grads_per_image"] <= 8
    assert scaled["fgsm"]["note"].startswith("as it is")
    auto = small(tmp_path, attacks=attacks[:3], seeds=1, sources=[MLP], targets=[CNN_B], n=20, equal_budget="auto")
    assert auto.to_dict()["equal_budget"]["budget"] == 15, "the median of 10 and 20"
    auto.plot(equal_budget=True)


def test_random_attacks_have_a_range_and_others_do_not(made: tuple[Matrix, Path]) -> None:
    data = made[0].to_dict()
    assert {attack["name"]: attack["random"] for attack in data["attacks"]} == {TWO[0]: False, TWO[1]: True}
    cell = made[0].cell(CNN_B, CNN, "fgsm")
    assert cell["seeds"] == [0]
    assert cell["acc"]["range"] == [cell["acc"]["value"]] * 2
    random = made[0].cell(CNN_B, CNN, TWO[1])
    shares = [k / n for k, n in random["acc"]["counts"]]
    assert random["seeds"] == [0, 1, 2]
    assert random["acc"]["value"] == pytest.approx(np.mean(shares))
    assert random["acc"]["range"] == [min(shares), max(shares)]
    assert len({made["images_sha256"] for made in data["sets"] if made["a"] == TWO[1]}) == 6


@pytest.mark.slow
def test_noise_is_eps_long_and_the_same_for_every_source(made: tuple[Matrix, Path], tmp_path: Path) -> None:
    data = made[0].to_dict()
    assert [told["t"] for told in data["noise"]] == [CNN_B, MLP]
    other = small(tmp_path, sources=[CNN_B], attacks=["fgsm"]).to_dict()
    assert other["noise"] == data["noise"]
    assert data["noise"][0]["acc"]["value"] > made[0].cell(CNN_B, CNN, "fgsm")["acc"]["value"] + 0.2


@pytest.mark.slow
def test_targeted_images_and_their_success(tmp_path: Path) -> None:
    matrix = small(
        tmp_path, goal="targeted:how=next", attacks=["pgd:steps=20,step_size=0.2"], eps=0.3, seeds=1, targets=[MLP]
    )
    white = matrix.cell(MLP, MLP, "pgd:steps=20,step_size=0.2")["targeted"]["value"]
    assert white > 0.8
    assert matrix.to_dict()["eps"] == 0.3
    drawn = small(tmp_path, goal="targeted:how=random", attacks=["pgd:steps=20,step_size=0.2"], eps=0.3, targets=[MLP])
    told = drawn.cell(MLP, MLP, "pgd:steps=20,step_size=0.2")["targeted"]
    assert told["value"] > 0.8, "the wanted class of every seed is the one that the attack was given"
    with pytest.raises(UsageError, match="how=next"):
        small(tmp_path, goal="targeted:how=least_likely")


@pytest.mark.slow
def test_similarity_is_one_on_the_diagonal_and_symmetric(tmp_path: Path) -> None:
    found = small(tmp_path, similarity=True, attacks=["fgsm", "mifgsm:steps=1"], seeds=1).to_dict()["similarity"]
    cosine = np.array(found["cosine"])
    assert cosine.shape == (4, 4)
    assert found["pairs"][1] == [CNN, "mifgsm:steps=1"]
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
    np.testing.assert_allclose(cosine, cosine.T)
    assert cosine[0, 1] == pytest.approx(1, abs=1e-5), "one step with momentum is a sign step"
    assert cosine[0, 2] < 0.9


@pytest.mark.slow
def test_an_attack_that_wants_data_gets_the_training_set(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sources": [MLP], "targets": [CNN_B], "attacks": ["admix:steps=2", "fgsm"], "n": 12}
    found = small(tmp_path, seeds=1, equal_budget=30, **settings).to_dict()
    assert found["missing"] == []
    assert [attack["grads_per_image"] for attack in found["attacks"]] == [2 * 15, 1]
    rows = Rows.of(TASKS.build("digits"), 12)
    without = small(tmp_path, task=(rows.x, rows.labels), eps=0.2, seeds=1, **settings).to_dict()
    assert [(told["a"], told["t"]) for told in without["missing"]] == [("admix:steps=2", None)]
    keys = [next(m["file_hash"] for m in told["sets"] if m["a"] == "fgsm") for told in (found, without)]
    assert keys[0] == keys[1], "what an attack does not look at does not decide its images"


def test_names_of_sums() -> None:
    assert split_sum("zoo:a+zoo:b") == ("zoo:a", "zoo:b")
    assert split_sum("[zoo:a]+pgd_at@cnn") == ("zoo:a", "pgd_at@cnn")
    assert split_sum("path:models/a+b.safetensors") == ("path:models/a+b.safetensors",)
    assert split_sum("zoo:a") == ("zoo:a",)
    attack = named_attacks(["ni+ti"])[0]
    assert (attack.name, attack.spec) == ("ni+ti", "transfer:ni+ti")
    with pytest.raises(UsageError, match="more than once"):
        named_attacks(["fgsm", "fgsm"])
    with pytest.raises(UsageError, match="more than once"):
        named_attacks(["pgd", "pgd:steps=40"])


@pytest.mark.slow
def test_heat_maps_hold_the_cells_and_their_titles_stand_clear(made: tuple[Matrix, Path]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from advkit.evaluation.figures.plots import transfer_heatmap

    figure = made[0].plot()
    panels = figure.axes[:-1]
    assert [axes.get_title(loc="left") for axes in panels] == ["target public-cnn-b", "target public-mlp"]
    for axes, target in zip(panels, (CNN_B, MLP), strict=True):
        values = np.asarray(axes.images[0].get_array())
        expected = [[made[0].cell(target, source, attack)["acc"]["value"] for attack in TWO] for source in (CNN, MLP)]
        np.testing.assert_allclose(values, expected)
    hatched = [[patch.get_hatch() for patch in axes.patches].count("////") for axes in panels]
    assert hatched == [0, 2], "the cells of the source that is the target"
    long = "Robust accuracy under transfer of every public model of the zoo"
    for drawn in (figure, transfer_heatmap(np.full((1, 2), 0.5), ["s"], ["a", "b"], title=long)):
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        title = drawn._suptitle.get_window_extent()
        for tick in drawn.axes[-1].get_yticklabels():
            assert not title.overlaps(tick.get_window_extent())


@pytest.mark.slow
def test_saved_loaded_and_refused(made: tuple[Matrix, Path], tmp_path: Path) -> None:
    matrix, _ = made
    assert matrix.save(tmp_path / "out") == tmp_path / "out" / "matrix.json"
    again = read_matrix(tmp_path / "out")
    assert again.to_dict() == matrix.to_dict()
    assert (tmp_path / "out" / "matrix.md").read_text() == matrix.markdown()
    stored = load_file(tmp_path / "out" / "decisions.safetensors")["decisions"].numpy()
    labels = Rows.of(TASKS.build("digits"), 40).labels.numpy()
    for t, name in enumerate((CNN_B, MLP)):
        grid = TransferGrid(sources=(CNN, MLP), attacks=TWO, white_box=frozenset({MLP} & {name}))
        found = over_seeds(grid, errors_of(stored[t].transpose(2, 0, 1, 3), labels))
        assert found["overall"] == matrix.summary[name]["overall"], "the stored answers give the figures again"
    data = matrix.to_dict()
    for change in (
        lambda d: d.pop("noise"),
        lambda d: d["cells"][0]["acc"].update(value=0.123),
        lambda d: d["cells"][0]["asr_all"]["counts"][0].__setitem__(0, 39),
        lambda d: d["summary"][CNN_B]["overall"]["union"].update(value=1.0),
        lambda d: d["summary"].pop(CNN_B),
        lambda d: d["summary"][CNN_B]["by_attack"].pop(TWO[0]),
        lambda d: d["summary"][CNN_B]["by_source"].update(x=None),
        lambda d: d["summary"][CNN_B]["by_group"].update(x=None),
        lambda d: d["summary"][CNN_B]["overall"]["best"].update(a="x"),
        lambda d: d["summary"][CNN_B]["overall"]["avg"].update(range=None),
        lambda d: d["noise"][0].update(t="x"),
        lambda d: d["cells"][0].update(s="x"),
        lambda d: d["cells"][0]["acc"]["counts"][0].__setitem__(1, 2**60),
        lambda d: d["targets"][0]["clean"]["counts"][0].__setitem__(0, 10**6),
        lambda d: d.update(similarity={"pairs": [["a", "b"]], "cosine": []}),
    ):
        broken = json.loads(json.dumps(data))
        change(broken)
        with pytest.raises(ReportError):
            Matrix.from_dict(broken)


def test_nothing_of_a_matrix_steers_a_terminal(made: tuple[Matrix, Path]) -> None:
    """Every text of a stranger's matrix that its page shows is printable."""
    steering = "\x1b[31m\x9b2J\u202e\u2028"
    data = json.loads(json.dumps(made[0].to_dict()).replace(json.dumps(CNN_B)[1:-1], "zoo:odd"))
    text = json.dumps(data).replace("zoo:odd", "zoo:odd" + json.dumps(steering)[1:-1])
    data = json.loads(text)
    data |= {"command": "advkit " + steering, "goal": "untargeted" + steering}
    shown = [
        Matrix.from_dict(data).markdown(),
        Matrix.from_dict(data).markdown(brief=True),
        repr(Matrix.from_dict(data)),
    ]
    assert any("zoo:odd" in page for page in shown)
    for page in shown:
        assert not set(page) & set("\x1b\x9b\u202e\u2028")


@pytest.mark.parametrize("what", ["images", "answers"])
@pytest.mark.parametrize("content", [b"", b"no safetensors", (1 << 62).to_bytes(8, "little") + b"{}", None])
def test_stored_images_and_answers_that_are_damaged_are_one_line(
    what: str, content: bytes | None, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    asked: dict[str, Any] = {
        "sources": [MLP],
        "attacks": TWO[:1],
        "targets": [CNN_B],
        "n": 4,
        "seeds": 1,
        "equal_budget": None,
    }
    small(tmp_path, **asked)
    file = sorted((tmp_path / what).rglob("*.safetensors"))[0]
    if content is None:  # a file of the kind, of other rows
        wrong = {name: tensor[:2].contiguous() for name, tensor in load_file(file).items()}
        save_file(wrong, file, metadata={"key": "x", "ids": "[]", "seconds": "nan"})
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="delete it") as told:
        small(tmp_path, **asked)
    assert "\n" not in str(told.value)
    file.unlink()
    small(tmp_path, **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["fgsm", "nothing"]}, "unknown attack"),
        ({"attacks": ["autoattack"]}, "suite"),
        ({"attacks": []}, "at least one attack"),
        ({"sources": [CNN, CNN]}, "more than once"),
        ({"targets": [f"{CNN}+{MLP}"]}, "several targets"),
        ({"seeds": 0}, "at least 1"),
        ({"seen": {CNN_B: ["nobody"]}}, "seen names nobody"),
        ({"equal_budget": 0}, "budget"),
        ({"threat_model": "minimum-l2"}, "no radius"),
        ({"sources": ["zoo:fashion-mnist-public-cnn"]}, "trained on samples of shape"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(advkit.core.errors.AdvkitError, match=message):
        small(tmp_path, **changes)
    assert not (tmp_path / "images").exists()


def test_rows_outside_the_unit_box_are_refused(tmp_path: Path) -> None:
    from advkit.tasks.arrays import Arrays

    x = torch.rand(4, 1, 8, 8) * 3
    with pytest.raises(BadInput):
        small(tmp_path, task=Arrays(x, torch.arange(4)))


def test_the_module_is_not_loaded_by_the_package() -> None:
    assert api.matrix is advkit.matrix


@pytest.mark.slow
def test_the_stored_request_makes_the_matrix_again(tmp_path: Path) -> None:
    pubdef = "zoo:digits-mlp-pubdef"
    given: dict[str, Any] = {"sources": ["public"], "attacks": ["fgsm", "mi+ti"], "targets": [pubdef], "n": 10}
    first = small(tmp_path / "one", eps=0.1, seeds=2, seen={pubdef: [CNN]}, equal_budget=4, **given)
    stored = first.to_dict()["request"]
    assert stored["sources"] == [f"zoo:{card.name}" for card in zoo.public("digits")]
    assert (stored["threat_model"], stored["seeds"], stored["n"]) == ("linf:eps=0.1", [0, 1], 10)
    assert isinstance(first.request, MatrixRequest)
    assert untimed(execute(first.request, cache=tmp_path / "two")) == untimed(first)


def test_a_matrix_of_schema_1_0_is_read_and_has_no_request(made: tuple[Matrix, Path]) -> None:
    old = made[0].to_dict()
    del old["request"]
    with pytest.raises(ReportError, match="request"):
        Matrix.from_dict(old)
    old["schema_version"] = "1.0"
    again = Matrix.from_dict(old)
    assert again.markdown() == made[0].markdown()
    with pytest.raises(ReportError, match=r"schema 1\.0"):
        _ = again.request


@pytest.mark.slow
@pytest.mark.parametrize("most", [128, 20, 3])
def test_memory_that_ends_makes_the_batches_smaller_and_the_images_the_same(
    made: tuple[Matrix, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    from advkit.evaluation.run import engine

    real, sizes = engine.run_alone, []

    def tight(unit: Any, case: Any, batch: Any, lanes: Any) -> Any:
        sizes.append(len(batch.ids))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("too much")
        return real(unit, case, batch, lanes)

    monkeypatch.setattr(engine, "run_alone", tight)
    matrix = small(tmp_path)
    assert (max(sizes) > most) == (most < 32)
    assert files(tmp_path) == files(made[1])
    assert untimed(matrix) == untimed(made[0])
