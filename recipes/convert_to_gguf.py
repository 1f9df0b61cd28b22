"""GGUF of a merged model, by llama.cpp's own converter.

    python recipes/convert_to_gguf.py LLAMA_CPP BASE MODEL [--pre NAME] [OPTIONS]

LLAMA_CPP is a checkout of llama.cpp, BASE the base model or its tokenizer; OPTIONS are those of
convert_hf_to_gguf.py. The converter alone does not convert every MODEL:

- It finds out how a byte-level tokenizer splits text into words (`tokenizer.ggml.pre`) from a hash
  of the token ids of a text that contains Chinese. New pieces change those ids, and then it stops
  with "BPE pre-tokenizer was not recognized". An extension leaves the splitting as it is, so here
  the converter hashes the ids of the base's tokenizer. If it does not know the base either, `--pre`
  names the splitting, as llama.cpp calls it.
- It reads from tokenizer_config.json which pieces of `tokenizer.model` are added tokens. Neither
  transformers 5 nor an extension writes them there, so texts would contain Gemma's
  `<start_of_turn>` as letters. Here it reads tokenizer.json.
- It reads there, too, whether texts begin with bos or a space. Here the tokenizer is asked.
- Of Phi-3 and Gemma it expects `tokenizer.model`, although the tokenizer may be byte-level
  (Phi-4-mini).
- Of Qwen3-Next and Qwen3.5 it expects the layers that predict further tokens, which training leaves
  out.
- Transformers 5 renames what it reads from config.json (`rotary_pct` of GPT-NeoX, `layer_types` of
  Granite-4), and then the converter does not find it. Here it reads config.json itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

SPLITTING = ("normalizer", "pre_tokenizer")  # of tokenizer.json
SENTENCEPIECE = "tokenizer.model"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens in GGUF
FURTHER_TOKENS = ("mtp.", "model.mtp.", "language_model.mtp.")  # prefixes of tensors


def identify_by(base: Path, name: str | None, owner: Any) -> None:
    """Let the converter hash the ids of the base instead of the model's, or take `name`."""
    from transformers import AutoTokenizer

    identify = owner.get_vocab_base_pre
    tokenizer = None if name else AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    owner.get_vocab_base_pre = lambda self, _extended: name or identify(self, tokenizer)


def accept_byte_level(owner: Any) -> None:
    """Let a class of the converter that finds no `tokenizer.model` take `tokenizer.json`."""
    expected = owner.set_vocab

    def set_vocab(self: Any) -> None:
        try:
            expected(self)
        except (FileNotFoundError, ValueError) as error:
            if SENTENCEPIECE not in str(error):
                raise
            self._set_vocab_gpt2()

    owner.set_vocab = set_vocab


def as_published(found: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json, with the values that are written there."""
    config = dict(found)
    for name, value in written.items():
        inner = found.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            config[name] = as_published(inner, value)
        elif value is not None:
            config[name] = value
    return config


def complete_config(owner: Any) -> None:
    """Let the converter read config.json as it was published, also with transformers 5."""
    read = owner.load_hparams

    def load_hparams(model: Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        found = read(model, *arguments, **named)
        rope = found.get("rope_parameters") or {}
        config = {"rotary_pct": rope.get("partial_rotary_factor", 1.0), **found}
        written = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return as_published(config, written)

    owner.load_hparams = staticmethod(load_hparams)


def know_added_tokens(model: Path, owner: Any) -> None:
    """Let the converter find the added tokens of `tokenizer.model` in tokenizer.json."""
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    create = owner._create_vocab_sentencepiece

    def create_vocab(self: Any) -> tuple[list[bytes], list[float], list[int]]:
        pieces, scores, kinds = create(self)
        for token in content.get("added_tokens", []):
            number, text = token["id"], token["content"]
            if number < len(pieces) and kinds[number] != UNKNOWN:
                kinds[number] = CONTROL if token["special"] else USER_DEFINED
                pieces[number] = (text if token["special"] else text.replace("▁", " ")).encode()
                scores[number] = -1000.0
        return pieces, scores, kinds

    owner._create_vocab_sentencepiece = create_vocab


def state_prefixes(model: Path, owner: Any) -> None:
    """Write whether texts begin with bos or a space, which llama.cpp guesses otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    spaced = tokenizer.tokenize("a")[0].startswith("▁")
    add = owner.add_to_gguf

    def add_to_gguf(self: Any, writer: Any, *arguments: Any) -> None:
        self.add_special_token["bos"] = bos
        if (model / SENTENCEPIECE).is_file():
            writer.add_add_space_prefix(spaced)
        add(self, writer, *arguments)

    owner.add_to_gguf = add_to_gguf


def is_byte_level(model: Path) -> bool:
    """Whether the pieces of tokenizer.json are made of bytes."""
    if (model / SENTENCEPIECE).is_file():
        return False
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])


def predicts_further_tokens(model: Path) -> bool:
    """Whether the files contain layers that predict more than the next token."""
    names: list[str] = []
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            names += json.loads(stream.read(size))
    return any(name.startswith(FURTHER_TOKENS) for name in names)


def problem(llama_cpp: Path, base: Path, model: Path) -> str | None:
    """What is wrong with the arguments: both tokenizers must split text in the same way."""
    for needed in ("convert_hf_to_gguf.py", "conversion/base.py"):
        if not (llama_cpp / needed).is_file():
            return f"{llama_cpp} has no {needed}; name a checkout of llama.cpp, from 2026 or later."
    if not (model / "config.json").is_file():
        return f"{model} has no config.json; name the folder of a model."
    if (model / SENTENCEPIECE).is_file():
        return None  # nothing is hashed
    files = [folder / "tokenizer.json" for folder in (base, model)]
    for file in files:
        if not file.is_file():
            return f"{file} does not exist; name a folder with a byte-level tokenizer."
    one, other = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for name in SPLITTING:
        if one.get(name) != other.get(name):
            return f"{name} differs in {files[0]} and {files[1]}; name the base of this model."
    return None


def prepare(converter: Any, base: Path, model: Path, pre: str | None) -> list[str]:
    """Change the classes of the converter for this model; the options that it needs."""
    text_models = sys.modules["conversion.base"]
    if not (model / SENTENCEPIECE).is_file():
        identify_by(base, pre, text_models.TextModel)
    elif (model / "tokenizer.json").is_file():
        know_added_tokens(model, text_models.TextModel)
    complete_config(text_models.ModelBase)
    state_prefixes(model, text_models.gguf.SpecialVocab)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        owner = converter.get_model_class(config["architectures"][0])
    except NotImplementedError:
        return []  # the converter says so
    if is_byte_level(model):
        accept_byte_level(owner)
    can_leave_out = owner.supports_mtp_export and not predicts_further_tokens(model)
    return ["--no-mtp"] if can_leave_out else []


def main() -> int:
    """Check, and hand over to the converter."""
    if len(sys.argv) < 4:
        print(__doc__, file=sys.stderr)
        return 2
    llama_cpp, base, model = map(Path, sys.argv[1:4])
    if sentence := problem(llama_cpp, base, model):
        print(sentence, file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pre")
    own, options = parser.parse_known_args(sys.argv[4:])
    sys.path.insert(0, str(llama_cpp))
    converter = importlib.import_module("convert_hf_to_gguf")
    options += prepare(converter, base, model, own.pre)
    sys.argv = ["convert_hf_to_gguf.py", str(model), *options]
    converter.main()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
