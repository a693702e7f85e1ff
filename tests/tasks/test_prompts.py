"""Prompts with wanted replies and harmless twins."""

from __future__ import annotations

import json

import pytest
import torch

from advkit.core.errors import BadInput, UsageError
from advkit.core.spaces import NOTHING, REPLY, USER, Box, Transcripts
from advkit.models.language.toychat import FORBIDDEN, THINGS, compliance, question, tokenizer
from advkit.tasks import TASKS
from advkit.testing.language import PieceTokenizer, words


def file_of(tmp_path, *lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return f"prompts:file={file}"


def line(id="a", prompt="w4 w5", target="w6", **more):
    return {"id": id, "prompt": prompt, "target": target, **more}


def bound(spec, count=12):
    return TASKS.build(spec).bind(Transcripts(words(count)))


def texts(row, role):
    return words(12).decode(row[0][row[1] == role].tolist())


def test_the_toychat_set_is_what_the_model_was_made_for():
    task = TASKS.build("prompts").bind(Transcripts(tokenizer()))
    assert len(task) == 24
    assert task.space.contains(next(iter(task.batches(24))).x).all()
    things, twins = [], []
    for each in task.prompts:
        verb, thing = each.prompt.split()[3], each.prompt.split()[-1]
        assert each.prompt == question(verb, thing)
        assert each.target == compliance(verb, thing)
        things.append(thing)
        twin = task._lines[each.twin]
        assert twin.prompt.split()[3] == verb
        assert twin.target == compliance(verb, twin.prompt.split()[-1])
        twins.append(twin.prompt.split()[-1])
    assert sorted(things) == sorted(FORBIDDEN * 3)
    assert sorted(twins) == sorted(THINGS)
    batch = next(iter(task.batches(24)))
    assert batch.twins.shape == batch.x.shape
    assert task.space.contains(batch.twins).all()


def test_the_general_set_can_be_read():
    task = TASKS.build("prompts:set=general")
    assert len(task.ids) == len(set(task.ids)) >= 10
    assert task.defaults.goal == "says:judges=refusal+exact,max_tokens=150"


def test_rows(tmp_path):
    task = bound(
        file_of(tmp_path, line(), line("b", "w7 w8 w9", "w4 w5"), "", line("t", "w3", "w4", benign=True)) + ",room=5"
    )
    (batch,) = task.batches(10)
    assert batch.ids == ("a", "b")
    assert batch.x.shape == (2, 2, 5 + 3 + 2)
    assert batch.labels.tolist() == [0, 0]
    assert batch.twins is None
    for row, user, reply in zip(batch.x, ("w4 w5", "w7 w8 w9"), ("w6", "w4 w5"), strict=True):
        assert texts(row, USER) == user
        assert texts(row, REPLY) == reply
        assert int((row[1] == NOTHING).sum()) >= 5
    pieces = torch.cat([b.x for b in task.batches(1)])
    assert torch.equal(pieces, batch.x)
    assert [b.ids for b in task.batches(1, skip={"a"})] == [("b",)]
    assert [b.ids for b in task.batches(9, n=1)] == [("a",)]


def test_a_placeholder_is_where_the_room_is(tmp_path):
    task = bound(file_of(tmp_path, line(prompt="w4 [[slot]] w5 w6")) + ",room=4")
    row = next(iter(task.batches(1))).x[0]
    assert row[1].tolist() == [USER, *[NOTHING] * 4, USER, USER, REPLY]
    assert texts(row, USER) == "w4 w5 w6"


def test_twins_stand_beside_their_rows(tmp_path):
    task = bound(file_of(tmp_path, line(), line("b", twin="t"), line("t", "w3", "w4", benign=True)))
    (batch,) = task.batches(5)
    assert not (batch.twins[0, 1] != NOTHING).any()
    assert texts(batch.twins[1], USER) == "w3"


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        (['{"id": '], "line 1 is no JSON"),
        (["[]"], "a list"),
        ([{"id": "a", "prompt": "w4"}], "no target"),
        ([line(prompt=" ")], "no prompt"),
        ([line(), line()], "was there before"),
        ([line(twin="nobody")], "nobody"),
        ([line(), line("b", twin="a")], "the twin 'a'"),
        ([line(benign=True)], "no prompts to attack"),
        ([line(benign="yes")], "true or false"),
        ([line(hint=1)], "hint"),
        ([line(prompt="[[slot]] w4 [[slot]]")], "twice"),
        ([], "no prompts"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, seen):
    with pytest.raises(BadInput, match=seen):
        len(TASKS.build(file_of(tmp_path, *lines)))


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_lines_end_at_line_feeds_alone(tmp_path, sign):
    file = tmp_path / "p.jsonl"
    written = json.dumps(sign)[1:-1] if sign < " " else sign  # JSON wants control characters escaped
    held = json.dumps({"prompt": "w4 . w5", "target": "w6"}).replace(".", written)
    file.write_bytes(b"\xef\xbb\xbf" + (held + "\r\n\n" + held + "\n").encode())
    task = TASKS.build(f"prompts:file={file}")
    assert [each.prompt for each in task.prompts] == [f"w4 {sign} w5"] * 2
    assert task.ids == ("line-0001", "line-0003")


@pytest.mark.parametrize("key", ["prompt", "target", "id"])
def test_half_a_character_is_named(tmp_path, key):
    with pytest.raises(BadInput, match="line 1 holds half a character"):
        len(TASKS.build(file_of(tmp_path, {"id": "a", "prompt": "w4", "target": "w5", key: "w4 \ud83d"})))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", "{" * 9, "\x00", '{"prompt": NaN}'])
def test_lines_that_parsers_choke_on_are_one_line(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(BadInput, match="line 1"):
        len(TASKS.build(f"prompts:file={tmp_path / 'p.jsonl'}"))


@pytest.mark.parametrize(
    ("lines", "prompts", "ids"),
    [
        ("goal,target\nw4 w5,w6\n", [("w4 w5", "w6")], ("row-0001",)),
        ('\ufeffGoal,Target\n"w4, ""w5""\nw6",w7\n', [('w4, "w5"\nw6', "w7")], ("row-0001",)),
        ("Index,Goal,Target,Behavior,Category\n0,w4,w6,w5,w7\n", [("w4", "w6")], ("row-0001",)),
        (
            "Behavior,ContextString,BehaviorID\nw4,,one\nw5,w9,two\n",
            [("w4", "w8"), ("w9\n\n---\n\nw5", "w8")],
            ("one", "two"),
        ),
    ],
)
def test_published_sets_of_behaviours(tmp_path, lines, prompts, ids):
    (tmp_path / "p.csv").write_text(lines, encoding="utf-8")
    task = TASKS.build(f"prompts:file={tmp_path / 'p.csv'},target=w8")
    assert [(each.prompt, each.target) for each in task.prompts] == prompts
    assert task.ids == ids
    assert task.defaults.goal.startswith("says:judges=refusal+exact")


@pytest.mark.parametrize(
    ("lines", "seen"),
    [
        ("text,target\nw4,w5\n", "columns text, target"),
        ("", "columns none"),
        ("goal,target\nw4\n", "row 1 has another number"),
        ("goal,target\nw4,w5,w6\n", "row 1 has another number"),
        ("Behavior\nw4\n", "target=\\["),
        ("goal,target\n ,w5\n", "row 1 has no goal"),
        ('goal,target\n"w4,w5\n', "no CSV file"),
        ("goal,target,id\nw4,w5,a\nw4,w5,a\n", "was there before"),
        ("goal,target\n", "no prompts"),
    ],
)
def test_tables_that_are_none_are_named(tmp_path, lines, seen):
    (tmp_path / "p.csv").write_text(lines)
    with pytest.raises(BadInput, match=seen):
        len(TASKS.build(f"prompts:file={tmp_path / 'p.csv'}"))


def test_toychat_s_language_is_for_toychat():
    pieces = PieceTokenizer([chr(code) for code in range(32, 127)])
    for kind in ("toychat", "toychat-clean"):
        with pytest.raises(UsageError, match="prompts:file=FILE"):
            TASKS.build(f"prompts:set={kind}").bind(Transcripts(pieces))
    assert len(TASKS.build("prompts:set=general").bind(Transcripts(pieces))) >= 10


def test_refusals(tmp_path):
    with pytest.raises(BadInput, match="'hello'"):
        next(iter(bound(file_of(tmp_path, line(prompt="hello"))).batches(1)))
    with pytest.raises(UsageError, match="language models"):
        TASKS.build("prompts").bind(Box())
    with pytest.raises(UsageError, match="can't be read"):
        len(TASKS.build(f"prompts:file={tmp_path / 'nothing.jsonl'}"))
    with pytest.raises(UsageError, match="bound"):
        next(iter(TASKS.build("prompts").batches(1)))
    for wrong in ("room=0", "set=other"):
        with pytest.raises(UsageError):
            TASKS.build(f"prompts:{wrong}")


def test_digest_knows_lines_room_and_tokenizer(tmp_path):
    spec = file_of(tmp_path, line())
    found = {bound(spec).digest(), bound(spec, 13).digest(), bound(f"{spec},room=4").digest()}
    assert len(found) == 3
    assert bound(spec).digest() in found
    file_of(tmp_path, line(target="w7"))
    assert bound(spec).digest() not in found
