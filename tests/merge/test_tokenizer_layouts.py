"""Tokenizers in the layouts of published checkpoints: what the merge writes is what transformers reads."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpt_merge.checkpoint.loaded_tokenizer import Loading
from cpt_merge.checkpoint.token_ids import read_tokens
from cpt_merge.core.errors import UserError
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from tests.merge.test_merge_files import load
from tests.tokenizer_ext.conftest import pieces_of
from tests.tokenizer_ext.small_tokenizers import CHAT_TEMPLATE, train_sentencepiece
from tests.tokenizer_ext.test_transformers_4 import python_4, read_with

__all__ = ["python_4"]

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> SimpleNamespace:
    """LLaMA-2-like: base and CPT with `tokenizer.model` alone, a ChatML chat model with
    `tokenizer.json` alone, as transformers saves it. CPT has a pad in `added_tokens.json`.
    """
    root, proto = tmp_path_factory.mktemp("published"), train_sentencepiece()
    rows = pieces_of(proto)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                "add_bos_token": True}  # fmt: skip
    for number, (name, count) in enumerate((("base", 0), ("cpt", 1), ("chat", 2))):
        model = LlamaForCausalLM(tiny(rows))
        with torch.no_grad():
            for values in model.parameters():
                values.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
                noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(number))
                values += number * 0.001 * noise
        if count:
            model.resize_token_embeddings(rows + count, mean_resizing=False)
        model.bfloat16().save_pretrained(root / name)
        (root / name / "tokenizer.model").write_bytes(proto)
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "cpt" / "added_tokens.json").write_text(json.dumps({"[PAD]": rows}))
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    (root / "chat" / "tokenizer.model").unlink()
    tokenizer.save_pretrained(root / "chat")
    return SimpleNamespace(root=root, rows=rows, proto=proto)


def tiny(rows: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=rows, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def family(published, tmp_path) -> SimpleNamespace:
    """A copy to edit."""
    shutil.copytree(published.root, tmp_path / "models", copy_function=os.link)
    for file in (tmp_path / "models").rglob("*token*"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    root = tmp_path / "models"
    return SimpleNamespace(
        base=root / "base", cpt=root / "cpt", chat=root / "chat", out=tmp_path / "out",
        rows=published.rows, proto=published.proto,
    )  # fmt: skip


def merge(family: SimpleNamespace, **settings: object) -> Path:
    inputs = MergeInputs(family.cpt, family.base, family.chat)
    merge_directories(MergeConfig(**settings), inputs, family.out)
    return family.out


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def extend_model(path: Path, pieces: dict[str, int]) -> None:
    """Append pieces of a type to a SentencePiece model, as the published extensions do."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece, kind in pieces.items():
        proto.pieces.add(piece=piece, score=0.0 if kind != NORMAL else -1e5, type=kind)
    path.write_bytes(proto.SerializeToString())


def assert_rows_are_those_of_chat(family: SimpleNamespace, out: Path) -> None:
    """By the ids of transformers, on both sides."""
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(family.chat)
    merged, chat = load(out), load(family.chat)
    for token in ("<|im_start|>", "<|im_end|>"):
        row, of_chat = ours.convert_tokens_to_ids(token), theirs.convert_tokens_to_ids(token)
        for name in MATRICES:
            assert torch.equal(merged[name][row], chat[name][of_chat]), (token, name)
        assert ours.decode([row]) == token


def test_sentencepiece_with_added_tokens_json_and_a_chatml_chat_model(family, capsys) -> None:
    """transformers numbered `<|im_end|>` itself, because the decoder listed the new tokens only."""
    out = merge(family)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("[PAD]") == family.rows
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == family.rows + 2
    assert tokenizer.get_vocab() == read_tokens(out).ids
    assert_rows_are_those_of_chat(family, out)


@pytest.mark.slow
def test_transformers_4_reads_the_same(family, python_4, tmp_path) -> None:
    texts = ["[PAD]", "<|im_start|>", "<|im_end|>"]
    out = merge(family)
    four = read_with(python_4, out, texts, tmp_path)
    assert four["ids"] == AutoTokenizer.from_pretrained(out)(texts)["input_ids"]
    assert [ids[-1] for ids in four["ids"]] == [family.rows + number for number in range(3)]


def test_without_transformers_here_the_output_is_loaded_in_another_process(
    family, monkeypatch
) -> None:
    out = merge(family)
    modules = {name: module for name, module in sys.modules.items() if name != "transformers"}
    monkeypatch.setattr(sys, "modules", modules)
    assert Loading(out, family.chat).differences() == []
    edit(
        out / "tokenizer_config.json", lambda settings: settings["added_tokens_decoder"].pop("0", 0)
    )
    edit(
        out / "tokenizer_config.json",
        lambda settings: settings["added_tokens_decoder"].pop(str(family.rows)),
    )
    with pytest.raises(UserError, match=r"added_tokens\.json.*'<\|im_start\|>' at \d+ instead of"):
        Loading(out, family.chat).require_none("CPT")


def test_what_transformers_would_number_otherwise_is_refused_and_names_token_and_files(
    family,
) -> None:
    """A hole between the pieces and the added tokens: loaders number the tokens without it."""
    (family.cpt / "added_tokens.json").write_text(json.dumps({"[PAD]": family.rows + 5}))
    cpt = LlamaForCausalLM.from_pretrained(family.cpt)
    cpt.resize_token_embeddings(family.rows + 6, mean_resizing=False)
    (family.cpt / "model.safetensors").unlink()
    cpt.save_pretrained(family.cpt)
    with pytest.raises(UserError, match=r"tokenizer\.model.*'\[PAD\]' at \d+ instead of \d+"):
        merge(family)
    assert not family.out.exists()


def test_a_token_of_the_settings_that_the_tokenizer_lacks_is_left_out(family, capsys) -> None:
    edit(family.cpt / "tokenizer_config.json", lambda s: s.update(pad_token="<never>"))
    out = merge(family)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == read_tokens(out).ids
    assert "'<never>'" in capsys.readouterr().err


def test_the_advice_for_tokens_that_only_the_settings_name_works(family) -> None:
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = json.loads((family.chat / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in names]
    (family.chat / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": names}
    (family.chat / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer_config\.json names <\|im_start\|>, <\|im_end"):
        merge(family)
    AutoTokenizer.from_pretrained(family.chat).save_pretrained(family.chat)
    assert_rows_are_those_of_chat(family, merge(family))


def stale_fast(family: SimpleNamespace, folder: Path) -> None:
    """A tokenizer.json of before the extension, with a pad where the first new piece is."""
    fast = AutoTokenizer.from_pretrained(family.base)
    fast.add_special_tokens({"pad_token": "<pad>"})
    fast.save_pretrained(folder / "stale")
    (folder / "tokenizer.json").write_bytes((folder / "stale" / "tokenizer.json").read_bytes())
    shutil.rmtree(folder / "stale")
    extend_model(folder / "tokenizer.model", {"學生": NORMAL, "老師": NORMAL})


def stale_model(family: SimpleNamespace, folder: Path) -> None:
    AutoTokenizer.from_pretrained(family.base).save_pretrained(folder / "fast")
    edit(folder / "fast" / "tokenizer.json", lambda c: c["model"]["vocab"].update(學生=family.rows))
    (folder / "tokenizer.json").write_bytes((folder / "fast" / "tokenizer.json").read_bytes())
    shutil.rmtree(folder / "fast")


def stale_list(family: SimpleNamespace, folder: Path) -> None:
    extend_model(folder / "tokenizer.model", {"學生": NORMAL})
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": family.rows}))


def two_lists(family: SimpleNamespace, folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": family.rows}))
    decoder = {str(family.rows): {"content": "<other>"}}
    edit(folder / "tokenizer_config.json", lambda s: s.update(added_tokens_decoder=decoder))


def stale_decoder(family: SimpleNamespace, folder: Path) -> None:
    stale_fast(family, folder)
    (folder / "tokenizer.model").unlink()
    decoder = {str(family.rows): {"content": "<other>"}}
    edit(folder / "tokenizer_config.json", lambda s: s.update(added_tokens_decoder=decoder))


def stale_vocabulary(family: SimpleNamespace, folder: Path) -> None:
    stale_fast(family, folder)
    (folder / "tokenizer.model").unlink()
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "學生": family.rows}))


@pytest.mark.parametrize("model", ["cpt", "base", "chat"])
@pytest.mark.parametrize(
    ("disagree", "files"),
    [
        (stale_fast, ("tokenizer.model", "tokenizer.json")),
        (stale_model, ("tokenizer.model", "tokenizer.json")),
        (stale_list, ("tokenizer.model", "added_tokens.json")),
        (two_lists, ("added_tokens.json", "added_tokens_decoder")),
        (stale_decoder, ("added_tokens_decoder", "tokenizer.json")),
        (stale_vocabulary, ("vocab.json", "tokenizer.json")),
    ],
)
def test_two_files_that_disagree_are_an_error_that_names_both(
    family, model, disagree, files
) -> None:
    """With a stale tokenizer.json all new rows were padding, and `<pad>` overwrote one."""
    folder = getattr(family, model)
    (folder / "tokenizer.model").write_bytes(family.proto)
    for name in ("added_tokens.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    disagree(family, folder)
    with pytest.raises(UserError) as caught:
        merge(family)
    for file in (*files, str(folder)):
        assert file in str(caught.value)
    assert not family.out.exists()


def add_beyond(folder: Path, number: int) -> None:
    """As in Gemma-3 1B: an added token whose id is the number of rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == number
    for file in ("added_tokens.json", "tokenizer.model"):
        (folder / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def test_an_added_token_beyond_the_rows_gets_one(family, tmp_path, capsys) -> None:
    for model, more in (("base", 0), ("cpt", 1), ("chat", 2)):
        add_beyond(getattr(family, model), family.rows + more)
    out = merge(family)
    tokenizer, merged = AutoTokenizer.from_pretrained(out), load(out)
    row = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    assert row == family.rows + 1
    assert max(tokenizer.get_vocab().values()) < len(merged["lm_head.weight"])
    assert_rows_are_those_of_chat(family, out)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("'<image_soft_token>'") >= 2
    extract(family.base, family.chat, tmp_path / "vector")


def test_a_piece_beyond_the_rows_is_another_tokenizer(family) -> None:
    extend_model(family.cpt / "tokenizer.model", {"學生": NORMAL, "老師": NORMAL})
    (family.cpt / "added_tokens.json").unlink()
    with pytest.raises(UserError, match=r"'老師'.* beyond them"):
        merge(family)


def test_reserved_pieces_that_a_list_of_added_tokens_renames_are_no_disagreement(family) -> None:
    """As InternLM2 names `<|im_end|>`: the SentencePiece model keeps the reserved name."""
    for folder in (family.base, family.cpt):
        extend_model(folder / "tokenizer.model", {"[UNUSED_7]": USER_DEFINED})
        (folder / "added_tokens.json").unlink(missing_ok=True)
    decoder = {str(family.rows): {"content": "<|mine|>", "special": True}}
    edit(family.cpt / "tokenizer_config.json", lambda s: s.update(added_tokens_decoder=decoder))
    tokens = read_tokens(family.cpt)
    assert tokens.ids["<|mine|>"] == family.rows
    assert "[UNUSED_7]" not in tokens.ids


def save_fast(folder: Path, content: dict, **settings: object) -> None:
    """`tokenizer.json` alone."""
    for file in ("added_tokens.json", "tokenizer.model", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def special(number: int, token: str) -> dict:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **plain, "special": True}


def test_unigram_tokenizers_meet_by_token(family) -> None:
    """Only BPE can be extended, but a merge needs token strings and no more."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]]
    pieces += [[f"▁w{number}", -float(number)] for number in range(3, family.rows)]
    shape = json.loads((family.chat / "tokenizer.json").read_text())
    shape["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    own = [special(number, token) for number, token in enumerate(("<unk>", "<s>", "</s>"))]
    chat = [
        special(family.rows + n, token) for n, token in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    save_fast(family.base, {**shape, "added_tokens": own})
    save_fast(family.cpt, {**shape, "added_tokens": [*own, special(family.rows, "[PAD]")]})
    save_fast(family.chat, {**shape, "added_tokens": own + chat}, chat_template=CHAT_TEMPLATE)
    out = merge(family)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == family.rows + 2
    assert_rows_are_those_of_chat(family, out)


def test_a_tiktoken_file_next_to_a_tokenizer_json_is_ignored(family) -> None:
    """As Meta's and Moonshot's; alone it does not tell the special tokens."""
    edit(family.cpt / "added_tokens.json", lambda content: content)
    for folder in (family.base, family.cpt):
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (family.cpt / "added_tokens.json").unlink()
    for folder in (family.base, family.cpt, family.chat):
        (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert_rows_are_those_of_chat(family, merge(family))
    (family.cpt / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"is a tiktoken file.*tokenizer\.json"):
        read_tokens(family.cpt)


def test_the_processor_s_template_and_further_templates_are_carried_over(family) -> None:
    (family.chat / "chat_template.jinja").unlink()
    (family.chat / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    folder = family.chat / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ messages }}tools")
    tokenizer = AutoTokenizer.from_pretrained(merge(family))
    assert tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tool_use": "{{ messages }}tools"}


def test_reserved_tokens_that_cpt_renamed_stay_its_own(family, capsys) -> None:
    """They were put back behind all others, with the chat model's rows."""
    for model, name in (
        ("base", "<|reserved_1|>"),
        ("cpt", "<|mine|>"),
        ("chat", "<|reserved_1|>"),
    ):
        folder = getattr(family, model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in ("added_tokens.json", "tokenizer.model"):
            (folder / file).unlink(missing_ok=True)

        def name_it(content: dict, name: str = name) -> None:
            vocabulary = content["model"]["vocab"]
            old = next(token for token, number in vocabulary.items() if number == family.rows - 1)
            del vocabulary[old]
            merges = content["model"]["merges"]
            content["model"]["merges"] = [one for one in merges if old not in (*one, "".join(one))]
            vocabulary[name] = family.rows - 1
            content["added_tokens"].append(special(family.rows - 1, name))

        edit(folder / "tokenizer.json", name_it)
    before = load(family.cpt)
    out = merge(family)
    tokenizer, merged = AutoTokenizer.from_pretrained(out), load(out)
    assert tokenizer.convert_tokens_to_ids("<|mine|>") == family.rows - 1
    assert "<|reserved_1|>" not in tokenizer.get_vocab()
    for name in MATRICES:
        assert torch.equal(merged[name][family.rows - 1], before[name][family.rows - 1])
    assert "'<|reserved_1|>'" in capsys.readouterr().err
    assert_rows_are_those_of_chat(family, out)
