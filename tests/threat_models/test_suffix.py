"""Tokens in a slot: what an attacker may add, and what arrives once the chat is text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit.core.errors import BadInput, UsageError
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER, Box, Transcripts
from advkit.testing import check_threat_law
from advkit.testing.language import PieceTokenizer, words
from advkit.testing.threat_laws import TOKEN_LAWS
from advkit.threat_models import THREAT_MODELS

# "ab" reads as one piece, so a suffix that begins with b grows together with words that end with a.
PIECES = ("<s>", "<u>", "<e>", "a", "b", "c", "d", "ab", "cd", "é")
PIECE = PieceTokenizer(PIECES, special=("<s>", "<u>", "<e>"), before="<s>", after="<u>", ends=("<e>",))
A, B, C, D, AB, CD, ODD = range(3, 10)
USER_IDS, REPLY_IDS = (C, A, D, C), (D, A)


def row(user=USER_IDS, reply=REPLY_IDS, room=20, gap=None):
    """An untouched row; gap: how many words stand before the room."""
    cut = len(user) if gap is None else gap
    ids = [*user[:cut], *[-1] * room, *user[cut:], *reply]
    roles = [USER] * cut + [NOTHING] * room + [USER] * (len(user) - cut) + [REPLY] * len(reply)
    return torch.tensor([ids, roles])


def bound(spec="suffix:n=4", tokenizer=PIECE):
    return THREAT_MODELS.build(spec).bind(Transcripts(tokenizer))


def read(line):
    """Ids and roles in reading order."""
    return [(int(i), int(r)) for i, r in zip(*line.tolist(), strict=True) if r != NOTHING]


@pytest.mark.parametrize("law", TOKEN_LAWS)
@pytest.mark.parametrize(
    "spec",
    ["suffix", "suffix:n=3,place=prefix", "suffix:n=5,place=infix,forbid=none", "suffix:retokenize=false",
     "suffix:place=placeholder,forbid=special+nonascii"],
)  # fmt: skip
def test_contract(spec, law):
    check_threat_law(law, THREAT_MODELS.build(spec))


@pytest.mark.parametrize(("place", "before"), [("suffix", 4), ("prefix", 0), ("infix", 2)])
def test_candidates_go_where_the_place_says(place, before):
    threat, origin = bound(f"suffix:n=4,place={place}"), row()
    made = threat.slotted(origin, torch.tensor([[D, D], [B, CD]]))
    user = [(token, USER) for token in USER_IDS]
    for line, ids in zip(made, ((D, D), (B, CD)), strict=True):
        wanted = [*user[:before], *((i, SLOT) for i in ids), *user[before:], *((i, REPLY) for i in REPLY_IDS)]
        assert read(line) == wanted
        assert threat.slot(line).tolist() == list(ids)
        assert read(threat.slotted(line, torch.tensor([[A]]))[0]) == [
            *wanted[:before],
            (A, SLOT),
            *wanted[before + 2 :],
        ]
    assert threat.admits(made, origin.expand(2, -1, -1)).all()
    assert threat.distance(made, origin.expand(2, -1, -1)).tolist() == [2, 2]


@pytest.mark.parametrize("gap", [0, 1, 3, 4])
def test_a_placeholder_is_where_the_room_is(gap):
    threat, origin = bound("suffix:n=4,place=placeholder"), row(gap=gap)
    (made,) = threat.slotted(origin, torch.tensor([[D]]))
    assert read(made)[gap] == (D, SLOT)
    assert bool(threat.admits(made[None], origin[None]))
    assert torch.equal(threat.slotted(made, torch.empty(1, 0, dtype=torch.long))[0], origin)


def test_what_is_not_admitted():
    threat, origin = bound("suffix:n=3"), row()
    (fine,) = threat.slotted(origin, torch.tensor([[D, D, D]]))

    def changed(change):
        z = fine.clone()
        change(z)
        return bool(threat.admits(z[None], origin[None]))

    def user_word(z):
        z[0, 0] = D

    def reply_word(z):
        z[0, -1] = D

    def forbidden(z):
        z[0, 5] = 0

    def too_many(z):
        z[0, 7], z[1, 7] = D, SLOT

    def wrong_place(z):
        z[0, :5], z[1, :5] = torch.tensor([D, *USER_IDS]), torch.tensor([SLOT, USER, USER, USER, USER])

    def torn(z):
        z[0, :7] = torch.tensor([D, C, A, D, C, D, D])
        z[1, :7] = torch.tensor([SLOT, USER, USER, USER, USER, SLOT, SLOT])

    def unknown_role(z):
        z[1, 10] = 5

    def word_dropped(z):
        z[0, 0], z[1, 0] = -1, NOTHING

    assert changed(lambda z: None)
    for change in (user_word, reply_word, forbidden, too_many, wrong_place, torn, unknown_role, word_dropped):
        assert not changed(change), change.__name__
    assert bool(replace(threat, forbid="none").admits(_with(fine, 5, 0)[None], origin[None]))
    assert not threat.admits(fine[None].float(), origin[None]).any()
    assert not threat.admits(fine[None, :, :-1], origin[None]).any()


def _with(line, place, token):
    line = line.clone()
    line[0, place] = token
    return line


def test_forbidden_ids():
    everything = set(range(PIECE.vocabulary))
    allowed = {forbid: set(bound(f"suffix:forbid={forbid}").allowed().nonzero().squeeze(1).tolist())
               for forbid in ("special", "special+nonascii", "eos", "none")}  # fmt: skip
    assert allowed == {
        "special": everything - {0, 1, 2},
        "special+nonascii": everything - {0, 1, 2, ODD},
        "eos": everything - {2},
        "none": everything,
    }


def test_what_arrives_is_read_anew():
    threat, origin = bound(), row(user=(C, A))
    grown, kept = threat.slotted(origin, torch.tensor([[B, C, D], [C, C, B]]))
    both, origins = torch.stack((grown, kept)), origin.expand(2, -1, -1)
    done = threat.finish(both, origins)
    # c a + b c d is "cabcd", which reads c ab cd
    assert read(done[0]) == [(C, REREAD), (AB, REREAD), (CD, REREAD), *((i, REPLY) for i in REPLY_IDS)]
    assert torch.equal(done[1], kept)
    assert threat.admits(done, origins).all()
    assert torch.equal(threat.finish(done, origins), done)
    assert threat.distance(done, origins).tolist() == [1, 3]
    assert torch.equal(replace(threat, retokenize=False).finish(both, origins), both)


def test_a_row_read_anew_is_held_against_the_text():
    threat, origin = bound(), row(user=(C, A))

    def admitted(ids):
        z = torch.full_like(origin, -1)
        z[1] = NOTHING
        z[0, : len(ids)], z[1, : len(ids)] = torch.tensor(ids), REREAD
        z[:, -2:] = origin[:, -2:]
        return bool(threat.admits(z[None], origin[None]))

    assert admitted([C, AB, CD])
    assert not admitted([C, A, B])  # no fixed point: it reads c ab
    assert not admitted([D, AB, CD])  # another text
    assert not admitted([C])  # the user's words are not all there
    assert not admitted([C, AB, 0])  # a turn mark
    assert admitted([C, A] + [D] * 16)
    assert not admitted([C, A] + [D] * 17)  # 2 n + 8 and no more
    arrived = threat.finish(threat.slotted(origin, torch.tensor([[B]])), origin[None])
    assert bool(threat.admits(arrived, origin[None]))
    assert not bool(replace(threat, retokenize=False).admits(arrived, origin[None]))


def test_a_template_that_does_not_survive_hands_in_the_origin():
    grows = PieceTokenizer(("<s>", "u", "a", "b", "bu"), special=("<s>",), before="<s>", after="u")
    threat, origin = bound(tokenizer=grows), row(user=(2,), reply=(2,))
    made = threat.slotted(origin, torch.tensor([[3], [2]]))  # "b" grows together with the template's "u"
    done = threat.finish(made, origin.expand(2, -1, -1))
    assert torch.equal(done[0], origin)
    assert torch.equal(done[1], made[1])


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(3, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 4))
def test_whatever_is_slotted_is_admitted_and_stays_so(candidates, cut):
    for place in ("suffix", "prefix", "infix", "placeholder"):
        threat, origin = bound(f"suffix:n=4,place={place}"), row(gap=cut)
        for ids in candidates:
            made = threat.slotted(origin, torch.tensor([ids]))
            assert bool(threat.admits(made, origin[None]))
            done = threat.finish(made, origin[None])
            assert bool(threat.admits(done, origin[None]))
            assert torch.equal(threat.finish(done, origin[None]), done)


def test_refusals():
    with pytest.raises(UsageError, match="tokens"):
        THREAT_MODELS.build("suffix").bind(Box())
    with pytest.raises(UsageError):
        THREAT_MODELS.build("suffix:n=-1")
    with pytest.raises(UsageError, match="room"):
        bound("suffix:n=30").slotted(row(room=5), torch.full((1, 6), D))
    with pytest.raises(BadInput, match="l <= 4"):
        bound().slotted(row(), torch.full((1, 5), D))
    with pytest.raises(UsageError, match="bind"):
        THREAT_MODELS.build("suffix").allowed()


def test_transcripts():
    space, line = Transcripts(PIECE), row()
    assert space.contains(line[None]).all()
    assert space.complaint(line[None]) is None
    assert space == Transcripts(PIECE) != Transcripts(words(10))
    assert hash(space) == hash(Transcripts(PIECE))
    assert not Transcripts(PIECE, width=3).contains(line[None]).any()
    for place, token, role in ((0, 99, USER), (0, -1, USER), (6, 3, NOTHING), (-1, D, USER), (0, D, 7)):
        z = line.clone()
        z[0, place], z[1, place] = token, role
        assert not space.contains(z[None]).any()
        assert space.complaint(z[None])
    assert "tokenizer" in space.complaint(_with(line, 0, 99)[None])
    assert "language model" in space.complaint(torch.rand(2, 3, 4, 4))
    assert not space.contains(torch.stack((line[0], torch.zeros_like(line[1])))[None]).any()
