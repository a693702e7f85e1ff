"""Pictures and pages of attacks on words, from records alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from advkit.core.errors import UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation import api
from advkit.evaluation.figures import write_plots
from advkit.evaluation.figures.text_plots import search_figure, searched, transcripts_page
from advkit.evaluation.run.store import from_line, read_records, to_line


def record(row, course, attack="beast", **texts):
    trace = tuple({"evaluations": n, "best": best} for n, best in course)
    return Record(id=row, attack=attack, outcome=Outcome.ROBUST, trace=trace, texts=texts)


def test_the_bold_line_is_the_median_of_the_best_scores():
    rows = [
        record("a", [(1, 4.0), (10, 2.0)]),
        record("b", [(1, 3.0), (5, 1.0)]),
        record("c", [(1, 5.0), (20, 0.0)]),
        record("d", []),
        record("e", [(1, None), (2, None)]),
    ]
    assert [r.id for r in searched(rows)] == ["a", "b", "c"]
    (axes,) = search_figure(rows).axes
    bold = max(axes.lines, key=lambda line: line.get_linewidth())
    assert np.array_equal(bold.get_xdata(), [1, 5, 10, 20])
    assert np.array_equal(bold.get_ydata(), [4.0, 4.0, 2.0, 1.0])
    assert len(axes.lines) == 4
    with pytest.raises(UsageError, match="trace"):
        search_figure(rows[3:])


def test_a_page_shows_words_as_they_are():
    page = transcripts_page(
        [
            record("a", [], prompt="how", sent="how | `x`\n<b># now", suffix="| `x`", wanted="Sure", reply="*no*"),
            record("b", []),
        ]
    )
    assert "## a: robust (beast)" in page
    assert r"| sent | how \| \`x\`<br>&lt;b&gt;\# now |" in page
    assert r"| reply to what was sent | \*no\* |" in page
    assert "## b" not in page
    assert transcripts_page([record("b", [])]) == ""


def test_records_keep_their_words():
    one = record("a", [(1, 2.0)], sent='w3 \u00e4 "q"', reply="")
    assert from_line(to_line(one)) == one
    assert "texts" not in json.loads(to_line(record("a", [(1, 2.0)])))


@pytest.mark.slow
def test_a_run_on_words_leaves_its_transcripts(tmp_path):
    run = tmp_path / "run"
    api.evaluate("beast:k=3,length=4", task="prompts", model="toychat", n=3, device="cpu", out=run)
    records = read_records(run / "records.jsonl")
    for each in records:
        assert each.texts["sent"] == f"{each.texts['prompt']} {each.texts['suffix']}".strip()
        assert each.texts["reply_before"].startswith("sorry")
        assert each.texts["wanted"].startswith("sure here is how to")
        # what is told of the greedy reply is what the judge was shown
        assert each.figures["exact_asr_greedy"] == each.texts["reply"].startswith(each.texts["wanted"])
    made = {path.name for path in write_plots(run)}
    assert {"searches.png", "transcripts.md"} <= made
    assert (run / "transcripts.md").read_text().count("\n## ") == 3
