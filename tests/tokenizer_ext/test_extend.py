"""The stage from end to end, and what it leaves behind."""

import json
import shutil

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cpt_merge.checkpoint.loaded_tokenizer import CONVERSATION
from cpt_merge.checkpoint.token_ids import read_tokens
from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.checkpoint.vocabulary_map import VocabularyMap
from cpt_merge.core.artifact import write_json
from cpt_merge.tokenizer_ext.base_tokenizer import read_base
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.sentencepiece import fast_content, read_proto
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, add_tokens
from cpt_merge.tokenizer_ext.verify.invariants import prove
from cpt_merge.tracking.events import Image, Summary
from tests.tokenizer_ext.small_tokenizers import CHAT_TEMPLATE, CONFIG, write_base


def test_an_added_token_beyond_the_rows_gets_one(
    sp_base, sp_model, corpus, tmp_path, capsys
) -> None:
    """As Gemma-3 1B's `<image_soft_token>`."""
    rows = read_base(sp_base).rows
    content = fast_content(read_proto(sp_base / "tokenizer.model"), sp_base)
    content = add_tokens(content, [AddedToken(rows, "<image_soft_token>")])
    base = write_base(tmp_path / "base", rows, content=content, proto=sp_model, bos_token="<s>")
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out", base)
    vocabulary = VocabularyMap.load(tmp_path / "out")
    assert rows in vocabulary.padding
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == rows
    assert "'<image_soft_token>' of the base" in capsys.readouterr().err


def test_special_tokens_that_strip_spaces(bl_base, corpus, tmp_path) -> None:
    """As in Phi-3: the line's end behind a role belongs to the role's token."""
    content = json.loads((bl_base / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = True
    rows = read_base(bl_base).rows
    base = write_base(tmp_path / "base", rows, content=content, chat_template=CHAT_TEMPLATE)
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out", base)
    before, after = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(CONVERSATION, return_dict=False)
        for folder in (base, tmp_path / "out")
    )
    assert after == before


def test_all_laws_hold_on_what_was_written(extended) -> None:
    proofs = prove(extended.case)
    assert [proof.invariant for proof in proofs if proof.failures] == []
    unchecked = {proof.invariant for proof in proofs if not proof.checked}
    assert unchecked == (
        {"looking up whole words gives what merging gives"} if extended.case.proto is not None else {
            "old pieces of tokenizer.model are untouched", "SentencePiece and the fast tokenizer agree",
            "tokenizer.model and tokenizer.json have equal ids and merges",
        }
    )  # fmt: skip


def test_the_map_describes_every_row(extended) -> None:
    found = VocabularyMap.load(extended.out)
    base = read_base(extended.base)
    ids = read_tokens(extended.out).ids
    assert found.base_rows == base.rows
    assert found.rows % 64 == 0
    assert found.rows == extended.results["rows"]
    assert sorted(ids.values()) == list(range(found.rows))
    assert all(ids[piece.piece] == piece.id for piece in found.new)
    reserved = {id_ for token, id_ in ids.items() if token.startswith("<|reserved_")}
    assert set(found.padding) <= reserved


def test_new_pieces_are_of_the_scripts_only(extended) -> None:
    family = read_base(extended.base).family
    texts = [family.readable(piece.piece) for piece in VocabularyMap.load(extended.out).new]
    letters = {character for text in texts if "<" not in text for character in text}
    assert letters
    assert not any(character.isascii() and character != " " for character in letters)


def test_constituents_spell_the_piece_without_a_dummy_prefix(extended) -> None:
    base = read_base(extended.base)
    names = {id_: token for token, id_ in base.ids.items()}
    for piece in VocabularyMap.load(extended.out).new:
        spelt = "".join(names[id_] for id_ in piece.constituents)
        if "<0x" in spelt:
            as_bytes = b"".join(
                bytes([int(name[3:5], 16)])
                if (name := names[id_]).startswith("<0x")
                else name.encode()
                for id_ in piece.constituents
            )
            spelt = as_bytes.decode()
        assert spelt == piece.piece


def test_tokens_of_the_chat_model_keep_their_ids(sp) -> None:
    base = read_base(sp.base)
    ids = read_tokens(sp.out).ids
    expected = {"<pad>": base.rows, "<|im_start|>": base.rows + 1, "<|im_end|>": base.rows + 5}
    assert {token.token: token.id for token in VocabularyMap.load(sp.out).chat} == expected
    assert {token: ids[token] for token in expected} == expected
    proto = SentencePieceProcessor(model_file=str(sp.out / "tokenizer.model"))
    assert {token: proto.piece_to_id(token) for token in expected} == expected


def test_fertility_falls_where_pieces_were_learnt_and_stays_in_english(extended) -> None:
    results = extended.results
    for language in ("zh_tw", "ko"):
        before, after = (
            results[f"{language}/tokens_per_character_before"],
            results[f"{language}/tokens_per_character"],
        )
        assert after < before / 2
    assert results["en/tokens_per_character_before"] == results["en/tokens_per_character"]
    assert results["en/changed_documents"] == 0


def test_the_beginning_of_text_is_kept(sp) -> None:
    ids = Tokenizer.from_file(str(sp.out / "tokenizer.json")).encode("hello").ids
    assert ids[0] == read_tokens(sp.out).ids["<s>"]


def test_settings_name_the_one_class_that_both_transformers_read_exactly(extended) -> None:
    settings = json.loads((extended.out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["clean_up_tokenization_spaces"] is False
    assert "add_bos_token" not in settings
    original = json.loads((extended.base / "tokenizer_config.json").read_text())
    assert settings.get("chat_template") == original.get("chat_template")
    assert (
        json.loads((extended.out / "special_tokens_map.json").read_text())["eos_token"]
        == original["eos_token"]
    )


def test_the_report_is_written_and_tracked(extended) -> None:
    report = json.loads((extended.out / "report.json").read_text())
    assert {one["language"] for one in report["fertility"]} == {"zh_tw", "ko", "en"}
    for one in report["usefulness"]:
        heights = [height for _, height in one["curve"]]
        assert heights == sorted(heights, reverse=True)
        assert 0.1 < one["used_in_training"] <= 1
    assert report["examples"]
    assert {one["language"] for one in report["drift"]} == {
        "en",
        "zh_cn (sentences)",
        "ja (sentences)",
    }
    names = ("fertility", "pieces", "drift", "gain curve", "examples", "proofs")
    assert set(extended.recording.tables) == {f"tokenizer/{name}" for name in names}
    events = extended.recording.events
    (image,) = (event for event in events if isinstance(event, Image))
    assert image.name == "tokenizer/report"
    assert image.path.read_bytes().startswith(b"\x89PNG")
    values = [event.values for event in events if isinstance(event, Summary)]
    assert values[-1]["tokenizer/rows"] == extended.results["rows"]


@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces",
        "\tx",
        "中文字 abc",
        "한국어 🙂",
        "e\u0301",
        "\x00\x07",
        "x" * 20_000,
        "學" * 5_000,
    ],
)
def test_text_comes_back(extended, text) -> None:
    tokenizer = Tokenizer.from_file(str(extended.out / "tokenizer.json"))
    assert (
        tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        == text
    )


@pytest.mark.parametrize("lists_added", [False, True])
def test_two_files_that_name_another_eos_are_read_as_transformers_reads_them(
    sp_base, corpus, tmp_path, lists_added: bool
) -> None:
    """special_tokens_map.json counts more, unless the settings list the added tokens."""
    base = shutil.copytree(sp_base, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    if lists_added:
        names = ("<unk>", "<s>", "</s>")
        decoder = {str(n): {"content": name, "special": True} for n, name in enumerate(names)}
        write_json(base / "tokenizer_config.json", settings | {"added_tokens_decoder": decoder})
    write_json(base / "special_tokens_map.json", {"eos_token": "<unk>"})
    expected = AutoTokenizer.from_pretrained(base).eos_token
    assert expected == ("</s>" if lists_added else "<unk>")
    assert TokenizerFiles(base, {}, frozenset()).roles["eos_token"] == expected
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == expected
