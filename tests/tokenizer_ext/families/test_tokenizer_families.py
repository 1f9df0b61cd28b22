"""SentencePiece and byte-level BPE: what each writes, and that both sides of a SentencePiece base
agree.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer

from cpt_merge.core.byte_alphabet import LETTERS
from cpt_merge.core.languages import find_language
from cpt_merge.tokenizer_ext.base_tokenizer import read_base, read_chat_tokens
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.byte_level import ByteLevelBpe, begins_only
from cpt_merge.tokenizer_ext.families.sentencepiece import (
    NORMAL,
    SentencePieceBpe,
    extend_proto,
    fast_content,
    read_proto,
)
from cpt_merge.tokenizer_ext.families.tokenizer_json import (
    AddedToken,
    build,
    ids_of,
    look_up_whole_words,
    merges_of,
)
from cpt_merge.tokenizer_ext.learn.scripts import Scripts
from cpt_merge.tokenizer_ext.verify.invariants import Case
from tests.tokenizer_ext.small_tokenizers import (
    CHINESE,
    CONFIG,
    KOREAN,
    byte_level_content,
    write_base,
)

ANYTHING = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list(" \n\t▁的人中學생한국어ㅋ哈々〇aeE.,，。🙂\u0301\u200d")),
    ),
    max_size=40,
)


@pytest.fixture(scope="session")
def processor(sp) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(sp.out / "tokenizer.model"))


@pytest.fixture(scope="session")
def cases(sp, bl) -> list[Case]:
    return [sp.case, bl.case]


WORDS = st.lists(
    st.sampled_from([*CHINESE, *KOREAN, " ", "  ", " the", "water", "\n", "，", "🙂"]), max_size=12
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(ANYTHING, WORDS))
def test_sentencepiece_and_the_fast_tokenizer_agree_on_anything(sp, processor, text) -> None:
    ids = sp.case.after.encode(text, add_special_tokens=False).ids
    assert processor.encode(text) == ids
    if "▁" not in text:  # a literal one becomes a space, in the base as well
        assert sp.case.after.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(ANYTHING, WORDS))
def test_byte_level_text_comes_back(bl, text) -> None:
    ids = bl.case.after.encode(text, add_special_tokens=False).ids
    assert bl.case.after.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=ANYTHING)
def test_text_without_the_scripts_is_tokenized_as_before(cases, text) -> None:
    plain = "".join(
        c for c in text if not any(find_language(tag).letters.match(c) for tag in ("zh_tw", "ko"))
    )
    for case in cases:
        assert case.before.encode(plain).ids == case.after.encode(plain).ids


def test_scores_of_new_pieces_are_distinct_and_below_all_old_merges(sp) -> None:
    proto = read_proto(sp.out / "tokenizer.model")
    rows = sp.case.map.base_rows
    old = [piece.score for piece in proto.pieces[:rows] if piece.type == NORMAL]
    new = np.array(
        [piece.score for piece in proto.pieces[rows:] if piece.type == NORMAL], dtype=np.float32
    )
    assert len(set(new.tolist())) == len(new) == len(sp.case.map.new)
    assert new.max() < min(old)
    assert all(after < before for before, after in pairwise(new))
    assert proto.trainer_spec.vocab_size == len(proto.pieces) == sp.case.map.rows


@pytest.fixture(scope="session")
def proto_with_low_whitespace(sp_model):
    """As in LLaMA-2, runs of `▁` have the score -1e9, far below all else; as in Mistral, some
    lengths are missing.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(sp_model)
    for piece in proto.pieces:
        if not piece.piece.strip("▁"):
            piece.score = -1e9
    known = {piece.piece for piece in proto.pieces}
    for length in (16, 2, 4, 8, 3, 6, 7, 5, 9, 12, 13, 14, 10):
        if "▁" * length not in known:
            proto.pieces.add(piece="▁" * length, score=-1e9, type=NORMAL)
    return proto


def test_new_merges_come_before_those_of_whitespace_runs(proto_with_low_whitespace) -> None:
    """New scores lie above -1e9, so the new merges have to come before."""
    proto = proto_with_low_whitespace
    content = fast_content(proto, "here")
    family = SentencePieceBpe(content, proto)
    merges = merges_of(content)
    assert 0 < family.settled() < len(merges)
    assert all(not "".join(merge).strip("▁") for merge in merges[family.settled() :])
    start = len(proto.pieces)
    content["model"]["vocab"]["新"] = start
    extended = extend_proto(proto, content, {"新": start}, start + 1)
    lowest = min(
        piece.score for piece in proto.pieces if piece.type == NORMAL and piece.score > -1e9
    )
    assert -1e9 < extended.pieces[start].score < lowest


def test_a_whitespace_run_with_an_ordinary_score_is_an_ordinary_merge(sp_model) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(sp_model)
    proto.pieces.add(piece="▁" * 3, score=-5000.0, type=NORMAL)
    content = fast_content(proto, "here")
    assert merges_of(content)[-1] == ("▁▁", "▁") or merges_of(content)[-1] == ("▁", "▁▁")
    assert SentencePieceBpe(content, proto).settled() == len(merges_of(content))


def test_pieces_of_equal_score_merge_as_in_sentencepiece(proto_with_low_whitespace) -> None:
    fast = build(fast_content(proto_with_low_whitespace, "here"))
    sentencepiece = SentencePieceProcessor(
        model_proto=proto_with_low_whitespace.SerializeToString()
    )
    texts = [f"{' ' * width}{word}" for width in range(120) for word in ("", "the", "中文")]
    assert [
        fast.encode(text, add_special_tokens=False).ids for text in texts
    ] == sentencepiece.encode(texts)


def test_a_fast_tokenizer_made_from_the_model_alone_equals_it(sp_base) -> None:
    base = read_base(sp_base)
    sentencepiece = SentencePieceProcessor(model_file=str(sp_base / "tokenizer.model"))
    fast = build(base.content)
    for text in ["the water", " The  river", "中文的人 한", "\n\t x\n", "", "é🙂"]:
        assert fast.encode(text, add_special_tokens=False).ids == sentencepiece.encode(text)


def test_the_model_alone_begins_a_text_as_llama_does(sp_model, sp_base, tmp_path) -> None:
    alone = read_base(write_base(tmp_path, read_base(sp_base).rows, proto=sp_model))
    assert build(alone.content).encode("the").tokens[0] == "<s>"
    assert alone.settings == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }


def test_both_files_side_by_side_give_the_same_as_the_model_alone(
    sp, sp_base, sp_model, corpus, tmp_path
) -> None:
    settings_ = json.loads((sp_base / "tokenizer_config.json").read_text())
    rows = sp.case.map.base_rows
    base = write_base(
        tmp_path / "base", rows, content=read_base(sp_base).content, proto=sp_model, **settings_
    )
    (tmp_path / "out").mkdir()
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out", sp.chat)
    for name in ("tokenizer.json", "tokenizer.model", "vocabulary_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sp.out / name).read_bytes()


def test_a_base_with_the_fast_file_only(sp, sp_base, corpus, tmp_path) -> None:
    content = read_base(sp_base).content
    base = write_base(
        tmp_path / "base", sp.case.map.base_rows, content=content, bos_token="<s>", eos_token="</s>"
    )
    (tmp_path / "out").mkdir()
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out", sp.chat)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        sp.out / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_of_a_chat_model_without_the_fast_file(file, sp_base, sp_model, tmp_path) -> None:
    base = read_base(sp_base)
    chat = write_base(tmp_path, base.rows + 1, proto=sp_model)
    described = {"added_tokens_decoder": {str(base.rows): {"content": "<pad>", "special": True}}}
    listed = {"<pad>": base.rows} if file == "added_tokens.json" else described
    (chat / file).write_text(json.dumps(listed))
    assert read_chat_tokens(chat, base) == [AddedToken(base.rows, "<pad>")]


def test_special_tokens_of_a_byte_level_base_stay_where_they_were(bl) -> None:
    """They are in `added_tokens` only;

    `tokenizers` would count their ids from the size of the vocabulary.
    """
    before, after = ids_of(bl.case.base.content), bl.case.after
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert token not in bl.case.base.content["model"]["vocab"]
        assert after.token_to_id(token) == before[token]
        assert after.encode(f"a{token}b").ids == bl.case.before.encode(f"a{token}b").ids


def test_whole_words_are_looked_up_where_that_changes_nothing(bl, sp) -> None:
    assert bl.case.content["model"]["ignore_merges"] is True
    assert not sp.case.content["model"].get("ignore_merges")  # there the whole text is one word


def test_whole_words_are_not_looked_up_where_a_piece_is_no_merge(bl) -> None:
    content = json.loads(json.dumps(bl.case.base.content))
    assert look_up_whole_words(content)["model"]["ignore_merges"] is True
    content["model"]["vocab"]["riverwater"] = len(content["model"]["vocab"])
    assert not look_up_whole_words(content)["model"].get("ignore_merges")


def test_a_token_added_later_gets_a_row_of_its_own(extended) -> None:
    tokenizer = Tokenizer.from_file(str(extended.out / "tokenizer.json"))
    tokenizer.add_special_tokens(["<later>"])
    assert tokenizer.token_to_id("<later>") == extended.case.map.rows


def test_parts_of_characters_belong_to_the_script_alone() -> None:
    han = Scripts(find_language("zh_tw"))
    assert begins_only("中".encode()[:2], han)
    assert not begins_only("。".encode()[:2], han)  # 々 and 。 begin alike
    assert not begins_only("中".encode()[:1], han)  # E4: so do the hexagrams
    assert not begins_only("中".encode()[1:], han)
    assert not begins_only(b"a", han)


def test_a_byte_level_piece_is_whole_characters_or_the_beginning_of_one() -> None:
    admits = ByteLevelBpe(byte_level_content()).admits(Scripts(find_language("ko")), 3)

    def spell(spelt: bytes) -> str:
        return "".join(LETTERS[byte] for byte in spelt)

    assert admits(spell("한국".encode()))
    assert admits(spell(" 한국".encode()))
    assert admits(spell(" 한".encode()[:-1]))
    assert not admits(spell("한국말로".encode()))
    assert not admits(spell("한국".encode()[:-1]))
    assert not admits(spell("한국".encode()[1:]))
    assert not admits(spell("한a".encode()))
    assert not admits(spell("한 ".encode()))


def test_a_tokenizer_like_llama_3(bl, corpus, tmp_path) -> None:
    """It cuts by its own pattern, and looks a whole word up before it merges; every new piece is
    reached by merges.
    """
    content = byte_level_content()
    content["model"]["ignore_merges"] = True
    content["normalizer"] = {"type": "NFC"}  # as Qwen's
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, to_bytes]}
    base = write_base(tmp_path / "base", bl.case.map.base_rows, content=content)
    (tmp_path / "out").mkdir()
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["ignore_merges"]
        is True
    )
