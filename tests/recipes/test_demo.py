"""The demo's inputs: text, held-out prompts, tokenizer, template, and the command that writes them."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("hassil", reason="the extra `demo` is not installed")

import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cpt_merge.recipes.demo import pair, prepare
from cpt_merge.recipes.demo.corpus import (
    LANGUAGES,
    CorpusSettings,
    LanguageCorpus,
    build_corpus,
    build_language,
    chatterbot_conversations,
)
from cpt_merge.recipes.demo.intents import IntentSampler
from cpt_merge.recipes.demo.tokenizer import to_fast_tokenizer, train_sentencepiece, write_tokenizer

SMALL = CorpusSettings(intent_draws=800)
STRINGS = [
    "Turn on the lights in the kitchen",
    " two  spaces, a trailing one ",
    "line\nbreak\n\n[INST] x [/INST]",
    "關閉客房燈 and 거실 조명 켜줘",
    "naïve café — “quotes” 12345",
    "\t☃🙂",
    "",
]


@pytest.fixture(scope="module")
def corpus() -> dict[str, LanguageCorpus]:
    return build_corpus(SMALL)


@pytest.fixture(scope="module")
def model_bytes(corpus) -> bytes:
    return train_sentencepiece(
        [line for text in corpus["en"].documents for line in text.split("\n") if line], 800
    )


@pytest.fixture(scope="module")
def tokenizer(model_bytes, tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(model_bytes, folder, context=256, chat=True)
    return AutoTokenizer.from_pretrained(folder)


def test_text_is_nfc_and_in_documents_of_many_lines(corpus):
    for text in corpus.values():
        assert len(text.documents) > 10
        assert all(
            document == unicodedata.normalize("NFC", document) for document in text.documents
        )
        assert sum(document.count("\n") for document in text.documents) > 20 * len(text.documents)


def test_no_training_text_holds_a_held_out_prompt(corpus):
    for text in corpus.values():
        assert (
            len(text.prompts)
            == SMALL.intent_prompts + SMALL.chatterbot_prompts
            == len(set(text.prompts))
        )
        shown = {turn for turns in text.conversations for turn in turns}
        for document in text.documents:
            for line in document.split("\n"):
                shown.update({line, bare(line)})
        assert not shown.intersection(text.prompts)


def bare(line: str) -> str:
    """A turn without what its notation puts around it."""
    return re.sub(r"^(- |“|> |\[[A-Z]+\] |\[)|(”| \[/[A-Z]+\]|\])$", "", line)


def test_bare_undoes_every_notation(corpus):
    lines = {line for document in corpus["ko"].documents for line in document.split("\n")}
    turns = {turn for turns in corpus["ko"].conversations for turn in turns}
    marked = [line for line in lines if line not in turns]
    assert len([line for line in marked if bare(line) in turns]) > 0.5 * len(turns)


def test_no_text_holds_the_chat_template(corpus):
    assert not any("INST]" in document for text in corpus.values() for document in text.documents)


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert build_language("ko", SMALL) == build_language("ko", SMALL)
    assert (
        build_language("ko", SMALL).prompts != build_language("ko", replace(SMALL, seed=1)).prompts
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_exchanges_are_whole_sentences_of_the_language(language):
    exchanges = list(IntentSampler(language, random.Random(0)).exchanges(400))
    assert len(exchanges) > 300
    for exchange in exchanges:
        for line in (exchange.prompt, exchange.reply):
            assert line
            assert line == line.strip()
            assert not set(line) & set("{}<>[]|\n"), line
            assert "None" not in line


def test_replies_name_what_was_asked_for():
    exchanges = list(IntentSampler("zh_tw", random.Random(0)).exchanges(1500))
    named = [
        (x.prompt, x.reply.removesuffix("計時器"))
        for x in exchanges
        if x.reply.startswith("已設定")
    ]
    assert len(named) > 20
    assert all(
        set(reply) & set("0123456789") <= set(prompt) | set("30") for prompt, reply in named
    )  # 半 is 30


def test_long_turns_are_left_out():
    assert all(len(turn) <= 30 for turns in chatterbot_conversations("en", 30) for turn in turns)


def test_fast_tokenizer_equals_the_sentencepiece_model(model_bytes, corpus):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    fast = to_fast_tokenizer(model_bytes)
    for text in [*STRINGS, *(corpus[language].documents[0] for language in LANGUAGES)]:
        assert fast.encode(text, add_special_tokens=False).ids == processor.encode(text), text
        assert fast.decode(fast.encode(text).ids) == text


def test_special_tokens_have_llama_2_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (
        text
        == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]\nHello</s><s>[INST] Bye [/INST]\n"
    )


def test_chat_template_refuses_two_turns_of_one_speaker(tokenizer):
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        )


def test_only_the_assistants_turns_are_learnt(tokenizer):
    ids, labels = pair.encode_chat(
        ("Lock the gate", "Locking", "Unlock it", "Unlocking", "unanswered"), tokenizer
    )
    assert len(ids) == len(labels)
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != pair.IGNORED]
    assert tokenizer.decode(learnt) == "Locking</s>Unlocking</s>"
    assert "unanswered" not in tokenizer.decode(ids)


def test_packing_keeps_every_token_but_the_last_incomplete_row(tokenizer):
    rows = pair.pack_documents(["one two three", "four"], tokenizer, tokens=4)
    stream = [*tokenizer("one two three")["input_ids"], 2, *tokenizer("four")["input_ids"], 2]
    assert rows.flatten().tolist() == stream[: len(stream) // 4 * 4]


@pytest.fixture(scope="module")
def tiny_settings() -> pair.PairSettings:
    run = pair.TrainSettings(learning_rate=1e-3, steps=3, rows=4, tokens=64)
    return pair.PairSettings(
        corpus=SMALL,
        model=pair.ModelSettings(
            vocab_size=800, hidden_size=32, intermediate_size=64, layers=1, heads=1
        ),
        pretraining=run,
        chat_tuning=run,
    )


def test_pair_loads_and_is_the_same_every_time(corpus, tiny_settings, tmp_path):
    weights = []
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        pair.make_pair(corpus["en"], tiny_settings, threads=1, out=tmp_path / attempt)
        base, chat = (
            AutoModelForCausalLM.from_pretrained(tmp_path / attempt / name).state_dict()
            for name in ("base", "chat")
        )
        assert base.keys() == chat.keys()
        assert any(not torch.equal(base[name], chat[name]) for name in base)
        weights.append({**base, **{f"chat.{name}": tensor for name, tensor in chat.items()}})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("base", "chat"):
        assert AutoTokenizer.from_pretrained(tmp_path / "first" / name)("Hi")["input_ids"][0] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "first" / "base").chat_template is None


def test_prepare_writes_everything_once(monkeypatch, capsys, tiny_settings, tmp_path):
    monkeypatch.setattr(pair, "PairSettings", lambda: tiny_settings)
    out = tmp_path / "inputs"
    assert prepare.main(["--out", str(out), "--threads", "1"]) == 0
    prompts = [
        json.loads(line)
        for line in (out / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {prompt["language"] for prompt in prompts} == set(LANGUAGES)
    assert all(prompt["messages"][0]["role"] == "user" for prompt in prompts)
    for language in LANGUAGES:
        lines = (out / "text" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line)["text"] for line in lines)
    assert "home-assistant-intents" in (out / "licences.txt").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]

    before = (out / "base" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare.main(["--out", str(out)]) == 0
    assert "up to date" in capsys.readouterr().err
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_prepare_leaves_a_strangers_folder_alone(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert prepare.main(["--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_missing_package_is_one_sentence(tmp_path):
    hide = "import sys; sys.modules['hassil'] = None; from recipes.demo.prepare import main; sys.exit(main(sys.argv[1:]))"
    root = Path(prepare.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", hide, "--out", str(tmp_path / "out")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "pip install -e .[demo]" in run.stderr
    assert "Traceback" not in run.stderr
