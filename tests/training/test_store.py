"""The token store holds every document, exactly."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from core.errors import UserError
from core.sources import Corpus, Source
from training.store import Store, write_store


def test_every_document_is_there_with_prefix_eos_and_its_bytes(store: Path, corpus: Corpus, model: Path) -> None:
    opened, tokenizer = Store.open(store), AutoTokenizer.from_pretrained(model)
    for source, info in zip(corpus.sources, opened.info.sources, strict=True):
        for split in ("train", "heldout"):
            texts = list(corpus.documents(source, split))
            documents = opened.documents(info, split)
            assert len(documents) == len(texts) > 10
            for number, text in enumerate(texts):
                ids = documents.tokens[documents.starts[number] : documents.starts[number + 1]].tolist()
                # this tokenizer adds no bos of its own, so a document starts with eos
                assert ids[0] == ids[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(ids[1:-1]) == text
                assert documents.bytes[number] == len(text.encode())


def test_counts_are_in_store_json(store: Path) -> None:
    opened = Store.open(store)
    for info in opened.info.sources:
        documents = opened.documents(info, "train")
        assert info.train.documents == len(documents)
        assert info.train.tokens == documents.starts[-1] == len(documents.tokens)
        assert info.train.bytes == documents.bytes.sum()


def test_a_store_of_another_tokenizer_is_refused(store: Path, tmp_path: Path, model: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text((model / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="made with another tokenizer"):
        Store.open(store).check_tokenizer(tmp_path)


def test_a_truncated_token_file_is_refused(tmp_path: Path, corpus: Corpus, model: Path) -> None:
    write_store(corpus, model, tmp_path, batch_documents=50)
    opened = Store.open(tmp_path)
    path = tmp_path / opened.info.sources[0].folder / "train" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens\.bin has"):
        opened.documents(opened.info.sources[0], "train")


def test_a_source_without_text_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    corpus = Corpus(sources=[Source(path=str(tmp_path / "empty.jsonl"), language="ko")])
    with pytest.raises(UserError, match=r"empty\.jsonl yields no training text"):
        write_store(corpus, model, tmp_path / "store", 10)
