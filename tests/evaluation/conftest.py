"""Tiny random models with small trained tokenizers, prompts and a corpus in Chinese, Korean and English."""

import json
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cpt_merge.evaluation.generate.endpoint
from cpt_merge.data.sources import Corpus, Source
from tests.evaluation.http_server import Server

torch.set_num_threads(1)  # as in the processes that the tests start

TEXTS = {
    "zh_tw": [
        "今天天氣很好，我們去公園散步。",
        "請問圖書館在哪裡？",
        "台灣的夜市有很多好吃的東西。",
    ],
    "ko": [
        "오늘은 날씨가 좋아서 공원에 갔습니다.",
        "도서관은 어디에 있습니까?",
        "한국의 시장에는 맛있는 음식이 많습니다.",
    ],
    "en": [
        "The weather is fine today, so we walk in the park.",
        "Where is the library?",
        "Night markets have good food.",
    ],
}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer(vocabulary: int, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([text for texts in TEXTS.values() for text in texts], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def make_model(
    directory: Path, vocabulary: int, seed: int, template: str | None = None, uniform: bool = False
) -> Path:
    tokenizer = make_tokenizer(vocabulary, template)
    torch.manual_seed(seed)
    size = len(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)  # far from uniform, so that argmax has no near ties
        if uniform:
            model.lm_head.weight.zero_()
    model.generation_config = GenerationConfig(
        eos_token_id=1, bos_token_id=0, temperature=0.6, do_sample=True
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def models_of_two_vocabularies(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "base": make_model(root / "base", vocabulary=280, seed=1),
        "chat": make_model(root / "chat", vocabulary=340, seed=2, template=TEMPLATE),
    }


@pytest.fixture(scope="session")
def uniform_model(tmp_path_factory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("uniform") / "m",
        vocabulary=300,
        seed=0,
        template=TEMPLATE,
        uniform=True,
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    sources = []
    for language, texts in TEXTS.items():
        path = root / f"{language}.jsonl"
        rows = [{"text": f"{text} {number}"} for number in range(20) for text in texts]
        path.write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
        )
        sources.append(Source(path=str(path), language=language))
    return Corpus(sources=sources, heldout=0.3)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"language": language, "messages": [{"role": "user", "content": text}]}
        for language, texts in TEXTS.items()
        for text in texts
    ]
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(cpt_merge.evaluation.generate.endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(cpt_merge.evaluation.generate.endpoint, "BUSY_PAUSE", 0.01)
    servers = []

    def start(behave):
        server = Server(behave)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
