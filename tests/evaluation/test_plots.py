"""Figures show the numbers they were given and leave matplotlib as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from report_examples import B, R, W, document, old, records, run_folder

from advkit.core.errors import ReportError, UsageError
from advkit.evaluation import figures
from advkit.evaluation.figures import plots, write_plots
from advkit.evaluation.report import Report
from advkit.evaluation.run.store import to_line
from advkit.evaluation.stats import rate

PNG = b"\x89PNG\r\n\x1a\n"


def points(*counts: int) -> list[plots.Point]:
    return [plots.Point.of(8 * i / 255, rate(k, 100, "all_samples")) for i, k in enumerate(counts)]


def test_curve_draws_the_points_and_their_intervals_side_by_side() -> None:
    given = points(90, 50, 10)
    alone = plots.robust_accuracy_curve(list(reversed(given))).axes[0]
    np.testing.assert_allclose(alone.lines[0].get_xydata(), [(p.eps, p.value) for p in given])
    assert alone.get_title("left") == "Robust accuracy against eps"
    curves = {"a$b": list(reversed(given)), "other": points(80, 60, 40)}
    figure = plots.robust_accuracy_curve(curves, norm="Linf", title="a title")
    axes = figure.axes[0]
    first, second = (line for line in axes.lines if line.get_marker() in ("o", "s"))
    np.testing.assert_allclose(first.get_ydata(), [p.value for p in given])
    apart = second.get_xdata() - first.get_xdata()
    assert (apart > 0).all()
    assert apart.max() < 0.05 * given[-1].eps
    spans = axes.collections[0].get_segments()
    np.testing.assert_allclose([sorted(span[:, 1]) for span in spans], [(p.low, p.high) for p in given])
    figure.canvas.draw()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["16/255", "8/255", "0"]
    assert axes.get_xlabel() == "eps (Linf)"
    assert axes.get_title("left") == "a title"


@pytest.mark.parametrize(
    ("levels", "texts"),
    [
        ((0, 17 / 255, 34 / 255), {"0", "17/255", "34/255"}),  # 1/15 is no decimal
        ((0, 51 / 255, 102 / 255), {"0", "0.2", "0.4"}),
        ((0.5, 1.0), {"0.5", "1"}),
        ((0.031, 0.1), {"0.031", "0.1"}),
    ],
)
def test_radii_are_written_as_people_write_them(levels, texts) -> None:  # type: ignore[no-untyped-def]
    axes = plots.robust_accuracy_curve([plots.Point(each, 0.5) for each in levels]).axes[0]
    assert {each.get_text() for each in axes.get_xticklabels()} == texts


def test_intervals_of_several_curves_are_lines_and_no_bands() -> None:
    found = ([0.5, 2.0], 3, 4)
    assert plots.accuracy_by_distance({"a": found}).axes[0].collections
    both = plots.accuracy_by_distance({"a": found, "b": found}).axes[0]
    assert not both.collections
    assert len(both.lines) == 6


def class_bars(counts: dict[int, tuple[int, int, int]], names: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """Axes of bars from samples, right and robust ones of each class; and bar -> (clean, robust)."""
    rates = {
        k: {"clean": rate(clean, n, "source_class"), "robust": rate(robust, n, "source_class")}
        for k, (n, clean, robust) in counts.items()
    }
    axes = plots.per_class_bars(rates, names).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    widths = [round(float(bar.get_width()), 3) for bar in axes.patches]
    return axes, dict(zip(labels, zip(widths[: len(labels)], widths[len(labels) :], strict=True), strict=True))


def test_classes_stand_in_their_order_with_their_numbers_and_missing_ones_are_named() -> None:
    axes, drawn = class_bars({0: (30, 27, 21), 1: (20, 18, 0), 3: (40, 36, 20)}, ("cat", "dog", "emu", "fox"))
    assert drawn == {"cat (n = 30)": (0.9, 0.7), "dog (n = 20)": (0.9, 0.0), "fox (n = 40)": (0.9, 0.5)}
    heights = [t.get_position()[1] for t in axes.get_yticklabels()]
    assert heights == sorted(heights, reverse=True)
    assert [text.get_text() for text in axes.texts] == ["70 %", "0 %", "50 %"]
    marks = next(line for line in axes.lines if line.get_marker() == "D")
    assert 0.0 in marks.get_xdata()  # seen where the bar has no width
    assert not marks.get_clip_on()
    assert "no sample of: emu" in axes.get_xlabel()


def test_classes_of_few_samples_share_a_bar_unless_all_have_few() -> None:
    axes, drawn = class_bars({0: (30, 27, 21), 1: (5, 4, 1), 2: (15, 10, 3)}, ("cat", "dog", "emu"))
    assert drawn == {"cat (n = 30)": (0.9, 0.7), "2 others (n = 20)": (0.7, 0.2)}
    assert "others, fewer than 20 samples each: dog, emu" in axes.get_xlabel()
    axes, drawn = class_bars({0: (3, 3, 2), 1: (5, 4, 1)})
    assert list(drawn) == ["0 (n = 3)", "1 (n = 5)"]
    assert "fewer than 20 samples in every class" in axes.get_xlabel()


def test_success_by_distance_steps_up_at_every_success() -> None:
    figure = plots.success_by_distance({"a$b": ([2.0, 0.5, 1.0], 4), "none": ([], 4)}, norm="L2")
    axes = figure.axes[0]
    line = axes.lines[0]
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xydata(), [(0, 0), (0.5, 0.25), (1, 0.5), (2, 0.75), (2.1, 0.75)])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [0, 0])
    assert axes.get_xlabel() == "distance allowed (L2)"
    figure.canvas.draw()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_amplifies_the_difference_and_says_by_how_much(channels: int) -> None:
    x = torch.full((3, channels, 4, 4), 0.5)
    z = x.clone()
    z[0, :, 0, 0] += 0.1
    z[1, :, 1, 1] -= 0.05
    figure = plots.example_grid(x, z, clean_names=["a", "b", "c"], adversarial_names=["a", "x", "c"])
    _, middle, bottom = figure.axes
    assert "amplified x5" in bottom.get_ylabel()
    image = np.asarray(bottom.images[0].get_array())
    assert image[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert image[2, 2] == pytest.approx(0.5)
    assert np.asarray(bottom.images[1].get_array())[1, 1] == pytest.approx(0.25, abs=1e-6)
    assert [text.get_text() for text in middle.texts] == ["a", "x", "c"]
    colors = [text.get_color() for text in middle.texts]
    assert colors[1] == plots.RED
    assert colors[0] == colors[2] != plots.RED


def test_grid_notes_stand_below_their_columns_and_long_names_fold() -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    names = ["Staffordshire bullterrier", "cat"]
    figure = plots.example_grid(x, x, clean_names=names, notes=[("a/long/path/to/image-17", "held"), ("b", "broken")])
    top, _, bottom = figure.axes
    assert top.texts[0].get_text() == "Staffordshire\nbullterrier"
    below = [text.get_text().split("\n") for text in bottom.texts]
    assert [lines[1:] for lines in below] == [["held"], ["broken"]]
    assert all(len(line) <= 15 for lines in below for line in lines)
    figure.canvas.draw()
    edges = [text.get_window_extent() for text in bottom.texts]
    assert edges[0].x1 < edges[1].x0
    assert min(edge.y0 for edge in edges) >= 0


def test_grid_of_unchanged_images_and_other_ranges() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    figure = plots.example_grid(x, x, bounds=(-1, 1))
    assert "x1" in figure.axes[2].get_ylabel()
    titled = plots.example_grid(x, x, bounds=(-1, 1), title="a title of more words than fit above one column")
    assert "\n" in titled.get_suptitle()
    with pytest.raises(UsageError, match="outside"):
        plots.example_grid(x, x)
    with pytest.raises(UsageError, match="expected the same"):
        plots.example_grid(torch.rand(2, 1, 4, 4), torch.rand(1, 1, 4, 4))
    with pytest.raises(UsageError, match="C 1 or 3"):
        plots.example_grid(torch.rand(2, 5, 4, 4), torch.rand(2, 5, 4, 4))


def test_heat_map_puts_seen_sources_first_and_frames_the_worst_cell() -> None:
    table = np.array([[0.9, 0.8], [0.4, np.nan], [0.3, 0.7]])
    figure = plots.transfer_heatmap(table, ["new", "known", "newer"], ["fgsm", "pgd"], seen=["known"])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["known \u25cf", "new \u25cb", "newer \u25cb"]
    assert [t.get_text() for t in axes.texts] == ["40", "-", "90", "80", "30", "70"]
    frame = axes.patches[0]
    assert (frame.get_x(), frame.get_y()) == (-0.5, 1.5)


def test_heat_map_of_a_report() -> None:
    data = document({"fgsm@a": [R, R, B, W], "pgd@a": [R, B, B, W], "fgsm@b": [R, R, R, W]})
    for attack in data["attacks"]:
        attack["params"] = {"source": attack["name"].split("@")[1], "seen": attack["name"].endswith("b")}
    data["threat_model"]["knowledge"] = "transfer"
    figure = plots.transfer_heatmap_of(Report.from_dict(data))
    assert figure is not None
    assert [t.get_text() for t in figure.axes[0].texts] == ["75", "-", "50", "25"]
    title = " ".join(figure.get_suptitle().split())
    assert "eps=" in title
    assert title.endswith("n = 4")
    assert plots.transfer_heatmap_of(Report.from_dict(document({"pgd": [R, B]}))) is None


def test_curve_points_of_reports() -> None:
    report = Report.from_dict(document({"pgd": [R, B, R, W]}))
    assert plots.curve_points([report])[0].value == 0.5
    with pytest.raises(ReportError, match="no eps"):
        plots.curve_points([Report.from_dict(document({"pgd": [R, B]}, {"threat_model": {"eps": None}}))])


@pytest.mark.parametrize(
    "call",
    [
        lambda: plots.robust_accuracy_curve([]),
        lambda: plots.robust_accuracy_curve({"a": []}),
        lambda: plots.per_class_bars({}),
        lambda: plots.success_by_distance({}),
        lambda: plots.success_by_distance({"a": ([1.0, 2.0], 1)}),
        lambda: plots.transfer_heatmap(np.zeros((2, 2)), ["a"], ["b", "c"]),
        lambda: plots.transfer_heatmap(np.full((1, 1), np.nan), ["a"], ["b"]),
        lambda: plots.Point.of(0.1, rate(0, 0, "all_samples")),
        lambda: plots.save(plots.robust_accuracy_curve(points(3)), "figure.exe"),
    ],
)
def test_nothing_to_draw_is_an_error(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError):
        call()


@pytest.mark.slow
def test_save_repeats_byte_for_byte(tmp_path: Path) -> None:
    for suffix in ("png", "svg", "pdf"):
        paths = [plots.save(plots.robust_accuracy_curve(points(9, 5)), tmp_path / f"{i}.{suffix}") for i in range(2)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert (tmp_path / "0.png").read_bytes().startswith(PNG)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="can't be written"):
        plots.save(plots.robust_accuracy_curve(points(9, 5)), tmp_path / "file" / "x.png")


def test_write_plots_of_a_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", {"pgd": [R, B, R, W, R, B]})
    made = write_plots(run, ["zero", "one"])
    assert [path.name for path in made] == ["per_class.png"]
    assert made[0].read_bytes().startswith(PNG)


def test_write_plots_of_a_run_without_a_radius(tmp_path: Path) -> None:
    """Distances in place of classes, whose robust accuracy means nothing for such a goal."""
    threat = {"name": "minimum-l2", "norm": "L2", "eps": None, "eps_string": None, "goal": "topk_ordered"}
    outcomes = {"quadattack": [R, B, R, W, B]}
    run = run_folder(tmp_path / "run", outcomes, {"threat_model": threat})
    (run / "report.json").write_text(json.dumps(old(document(outcomes, {"threat_model": threat}))))
    held = [replace(r, distance=float(i)) for i, r in enumerate(records({"quadattack": [R, B, R, W, B]}))]
    (run / "records.jsonl").write_text("".join(to_line(r) + "\n" for r in held), encoding="utf-8")
    assert [path.name for path in write_plots(run)] == ["success_by_distance.png"]
    figure = plots.success_by_distance_of(Report.load(run), held)
    assert figure is not None
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [(0, 0), (1, 0.25), (4, 0.5), (4.2, 0.5)])
    assert plots.success_by_distance_of(Report.from_dict(document({"pgd": [R, B]})), held) is None


def test_a_run_is_drawn_as_its_section_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = {"pgd": [R, B, R, W, R, B]}
    named = [{"name": "of_a_plug_in", "keys": 1}, {"name": "per_class", "class_names": ["cat", "dog"]}]
    run = run_folder(tmp_path / "run", outcomes, {"section": {"figures": named}})
    with caplog.at_level("INFO", logger="advkit"):
        assert [path.name for path in write_plots(run)] == ["per_class.png"]
    assert "of_a_plug_in" in caplog.text
    assert write_plots(run_folder(tmp_path / "none", outcomes, {"section": {"figures": []}})) == []
    named = [{"name": "per_class", "no_such_key": 1}]
    with pytest.raises(ReportError, match="no_such_key"):
        write_plots(run_folder(tmp_path / "off", outcomes, {"section": {"figures": named}}))


def test_every_figure_of_the_table_is_there_and_described() -> None:
    assert figures.__doc__ is not None
    for name in figures.FIGURES:
        assert callable(figures.figure(name))
        assert f"| `{name}` |" in figures.__doc__


@pytest.mark.slow
def test_pyplot_is_never_touched() -> None:
    code = (
        "import sys; from advkit.evaluation.figures import plots as p; "
        "p.robust_accuracy_curve([p.Point(0.1, 0.5)]).canvas.draw(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_equations_in_titles_stay_on_one_line() -> None:
    from advkit.evaluation.figures.axes import wrapped

    words = "robust accuracy of digits under pgd, n = 60"
    assert wrapped(words, len(words) - 1).splitlines() == ["robust accuracy of digits under pgd,", "n = 60"]
    assert wrapped(words, 200) == words
    assert wrapped("costs $5", 20) == r"costs \$5"
