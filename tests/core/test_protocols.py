"""Labels of attacks as values, and what an ability means to the type checker."""

from __future__ import annotations

import pytest

from advkit.core.protocols import Label, Outcome, Record


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("pgd", Label("pgd")),
        ("thorough/near-fab", Label("thorough", "near-fab")),
        ("thorough:targets=5/apgd-t", Label("thorough:targets=5", "apgd-t")),
        ("pgd:step_size=2/255", Label("pgd:step_size=2/255")),
        ("suite:eps=2/255/square", Label("suite:eps=2/255", "square")),
        ("pgd:steps=20,step_size=0.25@zoo:public-mlp", Label("pgd:steps=20,step_size=0.25", source="zoo:public-mlp")),
        ("mifgsm@path:runs/a@b/model.safetensors", Label("mifgsm", source="path:runs/a@b/model.safetensors")),
        ("online:inner=[pgd:step_size=1/4],k=5/submitted", Label("online:inner=[pgd:step_size=1/4],k=5", "submitted")),
        ("x:of=[a@b/c],n=3/last@here", Label("x:of=[a@b/c],n=3", "last", "here")),
        ("Mine:name=a[b/last@here", Label("Mine:name=a[b", "last", "here")),
        ("apgd-ce:steps=100@undefended", Label("apgd-ce:steps=100", source="undefended")),
        ("spiking:pgd,surrogate=ensemble/pdsg", Label("spiking:pgd,surrogate=ensemble", "pdsg")),
    ],
)
def test_a_label_is_read_as_it_was_written(text, label):
    assert Label.parse(text) == label
    assert str(label) == text


@pytest.mark.parametrize(
    ("text", "streams"),
    [
        ("pgd:steps=3", ("pgd", "")),
        ("pgd:steps=3@zoo:m", ("pgd", "zoo:m")),
        ("thorough:targets=5/apgd-t", ("apgd-t", "")),
        ("pgd:step_size=2/255", ("255", "")),  # so the streams of its records were always called
    ],
)
def test_random_streams_are_named_as_those_of_all_earlier_records(text, streams):
    assert Label.parse(text).streams == streams


def test_a_record_says_who_made_it():
    made = Record("a", "lean", Outcome.BROKEN, stage="near-fab", source="zoo:m")
    assert str(made.made_by) == "lean/near-fab@zoo:m"
    assert Record("a", "pgd:step_size=2/255", Outcome.BROKEN).made_by == Label("pgd:step_size=2/255")
