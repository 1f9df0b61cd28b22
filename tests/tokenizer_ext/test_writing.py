"""Which token gets which row."""

import pytest

from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken
from cpt_merge.tokenizer_ext.writing import lay_out, map_rows


@pytest.fixture
def base(bl_base):
    return read_base(bl_base)


def test_ids_of_the_chat_model_are_not_given_to_new_pieces(base) -> None:
    rows = base.rows
    chat = [AddedToken(rows, "<pad>"), AddedToken(rows + 2, "<|eot|>")]
    layout = lay_out(base, chat, ["甲", "乙", "丙"], 64)
    assert layout.pieces == {"甲": rows + 1, "乙": rows + 3, "丙": rows + 4}
    assert [(token.id, token.chat_id) for token in layout.chat] == [
        (rows, rows),
        (rows + 2, rows + 2),
    ]
    assert layout.rows % 64 == 0
    assert layout.padding == list(range(rows + 5, layout.rows))
    assert map_rows(base, layout).rows == layout.rows


def test_a_chat_token_on_an_id_that_the_base_uses_moves_behind(base) -> None:
    layout = lay_out(base, [AddedToken(5, "<pad>")], ["甲"], 1)
    assert layout.pieces == {"甲": base.rows}
    assert [(token.id, token.chat_id) for token in layout.chat] == [(base.rows + 1, 5)]


def test_a_chat_token_on_a_row_of_the_base_without_a_token_takes_it(base) -> None:
    free = base.rows - 1
    layout = lay_out(base, [AddedToken(free, "<pad>")], [], 1)
    assert layout.chat == []
    assert layout.rows == base.rows
    assert {token.content: token.id for token in layout.added}["<pad>"] == free


def test_rows_of_the_base_without_a_token_get_a_name(base) -> None:
    layout = lay_out(base, [], [], 1)
    named = {token.id for token in layout.added} | set(base.ids.values())
    assert named == set(range(base.rows))
    assert layout.padding == []


def test_reserved_names_avoid_existing_tokens(base) -> None:
    layout = lay_out(base, [AddedToken(base.rows, "<|reserved_0|>")], ["甲"], 64)
    names = [token.content for token in layout.added]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("multiple", [1, 8, 64, 128])
def test_rows_are_a_multiple(base, multiple) -> None:
    layout = lay_out(base, [], ["甲", "乙"], multiple)
    assert layout.rows % multiple == 0
    assert layout.rows - (base.rows + 2) < multiple


def test_constituents_hold_no_dummy_prefix(sp_base) -> None:
    base = read_base(sp_base)
    found = map_rows(base, lay_out(base, [], ["的人", "▁人"], 1))
    assert [piece.constituents for piece in found.new] == [
        [base.ids["的"], base.ids["人"]],
        [base.ids["▁"], base.ids["人"]],
    ]
