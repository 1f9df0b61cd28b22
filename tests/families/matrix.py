"""The family matrix: each step of the pipeline, on a small model of every family.

    python -m tests.families.matrix [FAMILY ...]      compute the rows, and write them to docs/families.md

A row is computed by the library's own functions on real files, with one and two processes. A cell
is `yes`, or the sentence with which the step was refused, or what went wrong.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from cpt_merge import extend_tokenizer, resize_embeddings
from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.checkpoint.text_models import auto_class
from cpt_merge.core.artifact import write_json
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.data.packing import IGNORED, Batch, TrainingSequences
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.data.store import Store
from cpt_merge.data.tokenise import write_store
from cpt_merge.evaluation.chat_template import read_chat_template
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import prompt
from cpt_merge.evaluation.generate.conversations import converse
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.hook import merge_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.run import run
from tests.distributed import run_ranks
from tests.evaluation.conftest import TEMPLATE, make_tokenizer
from tests.families import llama_cpp
from tests.recording import Recording
from tests.tokenizer_ext.small_tokenizers import train_sentencepiece
from tests.training.conftest import CONFIG, write_text
from tests.training.families import apart, make_family
from tests.training.runs import ask_for, signal_when
from tests.training.test_ignored_tensors import MASK, in_layers
from tests.wrappers import VOCABULARY, make_wrapper

ROWS = VOCABULARY  # of the base's embedding, a few more than its tokenizer has tokens
STEPS = 4
TRAINING: dict[str, Any] = {
    **CONFIG, "tokens": 32 * 8 * STEPS, "evaluate_every": STEPS, "checkpoints": {"every": 2},
    "auxiliary_loss": False,  # it depends on how sequences are grouped into micro-batches
}  # fmt: skip
YES = "yes"


def text(family: str, tied: bool = False, **settings: Any) -> Callable[[], Any]:
    """A family of tests/training/families.py."""

    def make() -> Any:
        sizes = {"vocab_size": ROWS, "max_position_embeddings": 128, **settings}
        with tempfile.TemporaryDirectory() as folder:
            return make_family(Path(folder), family, tied, **sizes)

    return make


def wrapper(family: str, **text: Any) -> Callable[[], Any]:
    """A family of tests/wrappers.py, with other settings of its decoder."""

    def make() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return make_wrapper(Path(folder), family, text=text)

    return make


PHI4 = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}
USER = "<|user|>"  # a token that only chat models use
LLAMA2: dict[str, Any] = {"bos_id": 0, "eos_id": 1, "unk_id": 2, "user_defined_symbols": [USER]}
GEMMA: dict[str, Any] = {**LLAMA2, "add_dummy_prefix": False}
GEMMA3 = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
GRANITE4 = {"layer_types": ["mamba", "attention"]}  # which transformers 5 writes in other words
QWEN3_NEXT = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "norm_topk_prob": True,
}  # fmt: skip
INTERLEAVED = {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}  # fmt: skip
NEOX_BUFFERS = in_layers(
    "gpt_neox.layers", attention__bias=MASK.bool(), attention__masked_bias=torch.tensor(-torch.inf),
    attention__rotary_emb__inv_freq=torch.arange(4.0),
)  # fmt: skip

WHOLE = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
MISTRAL = llama_cpp.Difference(
    "llama.cpp computes Mistral without its sliding window (of v0.1; later versions have none)",
    WHOLE,
)
EXAONE4 = llama_cpp.Difference(
    "llama.cpp computes EXAONE-4 with its sliding window only if it has 64 layers (32B; the 1.2B has "
    "no window)", WHOLE,
)  # fmt: skip
GPT_OSS = llama_cpp.Difference(
    "llama.cpp rounds the bounds of YaRN's ramp, although config.json says `truncate: false`",
    {"rope_parameters": {"truncate": True}},
)


@dataclass(frozen=True)
class Family:
    """How a small model of a family is made."""

    make: Callable[[], Any]
    more: dict[str, torch.Tensor] = field(default_factory=dict)  # that published files hold as well
    config: dict[str, Any] = field(default_factory=dict)  # that published config.json say
    sentencepiece: dict[str, Any] | None = None  # its options, instead of a byte-level tokenizer
    llama_cpp: llama_cpp.Difference | None = None


FAMILY: dict[str, Family] = {
    "Llama": Family(text("llama")),
    "Mistral": Family(text("mistral"), sentencepiece=LLAMA2, llama_cpp=MISTRAL),
    "Qwen2, Qwen2.5": Family(text("qwen2", tied=True)),
    "Qwen3": Family(text("qwen3")),
    "Gemma-2": Family(text("gemma2", tied=True), sentencepiece=GEMMA),
    "Gemma-3 1B": Family(text("gemma3", tied=True), sentencepiece=GEMMA),
    "Gemma-3 4B and larger": Family(wrapper("gemma3", **GEMMA3), sentencepiece=GEMMA),
    "Phi-3": Family(text("phi3"), sentencepiece=LLAMA2),
    "Phi-4-mini": Family(text("phi3", tied=True, **PHI4)),
    "OLMo-2": Family(text("olmo2")),
    "GPT-NeoX, as published": Family(text("gpt-neox"), NEOX_BUFFERS, {"rotary_pct": 0.25}),
    "GLM-4": Family(text("glm4")),
    "EXAONE-4": Family(text("exaone4"), llama_cpp=EXAONE4),
    "Cohere2": Family(text("cohere2", tied=True, rotary_pct=1.0)),
    "Granite": Family(text("granite", tied=True)),
    "Mixtral": Family(text("mixtral"), sentencepiece=GEMMA),
    "Qwen3-MoE": Family(text("qwen3-moe", norm_topk_prob=True)),
    "gpt-oss": Family(text("gpt-oss"), llama_cpp=GPT_OSS),
    "DeepSeek-V3": Family(text("deepseek-v3", scoring_func="sigmoid")),
    "Qwen2.5-VL": Family(wrapper("qwen2.5-vl")),
    "Qwen3-VL": Family(wrapper("qwen3-vl")),
    "Mistral-Small-3": Family(wrapper("mistral3")),
    "Qwen3-Next": Family(text("qwen3-next", **QWEN3_NEXT)),
    "Qwen3.5": Family(text("qwen3.5", rope_parameters=INTERLEAVED)),
    "Granite-4": Family(text("granite-4", num_experts_per_tok=0), config=GRANITE4),
}  # fmt: skip


def write_byte_level(folder: Path, template: str | None) -> None:
    """A tokenizer that splits text as GPT-2 does, with tokens that Qwen and GLM look for."""
    tokenizer = make_tokenizer(ROWS - 6, template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", USER]})
    tokenizer.save_pretrained(folder)


def write_sentencepiece(folder: Path, template: str | None, options: dict[str, Any]) -> None:
    """A tokenizer like those of LLaMA 2 and Gemma."""
    model = train_sentencepiece(vocab_size=ROWS - 4, **options)
    settings: dict[str, Any] = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {
            str(number): {"content": token, "special": True}
            for number, token in enumerate(("<s>", "</s>", "<unk>", USER))
        },
    }  # fmt: skip
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@dataclass
class Models:
    """A family's models, and what the pipeline makes of them in `folder`."""

    family: str
    folder: Path

    def __post_init__(self) -> None:
        self.base, self.chat = self.folder / "base", self.folder / "chat"
        self.tokenizer, self.resized = self.folder / "tokenizer", self.folder / "resized"
        self.store, self.merged = self.folder / "store", self.folder / "merged"
        family = FAMILY[self.family]
        model = family.make().to(torch.bfloat16)
        for place, shift in ((self.base, 0.0), (self.chat, 0.02)):
            model.save_pretrained(place)
            write_json(place / "config.json", read_json(place / "config.json") | family.config)
            template = TEMPLATE if shift else None
            if family.sentencepiece is None:
                write_byte_level(place, template)
            else:
                write_sentencepiece(place, template, family.sentencepiece)
            torch.manual_seed(1)
            stored = load_file(place / "model.safetensors")
            stored = {name: v + shift * torch.randn_like(v) for name, v in stored.items()}
            save_file({**stored, **family.more}, place / "model.safetensors", {"format": "pt"})

    @property
    def corpus(self) -> Corpus:
        """Text in Korean and English."""
        sources = [
            Source(path=str(write_text(self.folder / f"{language}.jsonl", language, 300)), language=language)
            for language in ("ko", "en")
        ]  # fmt: skip
        return Corpus(sources=sources, heldout=0.1)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of the resized base."""
        return load_file(self.resized / "model.safetensors")

    def trained(self, backend: str, processes: int) -> tuple[Path, dict[int, float]]:
        """A finished run, made once: its folder and its losses."""
        out = self.folder / f"{backend}-{processes}"
        kept = out / "losses.json"
        if not kept.exists():
            found = self.train(out, backend, processes)
            kept.write_text(json.dumps(found))
        return out, {int(step): loss for step, loss in json.loads(kept.read_text()).items()}

    def train(
        self, out: Path, backend: str, processes: int, stop_after: int = 0
    ) -> dict[int, float]:
        """Train, or go on; the losses by step."""
        found = run_ranks(train_and_merge, processes, self, out, backend, stop_after)[0]
        if isinstance(found, str):
            raise UserError(found)
        return dict(found)


def train_and_merge(
    models: Models, out: Path, backend: str, stop_after: int
) -> dict[int, float] | str:
    """One process of a run with the hook; the sentence if it is refused."""
    ask_for(backend)
    recording = Recording()
    tracker = Tracker([recording], {"mode": "disabled", "run_id": "id", "group": "group"})
    if stop_after:
        signal_when(tracker, stop_after)
    merged = MergeInputs(models.resized, models.base, models.chat, models.tokenizer)

    def hook(shards: list[LocalShard], parallel: Parallel) -> None:
        merge_shards(shards, MergeConfig(), merged, out / "merged", Tracker(), parallel)

    inputs = TrainingInputs(models.resized, models.tokenizer, models.store, "key")
    try:
        run(TrainingConfig(**TRAINING), inputs, out, tracker, hook)
    except Interrupted:
        assert stop_after
    except UserError as error:
        return str(error)
    return {step: row["train/loss"] for step, row in recording.rows if step and "train/loss" in row}


def load(directory: Path) -> Any:
    """The model in plain transformers, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    return auto_class(config).from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def plain_loss(model: Any, batch: Batch) -> float:
    """The mean loss that transformers gives, each document on its own."""
    total = 0.0
    for part in apart(batch):
        if (part.labels != IGNORED).any():
            logits = model(input_ids=part.input_ids, use_cache=False).logits[0].float()
            total += F.cross_entropy(
                logits, part.labels[0], ignore_index=IGNORED, reduction="sum"
            ).item()
    return total / int((batch.labels != IGNORED).sum())


def near(found: float, expected: float, relative: float = 2e-5) -> None:
    """Raise `AssertionError` for another number."""
    assert abs(found - expected) <= relative * abs(expected), f"{found} instead of {expected}"


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise `AssertionError` unless names, types, shapes and values are the same."""
    same_layout(found, expected)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def same_layout(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise `AssertionError` unless names, types and shapes are the same."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, values in expected.items():
        there = found[name]
        assert (there.shape, there.dtype) == (values.shape, values.dtype), name


def tokenizer(models: Models) -> None:
    """Korean pieces are added, and old text keeps its tokens."""
    extend_tokenizer(
        models.base, models.corpus, models.tokenizer, chat=models.chat, new_pieces={"ko": 40},
        min_frequency=2,
    )  # fmt: skip


def embeddings(models: Models) -> None:
    """Old rows stay, and the model loads."""
    resize_embeddings(models.base, models.tokenizer, models.resized)
    old = load_file(models.base / "model.safetensors")
    for name, values in models.stored.items():
        assert torch.equal(values[: len(old[name])], old[name]), name
    rows = len(load(models.resized).get_input_embeddings().weight)
    assert rows > ROWS - 4, rows


def one_process(models: Models) -> None:
    """The first loss is that of plain transformers."""
    write_store(models.corpus, models.tokenizer, models.store)
    _, losses = models.trained("fsdp2", 1)
    config = TrainingConfig(**TRAINING)
    sequences = TrainingSequences(Store.open(models.store), config.sequence_length, config.seed)
    near(losses[1], plain_loss(load(models.resized), sequences.batch(list(range(8)))))


def on_two(backend: str) -> Callable[[Models], None]:
    """All losses are those of one process."""

    def column(models: Models) -> None:
        _, alone = models.trained("fsdp2", 1)
        _, together = models.trained(backend, 2)
        assert list(together) == list(alone)
        for step, loss in alone.items():
            near(together[step], loss, 1e-4)

    return column


def resume(models: Models) -> None:
    """A run on two processes that is stopped and goes on ends in the same bytes."""
    whole, losses = models.trained("fsdp2", 2)
    out = models.folder / "parts"
    first = models.train(out, "fsdp2", 2, stop_after=2)
    rest = models.train(out, "fsdp2", 2)
    assert {**first, **rest} == losses
    for name in ("cpt", "merged"):
        same_tensors(*(load_file(one / name / "model.safetensors") for one in (out, whole)))


def export(models: Models) -> None:
    """The trained model has the names, types and shapes of the resized base."""
    out, _ = models.trained("fsdp2", 2)
    found = load_file(out / "cpt" / "model.safetensors")
    same_layout(found, models.stored)
    assert any(not torch.equal(found[name], values) for name, values in models.stored.items())


def hook(models: Models) -> None:
    """The hook's merge on two processes is the merge of files, which round to bfloat16 once more."""
    out, _ = models.trained("fsdp2", 2)
    inputs = MergeInputs(out / "cpt", models.base, models.chat, models.tokenizer)
    merge_directories(MergeConfig(), inputs, models.merged)
    found, files = (load_file(one / "model.safetensors") for one in (out / "merged", models.merged))
    same_layout(found, files)
    for name, values in files.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=2**-7, msg=name)


def reload(models: Models) -> None:
    """The export in plain transformers has the loss with which training went on from it."""
    out, losses = models.trained("fsdp2", 1)
    assert losses.keys() == set(range(1, STEPS + 1))
    model, again = load(out / "cpt"), models.folder / "again"
    sequences = TrainingSequences(Store.open(models.store), 32, 0)
    config = {**TRAINING, "tokens": 32 * 8, "evaluate_every": 1, "checkpoints": {"every": 1}}
    found = run_ranks(first_loss, 1, models, out / "cpt", again, config)[0]
    near(found, plain_loss(model, sequences.batch(list(range(8)))))


def first_loss(models: Models, model: Path, out: Path, config: dict[str, Any]) -> float:
    """The loss of the first step of a run that starts from a model."""
    ask_for("fsdp2")
    recording = Recording()
    tracker = Tracker([recording], {"mode": "disabled", "run_id": "id", "group": "group"})
    inputs = TrainingInputs(model, models.tokenizer, models.store, "key")
    run(TrainingConfig(**config), inputs, out, tracker, None)
    return next(float(row["train/loss"]) for _, row in recording.rows if "train/loss" in row)


def generation(models: Models) -> None:
    """The merged model replies, in batches as one by one."""
    model = LanguageModel.open("merged", models.merged)
    asked = [
        prompt("ko", [{"role": "user", "content": text}])
        for text in ("집", "나는 집에", "go home and eat")
    ]
    template = read_chat_template(models.merged)
    replies = []
    for size in (1, 3):
        config = EvaluationConfig(max_new_tokens=12, batch_size=size)
        found = converse(TransformersEngine(model, Ranks()), template, asked, config)
        replies.append([one.replies for one in found.exchanges])
    assert all(reply.tokens for [reply] in replies[0])
    assert replies[0] == replies[1], replies


def gguf(models: Models) -> None:
    """llama.cpp has the merged model's tokens and logits."""
    out = models.folder / "m.gguf"
    llama_cpp.convert(models.base, models.merged, out)
    llama_cpp.compare(models.merged, out, FAMILY[models.family].llama_cpp)


COLUMNS: dict[str, Callable[[Models], None]] = {
    "tokenizer": tokenizer,
    "embeddings": embeddings,
    "one process": one_process,
    "FSDP2": on_two("fsdp2"),
    "ZeRO-3": on_two("zero3"),
    "resume": resume,
    "export": export,
    "hook": hook,
    "reload": reload,
    "generation": generation,
    "GGUF": gguf,
}
MERGED = ("tokenizer", "embeddings", "one process", "hook")  # what a merged model needs
WITHOUT_LLAMA_CPP = tuple(name for name in COLUMNS if name != "GGUF")


def row(family: str, folder: Path, columns: Iterable[str]) -> dict[str, str]:
    """The cells of a family in these columns, of which each needs the ones before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = Models(family, folder)
    cells = {}
    for name in columns:
        try:
            COLUMNS[name](models)
            cells[name] = YES
        except UserError as error:
            cells[name] = f"refused: {error}"
        except llama_cpp.OtherLogitsError as reason:
            cells[name] = f"other logits, because {reason}"
        except Exception as error:
            lines = str(error).strip().splitlines() or traceback.format_exc().splitlines()[-2:]
            cells[name] = f"wrong: {lines[-1].strip()[:200]}"
    return cells


BEGIN, END = "<!-- matrix: python -m tests.families.matrix -->\n", "<!-- end of the matrix -->\n"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def documented() -> dict[str, dict[str, str]]:
    """The rows of docs/families.md."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    lines = rest.partition(END)[0].splitlines()
    notes = dict(re.findall(r"^(\d+)\. (.*)$", "\n".join(lines), re.MULTILINE))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {
        family: {
            name: notes[cell.removeprefix("note ")] if cell.startswith("note ") else cell
            for name, cell in zip(COLUMNS, cells, strict=True)
        }
        for family, *cells in table[2:]
    }


def write(rows: dict[str, dict[str, str]]) -> None:
    """Replace the matrix in docs/families.md. What is not `yes` becomes a note below the table."""
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, cells in rows.items():
        shown = [
            cell if cell == YES else f"note {notes.setdefault(cell, len(notes) + 1)}"
            for cell in cells.values()
        ]
        lines.append(f"| {family} | " + " | ".join(shown) + " |")
    below = [f"{number}. {cell}" for cell, number in notes.items()]
    content = "\n".join([*lines, "", *below, ""]) if below else "\n".join([*lines, ""])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + content + END + after, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = documented()
    if not llama_cpp.llama_cpp():
        print(f"{llama_cpp.VARIABLE} is not set, so the column GGUF stays as it is.")
    computed = COLUMNS if llama_cpp.llama_cpp() else WITHOUT_LLAMA_CPP
    for name in sys.argv[1:] or FAMILY:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = rows[name] | row(name, Path(folder) / "row", computed)
        print(name, json.dumps(rows[name], indent=1), flush=True)
        write({name: rows[name] for name in FAMILY if name in rows})
