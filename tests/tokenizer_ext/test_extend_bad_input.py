"""What the user did wrong is one sentence that says what to do."""

import json

import pytest

from cpt_merge.core.byte_alphabet import LETTERS
from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_base, read_chat_tokens
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.learn.word_counts import read_documents
from tests.tokenizer_ext.small_tokenizers import (
    CONFIG,
    byte_level_content,
    train_sentencepiece,
    write_base,
)


def source(folder, text: str, language: str = "zh_tw") -> Corpus:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return Corpus(sources=[Source(path=str(path), language=language)])


def stage(base, corpus, folder, **sizes: int) -> None:
    extend_tokenizer(
        TokenizerConfig(new_pieces=sizes, min_frequency=1), base, corpus, folder / "out"
    )


def test_a_directory_that_holds_something_is_left_alone(sp_base, corpus, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; empty it"):
        extend_tokenizer(CONFIG, sp_base, corpus, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_language_without_text(sp_base, tmp_path) -> None:
    with pytest.raises(UserError, match="no text in 'ko'"):
        stage(sp_base, source(tmp_path, "中文\n" * 9), tmp_path, ko=10)


def test_text_without_the_script(sp_base, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no Han letter"):
        stage(
            sp_base,
            source(tmp_path, "".join(f"only English {i}\n" for i in range(99))),
            tmp_path,
            zh_tw=10,
        )


def test_fewer_pieces_than_missing_characters(sp_base, corpus, tmp_path) -> None:
    with pytest.raises(
        UserError, match=r"new_pieces.zh_tw = 3 is too small: the text has \d+ characters"
    ):
        stage(sp_base, corpus, tmp_path, zh_tw=3)


def test_fewer_pairs_than_asked_for_is_said(sp_base, tmp_path, capsys) -> None:
    stage(sp_base, source(tmp_path, "".join(f"中文字{i}\n" for i in range(99))), tmp_path, zh_tw=50)
    assert "of 50 pieces" in capsys.readouterr().err


def test_a_lone_surrogate(tmp_path) -> None:
    class Broken(Corpus):
        def documents(self, source, split):
            yield from ["fine", "not \ud800 fine"]

    corpus = Broken(sources=[Source(path="x.txt", language="zh_tw")])
    with pytest.raises(UserError, match=r"x.txt: train document 2 holds a lone surrogate"):
        list(read_documents(corpus, "zh_tw", "train", 1000))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_pieces": {"xx": 5}}, "language 'xx' is not known"),
        ({"new_pieces": {"ko": 0}}, "ask for at least 1"),
        ({"new_pieces": {"ko": 5}, "min_frequenzy": 2}, "min_frequency"),
    ],
)
def test_a_bad_recipe(values, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_section(TokenizerConfig, values, "tokenizer")


def test_missing_files(tmp_path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_base(write_base(tmp_path, 10))
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level_content()))
    with pytest.raises(UserError, match=r"config.json does not exist"):
        read_base(tmp_path)


@pytest.mark.parametrize("damaged", [b"no protobuf", b"", b"\x0a\xff\xff\xff"])
def test_a_damaged_model(damaged, tmp_path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.model"):
        read_base(write_base(tmp_path, 10, proto=damaged))


def test_a_damaged_json(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_base(tmp_path)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
def test_another_kind_of_fast_tokenizer(kind, tmp_path) -> None:
    content = {**byte_level_content(), "model": {"type": kind, "vocab": {}}}
    with pytest.raises(UserError, match=f"is a {kind} tokenizer; only BPE"):
        read_base(write_base(tmp_path, 10, content=content))


def test_a_unigram_model(tmp_path) -> None:
    with pytest.raises(UserError, match="is a UNIGRAM model; only BPE"):
        read_base(write_base(tmp_path, 600, proto=train_sentencepiece("unigram")))


def test_a_model_without_byte_fallback(tmp_path) -> None:
    with pytest.raises(UserError, match="has no byte fallback"):
        read_base(write_base(tmp_path, 600, proto=train_sentencepiece(byte_fallback=False)))


def test_a_byte_level_base_that_lacks_bytes(bl_base, tmp_path) -> None:
    """As a tokenizer that was trained on English alone without its whole alphabet."""
    content = json.loads(json.dumps(read_base(bl_base).content))
    vocabulary = content["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop(LETTERS[0xE4])
    with pytest.raises(UserError, match="without 1 of the bytes of UTF-8"):
        read_base(write_base(tmp_path, read_base(bl_base).rows, content=content))


def test_a_model_that_normalizes(tmp_path) -> None:
    with pytest.raises(UserError, match="normalizes text"):
        read_base(
            write_base(tmp_path, 600, proto=train_sentencepiece(normalization_rule_name="nmt_nfkc"))
        )


def test_files_of_two_different_tokenizers(sp_base, sp_model, tmp_path) -> None:
    content = json.loads(json.dumps(read_base(sp_base).content))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(UserError, match=r"tokenizer.model and tokenizer.json disagree on '[ab]'"):
        read_base(write_base(tmp_path, len(vocabulary), content=content, proto=sp_model))


def test_a_tokenizer_with_more_ids_than_rows(bl_base, tmp_path) -> None:
    content = read_base(bl_base).content
    with pytest.raises(UserError, match=r" at ids beyond"):
        read_base(write_base(tmp_path, len(content["model"]["vocab"]) - 1, content=content))


def test_a_role_for_a_token_that_is_not_there(bl_base, tmp_path) -> None:
    base = read_base(bl_base)
    with pytest.raises(
        UserError, match=r"names the pad_token '<pad>', which the tokenizer does not have"
    ):
        read_base(write_base(tmp_path, base.rows, content=base.content, pad_token="<pad>"))


@pytest.mark.parametrize("extended", [True, False])
def test_a_token_that_only_the_base_s_settings_name(bl_base, corpus, tmp_path, extended) -> None:
    """Loaders add it behind all others, beyond the rows."""
    base = read_base(bl_base)
    settings = {"additional_special_tokens": ["<|im_end|>", "<|tool|>"]}
    odd = write_base(tmp_path / "base", base.rows, content=base.content, **settings)
    config = CONFIG if extended else TokenizerConfig()
    with pytest.raises(UserError, match=r"tokenizer_config.json names <\|tool\|>, but the files"):
        extend_tokenizer(config, odd, corpus, tmp_path / "out")


def test_a_special_token_that_would_be_read_at_another_id(bl_base, tmp_path) -> None:
    """Special tokens in front that are not in the vocabulary:

    `tokenizers` puts them behind it without a word.
    """
    content = json.loads(json.dumps(read_base(bl_base).content))
    content["added_tokens"][0]["id"] = 3
    with pytest.raises(
        UserError, match=r"lists '<\|endoftext\|>' at id 3, but it loads as id \d+; add it"
    ):
        read_base(write_base(tmp_path, read_base(bl_base).rows, content=content))


def test_text_that_gives_no_piece_at_all(sp_base, tmp_path) -> None:
    """Korean by mistake, with a few Han letters in it."""
    corpus = source(tmp_path, "".join(f"中 질문과 대답 {i}\n" for i in range(9)))
    with pytest.raises(UserError, match="gives no new piece: it has hardly any Han letters"):
        extend_tokenizer(
            TokenizerConfig(new_pieces={"zh_tw": 10}), sp_base, corpus, tmp_path / "out"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop("vocab"), "no vocab or no merges"),
        (lambda c: c.update(added_tokens=None), "no list of added_tokens"),
        (lambda c: c["model"]["merges"].append(["q", "zzqq"]), "is damaged"),
    ],
)
def test_a_json_of_the_wrong_shape(bl_base, tmp_path, change, message) -> None:
    content = json.loads((bl_base / "tokenizer.json").read_text())
    change(content)
    with pytest.raises(UserError, match=message):
        read_base(write_base(tmp_path, 600, content=content))


def test_two_tokens_of_one_id(bl_base, tmp_path) -> None:
    base = read_base(bl_base)
    content = json.loads(json.dumps(base.content))
    content["model"]["vocab"]["a"] = content["model"]["vocab"]["b"]
    with pytest.raises(UserError, match="'a' and 'b' have the same id"):
        read_base(write_base(tmp_path, base.rows, content=content))


def test_a_chat_model_of_another_base(sp_base, bl_base) -> None:
    with pytest.raises(UserError, match="use the base that the chat model was tuned from"):
        read_chat_tokens(bl_base, read_base(sp_base))


def test_a_broken_law_leaves_the_directory_empty(sp_base, corpus, tmp_path, monkeypatch) -> None:
    from cpt_merge.tokenizer_ext.verify import invariants

    broken = invariants.Proof("nothing is broken", 1, ["'x'"])
    monkeypatch.setattr(invariants, "INVARIANTS", (lambda case: broken,))
    with pytest.raises(UserError, match="breaks the invariant that nothing is broken"):
        extend_tokenizer(CONFIG, sp_base, corpus, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_truncation_and_padding_of_a_base_are_not_of_the_vocabulary(
    bl_base, corpus, tmp_path
) -> None:
    """Saved fine-tunes often carry them."""
    content = json.loads(json.dumps(read_base(bl_base).content))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    base = write_base(tmp_path / "base", read_base(bl_base).rows, content=content)
    extend_tokenizer(CONFIG, base, corpus, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None


def test_a_chat_template_in_the_new_language(bl_base, corpus, tmp_path) -> None:
    """Its text is split anew; its special tokens keep their ids."""
    base = read_base(bl_base)
    template = "<|im_start|>system\n學生和老師的問題<|im_end|>{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chat = write_base(tmp_path / "chat", base.rows, content=base.content, chat_template=template)
    extend_tokenizer(CONFIG, bl_base, corpus, tmp_path / "out", chat)
    proofs = json.loads((tmp_path / "out" / "report.json").read_text())["proofs"]
    assert [proof["failures"] for proof in proofs if "chat templates" in proof["invariant"]] == [[]]


def test_a_chat_template_that_cannot_be_rendered(bl_base, corpus, tmp_path) -> None:
    base = read_base(bl_base)
    template = "{{ raise_exception('never') }}"
    chat = write_base(tmp_path / "chat", base.rows, content=base.content, chat_template=template)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="cannot be rendered: never"):
        extend_tokenizer(CONFIG, bl_base, corpus, tmp_path / "out", chat)
