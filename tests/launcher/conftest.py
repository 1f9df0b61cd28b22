"""A tiny pair of models, text in three languages, and a recipe over them."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from cpt_merge.launcher.recipe import Recipe, load_recipe
from tests.command_line import cpt_merge

ROOT = Path(__file__).parents[2]

SYLLABLES = {"en": ["we", "go", "home", "and", "eat", "rice", "then", "sleep", "well", "again"], "ko": list("가나다라마바사아자차카타파하"),
             "zh_tw": list("天地玄黃宇宙洪荒日月盈昃辰宿列張")}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentences(language: str, count: int) -> list[str]:
    generator = random.Random(language)
    separator = " " if language == "en" else ""
    words = ["".join(generator.choices(SYLLABLES[language], k=2)) for _ in range(30)]
    words = SYLLABLES[language] if language == "en" else words
    joiner = separator if language != "ko" else " "
    return [joiner.join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(count)]


def write_tokenizer(folder: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences("en", 500)), model_writer=model, vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0, remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_model(folder: Path, rows: int, shift: float) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for name, shift in (("base", 0.0), ("chat", 0.01)):
        (folder / name).mkdir()
        write_tokenizer(folder / name)
        proto = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / name / "tokenizer.model")
        )
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                  "add_bos_token": True, "legacy": True}  # fmt: skip
        if name == "chat":
            config["chat_template"] = TEMPLATE
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
        write_model(folder / name, proto.vocab_size(), shift)
    return folder


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> Path:
    """A recipe of a run that takes seconds; its run lies beside it."""
    folder = tmp_path_factory.mktemp("run")
    sources = []
    for language, weight in (("ko", 0.4), ("zh_tw", 0.4), ("en", 0.2)):
        path = folder / f"{language}.jsonl"
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in sentences(language, 400)]
        path.write_text("\n".join(rows), encoding="utf-8")
        sources.append({"path": str(path), "language": language, "weight": weight})
    prompts = [
        {"language": s["language"], "messages": [{"role": "user", "content": "가나 天地 go home"}]}
        for s in sources
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    values = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "models": {"base": str(pair / "base"), "chat": str(pair / "chat")},
        "corpus": {"sources": sources, "heldout": 0.1},
        "tokenizer": {"new_pieces": {"ko": 40, "zh_tw": 40}, "min_frequency": 2},
        "training": {
            "tokens": 32 * 8 * 6, "sequence_length": 32, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32",
            "log_every": 2, "evaluate_every": 3, "checkpoints": {"every": 3}, "optimizer": {"learning_rate": 0.001},
        },
        "evaluation": {
            "suites": ["language", "chat", "safety"], "prompts": str(folder / "prompts.jsonl"), "max_prompts": 2,
            "max_new_tokens": 8, "context": 64,
        },
        "tracking": {"mode": "offline"},
        "launch": {"processes": 2},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, [])


@pytest.fixture(scope="session")
def finished(recipe_path: Path, recipe: Recipe) -> Path:
    """The folder of a finished run: trained by two processes, evaluated by this one."""
    for command in ("tokenizer", "embeddings", "data", "train"):
        done = cpt_merge(command, recipe_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = cpt_merge("run", recipe_path, "launch.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.directory
