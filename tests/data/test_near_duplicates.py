"""Near-duplicates: signatures, their clusters compared with exact similarities, and the store without them."""

import hashlib
import itertools
import multiprocessing
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cpt_merge.core.world import World
from cpt_merge.data import minhash, tokenise
from cpt_merge.data.config import DataConfig
from cpt_merge.data.minhash import PERMUTATIONS, shingles, signatures
from cpt_merge.data.near_duplicates import cluster_firsts, rows_of_band
from cpt_merge.data.preparation.notes import NOTES_FILE, read_notes
from cpt_merge.data.run import run
from cpt_merge.data.sources import Corpus, Source, read_source
from cpt_merge.data.store import Store
from cpt_merge.data.tokenise import write_store
from cpt_merge.tracking import Tracker
from tests.data.test_tokenise import digest, jsonl
from tests.recording import Recording

HAN, HANGUL = range(0x4E00, 0x4E00 + 3000), range(0xAC00, 0xAC00 + 2000)


def words(language: str) -> list[str]:
    generator = random.Random(language)
    letters = {"en": "abcdefghijklmnopqrstuvwxyz", "ko": "".join(map(chr, HANGUL))}
    if language == "zh_tw":
        return list(map(chr, HAN))
    return [
        "".join(generator.choices(letters[language], k=generator.randint(2, 7)))
        for _ in range(3000)
    ]


def edited(text: list[str], changes: int, pool: list[str], generator: random.Random) -> list[str]:
    text = list(text)
    for _ in range(changes):
        place, kind = generator.randrange(len(text)), generator.random()
        text[place : place + 1] = (
            [generator.choice(pool)] if kind < 0.5 else [] if kind < 0.75 else [text[place]] * 2
        )
    return text


def near_duplicates(language: str, clusters: int) -> list[str]:
    """Documents and versions of them with more and more changes; all contain the same passage."""
    generator, pool = random.Random(1), words(language)
    passage, documents = generator.choices(pool, k=40), []
    for _ in range(clusters):
        first = generator.choices(pool, k=generator.randint(60, 400)) + passage
        documents += [first, *(edited(first, n, pool, generator) for n in (1, 1, 2, 3, 5, 8, 20))]
    generator.shuffle(documents)
    return [("" if language == "zh_tw" else " ").join(one) for one in documents]


def exact_similarities(texts: list[str], has_spaces: bool) -> dict[tuple[int, int], float]:
    sets = [set(shingles(text, has_spaces)) for text in texts]
    containing: dict[str, list[int]] = {}
    for number, one in enumerate(sets):
        for shingle in one:
            containing.setdefault(shingle, []).append(number)
    pairs = itertools.chain.from_iterable(
        itertools.combinations(numbers, 2) for numbers in containing.values()
    )
    return {
        (a, b): shared / (len(sets[a]) + len(sets[b]) - shared)
        for (a, b), shared in Counter(pairs).items()
    }


def firsts_of(texts: list[str], language: str, threshold: float) -> list[int]:
    columns = signatures(texts, language).T
    return cluster_firsts(columns.__getitem__, len(texts), threshold).tolist()


@pytest.mark.parametrize("language", ["en", "ko", "zh_tw"])
@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_clusters_compared_with_exact_similarities(language: str, threshold: float) -> None:
    texts = near_duplicates(language, clusters=60)
    exact = exact_similarities(texts, has_spaces=language != "zh_tw")
    firsts = firsts_of(texts, language, threshold)
    clear = [pair for pair, similarity in exact.items() if similarity >= threshold + 0.05]
    found = sum(firsts[a] == firsts[b] for a, b in clear)
    assert len(clear) > 100
    assert found / len(clear) >= 0.98, "recall of pairs that are clearly above the threshold"
    most_similar = [0.0] * len(texts)
    for (a, b), similarity in exact.items():
        most_similar[a] = max(most_similar[a], similarity)
        most_similar[b] = max(most_similar[b], similarity)
    left_out = [number for number, first in enumerate(firsts) if first != number]
    wrong = [number for number in left_out if most_similar[number] < threshold - 0.05]
    assert len(left_out) > 50
    assert len(wrong) <= 0.01 * len(left_out), "documents like no other that are left out"


def test_the_estimate_has_no_bias() -> None:
    generator = random.Random(0)
    for similarity in (0.5, 0.8, 0.9):
        errors = []
        for _ in range(100):
            shared = [generator.randbytes(6).hex() for _ in range(round(200 * similarity))]
            ends = [[generator.randbytes(6).hex() for _ in range(200)] for _ in range(2)]
            rest = (200 - len(shared)) // 2
            one, two = ("".join(shared + end[:rest]) for end in ends)
            exact = exact_similarities([one, two], has_spaces=False)[0, 1]
            first, second = signatures([one, two], "zh_tw")
            errors.append(float((first == second).mean()) - exact)
        assert abs(np.mean(errors)) < 0.01
        assert np.std(errors) < 1.2 * (similarity * (1 - similarity) / PERMUTATIONS) ** 0.5 + 0.01


def test_signatures_are_the_same_on_every_machine() -> None:
    found = signatures(["나는 우리 집에 가서 밥을 먹고 다시 잔다", "we go home"], "ko")
    assert hashlib.sha256(found.astype("<u4").tobytes()).hexdigest().startswith("85d897785012478e")


def test_shingles_are_words_or_letters_without_punctuation() -> None:
    assert shingles("We go, HOME and eat rice!", True) == [
        "we go home and eat",
        "go home and eat rice",
    ]
    assert shingles("天地玄黃,宇宙。", False) == ["天地玄黃宇", "地玄黃宇宙"]
    assert shingles("天地", False) == ["天地"]
    assert shingles("go home", True) == ["go home"]
    assert shingles("!?…", True) == ["!?…"], "texts without words are like no others"


def test_a_long_text_needs_little_memory_and_is_like_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = " ".join(random.Random(0).choices(words("en"), k=3000))
    whole = signatures([text], "en")[0]
    monkeypatch.setattr(minhash, "_STRETCH", 1000)
    parted, short = signatures([text, "we go home"], "en")
    assert 0.95 < (whole == parted).mean() < 1
    assert (short == signatures(["we go home"], "en")[0]).all()


def test_bands_propose_pairs_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.9, 1.0):
        rows = rows_of_band(threshold)
        assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.99


def test_documents_that_others_connect_are_one_cluster() -> None:
    """0 is like 1, 1 like 2, and so on, also backwards; 5 is alone."""
    signature = np.random.default_rng(0).integers(0, 2**32, PERMUTATIONS, np.uint32)
    chain = [signature.copy()]
    for step in range(1, 5):
        chain.append(chain[-1].copy())
        chain[-1][step * 20 : step * 20 + 20] += np.uint32(1)
    alone = signature + np.uint32(7)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        columns = np.array([*(chain[place] for place in order), alone]).T
        assert cluster_firsts(columns.__getitem__, 6, 0.8).tolist() == [0, 0, 0, 0, 0, 5]


def test_no_documents() -> None:
    assert cluster_firsts(lambda number: np.zeros(0, np.uint32), 0, 0.8).tolist() == []


# --- in a store ---


@pytest.fixture
def similar(tmp_path: Path) -> Corpus:
    """Two sources: 30 Korean documents of 100 words, and versions of 20 of them among others."""
    generator, pool = random.Random(0), words("ko")
    first = [generator.choices(pool, k=100) for _ in range(30)]
    second = [edited(text, 1, pool, generator) for text in first[10:]]
    second[5:5] = [generator.choices(pool, k=100) for _ in range(30)]
    sources = [
        jsonl(tmp_path / f"{number}.jsonl", [" ".join(text) for text in texts])
        for number, texts in enumerate([first, second])
    ]
    return Corpus(sources=sources, heldout=0.2)


def texts_of(corpus: Corpus, source: Source) -> list[str]:
    return [*corpus.documents(source, "heldout"), *corpus.documents(source, "train")]


def test_the_first_of_a_cluster_stays_and_held_out_documents_come_first(
    similar: Corpus, model: Path, tmp_path: Path
) -> None:
    info = write_store(similar, model, tmp_path / "store", base=model, near_duplicates=0.8)
    left_out = [source.left_out["near_duplicates"] for source in info.sources]
    assert sum(left_out) == 20
    assert left_out[0] > 0, (
        "documents of the first source that are like held-out ones of the second"
    )
    heldout = set(similar.documents(similar.sources[0], "heldout"))
    second = set(similar.documents(similar.sources[1], "heldout"))
    originals, versions = (list(read_source(source)) for source in similar.sources)
    versions = versions[:5] + versions[35:]
    moved = [
        original
        for original, version in zip(originals[10:], versions, strict=True)
        if version in second and original not in heldout
    ]
    assert left_out[0] == len(moved)
    train = info.sources[0].train
    assert train.documents == 30 - len(heldout) - len(moved)
    for source in info.sources:
        assert source.reference is not None
        assert source.reference.documents == source.heldout.documents


def test_examples_show_what_was_left_out_and_what_is_kept(
    similar: Corpus, model: Path, tmp_path: Path
) -> None:
    recording = Recording()
    run(DataConfig(near_duplicates=0.8), similar, model, tmp_path / "store", Tracker([recording]))
    of_sources = read_notes(tmp_path / "store")
    assert all(notes.examples for notes in of_sources)
    examples = [example for notes in of_sources for example in notes.examples]
    texts = [text for source in similar.sources for text in texts_of(similar, source)]
    for one in examples:
        assert one.step == "near_duplicates"
        assert one.text != one.instead, "they show where the documents differ"
        for shown in (one.text, one.instead):
            assert len(shown) <= 101
            assert any(shown.strip("…") in text for text in texts)
    steps = [row["step"] for row in recording.tables["data/preparation"] if row["documents"]]
    assert steps == ["near duplicates"] * 2
    assert len(recording.tables["data/examples"]) == len(examples)


def test_equal_documents_are_counted_apart_if_asked_for(model: Path, tmp_path: Path) -> None:
    pool = words("ko")
    text = random.Random(0).choices(pool, k=100)
    like = edited(text, 1, pool, random.Random(0))
    texts = [" ".join(one) for one in (text, like, text, like, pool[:100])]
    corpus = Corpus(sources=[jsonl(tmp_path / "a.jsonl", texts)], heldout=1e-6)
    for deduplicate, counts in ((True, (2, 1)), (False, (0, 3))):
        out = tmp_path / f"store-{deduplicate}"
        info = write_store(corpus, model, out, deduplicate=deduplicate, near_duplicates=0.8)
        left_out = info.sources[0].left_out
        assert (left_out["duplicates"], left_out["near_duplicates"]) == counts
        assert info.sources[0].train.documents == 2


def node(number: int, workers: int, corpus: Corpus, model: Path, out: Path) -> None:
    tokenise.BLOCK_DOCUMENTS = 7
    world = World(number, 2, 0, "slurm")
    write_store(
        corpus, model, out, near_duplicates=0.8, deduplicate=True, processes=workers, world=world
    )


def test_nodes_and_processes_write_the_same_bytes(
    similar: Corpus, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "BLOCK_DOCUMENTS", 7)
    write_store(similar, model, tmp_path / "alone", near_duplicates=0.8, deduplicate=True)
    context = multiprocessing.get_context("fork")
    nodes = [
        context.Process(target=node, args=(number, 1, similar, model, tmp_path / "store"))
        for number in (1, 0)
    ]
    for one in nodes:
        one.start()
    for one in nodes:
        one.join(60)
    assert [one.exitcode for one in nodes] == [0, 0]
    assert digest(tmp_path / "store") == digest(tmp_path / "alone")


def test_without_it_nothing_of_a_store_changes(
    similar: Corpus, model: Path, tmp_path: Path
) -> None:
    info = write_store(similar, model, tmp_path / "store")
    assert info.sources[0].left_out == {"bad_rows": 0, "empty": 0, "duplicates": 0}
    assert not (tmp_path / "store" / NOTES_FILE).exists()
    assert DataConfig().identity() == {"deduplicate": False}
    other = write_store(similar, model, tmp_path / "other", near_duplicates=0.8)
    assert other.digest != info.digest == Store.open(tmp_path / "store").info.digest
