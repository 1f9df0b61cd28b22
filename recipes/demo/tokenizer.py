"""A small LLaMA-2-like tokenizer:

SentencePiece BPE with byte fallback, and the same thing as a fast tokenizer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

BOS, EOS, UNK = "<s>", "</s>", "<unk>"

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Roles must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]\\n' -}}
{%- else -%}
{{- message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


def train_sentencepiece(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train LLaMA-2's kind of model: BPE, byte fallback, digits apart, no normalisation. Returns it
    serialised.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def to_fast_tokenizer(model: bytes) -> Tokenizer:
    """The fast tokenizer that gives the ids of the SentencePiece model, with `<s>` in front."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=_merges(processor),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, pieces[BOS])]
    )
    return tokenizer


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every way to build a piece of two others, best-scored piece first: the order in which
    SentencePiece merges.
    """
    ids = range(processor.vocab_size())
    mergeable = [
        i
        for i in ids
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    pieces = {processor.id_to_piece(index) for index in mergeable}
    merges = []
    for index in sorted(mergeable, key=lambda index: -processor.get_score(index)):
        piece = processor.id_to_piece(index)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in pieces and right in pieces]
    return merges


def write_tokenizer(model: bytes, folder: Path, *, context: int, chat: bool) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json; `context` is in tokens."""
    (folder / "tokenizer.model").write_bytes(model)
    to_fast_tokenizer(model).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
    )
