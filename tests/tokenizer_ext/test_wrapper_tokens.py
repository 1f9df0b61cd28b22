"""The tokens of images and sound stay what they are when a wrapper's vocabulary grows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from cpt_merge.core.artifact import write_json
from cpt_merge.data.sources import Corpus
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.base_tokenizer import read_rows
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken, add_tokens
from tests.tokenizer_ext.small_tokenizers import (
    CHAT_TEMPLATE,
    CONFIG,
    byte_level_content,
    write_base,
)
from tests.wrappers import WRAPPERS, make_wrapper

IMAGE, BEGIN = "<image_soft_token>", "<start_of_image>"
PROCESSORS = {
    "preprocessor_config.json": {"image_processor_type": "SiglipImageProcessor", "size": 8},
    "processor_config.json": {"image_token": IMAGE, "image_seq_length": 4},
    "video_preprocessor_config.json": {"temporal_patch_size": 2},
}


def write_wrapper(folder: Path, family: str, tied: bool) -> int:
    """A wrapper with image tokens behind its words, and rows behind these; the id of an image."""
    content = byte_level_content()
    first = len(content["model"]["vocab"]) + len(content["added_tokens"])
    content = add_tokens(content, [AddedToken(first, BEGIN), AddedToken(first + 1, IMAGE)])
    settings = {
        "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE,
        "image_token": IMAGE, "boi_token": BEGIN, "extra_special_tokens": {"image_token": IMAGE, "boi_token": BEGIN},
        "processor_class": "SomeProcessor",
    }  # fmt: skip
    rows = first + 9
    write_base(folder, rows, content=content, **settings)
    make_wrapper(folder, family, tied, vocabulary=rows, image=first + 1)
    for name, values in PROCESSORS.items():
        write_json(folder / name, values)
    return first + 1


@pytest.mark.parametrize(("family", "tied"), [("gemma3", True), ("llava", False)])
def test_a_wrapper_s_vocabulary_grows_around_its_image_tokens(
    family: str, tied: bool, corpus: Corpus, tmp_path: Path
) -> None:
    base, longer, out = (tmp_path / name for name in ("base", "longer", "resized"))
    image = write_wrapper(base, family, tied)
    shutil.copytree(base, tmp_path / "chat")
    longer.mkdir()
    extend_tokenizer(CONFIG, base, corpus, longer, tmp_path / "chat")
    resize_embeddings(EmbeddingsConfig(), base, longer, out)

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids([BEGIN, IMAGE]) == [image - 1, image]
    assert tokenizer.image_token_id == image
    assert tokenizer(f"a{IMAGE}b")["input_ids"][1] == image
    before, after = (json.loads((place / "config.json").read_text()) for place in (base, out))
    assert after["text_config"].pop("vocab_size") == read_rows(out) == len(tokenizer) > image
    before["text_config"].pop("vocab_size")
    assert after == before  # with the ids of images
    for name in PROCESSORS:
        assert (out / name).read_bytes() == (base / name).read_bytes()

    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert new.keys() == old.keys()
    grown = {name for name in old if len(new[name]) != len(old[name])}
    assert len(grown) == 2 - tied
    for name, values in old.items():
        assert torch.equal(new[name][: len(values)], values), name
    architecture = getattr(transformers, WRAPPERS[family][0])
    model, loading = architecture.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert len(model.get_output_embeddings().weight) == len(tokenizer)
