"""The proof of every invariant fails when the invariant is broken."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, add_tokens
from cpt_merge.tokenizer_ext.verify import invariants
from cpt_merge.tokenizer_ext.verify.invariants import Case, prove, require
from tests.tokenizer_ext.small_tokenizers import ENGLISH


def rewritten(case: Case, folder: Path, change: Callable[[dict], None]) -> Case:
    """The case with a changed `tokenizer.json`; the other files are as they were."""
    content = json.loads((case.directory / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    for file in case.directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(
        json.dumps(content, ensure_ascii=False), encoding="utf-8"
    )
    return replace(case, directory=folder, content=content)


def broken(case: Case) -> set[str]:
    return {invariant.__name__ for invariant in invariants.INVARIANTS if invariant(case).failures}


def test_nothing_is_broken_to_begin_with(extended) -> None:
    assert broken(extended.case) == set()
    require(prove(extended.case))


def test_add_tokens_is_no_extension(extended, tmp_path) -> None:
    """The common mistake: new pieces as added tokens, which merges cannot make and which cut the
    text to pieces.
    """

    def change(content: dict) -> None:
        ids = {piece.piece: piece.id for piece in extended.case.map.new}
        base = extended.case.base.content
        kept = [
            AddedToken(**token)
            for token in content["added_tokens"]
            if token["id"] not in ids.values()
        ]
        naive = add_tokens(
            {**base, "added_tokens": []},
            [*kept, *(AddedToken(i, p, special=False) for p, i in ids.items())],
        )
        content.update(naive)
        for piece in ids:
            del content["model"]["vocab"][piece]

    case = rewritten(extended.case, tmp_path, change)
    assert "new_pieces_are_reachable" in broken(case)
    with pytest.raises(UserError, match="every new piece can be produced"):
        require([invariants.new_pieces_are_reachable(case)])


def test_a_word_that_is_looked_up_but_not_merged_is_found(bl, tmp_path) -> None:
    def change(content: dict) -> None:
        content["model"]["vocab"]["water"] = content["model"]["vocab"].pop("<|reserved_0|>")
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] != "<|reserved_0|>"
        ]

    case = rewritten(bl.case, tmp_path, change)
    case = replace(case, samples=replace(case.samples, mixed=["water"]))
    assert invariants.merges_alone_give_the_same(case).failures


def test_wrong_constituents_are_found(extended) -> None:
    first, *others = extended.case.map.new
    wrong = replace(first, constituents=first.constituents[:-1])
    case = replace(extended.case, map=replace(extended.case.map, new=[wrong, *others]))
    assert len(invariants.constituents_spell_their_piece(case).failures) == 1


def test_a_moved_id_is_found(extended, tmp_path) -> None:
    def change(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    found = broken(rewritten(extended.case, tmp_path, change))
    assert {"old_ids_stay", "plain_text_is_unchanged"} <= found


def test_an_old_merge_out_of_place_is_found(extended, tmp_path) -> None:
    def change(content: dict) -> None:
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    assert "old_ids_stay" in broken(rewritten(extended.case, tmp_path, change))


def test_a_piece_without_merges_is_found(extended, tmp_path) -> None:
    piece = next(piece.piece for piece in extended.case.map.new if len(piece.piece) > 1)

    def change(content: dict) -> None:
        content["model"]["merges"] = [
            merge for merge in content["model"]["merges"] if "".join(merge) != piece
        ]

    case = rewritten(extended.case, tmp_path, change)
    with pytest.raises(UserError, match=piece):
        require([invariants.new_pieces_are_reachable(case)])


def test_new_merges_before_the_old_ones_are_found(extended, tmp_path) -> None:
    """A new merge of Latin letters at the front rewrites English, as in the first published
    extensions.
    """

    def change(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        pairs = (
            pair for word in ENGLISH for pair in pairwise(word) if "".join(pair) not in vocabulary
        )
        left, right = next(pairs)
        vocabulary[left + right] = vocabulary.pop("<|reserved_0|>")
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["content"] != "<|reserved_0|>"
        ]
        content["model"]["merges"].insert(0, [left, right])

    assert broken(rewritten(extended.case, tmp_path, change)) & {"plain_text_is_unchanged"}


def test_a_decoder_that_eats_spaces_is_found(sp, tmp_path) -> None:
    def change(content: dict) -> None:
        content["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Strip", "strip_left": True, "strip_right": False}, *content["normalizer"]["normalizers"]]}  # fmt: skip

    found = broken(rewritten(sp.case, tmp_path, change))
    assert {"text_round_trips", "sentencepiece_agrees"} <= found


def test_files_that_disagree_are_found(sp, tmp_path) -> None:
    """Equal scores, as in the published extensions of LLaMA-2, make SentencePiece merge from the
    left.
    """
    proto = type(sp.case.proto)()
    proto.CopyFrom(sp.case.proto)
    for piece in sp.case.map.new:
        proto.pieces[piece.id].score = 0.0
    assert "sentencepiece_agrees" in broken(replace(sp.case, proto=proto))


def test_a_changed_old_piece_is_found(sp) -> None:
    proto = type(sp.case.proto)()
    proto.CopyFrom(sp.case.proto)
    proto.pieces[400].score -= 0.5
    proof = invariants.old_pieces_stay(replace(sp.case, proto=proto))
    assert proof.failures == [f"piece 400 {proto.pieces[400].piece!r} changed"]


def test_a_moved_special_token_is_found(extended, tmp_path) -> None:
    def change(content: dict) -> None:
        first, second = content["added_tokens"][:2]
        first["content"], second["content"] = second["content"], first["content"]
        vocabulary = content["model"]["vocab"]
        vocabulary[first["content"]], vocabulary[second["content"]] = first["id"], second["id"]

    assert "special_tokens_stay" in broken(rewritten(extended.case, tmp_path, change))


def test_a_chat_token_that_is_lost_is_found(sp, tmp_path) -> None:
    def change(content: dict) -> None:
        for token in content["added_tokens"]:
            token["content"] = token["content"].replace("<|im_end|>", "<|other|>")

    assert {"special_tokens_stay", "rows_are_named"} <= broken(rewritten(sp.case, tmp_path, change))


def test_a_class_that_reads_the_file_differently_is_found(sp, tmp_path) -> None:
    """The LlamaTokenizer of transformers 5 loses a leading space."""
    case = rewritten(sp.case, tmp_path, lambda content: None)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"})
    )
    assert broken(case) == {"transformers_agrees"}
