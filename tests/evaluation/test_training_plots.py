"""The curves of a training show the log's own values, and only what was measured."""

from __future__ import annotations

import pytest

from advkit.core.errors import UsageError
from advkit.evaluation.figures.training_plots import training_curves


def entry(epoch, score=0.4, **figures):
    return {"epoch": epoch, "loss": 2.0 / epoch, "score": score, "clean": 0.7, "lr": 0.1 * epoch, "figures": figures}


def curves(axes):
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines if len(line.get_xdata()) > 2
    }


def test_panels_hold_the_log():
    watched = [
        entry(e, score, fgsm_accuracy=0.5, abnormal_share=0.1 * e, overfitting=float(e > 2))
        for e, score in ((1, 0.4), (2, 0.3), (3, 0.1), (4, 0.0))
    ]
    loss, accuracy, rate, detector = training_curves(watched, title="a $ b").axes
    assert curves(loss) == {"loss": [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]}
    assert set(curves(accuracy)) == {"clean", "FGSM", "PGD-10 (score)"}
    assert [y for _, y in curves(accuracy)["PGD-10 (score)"]] == [0.4, 0.3, 0.1, 0.0]
    assert [y for _, y in curves(rate)["learning rate"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert [y for _, y in curves(detector)["FGSM - PGD accuracy"]] == pytest.approx([0.1, 0.2, 0.4, 0.5])
    assert [y for _, y in curves(detector)["abnormal examples"]] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    fired = [line.get_xdata()[0] for line in detector.lines if len(set(line.get_xdata())) == 1]
    assert fired == [3, 4]


def test_what_was_not_measured_is_not_drawn():
    plain = [{**entry(e, None), "clean": None} for e in (1, 2, 3)]
    panels = training_curves(plain).axes
    assert len(panels) == 3
    assert curves(panels[1]) == {}
    some = [entry(1), {**entry(2, None), "clean": None}, entry(3), entry(4)]
    assert [x for x, _ in curves(training_curves(some).axes[1])["score"]] == [1, 3, 4]
    # where the score is clean accuracy, one curve says it
    same = [entry(e, 0.7) for e in (1, 2, 3)]
    assert set(curves(training_curves(same).axes[1])) == {"clean"}
    with pytest.raises(UsageError):
        training_curves([])
