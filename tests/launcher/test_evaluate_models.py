"""`cpt-merge evaluate-models`: wrong words, wrong places, and a whole evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.cli import main
from cpt_merge.launcher.evaluate_models import evaluate
from tests.evaluation.conftest import serve  # noqa: F401 - a fixture
from tests.evaluation.http_server import completion

OUT = Path("out")
BAD: list[tuple[list[str], dict[str, Any], str]] = [
    (["A"], {}, "--model A is not of the form NAME=VALUE"),
    (["a=A", "a=B"], {}, "--model names a twice"),
    (["a=./nowhere"], {}, "model ./nowhere does not exist"),
    (["a=A"], {"suites": "chat,talk"}, "`evaluation.suites.1` = 'talk'"),
    (
        ["a=A"], {"settings": ["evaluation.suites=[chat]"], "suites": "chat"},
        "--suite and evaluation.suites say the same",
    ),
    (
        ["a=A"], {"settings": ["evaluation.max_token=1"]},
        "the nearest known key is `evaluation.max_",
    ),
    (["a=A"], {"settings": ["merge.ratio=1"]}, "unknown key `merge`"),
    (
        ["a=A"], {"settings": ["evaluation.safety.moderation={url: host, model: m}"]},
        "safety.moderation.url",
    ),
    (
        ["a=A"],
        {"settings": ["evaluation.judge={url: 'http://h/v1', model: m, prompts: {mark: Well}}"]},
        "{conversation} is missing; put it where the replies belong",
    ),
    (
        ["a=A"], {"settings": ["evaluation.knowledge.tasks={kmmlu: kr}"]},
        "language 'kr' is not known",
    ),
    (["a=A"], {"settings": ["evaluation.seed=-1"]}, "`evaluation.seed`"),
    (["a=A"], {"settings": ["evaluation.models.b=B"]}, "evaluation.models is for a recipe"),
    (["a=A"], {"settings": ["evaluation.languages=[kr]"]}, "language 'kr' is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("models", "more", "sentence"), BAD)
def test_bad_words(models: list[str], more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        evaluate(models, OUT, **{"settings": [], **more})
    assert sentence in str(raised.value)


def test_bad_places(pair: Path, tmp_path: Path) -> None:
    models, file = [f"a={pair / 'chat'}"], tmp_path / "file"
    file.write_text("")
    out = tmp_path / "o"
    with pytest.raises(UserError, match=r"--out .*file cannot be written \(File exists\)"):
        evaluate(models, file, [], "form")
    with pytest.raises(UserError, match=r"--text ko=no.txt does not exist"):
        evaluate(models, out, [], "language", ["ko=no.txt"])
    with pytest.raises(UserError, match="nothing is measured"):
        evaluate(models, out, [])


def test_an_evaluation_that_fails_before_a_model_is_measured_leaves_nothing(
    pair: Path, tmp_path: Path
) -> None:
    models, out, mine = [f"a={pair / 'chat'}"], tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    for folder in (out, mine):
        with pytest.raises(UserError, match=r"no\.jsonl does not exist"):
            evaluate(models, folder, ["evaluation.prompts=no.jsonl"], "form")
    assert list(tmp_path.iterdir()) == [mine], "a folder that was there before stays"


def test_what_the_urls_of_judges_hold_is_printed_and_stored_nowhere(
    pair: Path,
    tmp_path: Path,
    serve: Any,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out"
    questions.write_text('{"language": "ko", "turns": ["왜?"]}', encoding="utf-8")
    good = serve(lambda number, body: (200, completion("SCORE: 4")))
    bad = serve(lambda number, body: (200, "<html>") if number > 1 else (200, completion("yes")))
    urls = [
        one.url.replace("http://", "http://me:hunter22@") + "?key=queryvalue" for one in (good, bad)
    ]
    second = f"{{url: '{urls[1]}', model: m}}"
    words = [
        "evaluate-models", "--model", f"chat={pair / 'chat'}", "--suite", "chat", "--out", str(out),
        "evaluation.languages=[ko]", "evaluation.max_prompts=1", "evaluation.max_new_tokens=4",
        f"evaluation.judge={{url: '{urls[0]}', model: m, questions: {questions}, second: {second}, "
        f"cache: {tmp_path / 'cache'}}}",
    ]  # fmt: skip
    assert main(words) == 0
    broken = [word.replace("second: {url: 'http", "second: {url: 'ftp") for word in words]
    assert main(broken) == 2
    assert good.asked
    assert "key=queryvalue" in good.asked[0][0]
    shown = capfd.readouterr()
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written |= {"stdout": shown.out.encode(), "stderr": shown.err.encode()}
    assert "ftp://***@" in shown.err
    assert b"answers what is not JSON" in written[str(out / "results.json")]
    for secret in (b"hunter22", b"queryvalue"):
        assert [name for name, content in written.items() if secret in content] == []


def test_directories_without_a_recipe(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "ko.txt"
    text.write_text("가나 다라\n\n마바 사아\n", encoding="utf-8")
    words = [
        "evaluate-models", "--model", f"base={pair / 'base'}", "--model", f"chat={pair / 'chat'}", "--suite", "language,chat",
        "--text", f"ko={text}", "--out", str(tmp_path / "out"), "evaluation.max_new_tokens=4",
        "evaluation.max_prompts=2", "evaluation.baseline=chat",
    ]  # fmt: skip
    assert main(words) == 0
    assert (
        f"base: has no chat template; it is prompted in that of {pair / 'chat'}"
        in capsys.readouterr().err
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    base = results["models"]["base"]
    assert results["baseline"] == "chat"
    assert list(base["scores"]) == ["ko"], "built-in prompts are asked in the languages of the text"
    assert base["text"]["ko"]["documents"] == 2
    assert base["scores"]["ko"]["instructions"]["n"] == base["scores"]["ko"]["dialogues"]["n"] == 2
    assert base["differences"]["ko"]["bits_per_byte"]["n"] == 2
    assert (tmp_path / "out" / "log" / "tables" / "eval" / "differences.json").is_file()
