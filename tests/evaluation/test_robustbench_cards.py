"""Cards of RobustBench: read as claims, written from reports, never ranked; bad ones are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_examples import B, R, W, document

from advkit.cli.main import run
from advkit.core.errors import ReportError, UsageError
from advkit.evaluation.report import Report
from advkit.evaluation.report.leaderboard import scan, write
from advkit.evaluation.report.robustbench import CLAIMED, read_card, read_cards

CARMON = {
    "link": "https://arxiv.org/abs/1905.13736", "name": "Unlabeled Data Improves Adversarial Robustness",
    "authors": "Yair Carmon and others", "additional_data": True, "number_forward_passes": 1, "dataset": "cifar10",
    "venue": "NeurIPS 2019", "architecture": "WideResNet-28-10", "eps": "8/255", "clean_acc": "89.69",
    "reported": "62.5", "autoattack_acc": "59.53", "unreliable": False,
}  # fmt: skip
XIAO = {
    "dataset": "cifar10", "eps": "0.031", "clean_acc": "79.28", "reported": "52.4", "autoattack_acc": "18.50",
    "external": "7.15", "unreliable": True, "venue": "ICLR 2020",
}  # fmt: skip
CORRUPTIONS = {
    "dataset": "imagenet", "architecture": None, "eps": None, "clean_acc": "55.38", "reported": "", "footnote": None,
    "corruptions_acc": "21.12", "corruptions_mce": "100.00",
}  # fmt: skip


def put(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_cards_are_read_as_claims(tmp_path: Path) -> None:
    claim = read_card(put(tmp_path / "cifar10" / "Linf", "Carmon2019Unlabeled", CARMON))
    assert (claim.model, claim.threat, claim.dataset) == ("Carmon2019Unlabeled", "Linf", "cifar10")
    assert claim.eps == pytest.approx(8 / 255)
    assert claim.figures == pytest.approx({"clean_acc": 0.8969, "autoattack_acc": 0.5953, "reported": 0.625})
    assert claim.to_dict()["status"] == CLAIMED == "claimed, not measured"
    assert claim.to_card() == CARMON
    assert read_card(XIAO).eps == pytest.approx(0.031)
    last = read_card(CORRUPTIONS, model="AlexNet", threat="corruptions")
    assert (last.eps, last.figures) == (
        None,
        pytest.approx({"clean_acc": 0.5538, "corruptions_acc": 0.2112, "corruptions_mce": 1.0}),
    )


def test_a_report_goes_out_as_a_card_and_comes_back(tmp_path: Path) -> None:
    made = Report.from_dict(document({"pgd": [W, R, R, B, R, R, B, R, R]}, {"dataset": {"name": "cifar10"}}))
    card = made.robustbench(authors="A. Author")
    claim = read_card(put(tmp_path, "Author2026Title", card))
    assert claim.to_card() == card
    assert claim.figures["clean_acc"] == pytest.approx(8 / 9, abs=5e-5)
    assert claim.figures["reported"] == pytest.approx(made.robust_accuracy, abs=5e-5)
    assert "autoattack_acc" not in claim.figures  # pgd alone is no AutoAttack


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clean_acuracy": "80"}, "the key 'clean_acuracy'"),
        ({"clean_ac": "80"}, "did you mean clean_acc"),
        ({"clean_acc": 0.5538}, "clean_acc"),
        ({"autoattack_acc": "159.53"}, "expected percent as text"),
        ({"external": "about 7"}, "external is 'about 7'"),
        ({"dataset": "mnist"}, "dataset"),
        ({"eps": 8 / 255}, "eps"),
        ({"eps": "8/0"}, "eps is '8/0'"),
        ({"eps": "eight"}, "a radius such as"),
        ({"clean_acc": None}, "clean_acc"),
    ],
)
def test_bad_cards_are_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ReportError, match=says) as caught:
        read_card(CARMON | change, model="Carmon")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"dataset": "cifar10"}', '{"eps": NaN}'])
def test_files_that_are_no_cards_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(ReportError) as caught:
        read_card(put(tmp_path, "bad", content))
    assert "\n" not in str(caught.value)
    with pytest.raises(ReportError, match="no RobustBench card"):
        read_card(tmp_path / "nowhere.json")


def test_claims_stand_apart_and_change_no_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs, cards = tmp_path / "runs", tmp_path / "model_info"
    measured = document({"pgd": [R, R, B, W]}, {"dataset": {"name": "cifar10"}})
    put(runs / "one", "report", measured)
    put(cards / "cifar10" / "Linf", "Carmon2019Unlabeled", CARMON)
    put(cards / "cifar10" / "Linf", "Xiao2020Enhancing", XIAO)
    put(cards, "damaged", "{")
    assert len(read_cards(cards)[0]) == 2
    plain, found = scan(runs), scan(runs, cards)
    assert [group.to_dict() for group in found.groups] == [group.to_dict() for group in plain.groups]
    assert [claim.model for claim in found.claimed] == ["Carmon2019Unlabeled", "Xiao2020Enhancing"]
    assert [path for path, _ in found.invalid] == ["damaged.json"]
    assert "claimed" not in plain.to_dict()
    assert all("rank" not in claim for claim in found.to_dict()["claimed"])
    _, paths = write(runs, tmp_path / "out", cards)
    for path in paths:
        text = path.read_text()
        assert "laimed, not measured" in text
        assert "Carmon2019Unlabeled" in text
        assert text.index("Xiao2020Enhancing") > text.index("laimed, not measured") or path.suffix == ".json"
    assert run(["leaderboard", str(runs), "--claims", str(cards), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["claimed"]) == 2
    with pytest.raises(UsageError, match="no folder"):
        scan(runs, tmp_path / "nowhere")


def test_the_command_line_writes_cards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = put(tmp_path, "report", document({"pgd": [R, R, B, W]}, {"dataset": {"name": "cifar10"}}))
    assert run(["show", str(file), "--card"]) == 0
    assert read_card(json.loads(capfd.readouterr().out)).figures["clean_acc"] == 0.75
    put(tmp_path, "report", document({"pgd": [R, R, B, W]}))
    assert run(["show", str(file), "--card"]) != 0
    assert capfd.readouterr().err.count("\n") == 1
    assert run(["show", "pgd", "--card"]) == 2
