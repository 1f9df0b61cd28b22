"""GGUF of a model whose byte-level vocabulary was extended, by llama.cpp's own converter.

    python recipes/convert_to_gguf.py LLAMA_CPP BASE MODEL [options of convert_hf_to_gguf.py]

The converter finds out how a byte-level tokenizer splits text into words (`tokenizer.ggml.pre`)
from a hash of the token ids of a text that contains Chinese. New pieces change those ids, and then
it stops with "BPE pre-tokenizer was not recognized". An extension leaves the splitting as it is, so
here the converter hashes the ids of the base's tokenizer. LLAMA_CPP is a checkout of llama.cpp with
its requirements installed, BASE the base model or its tokenizer.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

SPLITTING = ("normalizer", "pre_tokenizer")  # of tokenizer.json


def identify_by(base: Path, owner: Any) -> None:
    """Let the class of the converter that hashes token ids hash those of the base."""
    from transformers import AutoTokenizer

    identify = owner.get_vocab_base_pre
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    owner.get_vocab_base_pre = lambda self, _extended: identify(self, tokenizer)


def problem(llama_cpp: Path, base: Path, model: Path) -> str | None:
    """What is wrong with the arguments: both tokenizers must split text in the same way."""
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        return f"{llama_cpp} has no convert_hf_to_gguf.py; name a checkout of llama.cpp."
    files = [folder / "tokenizer.json" for folder in (base, model)]
    for file in files:
        if not file.is_file():
            return f"{file} does not exist; name a folder with a byte-level tokenizer."
    one, other = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for name in SPLITTING:
        if one.get(name) != other.get(name):
            return f"{name} differs in {files[0]} and {files[1]}; name the base of this model."
    return None


def main() -> int:
    """Check, and hand over to the converter."""
    if len(sys.argv) < 4:
        print(__doc__, file=sys.stderr)
        return 2
    llama_cpp, base, model = map(Path, sys.argv[1:4])
    if sentence := problem(llama_cpp, base, model):
        print(sentence, file=sys.stderr)
        return 2
    sys.path.insert(0, str(llama_cpp))
    converter = importlib.import_module("convert_hf_to_gguf")
    text_models = sys.modules.get("conversion.base", converter)  # older ones are one file
    identify_by(base, text_models.TextModel)
    sys.argv = ["convert_hf_to_gguf.py", str(model), *sys.argv[4:]]
    converter.main()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
