"""`cpt-merge check-tokenizer`: the proofs on tokenizers that others made."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.cli import main
from cpt_merge.tokenizer_ext.families.sentencepiece import fast_content
from cpt_merge.tokenizer_ext.verify.check_tokenizer import check_tokenizer, guess_scripts
from cpt_merge.tokenizer_ext.verify.invariants import Proof
from tests.tokenizer_ext.small_tokenizers import write_base

WORDS = ["學生", "圖書館", "老師的", "질문", "대답은"]


def broken(proofs: list[Proof]) -> set[str]:
    return {proof.invariant for proof in proofs if proof.failures}


@pytest.fixture
def text(corpus) -> Path:
    return Path(next(source.path for source in corpus.sources if source.language == "zh_tw"))


def test_our_own_keeps_every_law(extended, text) -> None:
    checked = check_tokenizer(extended.out, extended.base, extended.chat, [text])
    assert checked.whole
    assert (
        checked.fertility[0].tokens_per_character[1]
        < checked.fertility[0].tokens_per_character[0] / 2
    )


def test_without_the_vocabulary_map_as_well(extended, tmp_path) -> None:
    out = shutil.copytree(extended.out, tmp_path / "out")
    (out / "vocabulary_map.json").unlink()
    assert check_tokenizer(out, extended.base).whole


def test_add_tokens_is_found_out(extended, tmp_path, capsys) -> None:
    """The common mistake, by transformers itself: words as added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(extended.base)
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(tmp_path / "naive")
    found = broken(check_tokenizer(tmp_path / "naive", extended.base).proofs)
    assert "new words are pieces of the model, not added tokens" in found
    assert "broken: new words are pieces" in capsys.readouterr().err


def test_a_unigram_model_appended_with_score_0_is_found_out(sp_base, tmp_path) -> None:
    """As the published extensions of LLaMA-2 are made: pieces that no merges lead to, and English
    is changed.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (sp_base / "tokenizer.model").read_bytes()
    )
    known = {piece.piece for piece in proto.pieces}
    for word in [*WORDS, "▁wat", "er▁"]:
        for piece in (word, *word) if word not in known else ():
            if piece not in known:
                known.add(piece)
                proto.pieces.add(piece=piece, score=0.0)
    folder = tmp_path / "appended"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"})
    )
    found = broken(check_tokenizer(folder, sp_base).proofs)
    assert {
        "every new piece can be produced",
        "text without the new scripts is tokenized as before",
    } <= found


def test_another_base_is_found_out(sp, bl_base) -> None:
    assert "old tokens keep their ids and merges" in broken(check_tokenizer(sp.out, bl_base).proofs)


def test_two_files_that_disagree_are_a_broken_law(sp, tmp_path) -> None:
    out = shutil.copytree(sp.out, tmp_path / "out")
    proto = sentencepiece_model_pb2.ModelProto.FromString((out / "tokenizer.model").read_bytes())
    new = [piece.id for piece in sp.case.map.new]
    proto.pieces[new[-1]].piece, proto.pieces[new[-2]].piece = (
        proto.pieces[new[-2]].piece,
        proto.pieces[new[-1]].piece,
    )
    (out / "tokenizer.model").write_bytes(proto.SerializeToString())
    found = broken(check_tokenizer(out, sp.base).proofs)
    assert "tokenizer.model and tokenizer.json have equal ids and merges" in found


def test_the_scripts_are_guessed_from_the_new_tokens() -> None:
    assert guess_scripts(["學生", "ab", "<|x|>"]) == ("Han",)
    assert guess_scripts(["질문", "ひ", "カ"]) == ("Hangul", "Hiragana", "Katakana")
    assert guess_scripts(["abc", *["x"] * 99]) == ()


def replace_reserved(out: Path, piece: str, splits: list[list[str]]) -> int:
    """Make a piece of a reserved row, consistently in both files."""
    content = json.loads((out / "tokenizer.json").read_text())
    token = next(
        token for token in content["added_tokens"] if token["content"].startswith("<|reserved")
    )
    content["added_tokens"].remove(token)
    vocabulary = content["model"]["vocab"]
    vocabulary[piece] = vocabulary.pop(token["content"])
    content["model"]["merges"] += splits
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    if (out / "tokenizer.model").is_file():
        proto = sentencepiece_model_pb2.ModelProto.FromString(
            (out / "tokenizer.model").read_bytes()
        )
        proto.pieces[token["id"]].piece, proto.pieces[token["id"]].type = piece, 1
        proto.pieces[token["id"]].score = (
            min(p.score for p in proto.pieces if p.type == 1 and p.score > -1e8) - 1
        )
        (out / "tokenizer.model").write_bytes(proto.SerializeToString())
    return token["id"]


@pytest.mark.parametrize("with_map", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_english_piece_is_found_whatever_the_samples_hold(extended, tmp_path, with_map) -> None:
    out = shutil.copytree(extended.out, tmp_path / "out")
    replace_reserved(
        out, "qjxz", [["q", "jxz"]] if "jxz" in extended.case.content["model"]["vocab"] else []
    )
    if not with_map:
        (out / "vocabulary_map.json").unlink()
    found = broken(check_tokenizer(out, extended.base, extended.chat).proofs)
    assert (
        "every row has exactly one token"
        if with_map
        else "every new piece holds a letter of the new scripts"
    ) in found


def test_other_roles_and_a_lost_beginning_are_found(sp, tmp_path) -> None:
    invariant = "roles of special tokens are the base's"
    out = shutil.copytree(sp.out, tmp_path / "roles")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second comes first
        values = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps({**values, "eos_token": "<s>"}))
    assert invariant in broken(check_tokenizer(out, sp.base, sp.chat).proofs)
    out = shutil.copytree(sp.out, tmp_path / "bos")
    content = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    assert invariant in broken(check_tokenizer(out, sp.base, sp.chat).proofs)


def test_a_model_that_sentencepiece_refuses_is_a_broken_law(sp, tmp_path) -> None:
    out = shutil.copytree(sp.out, tmp_path / "out")
    proto = sentencepiece_model_pb2.ModelProto.FromString((out / "tokenizer.model").read_bytes())
    next(piece for piece in proto.pieces if piece.type == 6).type = 1
    (out / "tokenizer.model").write_bytes(proto.SerializeToString())
    found = broken(check_tokenizer(out, sp.base, sp.chat).proofs)
    assert {
        "SentencePiece and the fast tokenizer agree",
        "old pieces of tokenizer.model are untouched",
    } <= found


def test_a_chat_directory_that_is_not_there(sp) -> None:
    with pytest.raises(UserError, match="--chat nowhere is no directory"):
        check_tokenizer(sp.out, sp.base, Path("nowhere"))


def test_scripts_beyond_the_known_languages_are_guessed() -> None:
    assert guess_scripts(["สวัสดี", "مرحبا", "नमस्ते", "ок"]) == (
        "Arabic",
        "Cyrillic",
        "Devanagari",
        "Thai",
    )


def test_words_with_marks_are_words(sp_base, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sp_base)
    tokenizer.add_tokens(["नमस्ते", "สวัสดี"])
    tokenizer.save_pretrained(tmp_path)
    checked = check_tokenizer(tmp_path, sp_base)
    assert "new words are pieces of the model, not added tokens" in broken(checked.proofs)


def test_two_texts_of_one_name(sp, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "x.txt", tmp_path / "a" / "x.txt"]
    for path in paths:
        path.write_text("x\n")
    with pytest.raises(UserError, match="have the same name"):
        check_tokenizer(sp.out, sp.base, texts=paths)


def test_exit_codes(sp, tmp_path, capsys) -> None:
    arguments = ["check-tokenizer", str(sp.out), "--against", str(sp.base)]
    assert main(arguments) == 0
    tokenizer = AutoTokenizer.from_pretrained(sp.base)
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(tmp_path)
    assert main(["check-tokenizer", str(tmp_path), "--against", str(sp.base)]) == 1
    assert main(["check-tokenizer", str(tmp_path / "nothing"), "--against", str(sp.base)]) == 2
    assert "holds neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err


def test_a_text_that_is_not_there(sp) -> None:
    with pytest.raises(UserError, match=r"--text nowhere.txt does not exist"):
        check_tokenizer(sp.out, sp.base, texts=[Path("nowhere.txt")])


def test_a_piece_that_cannot_be_produced_counts_once(sp_base, tmp_path) -> None:
    """Both files cannot produce it: a published extension had 1,328 instead of 657."""
    path = sp_base / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in ("學生們", "圖書館"):
        proto.pieces.add(piece=piece, score=0.0, type=1)
    out = write_base(tmp_path / "out", len(proto.pieces), proto=proto.SerializeToString())
    proofs = check_tokenizer(out, sp_base).proofs
    proof = next(proof for proof in proofs if proof.invariant == "every new piece can be produced")
    assert len(proof.failures) == proof.checked == 2


@pytest.mark.parametrize("fast", ["base", "extended"])
def test_runs_of_spaces_of_one_score_may_merge_in_another_order(sp_base, fast, tmp_path) -> None:
    """LLaMA-2's have one score; its published tokenizer.json orders them by id."""
    path = sp_base / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in proto.pieces:
        if piece.type == 1 and len(piece.piece) > 1 and not piece.piece.strip("▁"):
            piece.score = -1e9
    model, rows = proto.SerializeToString(), len(proto.pieces)
    alone = write_base(tmp_path / "alone", rows, proto=model, bos_token="<s>")
    content = fast_content(proto, path)
    merges = content["model"]["merges"]
    runs = [merge for merge in merges if not "".join(merge).strip("▁")]
    assert len(runs) > 1
    content["model"]["merges"] = [one for one in merges if one not in runs] + runs[::-1]
    other = write_base(tmp_path / "other", rows, content=content, bos_token="<s>")
    base, extended = (other, alone) if fast == "base" else (alone, other)
    proofs = check_tokenizer(extended, base).proofs
    assert "old tokens keep their ids and merges" not in broken(proofs)
