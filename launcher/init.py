"""`cpt-merge init`: inspect a pair and its text, write a recipe with a reason for each choice."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from cpt_merge.checkpoint.positions import positions_of
from cpt_merge.checkpoint.tokenizer_files import TOKENIZER_FILES
from cpt_merge.cluster.fit import fittings, shortest
from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.cluster.scaling import GPUS
from cpt_merge.core.artifact import write_text
from cpt_merge.core.config import as_count
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_here, model_directory
from cpt_merge.core.hub_repository import Repository
from cpt_merge.core.languages import find_language, script_share
from cpt_merge.core.progress import counted, say
from cpt_merge.data.sources import Corpus, Source, read_source, source_files, text_bytes_at_most
from cpt_merge.evaluation.chinese import SCRIPT_OF, other_script_characters
from cpt_merge.launcher import choosing
from cpt_merge.launcher.sizes import shape_of, shape_on_the_hub
from cpt_merge.merge import merge_report
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.fit import open_fitting
from cpt_merge.tokenizer_ext.base_tokenizer import Base, read_base
from cpt_merge.tokenizer_ext.config import TokenizerConfig
from cpt_merge.tokenizer_ext.families.tokenizer_json import Content, build
from cpt_merge.tokenizer_ext.fertility import Fertility, gain_curve
from cpt_merge.tokenizer_ext.learn.grow import learn_languages, with_pieces
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.memory import ModelShape

SAMPLE = 2_000_000  # characters of a language that are read
FERTILITY_SAMPLE = 200_000  # of them, characters on which tokens are counted
OWN_SCRIPT = 0.3  # share of the letters that a text in the language has at least
HELDOUT = 300_000  # characters of a language that are kept back
ENGLISH = "en"


@dataclass(frozen=True)
class Asked:
    """What the user says."""

    base: str
    chat: str
    text: list[tuple[str, str]]  # (language, path)
    out: Path
    gpu: str | None = None
    gpus: int = 1
    nodes: int = 1

    @property
    def cluster(self) -> ClusterOptions | None:
        """The GPUs, if they are named."""
        if self.gpu is None:
            return None
        return ClusterOptions(self.gpu, self.nodes, max(1, self.gpus // self.nodes))


@dataclass(frozen=True)
class TextFacts:
    """What the text of one language is like."""

    language: str
    sources: list[str]
    characters: float  # all of it; estimated if it is long
    before: float  # tokens per character with the base's tokenizer
    curve: list[tuple[int, float]] = field(default_factory=list)  # (new pieces, the same with them)

    @property
    def pieces(self) -> int:
        """New pieces: as many as save tokens."""
        if not self.curve:
            return 0
        least = self.curve[-1][1] * (1 + choosing.GAIN_LEFT)
        size = next(size for size, tokens in self.curve if tokens <= least)
        return -(-size // 100) * 100

    @property
    def after(self) -> float:
        """Tokens per character with the new pieces."""
        return self.curve[-1][1] if self.curve else self.before

    @property
    def tokens(self) -> float:
        """Of all of it."""
        return self.characters * self.after


@dataclass(frozen=True)
class BaseFacts:
    """The base model."""

    tokenizer: Base
    shape: ModelShape
    positions: int | None


def inspect_base(name: str) -> BaseFacts:
    """Read configuration, headers and tokenizer; of a model on the hub, without its weights."""
    if is_here(name):
        directory = model_directory(name)
        shape = shape_of(directory, name)
    else:
        _, shape = shape_on_the_hub(name, None)
        snapshot = Repository.parse("model", name).find()
        wanted = [one for one in ("config.json", *TOKENIZER_FILES) if one in snapshot.files]
        snapshot.download(wanted)
        path = snapshot.path("config.json")
        assert path is not None, "shape_on_the_hub has read it"
        directory = path.parent
    config = yaml.safe_load((directory / "config.json").read_text(encoding="utf-8"))
    return BaseFacts(read_base(directory), shape, positions_of(config))


def inspect_text(language: str, paths: Sequence[str], base: Base) -> TextFacts:
    """Read a sample of one language's text, and learn pieces from it if they would save much.

    Raises `UserError` for text that is hardly in the language.
    """
    sources, sample, whole = read_sample(language, paths)
    text = "".join(sample)
    characters = float(len(text))
    if not whole:
        sizes = sum(text_bytes_at_most(file, one) for one in sources for file in source_files(one))
        characters = sizes / (len(text.encode()) / len(text))
    counted_text = list(_until(sample, FERTILITY_SAMPLE))
    before = count_tokens(base.content, counted_text)
    size = sum(map(len, counted_text))
    facts = TextFacts(language, list(paths), characters, before.total() / size)
    if language == ENGLISH or facts.before <= choosing.EXTEND_ABOVE:
        return facts
    corpus = Corpus(sources=sources, heldout=0.001)
    wanted = TokenizerConfig(
        new_pieces={language: choosing.pieces_for(language)}, max_characters=SAMPLE
    )
    (learned,) = learn_languages(base, corpus, wanted)
    tokens = count_tokens(with_pieces(base, list(learned.pieces)), counted_text)
    measured = Fertility(language, len(sample), size, (0, 0), (0, 0), 0, tokens)
    curve = gain_curve(learned.pieces, {}, measured, learned.characters)
    return TextFacts(language, list(paths), characters, facts.before, curve)


def read_sample(language: str, paths: Sequence[str]) -> tuple[list[Source], list[str], bool]:
    """The sources of a language, documents from their start, and whether these are all.

    Raises `UserError` for text that cannot be read or is hardly in the language.
    """
    sources = [Source(path=path, language=language) for path in paths]
    sample, whole = _sample(sources)
    start, where = "".join(sample)[:FERTILITY_SAMPLE], f"--text {language}={paths[0]}"
    share = script_share(start, find_language(language).scripts)
    if share < OWN_SCRIPT:
        raise UserError(
            f"{where}: only {share:.0%} of the letters are in the script of "
            f"{find_language(language).name}; correct the language or the file."
        )
    _check_chinese_script(where, language, start)
    return sources, sample, whole


def _check_chinese_script(where: str, language: str, text: str) -> None:
    """Raise `UserError` for Chinese text that is rather in the other Chinese script."""
    if language not in SCRIPT_OF:
        return
    opposite = "zh_tw" if language == "zh_cn" else "zh_cn"
    other = other_script_characters(text, language)
    own = other_script_characters(text, opposite)
    if other > own:
        raise UserError(
            f"{where}: {other:,} characters are only in the other Chinese script and {own:,} only "
            f"in that of {language}; correct the language (probably {opposite}), or convert the "
            "text (`convert`, docs/data.md)."
        )


def check_pair(base: str, chat: str) -> None:
    """Raise `UserError` for models that do not fit; say what is probably wrong with a pair.

    Models of the hub that are not downloaded are checked by `run`.
    """
    if not (is_here(base) and is_here(chat)):
        return
    directories = {"base": model_directory(base), "chat": model_directory(chat)}
    open_fitting(directories)
    merge_report.warn(pair_warnings(directories["base"], directories["chat"]))


def count_tokens(content: Content, texts: Sequence[str]) -> Counter[str]:
    """How often a tokenizer uses each token."""
    encoded = build(content).encode_batch_fast(list(texts), add_special_tokens=False)
    names = {id_: token for token, id_ in content["model"]["vocab"].items()}
    return Counter(names.get(id_, "") for one in encoded for id_ in one.ids)


def _sample(sources: Sequence[Source]) -> tuple[list[str], bool]:
    """Documents from the start of the text, and whether they are all of it."""
    found, left, documents = list[str](), SAMPLE, _documents(sources)
    for document in documents:
        found.append(document)
        left -= len(document)
        if left <= 0:
            return found, next(documents, None) is None
    if not any(found):
        raise UserError(f"{sources[0].path} holds no text; give another file.")
    return found, True


def _documents(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        yield from (document for document in read_source(source) if document.strip())


def _until(texts: Sequence[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


@dataclass
class Recipe:
    """Lines of YAML, each with its reason."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str, reason: str = "") -> None:
        """A line and, before it, its reason as a comment."""
        indent = " " * (len(line) - len(line.lstrip()))
        if reason:
            self.lines += [f"{indent}# {part}" for part in _wrapped(reason, 90 - len(indent))]
        self.lines.append(line)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width)


def write_recipe(asked: Asked) -> None:
    """Inspect, choose, and write the recipe. Raises `UserError` for what cannot be used."""
    check_out(asked.out)
    base = inspect_base(asked.base)
    check_pair(asked.base, asked.chat)
    paths: dict[str, list[str]] = {}
    for language, path in asked.text:
        paths.setdefault(find_language(language).tag, []).append(path)
    new = [inspect_text(tag, found, base.tokenizer) for tag, found in paths.items()]
    if all(one.language == ENGLISH for one in new):
        raise UserError("all text is English; give text in the new language: --text ko=FILE.")
    for one in new:
        say(_summary(one))
    text = compose(asked, base, new)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(asked.out, text)
    say(f"init: wrote {asked.out}")


def check_out(out: Path) -> None:
    """Raise `UserError` for a file that is no recipe or exists."""
    if out.exists():
        raise UserError(f"{out} exists; give another name, or remove it.")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"{out} is no name of a recipe; end it in .yaml.")


def _summary(text: TextFacts) -> str:
    said = (
        f"{text.language}: about {text.characters / 1e6:,.1f} M characters, "
        f"{text.before:.2f} tokens per character"
    )
    if not text.curve:
        return said
    shown = islice(text.curve, 0, None, 4)
    points = ", ".join(f"{tokens:.2f} with {size:,}" for size, tokens in shown)
    return f"{said}; new pieces: {points}"


def compose(asked: Asked, base: BaseFacts, text: Sequence[TextFacts]) -> str:
    """The recipe."""
    new = [one for one in text if one.language != ENGLISH]
    replay = len(new) < len(text)
    pieces = {one.language: one.pieces for one in new if one.pieces}
    recipe = Recipe([
        "# Written by `cpt-merge init`, with a reason for each choice. docs/choosing.md has the",
        "# published runs, docs/recipe.md every key.",
        f"name: {asked.out.stem}", "", "models:", f"  base: {_quoted(asked.base)}",
        f"  chat: {_quoted(asked.chat)}", "",
    ])  # fmt: skip
    _add_corpus(recipe, text, replay)
    _add_tokenizer(recipe, base, new, pieces)
    training = _training(asked, base, new, replay, bool(pieces))
    _add_training(recipe, asked, base, training, pieces, new)
    recipe.add("merge:")
    recipe.add(
        "  ratio: 1.0",
        "Plain addition, as in the paper; `cpt-merge sweep` measures other ratios afterwards.",
    )
    recipe.add("")
    recipe.add("evaluation:")
    recipe.add(
        "  suites: [language, chat]",
        "Bits per byte, and the built-in prompts of the text's languages. Others: safety, "
        "toxicity, knowledge-ko, ... (docs/evaluation.md).",
    )
    return "\n".join(recipe.lines) + "\n"


def _quoted(value: str) -> str:
    return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("\n...\n").strip()


def _add_corpus(recipe: Recipe, text: Sequence[TextFacts], replay: bool) -> None:
    recipe.add("corpus:")
    share = HELDOUT / min(one.characters for one in text)
    recipe.add(
        f"  heldout: {min(0.02, max(0.0005, share)):.2g}",
        "Share of the documents that is kept back, for bits per byte.",
    )
    recipe.add("  sources:")
    others = sum(one.language != ENGLISH for one in text)
    for one in text:
        share = choosing.REPLAY if one.language == ENGLISH else 1.0
        if one.language != ENGLISH and replay:
            share = (1 - choosing.REPLAY) / others
        elif one.language != ENGLISH:
            share = 1 / others
        weight = share / len(one.sources)
        reason = ""
        if one.language == ENGLISH:
            reason = (
                "Replay of English against forgetting: published runs take 10 % (Swallow) to 25 % "
                "(SEA-LION v3)."
            )
        for number, path in enumerate(one.sources):
            recipe.add(
                f"    - {{path: {_quoted(path)}, language: {one.language}, weight: {weight:.4g}}}",
                "" if number else reason,
            )
    if not replay:
        recipe.lines += [
            "    # WARNING: there is no English text. Without replay the model forgets some of",
            "    # what it knows; add a source with `language: en` and about 15 % of the weight.",
        ]
        say("init: no English text is given, so the model will forget some of what it knows; "
            "add --text en=FILE")  # fmt: skip
    recipe.add("")


def _add_tokenizer(
    recipe: Recipe, base: BaseFacts, new: Sequence[TextFacts], pieces: dict[str, int]
) -> None:
    fertility = ", ".join(f"{one.before:.2f} ({one.language})" for one in new)
    if not pieces:
        recipe.add(
            f"# The base's own tokenizer is kept: it needs {fertility} tokens per character, and"
        )
        recipe.add(f"# an extension pays above {choosing.EXTEND_ABOVE:g}.")
        recipe.add("")
        return
    gains = "; ".join(
        f"{one.language}: {one.before:.2f} -> {one.after:.2f} tokens per character"
        for one in new
        if one.pieces
    )
    most = ", ".join(f"{choosing.pieces_for(tag):,} ({tag})" for tag in pieces)
    recipe.add("tokenizer:")
    recipe.add(
        f"  new_pieces: {{{', '.join(f'{tag}: {size}' for tag, size in pieces.items())}}}",
        f"{gains}. At most {most}; what saves less than {choosing.GAIN_LEFT:.0%} is left out.",
    )
    recipe.add("")


def _training(
    asked: Asked, base: BaseFacts, new: Sequence[TextFacts], replay: bool, extends: bool
) -> dict[str, Any]:
    """The values of the section `training`, apart from the phases."""
    own = sum(one.tokens for one in new)
    tokens = _rounded(choosing.budget(own) / (1 - choosing.REPLAY * replay))
    length = min(choosing.SEQUENCE_LENGTH, base.positions or choosing.SEQUENCE_LENGTH)
    ranks = asked.gpus if asked.gpu else 1
    sequences = max(1, choosing.step_tokens(tokens) // length)
    sequences = -(-sequences // ranks) * ranks
    rates = choosing.of_size(base.shape.parameters)
    return {
        "tokens": tokens,
        "sequence_length": length,
        "global_batch_size": sequences,
        "precision": "bf16" if asked.gpu else "fp32",
        "optimizer": {
            "learning_rate": rates.learning_rate,
            **({"embedding_learning_rate": rates.vocabulary_learning_rate} if extends else {}),
        },
        "schedule": {"shape": "wsd", "warmup": 0.02, "decay": 0.2},
    }


def _rounded(tokens: float) -> int:
    """To two digits."""
    digits = max(len(str(int(tokens))) - 2, 0)
    unit: int = 10**digits
    return int(tokens) // unit * unit


def _add_training(
    recipe: Recipe,
    asked: Asked,
    base: BaseFacts,
    values: dict[str, Any],
    pieces: dict[str, int],
    new: Sequence[TextFacts],
) -> None:
    tokens = int(values["tokens"])
    own = sum(one.tokens for one in new)
    recipe.add("training:")
    recipe.add(
        f"  tokens: {_short(tokens)}",
        f"The text has about {_short(_rounded(own))} tokens. EEVE needed 2B, and Swallow became "
        "better up to 100B; text may be read up to four times. Raise it, and the run continues.",
    )
    recipe.add(f"  sequence_length: {values['sequence_length']}")
    step = values["global_batch_size"] * values["sequence_length"]
    recipe.add(
        f"  global_batch_size: {values['global_batch_size']}",
        f"{step:,} tokens a step, {-(-tokens // step):,} steps.",
    )
    fit = _fitting(asked, base, values, sum(pieces.values()))
    fits = f"So that it fits the memory of {asked.gpu}."
    precise = "" if asked.gpu else "No GPU was named; on one, write bf16."
    recipe.add(
        f"  precision: {fit.get('precision', values['precision'])}",
        fits if "precision" in fit else precise,
    )
    for name, value in fit.items():
        section, dot, inner = name.partition(".")
        if section not in ("optimizer", "precision"):
            recipe.add(f"  {section}: {{{inner}: {value}}}" if dot else f"  {name}: {value}", fits)
    _add_optimizer(recipe, base.shape.parameters, fit, fits, extends=bool(pieces))
    recipe.add(
        "  schedule: {shape: wsd, warmup: 0.02, decay: 0.2}",
        "A rate that is flat until the decay, so that a longer run continues without loss.",
    )
    if pieces and tokens >= 50 * step:
        _add_phases(recipe, tokens, step)
    recipe.add("")
    if fit and asked.cluster and asked.cluster.cluster.ranks == 1:
        fsdp = "The memory is estimated for FSDP2, which a single process has to be asked for."
        recipe.add("launch: {accelerate_config: fsdp2}", fsdp)
        recipe.add("")


def _add_optimizer(
    recipe: Recipe, parameters: int, fit: Mapping[str, str], fits: str, extends: bool
) -> None:
    """Learning rates by the model's size, and by whether adapters are trained."""
    rates = choosing.of_size(parameters)
    rate = (
        f"For {parameters / 1e6:,.0f} M parameters; published runs of 7B take 1e-6 (Breeze) to "
        "1e-5 (llama-2-ko), others more: try half and twice."
    )
    if "lora.rank" in fit:
        rates = replace(
            rates,
            learning_rate=choosing.LORA_RATE,
            vocabulary_learning_rate=choosing.LORA_RATE,
        )
        rate = "Adapters take a higher rate: this is Chinese-LLaMA-2's."
    recipe.add("  optimizer:")
    recipe.add(f"    learning_rate: {rates.learning_rate:g}", rate)
    if extends:
        recipe.add(
            f"    embedding_learning_rate: {rates.vocabulary_learning_rate:g}",
            "New rows start from means of others and have more to learn.",
        )
    if "optimizer.moments" in fit:
        recipe.add(f"    moments: {fit['optimizer.moments']}", fits)


def _add_phases(recipe: Recipe, tokens: int, step: int) -> None:
    """What is trained one after the other, in whole steps."""
    recipe.add("  phases:", "New rows first, so that they disturb nothing (EEVE).")
    for train, share in (
        ("new_rows", choosing.NEW_ROWS_SHARE), ("vocabulary", choosing.VOCABULARY_SHARE),
    ):  # fmt: skip
        part = max(step, int(tokens * share) // step * step)
        recipe.add(f"    - {{train: {train}, tokens: {_short(part)}}}")
    recipe.add("    - {train: all}")


def _fitting(asked: Asked, base: BaseFacts, values: dict[str, Any], pieces: int) -> dict[str, str]:
    """The settings with which training fits the named GPUs. Raises `UserError` if none does."""
    options = asked.cluster
    if options is None:
        return {}
    shape = base.shape.resized(base.shape.vocabulary + pieces)
    best = shortest(fittings(shape, TrainingConfig(**values), options.cluster))
    if best is None:
        raise UserError(
            f"nothing makes this model fit on {counted(options.cluster.ranks, 'GPU')} "
            f"({asked.gpu}); give more of them with --gpus, or a smaller model."
        )
    pairs = (one.removeprefix("training.").partition("=") for one in best.overrides)
    return {name: value for name, _, value in pairs}


def _short(tokens: int) -> str:
    """A number of tokens as a recipe writes it."""
    for letter, times in (("B", 10**9), ("M", 10**6)):
        text = f"{tokens / times:g}{letter}"
        if tokens >= times and as_count(text) == tokens:
            return text
    return f"{tokens:_}"


def gpus_here() -> tuple[str, int] | None:
    """This machine's GPUs, as `plan --gpu` names them, and how many there are.

    None, with a message, if `--gpu` has to name them.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        if shutil.which("sbatch"):
            say("init: no GPU is here, but Slurm is; name its GPUs by --gpu, --gpus and --nodes")
        return None
    about = torch.cuda.get_device_properties(0)
    words = about.name.lower().replace(" ", "")
    kinds = {gpu.name.partition("-")[0] for gpu in GPUS.values()}
    kind = max((kind for kind in kinds if kind in words), key=len, default="")
    same = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] == kind]
    if not same:
        say(f"init: the speed of {about.name} is not known; give its numbers by --gpu")
        return None
    return min(same, key=lambda gpu: abs(gpu.memory - about.total_memory)).name, count


def next_commands(out: Path) -> str:
    """What to type next."""
    run = f"cpt-merge run {out}"
    if shutil.which("sbatch"):
        run = f"sbatch slurm/cpt_merge.sh {out}"
    return f"next: {run}    (cpt-merge plan {out} shows the plan again)"
