"""How much text there is, from samples; budgets that no text can fill are refused."""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cpt_merge.core.errors import UserError
from cpt_merge.data.check import HEAD_ROWS, MORE_ROWS, check_budget, check_text, tokens_at_most
from cpt_merge.data.mixture import SourceShare, check_repeats, mixture
from cpt_merge.data.sources import Corpus, Source

DOCUMENTS = 4000
WORDS = [str(number) for number in range(100)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token for each word."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """DOCUMENTS texts of 200 words: with prefix and eos 202 tokens each, 2.3 MB together."""
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=200)) for _ in range(DOCUMENTS)]


def write(path: Path, texts: list[str]) -> Source:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": texts}), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return Source(path=str(path), language="en")


@pytest.mark.parametrize(("without", "refused"), [(HEAD_ROWS + 1, False), (MORE_ROWS + 1, True)])
def test_a_field_that_no_row_at_the_beginning_has_is_refused_without_reading_on(
    tmp_path: Path, without: int, refused: bool
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"texts": "a"}\n' * without + '{"text": "b"}\n' * 5)
    corpus = Corpus(sources=[Source(path=str(path), language="ko")])
    if refused:
        with pytest.raises(UserError, match="line 1 has no field 'text' but texts"):
            check_text(corpus)
    else:
        check_text(corpus)


def test_bad_rows_at_the_beginning_hide_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("bad\n" * (HEAD_ROWS + 1) + '{"text": "x"}\n')
    check_text(Corpus(sources=[Source(path=str(path), language="ko", bad_rows="skip")]))


@pytest.mark.parametrize(
    "content", ['{"text": null}\n', '{"text": " "}\n' * 30, '{"text": 1}\n{"text": ""}\n']
)
def test_rows_without_text_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    corpus = Corpus(sources=[Source(path=str(path), language="ko", bad_rows="skip")])
    with pytest.raises(UserError, match=r"a\.jsonl has no text"):
        check_text(corpus)
    path.write_text(content + '{"text": "x"}\n')
    check_text(corpus)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_field_of_a_template_that_no_row_has_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write(tmp_path / name, ["가", "나"])
    for template, warned in (("{titel}\n{text}", True), ("{text} {text}", False)):
        check_text(
            Corpus(sources=[Source(path=str(tmp_path / name), language="ko", field=template)])
        )
        said = capsys.readouterr().err
        assert ("have no field 'titel'; it is empty in their documents" in said) == warned


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_the_tokens_of_a_file_are_estimated_from_a_sample(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], name: str
) -> None:
    source = write(tmp_path / name, texts)
    assert tokens_at_most(source, tokenizer) == pytest.approx(202 * DOCUMENTS, rel=0.05)
    limited = source.model_copy(update={"limit": 3000})
    assert tokens_at_most(limited, tokenizer) == pytest.approx(202 * 3000, rel=0.02)


def test_the_tokens_of_little_text_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", ["1 2 3", "4"])
    assert tokens_at_most(source, tokenizer) == 8


def reading(corpus: Corpus, tokens: int) -> Callable[[Sequence[int | None]], Sequence[SourceShare]]:
    return lambda sizes: mixture(corpus, sizes, tokens)


def test_a_budget_that_repeats_text_often_has_to_be_allowed(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", ["1 2 3", "4"])  # 8 tokens
    corpus = Corpus(sources=[source])
    check_budget(corpus, reading(corpus, 32), tokenizer)
    assert "warning" not in capsys.readouterr().err
    check_budget(corpus, reading(corpus, 64), tokenizer)
    assert "en:a will be read 8.0 times or more" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"en:a: .* at least 125,000,000 times .*allow_repeats"):
        check_budget(corpus, reading(corpus, 1_000_000_000), tokenizer)
    allowed = corpus.model_copy(update={"allow_repeats": True})
    check_budget(allowed, reading(allowed, 1000), tokenizer)


def test_epochs_that_the_recipe_names_are_allowed(tmp_path: Path) -> None:
    sources = [{"path": "a.txt", "language": "ko", "epochs": 20}]
    corpus = Corpus(sources=[*sources, {"path": "b.txt", "language": "en"}])  # type: ignore[list-item]
    check_repeats(corpus, mixture(corpus, [10, 100], 1000))
    with pytest.raises(UserError, match=r"en:b: .* this source 80 times"):
        check_repeats(corpus, mixture(corpus, [10, 10], 1000))


def test_allowing_repeats_changes_no_key_of_a_stage() -> None:
    source = {"path": "a.txt", "language": "ko"}
    strict, allowed = (Corpus(sources=[source], allow_repeats=allow) for allow in (False, True))  # type: ignore[list-item]
    assert strict.text() == allowed.text()
    assert strict.amounts() == allowed.amounts()


@pytest.mark.parametrize("split", ["train[100:200]", "train[50%:20%]"])
@pytest.mark.parametrize("amount", [{}, {"epochs": 2}])
def test_a_slice_without_documents_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, split: str, amount: dict[str, int]
) -> None:
    path = write(tmp_path / "text.jsonl", ["1 2"] * 40).path
    corpus = Corpus(sources=[Source(path=path, language="en", split=split, **amount)])
    with pytest.raises(UserError, match=r"has no documents in its split 'train\["):
        check_budget(corpus, reading(corpus, 32), tokenizer)
