"""Small real tokenizers and text, made in the test: words at random, always the same."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cpt_merge.data.sources import Corpus, Source
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.families.tokenizer_json import AddedToken

CONFIG = TokenizerConfig(new_pieces={"zh_tw": 150, "ko": 200}, min_frequency=2)


def words(text: str) -> list[str]:
    return text.split()


ENGLISH = words(
    "the a of to and in is was for that with on as at by from have it this which not be are or an "
    "they their were "
    "water river stone light morning evening people village teacher student language question "
    "answer machine system "
    "write read learn speak think carry bring under over between through small large quiet bright "
    "simple difficult"
)
CHINESE = words(
    "我們 今天 天氣 很好 圖書館 在 哪裡 台灣 的 夜市 有 很多 東西 好吃 學生 老師 問題 回答 電腦 系統 語言 學習 "
    "早上 晚上 河 水 石頭 光 村子 人 說話 想 帶 小 大 安靜 明亮 簡單 困難 是 不 和 這 那 會 可以 中文 繁體"
)
KOREAN = words(
    "우리는 오늘 날씨가 좋아서 공원에 갔습니다 도서관은 어디에 있습니까 한국의 시장에는 맛있는 음식이 많습니다 학생 "
    "선생님 질문 대답 컴퓨터 시스템 언어 배웁니다 아침에 저녁에 강 물 돌 빛 마을 사람 말합니다 생각 작은 큰 조용한"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def english(random: Random) -> str:
    return " ".join(random.choices(ENGLISH, k=random.randint(5, 12))).capitalize() + random.choice(
        [".", "?", " (1)."]
    )


def chinese(random: Random) -> str:
    return "".join(random.choices(CHINESE, k=random.randint(4, 10))) + random.choice(
        ["。", "？", "，Python 3。"]
    )


def korean(random: Random) -> str:
    return " ".join(random.choices(KOREAN, k=random.randint(4, 8))) + random.choice(
        [".", "?", " Linux."]
    )


WRITERS = {"en": english, "zh_tw": chinese, "ko": korean}


def write_corpus(folder: Path, documents: int = 600) -> Corpus:
    """A file of one document a line for each of English, Traditional Chinese and Korean."""
    for language, write in WRITERS.items():
        random = Random(language)
        lines = [write(random) for _ in range(documents)]
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = [
        Source(path=str(folder / f"{language}.txt"), language=language) for language in WRITERS
    ]
    return Corpus(sources=sources, heldout=0.1)


def train_sentencepiece(model_type: str = "bpe", **options: object) -> bytes:
    """A LLaMA-2-like model of English, that knows a few Han characters and one Chinese word."""
    random = Random(0)
    lines = (
        [english(random) for _ in range(800)]
        + ["  indented\n    more  x"] * 20
        + ["中文 中文 的人", "한"] * 40
    )
    model = io.BytesIO()
    defaults = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 600,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=model_type,
        character_coverage=1.0, allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
        hard_vocab_limit=False, **{**defaults, **options},
    )  # fmt: skip
    return model.getvalue()


def byte_level_content() -> dict:
    """A GPT-2-like tokenizer of English, whose special tokens are in `added_tokens` only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    random = Random(0)
    tokenizer.train_from_iterator((english(random) for _ in range(800)), trainer)
    content = json.loads(tokenizer.to_str())
    size = len(content["model"]["vocab"])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    content["added_tokens"] = [
        asdict(AddedToken(size + rank, name)) for rank, name in enumerate(names)
    ]
    return content


def write_base(
    folder: Path,
    rows: int,
    *,
    content: dict | None = None,
    proto: bytes | None = None,
    **settings: object,
) -> Path:
    """The tokenizer files of a model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "model_type": "llama"}))
    if content is not None:
        (folder / "tokenizer.json").write_text(
            json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )
    if proto is not None:
        (folder / "tokenizer.model").write_bytes(proto)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
