"""llama.cpp's converter knows an extended byte-level tokenizer by its base. The real converter is not
installed here (docs/families.md says what it did); a stand-in has its names and identifies alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        ids = tokenizer.encode("我想在apple工作")
        if len(ids) != 20:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return "known"
"""
CONVERTER = """
import sys
from transformers import AutoTokenizer
from conversion.base import TextModel

def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    print(TextModel().get_vocab_base_pre(tokenizer), len(tokenizer), sys.argv[2:])

if __name__ == "__main__":
    main()
"""


def tokenizer(folder: Path, merged: bool, **pre: bool) -> Path:
    """Bytes alone, and a piece for the first character if `merged`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = pre_tokenizers.ByteLevel(False).pre_tokenize_str("我")[0][0]
    pieces = [first[:2], first] if merged else []
    merges = [(first[0], first[1]), (first[:2], first[2])] if merged else []
    vocabulary = {piece: number for number, piece in enumerate([*letters, *pieces])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(False, **pre)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "__init__.py").write_text("")
    (folder / "conversion" / "base.py").write_text(BASE)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_base_identifies_an_extended_tokenizer(llama_cpp: Path, tmp_path: Path) -> None:
    base, model = (tokenizer(tmp_path / name, name == "model") for name in ("base", "model"))
    alone = run(llama_cpp / "convert_hf_to_gguf.py", model)
    assert "BPE pre-tokenizer was not recognized" in alone.stderr
    done = run(ROOT / "recipes/convert_to_gguf.py", llama_cpp, base, model, "--outtype", "f16")
    assert done.stdout.strip() == "known 258 ['--outtype', 'f16']", done.stderr


def test_what_cannot_be_right_is_one_sentence(llama_cpp: Path, tmp_path: Path) -> None:
    base, model = tokenizer(tmp_path / "base", False), tokenizer(tmp_path / "model", True)
    other = tokenizer(tmp_path / "other", False, use_regex=False)
    assert json.loads((other / "tokenizer.json").read_text())["pre_tokenizer"]["use_regex"] is False
    for arguments, sentence in (
        ((tmp_path, base, model), "name a checkout of llama.cpp"),
        ((llama_cpp, tmp_path, model), "name a folder with a byte-level tokenizer"),
        ((llama_cpp, other, model), "pre_tokenizer differs in"),
        ((llama_cpp, base), "python recipes/convert_to_gguf.py LLAMA_CPP BASE MODEL"),
    ):
        done = run(ROOT / "recipes/convert_to_gguf.py", *arguments)
        assert done.returncode == 2
        assert sentence in done.stderr
