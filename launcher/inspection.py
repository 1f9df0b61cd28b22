"""What `cpt-merge init` finds out about models, text and GPUs before it chooses anything."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_merge.checkpoint.reader import Checkpoint, read_json
from cpt_merge.checkpoint.token_ids import FAST_FILE
from cpt_merge.cluster.scaling import GIGA, GPUS, gpu_named
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import model_directory
from cpt_merge.core.languages import LANGUAGES, find_language, script_share
from cpt_merge.core.progress import say
from cpt_merge.data.sources import Corpus, Source, read_source, source_files, text_bytes_at_most
from cpt_merge.evaluation.chinese import SCRIPT_OF, is_chinese, is_japanese, other_script_characters
from cpt_merge.launcher.choosing import SEEN, LanguageFacts
from cpt_merge.launcher.sizes import shape_of
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.fit import open_fitting
from cpt_merge.tokenizer_ext import TokenizerConfig
from cpt_merge.tokenizer_ext.base_tokenizer import check_pair, read_tokenizer
from cpt_merge.tokenizer_ext.extend import try_extension
from cpt_merge.tokenizer_ext.families.tokenizer_json import build
from cpt_merge.training.memory import ModelShape

SAMPLE = 2_000_000  # characters of a source that are read; all of a small one
LEARNT_FROM = 20_000_000  # characters of a language from which the gain curve is made
OWN_SCRIPT = 0.5  # least share of a text's letters in its language's script
SHORT_SAMPLE = 200_000  # characters in which the language is recognised
COVERAGE = 0.9998
_MACHINE = re.compile(r"(?:([1-9]\d*)x)?([1-9]\d*)x(.+)")


@dataclass(frozen=True)
class BaseFacts:
    """What was read of the pair."""

    shape: ModelShape
    positions: int  # the longest sequence of the model
    doubts: list[str]  # what is probably wrong with the pair


def inspect_pair(base: str, chat: str) -> BaseFacts:
    """Read a pair. Raises `UserError` for one that does not fit."""
    directories = {"base": model_directory(base), "chat": model_directory(chat)}
    open_fitting(directories)
    config = Checkpoint.open(directories["base"]).config
    text = config.get("text_config") or config
    positions = int(text.get("max_position_embeddings") or 0)
    shape = shape_of(directories["base"], base)
    return BaseFacts(shape, positions or 1 << 20, pair_warnings(*directories.values()))


@dataclass(frozen=True)
class TextFacts:
    """A source of text, and what was read of it."""

    path: str
    language: str
    characters: float  # of the whole source; an upper estimate if not all of it was read
    counts: Counter[str]  # of the characters that were read
    documents: int  # that were read
    sample: str

    def __str__(self) -> str:
        return f"{self.path}: {self.language}, about {self.characters / 1e6:.3g} M characters"


def inspect_text(text: str) -> TextFacts:
    """Read the beginning of a source, `TAG=PATH` or a path whose language is guessed.

    Raises `UserError` for text that cannot be read, is empty, or is in another language.
    """
    tag, separator, path = text.partition("=")
    if not separator or "/" in tag:  # a path may contain the sign
        tag, path = "", text
    source = Source(path=path, language=find_language(tag).tag if tag else "en")
    documents, read = [], 0
    texts = read_source(source)
    for document in texts:
        documents.append(document)
        read += len(document)
        if read >= SAMPLE:
            break
    sample = "\n".join(documents)[:SHORT_SAMPLE]
    if not sample.strip():
        raise UserError(f"{path} holds no text; name another source.")
    guess = guess_language(sample)
    if not tag and guess is None:
        raise UserError(f"the language of {path} is not clear; write it as in ko={path}.")
    language = source.language if tag else guess or ""
    _check_language(path, language, sample, guess)
    is_whole = next(texts, None) is None
    size = 0.0 if is_whole else _size(source) * read / len("".join(documents).encode())
    counts = Counter("".join(documents))
    return TextFacts(path, language, max(size, read), counts, len(documents), sample)


def _size(source: Source) -> float:
    return sum(text_bytes_at_most(file, source) for file in source_files(source))


def guess_language(text: str) -> str | None:
    """The known language that a text is probably in, by its script and its characters."""
    found = {tag: script_share(text, one.scripts) for tag, one in LANGUAGES.items()}
    if found["ko"] >= OWN_SCRIPT or found["en"] >= OWN_SCRIPT:
        return "ko" if found["ko"] >= OWN_SCRIPT else "en"
    if found["ja"] < OWN_SCRIPT:
        return None
    start = text[:20_000]
    if script_share(text, ("Hiragana", "Katakana")) > 0.1 and is_japanese(start):
        return "ja"
    return next((tag for tag in SCRIPT_OF if is_chinese(start, tag)), None)


def _check_language(path: str, language: str, sample: str, guess: str | None) -> None:
    meant = f"; it looks like {guess}" if guess and guess != language else ""
    scripts = find_language(language).scripts
    share = script_share(sample, scripts)
    if share < OWN_SCRIPT:
        raise UserError(
            f"{path}: {share:.0%} of the letters are {' or '.join(scripts)}, so it is not in "
            f"{language}{meant}; correct its language, or name another source."
        )
    opposite = "zh_tw" if language == "zh_cn" else "zh_cn"
    if language in SCRIPT_OF:
        own = other_script_characters(sample, opposite)
        other = other_script_characters(sample, language)
        if other > own:
            raise UserError(
                f"{path}: {other:,} characters are of the other Chinese script and {own:,} of "
                f"{language}'s{meant}; correct its language, or convert it with `convert` in the "
                "recipe (docs/data.md)."
            )


def coverage_of(texts: Sequence[TextFacts], language: str) -> tuple[float, int]:
    """The share of a language's letters that are frequent enough for rows, and how many these are.

    For `tokenizer.character_coverage`, which counts from the most frequent one on.
    """
    letters = find_language(language).letters
    counts = Counter[str]()
    for one in texts:
        counts += one.counts if one.language == language else Counter()
    own = {letter: count for letter, count in counts.items() if letters.match(letter)}
    frequent = [count for count in own.values() if count >= SEEN]
    share = sum(frequent) / max(sum(own.values()), 1)
    return min(COVERAGE, int(share * 1e4) / 1e4), len(frequent)


def measure_languages(
    base: str, chat: str, texts: Sequence[TextFacts], config: TokenizerConfig, heldout: float
) -> dict[str, LanguageFacts]:
    """Learn new pieces from the beginning of the text, and measure what each number of them saves.

    If the base's tokenizer cannot be extended, that is said, and the curves end at no pieces.
    """
    directories = model_directory(base), model_directory(chat)
    try:
        check_pair(*directories)
    except UserError as error:
        say(f"no new pieces: {error}")
        unchanged = {tag: _fertility(directories[0], texts, tag) for tag in config.languages()}
        return {
            tag: LanguageFacts(_characters(texts, tag), ((0, fertility),))
            for tag, fertility in unchanged.items()
        }
    sources = [Source(path=one.path, language=one.language) for one in texts]
    with tempfile.TemporaryDirectory() as folder:
        report = try_extension(
            config,
            directories[0],
            Corpus(sources=sources, heldout=heldout),
            Path(folder),
            directories[1],
        )
    curves = {one.language: tuple(one.curve) for one in report.usefulness}
    if missing := [tag for tag, curve in curves.items() if not curve]:
        raise UserError(
            f"the text in {missing[0]} is too short to hold a document out; add text in it."
        )
    return {tag: LanguageFacts(_characters(texts, tag), curve) for tag, curve in curves.items()}


def _characters(texts: Sequence[TextFacts], tag: str) -> float:
    return sum(one.characters for one in texts if one.language == tag)


def _fertility(base: Path, texts: Sequence[TextFacts], tag: str) -> float:
    """Tokens per character by a tokenizer that may be of any kind."""
    fast = base / FAST_FILE
    tokenizer = build(read_json(fast) if fast.is_file() else read_tokenizer(base)[0])
    sample = next(one.sample for one in texts if one.language == tag)
    return len(tokenizer.encode(sample, add_special_tokens=False).ids) / len(sample)


@dataclass(frozen=True)
class Machine:
    """Where the run is meant to run."""

    gpu: str | None  # as `plan --gpu` takes it; None: no GPU
    gpus: int = 0  # of a node
    nodes: int = 1
    here: bool = True
    slurm: bool = False

    @property
    def ranks(self) -> int:
        """Processes of the training."""
        return max(1, self.gpus * self.nodes)

    def __str__(self) -> str:
        if self.gpu is None:
            return "this machine, without a GPU"
        memory = gpu_named(self.gpu).memory / GIGA
        what = f"{self.gpus} x {self.gpu} ({memory:g} GB)"
        nodes = f"{self.nodes} nodes of {what}" if self.nodes > 1 else what
        return nodes + (" on Slurm" if self.slurm else ", this machine" if self.here else "")


def parse_machine(text: str) -> Machine:
    """`this`, `cpu`, `8xh100`, or `slurm:2x8xh100` (nodes, GPUs of a node, GPU).

    Raises `UserError` for anything else.
    """
    words = text.strip().lower().replace(" ", "")
    if words in ("", "this"):
        return this_machine()
    if words == "cpu":
        return Machine(None)
    slurm = words.startswith("slurm:")
    found = _MACHINE.fullmatch(words.removeprefix("slurm:"))
    if not found:
        raise UserError(
            f"machine {text!r} is none of this, cpu, 8xh100 (GPUs) and slurm:2x8xh100 (nodes, GPUs "
            "of a node); correct it."
        )
    nodes, gpus, gpu = found.groups()
    gpu_named(gpu)
    return Machine(gpu, int(gpus), int(nodes or 1), here=False, slurm=slurm)


def this_machine() -> Machine:
    """The GPUs of this machine. Raises `UserError` for one of a kind that `plan` does not know."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        if shutil.which("sbatch"):
            raise UserError(
                "this machine has Slurm and no GPU; name those of its nodes, such as "
                "slurm:1x8xh100, or cpu."
            )
        return Machine(None)
    about = torch.cuda.get_device_properties(0)
    name = about.name.lower().replace(" ", "")
    known = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in name]
    if not known:
        raise UserError(
            f"the speed of the GPU {about.name} is not known; give the machine as "
            f"{count}xmemory={about.total_memory / GIGA:.0f},tflops=...,bandwidth=... "
            "(GB, dense bf16, GB/s)."
        )
    longest = max(len(gpu.name.partition("-")[0]) for gpu in known)
    same = [gpu for gpu in known if len(gpu.name.partition("-")[0]) == longest]
    best = min(same, key=lambda gpu: abs(gpu.memory - about.total_memory))
    return Machine(best.name, count)
