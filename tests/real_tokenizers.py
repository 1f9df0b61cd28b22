"""Tokenizers of real models, taken from installed packages without importing them (they need
others).

    mistral         mistral-common, `tokenizer.model.v1` (Apache-2.0): SentencePiece BPE with byte fallback, 32,000 pieces
    mistral_v3      the same with control tokens in front, 32,768 pieces
    qwen            dashscope, `qwen.tiktoken` (Apache-2.0): byte-level BPE, 151,643 ranks, more rows than ids
    tekken          mistral-common, `tekken_240718.json` (Apache-2.0): byte-level BPE whose special tokens come first

`python -m tests.real_tokenizers NAME DIR` writes one as a model directory without weights.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from cpt_merge.core.byte_alphabet import LETTERS
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, Content

QWEN_ROWS = 151_936  # of Qwen's published matrices; the tokenizer has fewer ids
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def data_file(package: str, path: str) -> Path:
    """A file of a package whose code cannot be imported: transformers would do that if it could.

    Raises `FileNotFoundError` where the package is not there.
    """
    folder = Path(sys.prefix) / "tokenizer-files" / package
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; run `make test`, which installs it")
    return folder / path


def write_mistral(folder: Path) -> None:
    """`tokenizer.model` only."""
    model = data_file("mistral_common", "data/tokenizer.model.v1")
    _write(
        folder,
        32_000,
        proto=model.read_bytes(),
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
    )


def write_mistral_v3(folder: Path) -> None:
    """`tokenizer.model` only, with 768 more pieces."""
    model = data_file("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3")
    _write(
        folder,
        32_768,
        proto=model.read_bytes(),
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
    )


def write_qwen(folder: Path) -> None:
    """Special tokens in `added_tokens` only, NFC, 293 rows without a token."""
    lines = data_file("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in lines if line)
    }
    specials = [
        AddedToken(len(ranks) + n, f"<|{name}|>")
        for n, name in enumerate(("endoftext", "im_start", "im_end"))
    ]
    content = byte_level(ranks, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + WORDS, specials)
    content["normalizer"] = {"type": "NFC"}
    _write(folder, QWEN_ROWS, content=content, eos_token="<|im_end|>", chat_template=CHATML)


def write_tekken(folder: Path) -> None:
    """131,072 tokens, the first 1,000 of them special; `ignore_merges` as LLaMA-3 has it."""
    tekken = json.loads(
        data_file("mistral_common", "data/tekken_240718.json").read_text(encoding="utf-8")
    )
    settings = tekken["config"]
    special, size = settings["default_num_special_tokens"], settings["default_vocab_size"]
    entries = tekken["vocab"][: size - special]
    ranks = {base64.b64decode(entry["token_bytes"]): special + entry["rank"] for entry in entries}
    tokens = [AddedToken(id_, f"<SPECIAL_{id_}>") for id_ in range(special)]
    content = byte_level(ranks, settings["pattern"], tokens)
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"] |= {token.content: token.id for token in tokens}
    _write(folder, size, content=content)


BASES: Mapping[str, Callable[[Path], None]] = {
    "mistral": write_mistral, "mistral_v3": write_mistral_v3, "qwen": write_qwen, "tekken": write_tekken,
}  # fmt: skip


def byte_level(ranks: Mapping[bytes, int], pattern: str, specials: list[AddedToken]) -> Content:
    """The `tokenizer.json` of a tiktoken vocabulary. tiktoken merges whatever two neighbours spell
    a token.
    """
    names = {token: "".join(LETTERS[byte] for byte in token) for token in ranks}
    merges = [
        [names[left], names[right]]
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in sorted(
            (
                (token[:cut], token[cut:])
                for cut in range(1, len(token))
                if token[:cut] in ranks and token[cut:] in ranks
            ),
            key=lambda split: (ranks[split[0]], ranks[split[1]]),
        )
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [asdict(token) for token in specials],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges,
        },
    }  # fmt: skip


def _write(
    folder: Path,
    rows: int,
    *,
    content: Content | None = None,
    proto: bytes | None = None,
    **settings: object,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "model_type": "llama"}))
    if content is not None:
        (folder / "tokenizer.json").write_text(
            json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )
    if proto is not None:
        (folder / "tokenizer.model").write_bytes(proto)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    BASES[sys.argv[1]](Path(sys.argv[2]))
