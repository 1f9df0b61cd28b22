"""transformers 4.57 reads an extended tokenizer as transformers 5 does: the real one, in an
environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cpt_merge.tokenizer_ext.extend import extend_tokenizer
from cpt_merge.tokenizer_ext.verify.samples import CODE, SENTENCES, mixed_texts
from tests.real_tokenizers import BASES
from tests.tokenizer_ext.small_tokenizers import CONFIG

PACKAGES = [
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface-hub==0.36.0",
    "jinja2",
    "sentencepiece",
    "protobuf",
]
ENVIRONMENT = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "cpt-merge-tests"
    / "transformers-4.57.6"
)
READ = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(open(sys.argv[2], encoding="utf-8"))
ids = tokenizer(texts)["input_ids"]
json.dump({
    "class": type(tokenizer).__name__, "size": len(tokenizer), "ids": ids,
    "texts": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
    "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
}, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="session")
def python_4() -> Path:
    """The interpreter of an environment with transformers 4.57, made once and kept in the user's
    cache.
    """
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "done"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
            check=True,
        )
        done.touch()
    return python


def read_with(python: Path, tokenizer: Path, texts: list[str], folder: Path) -> dict:
    (folder / "texts.json").write_text(json.dumps(texts))
    subprocess.run(
        [python, "-c", READ, tokenizer, folder / "texts.json", folder / "read.json"], check=True
    )
    return json.loads((folder / "read.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "mistral_v3", "qwen"])
def test_both_read_the_same(name, python_4, corpus, tmp_path) -> None:
    BASES[name](tmp_path / "base")
    extend_tokenizer(CONFIG, tmp_path / "base", corpus, tmp_path / "out")
    texts = [
        *CODE,
        *(line for lines in SENTENCES.values() for line in lines),
        *mixed_texts(["學生", " 질문"], 3_000),
    ]
    four = read_with(python_4, tmp_path / "out", texts, tmp_path)
    five = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert four["class"] == "PreTrainedTokenizerFast"
    assert four["size"] == len(five)
    ids = five(texts)["input_ids"]
    assert four["ids"] == ids
    assert four["texts"] == [five.decode(one, skip_special_tokens=True) for one in ids]
    assert four["special"] == [five.bos_token, five.eos_token, five.pad_token]
