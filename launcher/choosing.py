"""What `cpt-merge init` chooses, by model size, text and machine; docs/choosing.md shows it.

Continual pretraining has few published ablations, so most numbers are judgement between published
runs, and each choice says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cpt_merge.data.mixture import MANY_EPOCHS

BEGIN, END = "<!-- tables of launcher/choosing.py -->", "<!-- end of the tables -->"
NO_REPLAY = (
    "there is no English text, so the model will forget some of its English, and of what the chat "
    "vector needs; add a source with `language: en`."
)
REPLAY = 0.15  # share of the tokens that is English
WARMUP = 0.05  # share of the steps
NEW_ROWS = 0.1  # share of the tokens in which only new rows are trained, before everything
LORA_RATE = 2e-4  # of adapters, embedding and head
SMALL_GAIN = 0.1  # an extension that saves a smaller share of the tokens is not worth its rows
NEARLY_ALL = 0.03  # the smallest vocabulary within this share of the largest one's fertility
FEWEST_STEPS = 300  # the batch is made smaller for them
SEEN = 20  # a character that is rarer in the sample stays in bytes, because no row learns from it


@dataclass(frozen=True)
class SizeDefaults:
    """The defaults for models of up to so many parameters."""

    parameters: float
    learning_rate: float
    embedding_learning_rate: float  # new rows start from a mean and have farther to go
    tokens: float  # training budget, if there is text enough
    batch_tokens: int  # tokens of a step
    new_pieces: int  # largest vocabulary that is tried for each language
    sequence_length: int


SIZES = (
    SizeDefaults(50e6, 1e-3, 3e-3, 10e6, 1 << 14, 2_000, 1024),
    SizeDefaults(1e9, 2e-4, 4e-4, 2e9, 1 << 19, 12_000, 2048),
    SizeDefaults(5e9, 1e-4, 2e-4, 3e9, 1 << 20, 16_000, 4096),
    SizeDefaults(20e9, 5e-5, 1e-4, 3e9, 1 << 20, 24_000, 4096),
    SizeDefaults(math.inf, 2e-5, 4e-5, 3e9, 1 << 21, 24_000, 4096),
)


@dataclass(frozen=True)
class PublishedRun:
    """What a continual pretraining that was published used, as far as its source says."""

    name: str
    base: str
    tokens: str
    learning_rate: str
    new_pieces: str
    replay: str
    source: str


RUNS = (
    PublishedRun(
        "Swallow", "Llama 2 7B, 13B, 70B", "up to 100B", "", "extended", "10 % English",
        "summary of arXiv 2404.17790",
    ),
    PublishedRun(
        "Sailor2 1B, 8B, 20B", "Qwen2.5, with more layers", "500B",
        "1e-4, then 1e-5 on the best text", "", "100B of 500B", "summary of arXiv 2502.12982",
    ),
    PublishedRun(
        "SEA-LION v3 8B", "Llama 3.1 8B Instruct", "200B", "1e-5, WSD, 10 % warm-up", "none (70B)",
        "25 % English, 20 % code", "summary of arXiv 2504.05747, docs.sea-lion.ai",
    ),
    PublishedRun(
        "EEVE-Korean 10.8B", "SOLAR 10.7B", "2B", "", "extended; seven phases, new rows first",
        "", "abstract of arXiv 2402.14714, model card",
    ),
    PublishedRun(
        "Chinese-LLaMA-2", "Llama 2", "", "2e-4 with LoRA of rank 64, 5 % warm-up",
        "extended", "", "scripts/training/run_pt.sh of ymcui/Chinese-LLaMA-Alpaca-2",
    ),
    PublishedRun(
        "llama-2-ko 7B", "Llama 2 7B", "over 40B", "1e-5", "14,336", "", "model card",
    ),
    PublishedRun("TAIDE-LX 7B", "Llama 2 7B", "41B", "", "24,720", "", "model card"),
    PublishedRun("Llama3-TAIDE-LX 8B", "Llama 3 8B", "43B", "", "none", "", "model card, config"),
    PublishedRun("Breeze 7B", "Mistral 7B", "250 GB of text", "", "30,000", "", "model card"),
    PublishedRun(
        "Chat Vector, Traditional Chinese", "Llama 2 13B", "3.1B", "", "", "",
        "reviews of arXiv 2310.04799",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class LanguageFacts:
    """What was measured of the text in one language."""

    characters: float  # in all sources, an upper estimate
    curve: tuple[tuple[int, float], ...]  # (new pieces, tokens per character), from none on

    @property
    def gain(self) -> float:
        """The share of the tokens that all pieces of the curve save."""
        return 1 - self.curve[-1][1] / self.curve[0][1]

    def pieces(self, fewest: int) -> int:
        """How many new pieces to ask for; 0 if they save too little."""
        if self.gain < SMALL_GAIN:
            return 0
        enough = self.curve[-1][1] * (1 + NEARLY_ALL)
        return next(size for size, value in self.curve if value <= enough and size >= fewest)

    def fertility(self, pieces: int) -> float:
        """Tokens per character with so many pieces, one of the curve's points."""
        return dict(self.curve)[pieces]


def defaults_for(parameters: float) -> SizeDefaults:
    """The defaults of a model of this size."""
    return next(row for row in SIZES if parameters <= row.parameters)


def choose_tokens(row: SizeDefaults, available: float, replay: bool) -> tuple[int, str]:
    """The training budget, rounded to two digits, and the reason.

    `available` are the tokens of the text in new languages.
    """
    share = 1 - REPLAY if replay else 1.0
    most = MANY_EPOCHS * available / share
    if most < row.tokens:
        reason = f"the text {MANY_EPOCHS} times; read more often it adds little (arXiv 2305.16264)"
        return max(1, two_digits(most)), reason
    epochs = row.tokens * share / available
    return two_digits(row.tokens), f"the default for this size; reads the text {epochs:.2g} times"


def choose_batch(row: SizeDefaults, tokens: int, length: int, ranks: int) -> int:
    """Sequences of a step: a power of two if the ranks are one, at least one for each rank."""
    wanted = min(row.batch_tokens, tokens / FEWEST_STEPS) / length
    power = 1 << max(0, math.floor(math.log2(max(wanted, 1))))
    return max(ranks, power // ranks * ranks)


def choose_shares(new: Mapping[str, float], replay: bool) -> dict[str, float]:
    """The share of each language: new ones by their tokens, damped by a root, and replay."""
    roots = {tag: math.sqrt(tokens) for tag, tokens in new.items()}
    left = 1 - REPLAY if replay else 1.0
    shares = {tag: round(left * root / sum(roots.values()), 3) for tag, root in roots.items()}
    last = list(shares)[-1]
    shares[last] = round(shares[last] + left - sum(shares.values()), 3)
    return shares | ({"en": REPLAY} if replay else {})


def two_digits(number: float) -> int:
    """The number rounded to two digits."""
    return int(float(f"{number:.1e}"))


def as_markdown() -> str:
    """The tables of docs/choosing.md."""
    sizes = [
        [
            f"up to {short(row.parameters)}" if row.parameters < math.inf else "larger",
            _rate(row.learning_rate), _rate(row.embedding_learning_rate), short(row.tokens),
            f"{row.batch_tokens:,}", f"{row.new_pieces:,}", f"{row.sequence_length:,}",
        ]
        for row in SIZES
    ]  # fmt: skip
    head = (
        "parameters", "learning rate", "of embedding and head", "tokens", "tokens a step",
        "most new pieces a language", "sequence",
    )  # fmt: skip
    runs = [[*vars(run).values()] for run in RUNS]
    names = ("run", "base", "tokens", "learning rate", "new pieces", "replay", "read in")
    return f"{_table(head, sizes)}\n\n{_table(names, runs)}"


def short(number: float) -> str:
    """Three digits of a number, as a recipe may write it: 1.5B, 500M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def _rate(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Write the tables into docs/choosing.md, which `make docs` calls."""
    from cpt_merge.core.package import PACKAGE

    path = PACKAGE.parent / "docs" / "choosing.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{as_markdown()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
