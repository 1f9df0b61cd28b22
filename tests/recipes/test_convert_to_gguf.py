"""What the recipe changes in llama.cpp's converter. That is not installed here, so a stand-in has its
names; tests/families runs the real one where there is one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
ROOT = Path(__file__).parents[2]
BASE = """
class gguf:
    class SpecialVocab:
        def __init__(self):
            self.add_special_token = {}

        def add_to_gguf(self, writer):
            writer["bos"] = self.add_special_token.get("bos")

class Writer(dict):
    def add_add_space_prefix(self, value):
        self["space"] = value

class ModelBase:
    supports_mtp_export = True

    @staticmethod
    def load_hparams(folder, is_mistral_format):
        return {"rope_parameters": {"partial_rotary_factor": 0.5}, "layer_types": ["new"], "text": {"a": 1, "b": 2}}

class TextModel(ModelBase):
    def __init__(self, folder):
        self.folder = folder

    def get_vocab_base_pre(self, tokenizer):
        ids = tokenizer.encode("我想在apple工作")
        if len(ids) != 20:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return "known"

    def set_vocab(self):
        self.pieces = self._create_vocab_sentencepiece()

    def _create_vocab_sentencepiece(self):
        if not (self.folder / "tokenizer.model").exists():
            raise FileNotFoundError("no tokenizer.model")
        return [b"<unk>", b"<turn>", b"x", b"<tool>"], [0.0] * 4, [2, 1, 1, 1]

    def _set_vocab_gpt2(self):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.pieces = (self.get_vocab_base_pre(tokenizer), len(tokenizer))
"""
CONVERTER = """
import json, sys
from pathlib import Path
from conversion.base import TextModel, Writer, gguf

def get_model_class(name):
    return TextModel

def main():
    model = TextModel(Path(sys.argv[1]))
    model.set_vocab()
    config = TextModel.load_hparams(model.folder, is_mistral_format=False)
    written = Writer()
    gguf.SpecialVocab().add_to_gguf(written)
    print(json.dumps([repr(model.pieces), {**config, **written}, sys.argv[2:]]))

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


def converted(llama_cpp: Path, base: Path, model: Path, *options: str) -> list[Any]:
    """Pieces, config and options of the converter."""
    done = run(ROOT / "recipes/convert_to_gguf.py", llama_cpp, base, model, *options)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def write_model(folder: Path, tensor: str) -> None:
    config = {"architectures": ["A"], "layer_types": ["old"], "text": {"b": 3}, "head_dim": None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({tensor: torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.slow
def test_the_base_identifies_an_extended_tokenizer(llama_cpp: Path, tmp_path: Path) -> None:
    base, model = (tokenizer(tmp_path / name, name == "model") for name in ("base", "model"))
    write_model(model, "model.norm.weight")
    alone = run(llama_cpp / "convert_hf_to_gguf.py", model)
    assert "no tokenizer.model" in alone.stderr
    pieces, config, options = converted(llama_cpp, base, model, "--outtype", "f16")
    assert pieces == "('known', 258)"
    assert options == ["--outtype", "f16", "--no-mtp"]
    assert config == {
        "architectures": ["A"], "layer_types": ["old"], "text": {"a": 1, "b": 3}, "rotary_pct": 0.5,
        "rope_parameters": {"partial_rotary_factor": 0.5}, "bos": False,
    }  # fmt: skip
    write_model(model, "mtp.norm.weight")
    pieces, _, options = converted(llama_cpp, base, model, "--pre", "gpt-2")
    assert (pieces, options) == ("('gpt-2', 258)", [])


@pytest.mark.slow
def test_added_tokens_of_sentencepiece_are_those_of_tokenizer_json(
    llama_cpp: Path, tmp_path: Path
) -> None:
    model = tokenizer(tmp_path / "model", True)
    write_model(model, "model.norm.weight")
    (model / "tokenizer.model").touch()
    content = json.loads((model / "tokenizer.json").read_text())
    added = {0: ("<unk>", True), 1: ("<turn>", True), 3: ("<tool>", False), 4: ("<beyond>", True)}
    content["added_tokens"] = [
        {"id": number, "content": text, "special": special, **FLAGS}
        for number, (text, special) in added.items()
    ]
    (model / "tokenizer.json").write_text(json.dumps(content))
    pieces, written, _ = converted(llama_cpp, tmp_path, model)
    assert pieces == repr(
        ([b"<unk>", b"<turn>", b"x", b"<tool>"], [0.0, -1000.0, 0.0, -1000.0], [2, 3, 1, 4])
    )
    assert (written["bos"], written["space"]) == (False, False)


def test_what_cannot_be_right_is_one_sentence(llama_cpp: Path, tmp_path: Path) -> None:
    base, model = tokenizer(tmp_path / "base", False), tokenizer(tmp_path / "model", True)
    other = tokenizer(tmp_path / "other", False, use_regex=False)
    write_model(model, "model.norm.weight")
    assert json.loads((other / "tokenizer.json").read_text())["pre_tokenizer"]["use_regex"] is False
    for arguments, sentence in (
        ((tmp_path, base, model), "name a checkout of llama.cpp"),
        ((llama_cpp, base, other), "has no config.json"),
        ((llama_cpp, tmp_path, model), "name a folder with a byte-level tokenizer"),
        ((llama_cpp, other, model), "pre_tokenizer differs in"),
        ((llama_cpp, base), "python recipes/convert_to_gguf.py LLAMA_CPP BASE MODEL"),
    ):
        done = run(ROOT / "recipes/convert_to_gguf.py", *arguments)
        assert done.returncode == 2
        assert sentence in done.stderr
