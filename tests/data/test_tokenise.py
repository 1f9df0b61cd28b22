"""Text to token store: exact documents, the same bytes for any division, continued after a kill."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.checkpoints import word_tokenizer
from cpt_merge.core.artifact import Staging
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.data import parts as parts_module
from cpt_merge.data import tokenise
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.packing import PackedDocuments
from cpt_merge.data.selection import first_occurrences
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.store import Store
from cpt_merge.data.tokenise import Plan, blocks, write_store
from tests.training.conftest import WORDS, make_model, write_text


def jsonl(path: Path, texts: list[str | None]) -> Source:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        encoding="utf-8",
    )
    return Source(path=str(path), language="ko")


def digest(directory: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        found.update(f"{file.relative_to(directory)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def ids_of(store: Path, split: Any = "train", source: int = 0) -> list[list[int]]:
    opened = Store.open(store)
    documents = opened.documents(opened.info.sources[source], split)
    return [part.tolist() for part in np.split(documents.tokens, documents.starts[1:-1])]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 20 documents, so that a small corpus has many; for work in this process."""
    monkeypatch.setattr(tokenise, "BLOCK_DOCUMENTS", 20)


def test_every_document_is_there_with_prefix_eos_and_its_bytes(
    store: Path, corpus: Corpus, model: Path
) -> None:
    opened, tokenizer = Store.open(store), AutoTokenizer.from_pretrained(model)
    for source, info in zip(corpus.sources, opened.info.sources, strict=True):
        for split in ("train", "heldout"):
            texts = list(corpus.documents(source, split))
            documents = opened.documents(info, split)
            assert len(documents) == len(texts) > 10
            for number, text in enumerate(texts):
                ids = documents.tokens[
                    documents.starts[number] : documents.starts[number + 1]
                ].tolist()
                # this tokenizer adds no bos of its own, so a document starts with eos
                assert ids[0] == ids[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(ids[1:-1]) == text
                assert documents.bytes[number] == len(text.encode())


def test_real_processes_write_the_same_bytes_as_one(
    store: Path, corpus: Corpus, model: Path, tmp_path: Path
) -> None:
    write_store(corpus, model, tmp_path / "store", processes=2)
    assert digest(tmp_path / "store") == digest(store)


def rank(number: int, size: int, workers: int, corpus: Corpus, model: Path, out: Path) -> None:
    """One node of several, with blocks of 20 documents."""
    tokenise.BLOCK_DOCUMENTS = 20
    world = World(number, size, 0, "slurm")
    for worker in range(
        workers
    ):  # the workers of one node, one after the other, as each would run in its process
        plan = Plan.make(corpus, model, model, deduplicate=True)
        parts = tokenise.blocks_of(out, plan)
        store = Staging(out, tokenise._digest(plan))
        tokenise._open_parts(parts, store, plan, world)
        tokenise.tokenise_share(
            plan, range(len(plan.pieces)), parts.directory, world, workers, worker, lambda *_: None
        )
    write_store(corpus, model, out, base=model, deduplicate=True, world=world)


@pytest.mark.parametrize("workers", [[1, 1], [3, 1, 2]])
def test_nodes_write_the_same_bytes_as_one_process(
    workers: list[int], corpus: Corpus, model: Path, tmp_path: Path, small_blocks: None
) -> None:
    write_store(corpus, model, tmp_path / "alone", base=model, deduplicate=True)
    context = multiprocessing.get_context("fork")
    nodes = [
        context.Process(
            target=rank, args=(number, len(workers), count, corpus, model, tmp_path / "store")
        )
        for number, count in enumerate(workers)
    ]
    for node in reversed(nodes):  # the first one last: the others wait for it
        node.start()
    for node in nodes:
        node.join(60)
    assert [node.exitcode for node in nodes] == [0] * len(nodes)
    assert digest(tmp_path / "store") == digest(tmp_path / "alone")
    write_store(corpus, model, tmp_path / "alone", base=model, keep_blocks=False)
    assert not (tmp_path / "alone.blocks").exists()


def test_a_killed_stage_keeps_what_it_tokenised(
    corpus: Corpus, model: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)  # a part for each block
    write_store(corpus, model, tmp_path / "whole")

    def killed() -> None:
        made = tokenise.encode_block

        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            return made(*arguments)

        tokenise.encode_block = slow
        write_store(corpus, model, tmp_path / "store")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    folder = tmp_path / "store.blocks"
    while len([part for part in folder.glob("part-*") if not part.suffix]) < 8:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "store").exists()
    made = []
    encode = tokenise.encode_block
    monkeypatch.setattr(
        tokenise, "encode_block", lambda *block: (made.append(block), encode(*block))[1]
    )
    write_store(corpus, model, tmp_path / "store")
    assert 0 < len(made) <= 2 * 20 - 8
    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def test_blocks_of_another_tokenizer_are_not_used(
    corpus: Corpus, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "store.blocks" / "part-0").mkdir(parents=True)
    (tmp_path / "store.blocks" / "unfinished").write_text("other")
    write_store(corpus, model, tmp_path / "store")
    assert Store.open(tmp_path / "store").info.sources[0].train.documents > 300


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> list[str]:
    """The first texts of the blocks of 20 documents that are tokenised in this process."""
    first, encode = list[str](), tokenise.encode_block

    def noted(digest: bytes, texts: list[str | None], *rest: Any) -> Any:
        first.append(str(texts[0]))
        return encode(digest, texts, *rest)

    monkeypatch.setattr(tokenise, "encode_block", noted)
    return first


def test_only_text_that_is_new_is_tokenised(
    model: Path, tmp_path: Path, tokenised: list[str]
) -> None:
    texts = [f"we go home {number}" for number in range(100)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    corpus = Corpus(sources=[jsonl(first, [*texts[:70]])], heldout=0.2)
    write_store(corpus, model, tmp_path / "store")
    assert tokenised == [texts[number] for number in (0, 20, 40, 60)]

    jsonl(first, [*texts[:90]])  # more text in the same file: the last block is another one
    tokenised.clear()
    write_store(corpus, model, tmp_path / "store")
    assert tokenised == [texts[number] for number in (60, 80)]

    sources = [*corpus.sources, jsonl(second, [*texts[90:]])]
    more = corpus.model_copy(update={"sources": sources})
    tokenised.clear()
    write_store(more, model, tmp_path / "store", deduplicate=True)
    assert tokenised == [texts[90]]

    write_store(more, model, tmp_path / "alone", deduplicate=True)
    assert digest(tmp_path / "store") == digest(tmp_path / "alone")


def test_a_file_under_a_name_of_another_format_is_read_anew(tmp_path: Path, model: Path) -> None:
    """Each line of JSON is a document of a .txt file, but a record of a .jsonl file."""
    named = jsonl(tmp_path / "text.jsonl", [f"{word} {word}" for word in WORDS])
    mistaken = Source(path=str(Path(named.path).with_suffix(".txt")), language="ko")
    Path(named.path).rename(mistaken.path)
    found = []
    for source in (mistaken, named):
        if source is named:
            Path(mistaken.path).rename(named.path)
        for blocks_at in (tmp_path / "blocks", Path(f"{source.path}.blocks")):
            out = tmp_path / f"{len(found)}"
            write_store(Corpus(sources=[source]), model, out, blocks_at=blocks_at)
            found.append(ids_of(out))
    assert found[0] == found[1] != found[2] == found[3]


def test_the_progress_of_a_corpus_that_has_grown_is_of_what_is_new(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = list[Source]()
    for number in range(3):
        texts = [f"we go home {number} {line}" for line in range(99)]
        sources.append(jsonl(tmp_path / f"{number}.jsonl", texts))
        write_store(Corpus(sources=sources), model, tmp_path / "store")
        (line,) = re.findall(
            r"tokenise: (\S+)/(\S+) MB .* (\d+) documents", capsys.readouterr().err
        )
        assert line == (line[0], line[0], "99")


@pytest.mark.parametrize("name", ["blocks.npy", "pieces.json", "notes.json", "train-tokens.npy"])
def test_a_damaged_part_is_named_and_may_be_removed(tmp_path: Path, model: Path, name: str) -> None:
    """As a machine leaves it that lost its power."""
    source = jsonl(tmp_path / "text.jsonl", [f"we go home {line}" for line in range(99)])
    write_store(Corpus(sources=[source]), model, tmp_path / "store")
    before = digest(tmp_path / "store")
    (part,) = (tmp_path / "store.blocks").glob("part-*")
    os.truncate(part / name, 20)
    (tmp_path / "store" / "store.json").unlink()
    with pytest.raises(UserError, match=rf"^{part} is damaged .+; remove it and run"):
        write_store(Corpus(sources=[source]), model, tmp_path / "store")
    shutil.rmtree(part)
    write_store(Corpus(sources=[source]), model, tmp_path / "store")
    assert digest(tmp_path / "store") == before


def test_blocks_that_no_source_has_any_more_are_removed(
    model: Path, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)  # a part for each block
    path = tmp_path / "a.jsonl"
    corpus = Corpus(sources=[jsonl(path, [f"we go {number}" for number in range(60)])])
    write_store(corpus, model, tmp_path / "store")
    jsonl(path, [f"we go home {number}" for number in range(20)])
    write_store(corpus, model, tmp_path / "store")
    parts = parts_module.Parts(tmp_path / "store.blocks").update()
    assert len(parts.rows) == len(parts.pieces) == 1


def test_a_source_in_another_language_has_blocks_of_its_own(
    model: Path, tmp_path: Path, tokenised: list[str]
) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["we go home"])
    english = source.model_copy(update={"language": "en"})
    write_store(Corpus(sources=[source, english], heldout=1e-6), model, tmp_path / "store")
    assert tokenised == ["we go home", "we go home"]


def test_duplicates_are_dropped_over_all_sources_and_the_first_is_kept(
    model: Path, tmp_path: Path, small_blocks: None
) -> None:
    texts = [f"우리 집에 가서 {number}" for number in range(100)]
    decomposed = [unicodedata.normalize("NFD", text) for text in texts[:10]]
    first = jsonl(tmp_path / "1.jsonl", [*texts[:50], *texts[20:70]])
    second = jsonl(tmp_path / "2.jsonl", [*decomposed, *texts[60:]])
    corpus = Corpus(sources=[first, second], heldout=0.2)
    info = write_store(corpus, model, tmp_path / "store", deduplicate=True)
    assert [source.left_out["duplicates"] for source in info.sources] == [30, 20]
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = [
        [
            tokenizer.decode(ids[1:-1])
            for split in ("train", "heldout")
            for ids in ids_of(tmp_path / "store", split, source)
        ]
        for source in (0, 1)
    ]
    assert sorted(found[0]) == sorted(texts[:70])
    assert sorted(found[1]) == sorted(texts[70:])
    train = [tokenizer.decode(ids[1:-1]) for ids in ids_of(tmp_path / "store")]
    assert train == [text for text in texts[:70] if text in train], (
        "the order is that of the source"
    )


def test_first_occurrences_equal_a_set() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 6, (500, 2)).astype(
        np.uint64
    )  # equal halves with different other halves
    seen: set[tuple[int, int]] = set()
    expected = []
    for row in map(tuple, hashes.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert first_occurrences(hashes).tolist() == expected


def test_the_reference_split_is_the_heldout_text_in_the_base_s_tokens(
    corpus: Corpus, model: Path, tmp_path: Path
) -> None:
    english = corpus.model_copy(update={"sources": corpus.sources[1:]})
    base = make_model(tmp_path / "base", english, tied=False)
    write_store(corpus, model, tmp_path / "store", base=base)
    opened, tokenizer = Store.open(tmp_path / "store"), AutoTokenizer.from_pretrained(base)
    info = opened.info.sources[0]
    heldout, reference = opened.documents(info, "heldout"), opened.documents(info, "reference")
    assert heldout.bytes.tolist() == reference.bytes.tolist()
    assert reference.starts[-1] > heldout.starts[-1], "the base has no Korean pieces"
    texts = list(corpus.documents(corpus.sources[0], "heldout"))
    assert [tokenizer.decode(ids[1:-1]) for ids in ids_of(tmp_path / "store", "reference")] == texts
    assert opened.info.reference is not None
    opened.check_vocabulary(opened.info.reference.rows, "reference")
    with pytest.raises(UserError, match="has no text in the base's tokens"):
        write_store(corpus, model, tmp_path / "without").of("reference")


# --- edges ---


def test_a_source_without_text_is_named(tmp_path: Path, model: Path) -> None:
    source = jsonl(tmp_path / "empty.jsonl", ["", "  \n\t", None])
    with pytest.raises(
        UserError, match=r"empty\.jsonl yields no training text \(left out: 3 empty\)"
    ):
        write_store(Corpus(sources=[source]), model, tmp_path / "store")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl yields no training text"):
        write_store(Corpus(sources=[source]), model, tmp_path / "store")


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["나는", "", " \u3000\n", None, "너를"])
    info = write_store(Corpus(sources=[source], heldout=1e-6), model, tmp_path / "store")
    assert (info.sources[0].train.documents, info.sources[0].left_out["empty"]) == (2, 3)


def test_text_is_normalised(tmp_path: Path, model: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [unicodedata.normalize("NFD", "나는 너를")])
    write_store(Corpus(sources=[source], heldout=1e-6), model, tmp_path / "store")
    assert (
        AutoTokenizer.from_pretrained(model).decode(ids_of(tmp_path / "store")[0][1:-1])
        == "나는 너를"
    )


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path: Path, model: Path) -> None:
    text = "we go</s>home <s>"
    source = jsonl(tmp_path / "a.jsonl", [text])
    write_store(Corpus(sources=[source], heldout=1e-6), model, tmp_path / "store")
    tokenizer, ids = AutoTokenizer.from_pretrained(model), ids_of(tmp_path / "store")[0]
    assert set(tokenizer.all_special_ids) & set(ids[1:-1]) == set()
    assert tokenizer.decode(ids[1:-1]) == text


def test_a_bos_that_the_tokenizer_adds_is_the_prefix(tmp_path: Path, model: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "bos")
    backend = Tokenizer.from_file(str(tmp_path / "bos" / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(tmp_path / "bos" / "tokenizer.json"))
    encoder = DocumentEncoder.read(tmp_path / "bos")
    tokens, lengths = encoder(["we go", "home"])
    assert tokens[0] == tokens[lengths[0]] == tokenizer.bos_token_id
    assert tokens[-1] == tokens[lengths[0] - 1] == tokenizer.eos_token_id
    assert lengths.sum() == len(tokens)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos token"):
        DocumentEncoder.read(tmp_path)


def test_ids_beyond_two_bytes(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    (large / "tokenizer.json").write_text(json.dumps(word_tokenizer(2**16 + 9)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (large / "tokenizer_config.json").write_text(json.dumps(settings))
    source = jsonl(tmp_path / "a.jsonl", ["t65544 t3", "t4"])
    info = write_store(Corpus(sources=[source], heldout=1e-6), large, tmp_path / "store")
    assert info.tokenizer.dtype == "uint32"
    assert info.sources[0].train.largest == 65544 == ids_of(tmp_path / "store")[0][1]


def test_a_huge_document_spans_rows_and_is_one(tmp_path: Path, model: Path) -> None:
    text = " ".join(random.Random(0).choices(WORDS["ko"], k=300_000))
    source = jsonl(tmp_path / "a.jsonl", ["나는", text, "너를"])
    write_store(Corpus(sources=[source], heldout=1e-6), model, tmp_path / "store")
    opened = Store.open(tmp_path / "store")
    packed = PackedDocuments(opened.documents(opened.info.sources[0], "train"), 1000)
    assert packed.targets(packed.sequences // 2) == 1000, (
        "a row in the middle of the document has every target"
    )
    assert AutoTokenizer.from_pretrained(model).decode(ids_of(tmp_path / "store")[1][1:-1]) == text


def test_blocks_end_at_a_number_of_documents_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "BLOCK_DOCUMENTS", 3)
    monkeypatch.setattr(tokenise, "BLOCK_CHARACTERS", 10)
    texts = ["a", "b", "c", "d", "e" * 100, "f" * 5, "g" * 5, "h"]
    assert [len(block) for block in blocks(texts)] == [3, 2, 2, 1]


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet", "arrow", "csv", "many"])
def test_every_format_is_divided(
    kind: str, tmp_path: Path, model: Path, small_blocks: None
) -> None:
    import gzip

    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    texts = [f"we go home {number}" for number in range(200)]
    table = pyarrow.table({"text": texts})
    path = tmp_path / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "jsonl.gz":
        path.write_bytes(
            gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
        )
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.mkdir()
        for number in range(10):
            jsonl(path / f"{number}.jsonl", texts[number * 20 : number * 20 + 20])
    corpus = Corpus(sources=[Source(path=str(path), language="en")], heldout=1e-6)
    plan = Plan.make(corpus, model)
    parts = tokenise.blocks_of(tmp_path / "store", plan)
    parts.begin()
    for worker in range(3):
        tokenise.tokenise_share(
            plan, range(len(plan.pieces)), parts.directory, World(), 3, worker, lambda *_: None
        )
    write_store(corpus, model, tmp_path / "store")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [tokenizer.decode(ids[1:-1]) for ids in ids_of(tmp_path / "store")] == texts


def test_a_limit_counts_over_all_files(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        jsonl(folder / f"{number}.jsonl", [f"we go {number} {line}" for line in range(10)])
    source = Source(path=str(folder), language="en", limit=15)
    info = write_store(Corpus(sources=[source], heldout=1e-6), model, tmp_path / "store")
    assert info.sources[0].train.documents == 15


def test_what_a_process_meets_is_raised_in_the_first(tmp_path: Path, model: Path) -> None:
    write_text(tmp_path / "a.jsonl", "en", 100)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xb0\xa1"}\n')
    sources = [Source(path=str(tmp_path / name), language="en") for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 is not UTF-8"):
        write_store(Corpus(sources=sources), model, tmp_path / "store", processes=2)


def test_a_process_that_is_killed_is_named(tmp_path: Path, model: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", "en", 60_000)
    killer = threading.Thread(target=_kill_a_child, daemon=True)
    killer.start()
    with pytest.raises(UserError, match="a tokenising process was killed"):
        write_store(
            Corpus(sources=[Source(path=str(path), language="en")]),
            model,
            tmp_path / "store",
            processes=2,
        )


def _kill_a_child() -> None:
    while True:
        children = [child for child in multiprocessing.active_children() if child.pid]
        if len(children) == 2:
            os.kill(children[0].pid or 0, signal.SIGKILL)
            return
        time.sleep(0.01)
