"""A tiny pair of models, text in three languages, and a recipe over them."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from filelock import FileLock
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
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that the workers of pytest-xdist have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, in whichever worker comes first."""
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def pair(shared: Path) -> Path:
    return made_once(shared / "tiny-pair", write_pair)


def write_pair(folder: Path) -> None:
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


LANGUAGES = {"ko": 0.4, "zh_tw": 0.4, "en": 0.2}


def write_texts(folder: Path) -> None:
    """Text in three languages, and a prompt in each."""
    for language in LANGUAGES:
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in sentences(language, 400)]
        (folder / f"{language}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    message = {"role": "user", "content": "가나 天地 go home"}
    prompts = [{"language": language, "messages": [message]} for language in LANGUAGES]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")


def write_recipe(folder: Path, pair: Path, texts: Path) -> Path:
    """A recipe of a run that takes seconds; its run lies beside it."""
    sources = [
        {"path": str(texts / f"{language}.jsonl"), "language": language, "weight": weight}
        for language, weight in LANGUAGES.items()
    ]
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
            "suites": ["language", "chat", "safety"], "prompts": str(texts / "prompts.jsonl"), "max_prompts": 2,
            "max_new_tokens": 8, "context": 64,
        },
        "tracking": {"mode": "offline"},
        "launch": {"processes": 2},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(shared: Path) -> Path:
    return made_once(shared / "tiny-texts", write_texts)


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory, pair: Path, texts: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("tiny"), pair, texts)


@pytest.fixture(scope="session")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, [])


@pytest.fixture(scope="session")
def finished(shared: Path, recipe: Recipe, pair: Path, texts: Path) -> Path:
    """The folder of a finished run: trained by two processes, evaluated by this one."""
    made = made_once(
        shared / "tiny-run", lambda folder: make_run(write_recipe(folder, pair, texts))
    )
    shutil.copytree(made / "runs" / "tiny", recipe.directory, dirs_exist_ok=True)
    adopt(recipe.directory, str(made), str(recipe.directory.parents[1]))
    return recipe.directory


def make_run(recipe_path: Path) -> None:
    for command in ("tokenizer", "embeddings", "data", "train"):
        done = cpt_merge(command, recipe_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = cpt_merge("run", recipe_path, "launch.processes=1")
    assert done.returncode == 0, done.stdout + done.stderr


def adopt(run: Path, before: str, now: str) -> None:
    """Let a copied run's records name the folder of inputs that are equal byte for byte."""
    for record in run.glob("*/stage.json"):
        record.write_text(record.read_text().replace(before, now))
