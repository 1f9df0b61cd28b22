"""The tokenizer of a directory is the one that transformers loads, however it was read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from cpt_merge.checkpoint import tokenizer_backend
from cpt_merge.checkpoint.tokenizer_backend import TokenizerBackend
from cpt_merge.core.errors import UserError
from cpt_merge.core.package import PACKAGE
from tests.real_tokenizers import BASES

TEXT = "  We go home.\n가나다 天地玄黃 </s> <|im_end|>\t"


def small() -> Tokenizer:
    """Words of letters, two special tokens, and one added token that is none."""
    words = {letter: number for number, letter in enumerate("abcdefg ")}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="never")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("cab", lstrip=True)])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | settings
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def require_same(found: TokenizerBackend, directory: Path) -> None:
    """As transformers, apart from what is put in front: ids, eos, decoded text."""
    expected = AutoTokenizer.from_pretrained(directory)
    front = expected("", add_special_tokens=True)["input_ids"]
    assert (found.prefix, found.eos) == (front[0] if front else None, expected.eos_token_id)
    theirs = expected.backend_tokenizer
    assert found.tokenizer.get_vocab(True) == theirs.get_vocab(True)
    for special in (False, True):
        found.tokenizer.encode_special_tokens = theirs.encode_special_tokens = special
        for text in (TEXT, "abc cab </s>de <s>f", ""):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert found.tokenizer.encode(text, add_special_tokens=False).ids == ids
            assert found.tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", ["mistral", pytest.param("qwen", marks=pytest.mark.slow)])
def test_a_real_tokenizer_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    BASES[name](tmp_path)
    require_same(TokenizerBackend.read(tmp_path), tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": settings["eos_token"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = tokenizer_backend._as_it_is(tmp_path)
    assert read is not None
    require_same(read, tmp_path)


@pytest.mark.parametrize(
    ("settings", "as_it_is"),
    [
        ({}, True),
        ({"tokenizer_class": "TokenizersBackend", "bos_token": "<s>"}, True),
        ({"eos_token": {"content": "</s>", "__type": "AddedToken"}}, True),
        ({"is_local": True, "local_files_only": False}, True),  # transformers 5 writes them
        ({"bos_token": "<s>", "add_bos_token": True}, False),
        ({"add_eos_token": True}, False),
        ({"pad_token": "<pad>"}, False),  # gets a new id
        ({"additional_special_tokens": ["cab", "<more>"]}, False),
        ({"added_tokens_decoder": {"3": {"content": "d", "special": False}}}, False),
        ({"unk_token": "a"}, False),  # becomes an added token
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": None}, False),
        ({"eos_token": "cab"}, False),  # becomes a special one
        ({"extra_special_tokens": {"tool": "cab"}}, False),
        ({"image_token": "<img>"}, False),  # gets a new id
        ({"padding_side": "left", "split_special_tokens": True}, True),
    ],
)
def test_tokenizer_json_is_taken_as_it_is_only_where_transformers_does_so(
    settings: dict[str, Any], as_it_is: bool, tmp_path: Path
) -> None:
    write(tmp_path, small(), **settings)
    assert (tokenizer_backend._as_it_is(tmp_path) is not None) == as_it_is
    require_same(TokenizerBackend.read(tmp_path), tmp_path)


def test_a_post_processor_and_truncation_of_the_file(tmp_path: Path) -> None:
    tokenizer = small()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.enable_truncation(3)
    write(tmp_path, tokenizer)
    read = tokenizer_backend._as_it_is(tmp_path)
    assert read is not None
    assert read.prefix == tokenizer.token_to_id("<s>")
    assert len(read.tokenizer.encode("abcdefg", add_special_tokens=False).ids) == 7
    assert len(pickle.loads(pickle.dumps(read)).tokenizer.encode("abcdefg").ids) == 8


@pytest.mark.parametrize(
    ("files", "settings", "as_it_is"),
    [
        ({"special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": True}}}, {}, True),
        ({"special_tokens_map.json": {"eos_token": "<s>"}}, {}, False),
        ({"special_tokens_map.json": {"pad_token": "<pad>"}}, {}, False),
        ({"added_tokens.json": {"<more>": 11}}, {}, False),
        ({"tokenizer.4.0.0.json": ...}, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, False),
    ],
)
def test_other_files_that_transformers_reads_count(
    files: dict[str, Any], settings: dict[str, Any], as_it_is: bool, tmp_path: Path
) -> None:
    write(tmp_path, small(), **settings)
    other = small()
    other.add_special_tokens(["<more>"])
    for name, content in files.items():
        text = other.to_str() if content is ... else json.dumps(content)
        (tmp_path / name).write_text(text)
    assert (tokenizer_backend._as_it_is(tmp_path) is not None) == as_it_is
    require_same(TokenizerBackend.read(tmp_path), tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "tru', b'"\xff"', b"[]", b"{}"])
def test_a_damaged_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, small()) / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} cannot be read .+ copy or download it again\.$"):
        TokenizerBackend.read(tmp_path)


def test_a_config_may_choose_another_class(tmp_path: Path) -> None:
    write(tmp_path, small())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert tokenizer_backend._as_it_is(tmp_path) is None


def test_a_models_own_tokenizer_code_is_refused_in_a_sentence(tmp_path: Path) -> None:
    own = {"AutoTokenizer": ["own.Own", None]}
    write(tmp_path, small(), tokenizer_class="Own", auto_map=own)
    (tmp_path / "own.py").write_text("raise AssertionError('it has run')\n")
    with pytest.raises(UserError, match=r"cannot load the tokenizer in .* without the model's own"):
        TokenizerBackend.read(tmp_path)


def test_without_transformers_here_another_process_loads_it(tmp_path: Path) -> None:
    """It gives what this process gives, and its refusals are refusals here."""
    write(tmp_path, small(), bos_token="<s>", add_bos_token=True)
    script = (
        "import sys; from pathlib import Path\n"
        "from cpt_merge.checkpoint.tokenizer_backend import TokenizerBackend\n"
        "read = TokenizerBackend.read(Path(sys.argv[1]))\n"
        "print(read.prefix, read.eos, read.tokenizer.encode('abc').ids)\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    here = TokenizerBackend.read(tmp_path)
    assert (
        done.stdout.split("\n")[0] == f"{here.prefix} {here.eos} {here.tokenizer.encode('abc').ids}"
    )
    write(tmp_path, small(), eos_token=None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert "UserError: the tokenizer in" in done.stderr
    with pytest.raises(UserError, match="has no eos token"):
        TokenizerBackend.read(tmp_path)
