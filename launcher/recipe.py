"""The recipe: one YAML file, each section owned by the stage that it configures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import field_validator, model_validator

from cpt_merge.core.config import Section, apply_override, key, parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.package import PACKAGE
from cpt_merge.data.config import DataConfig
from cpt_merge.data.mixture import mixed
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.evaluation import EvaluationConfig
from cpt_merge.evaluation.sweep.config import SweepConfig
from cpt_merge.finetune import FinetuneConfig, FurtherTraining, PreferenceConfig
from cpt_merge.merge import MergeConfig
from cpt_merge.tokenizer_ext import EmbeddingsConfig, TokenizerConfig
from cpt_merge.tracking import TrackingConfig
from cpt_merge.training import TrainingConfig


class Models(Section):
    """The pair that the chat vector comes from."""

    base: str = key(
        ...,
        "the base model: a directory or a hub id, org/model or org/model@revision; may be left out "
        "with merge.method interpolate or slerp: training then starts from the chat model",
    )
    chat: str = key(
        ..., "its chat sibling, trained from the very same base: a directory or a hub id"
    )
    text_only: bool = key(
        False,
        "leave out the towers of a multimodal base: CPT and the merged model are then text models "
        "of their own, with the class that transformers has for its decoder",
    )

    @model_validator(mode="before")
    @classmethod
    def _starts_somewhere(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("base") is None and "chat" in values:
            return {**values, "base": values["chat"]}
        return values


class LaunchConfig(Section):
    """How training and evaluation are started on one machine. On Slurm, srun decides."""

    processes: int | None = key(
        None, "processes on this machine; all its GPUs (or 1 without) if not set", gt=0
    )
    accelerate_config: str | None = key(
        None,
        "accelerate's configuration, which decides the backend: cpu, fsdp2, fsdp2-offload, hsdp, "
        "zero1, zero2, zero2-offload, zero3 or zero3-offload (see recipes/accelerate), or a file; "
        "fsdp2 if not set",
    )
    spare_nodes: int = key(
        0, "on Slurm: how many bad nodes the preflight may exclude from the job", unit="nodes", ge=0
    )


class Recipe(Section):
    """All settings of a run. Relative paths start at the current directory of the command."""

    name: str = key(..., "name of the run: its folder under `runs`, its group in W&B")
    runs: str = key("runs", "folder that holds the runs")
    models: Models = key(..., "the pair")
    corpus: Corpus = key(..., "the text")
    tokenizer: TokenizerConfig = key(
        TokenizerConfig(), "tokenizer extension; without it the base's own tokenizer is kept"
    )
    embeddings: EmbeddingsConfig = key(EmbeddingsConfig(), "initialisation of the new rows")
    data: DataConfig = key(DataConfig(), "token store")
    training: TrainingConfig = key(..., "continual pretraining")
    finetune: FinetuneConfig | None = key(
        None, "fine-tuning on conversations; none if the section is missing"
    )
    dpo: PreferenceConfig | None = key(
        None, "direct preference optimisation at the end; none if the section is missing"
    )
    merge: MergeConfig = key(MergeConfig(), "the chat vector")
    evaluation: EvaluationConfig = key(EvaluationConfig(), "evaluation")
    sweep: SweepConfig = key(SweepConfig(), "ratio sweep")
    tracking: TrackingConfig = key(TrackingConfig(), "Weights & Biases")
    launch: LaunchConfig = key(LaunchConfig(), "processes")

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError("a run's name is one folder name, such as llama2-7b-ko")
        return name

    @model_validator(mode="after")
    def _new_languages_have_text(self) -> Recipe:
        missing = set(self.tokenizer.languages()) - set(self.corpus.languages())
        if missing:
            raise ValueError(
                f"`tokenizer` extends by {', '.join(sorted(missing))} but corpus.sources has no "
                "such text"
            )
        return self

    @model_validator(mode="after")
    def _phases_name_sources(self) -> Recipe:
        for place, phase in enumerate(self.training.phases):
            try:
                mixed(self.corpus, phase.weights, phase.shares)
            except UserError as error:
                raise ValueError(f"training.phases.{place}: {error}") from None
        return self

    @model_validator(mode="after")
    def _shielded_language_has_text(self) -> Recipe:
        shield = self.training.shield
        if shield and shield.language not in self.corpus.languages():
            raise ValueError(
                f"`training.shield.language` is {shield.language}, but corpus.sources has no text "
                "in it; add a source of replay text, or name another language"
            )
        return self

    @model_validator(mode="after")
    def _has_a_vector(self) -> Recipe:
        if self.models.base == self.models.chat and not self.merge.interpolates:
            raise ValueError(
                "`models` has no base, or the chat model as base, so there is no chat vector; name "
                "the base, or set merge.method to interpolate"
            )
        return self

    @property
    def new_languages(self) -> list[str]:
        """The languages that get pieces; without any, those of the text except English."""
        of_text = [tag for tag in self.corpus.languages() if tag != "en"]
        return self.tokenizer.languages() or of_text or self.corpus.languages()

    @property
    def named_sources(self) -> dict[str, Source]:
        """Every source that the stages read, by its key: text and conversations."""
        lists: dict[str, Sequence[Source]] = {"corpus": self.corpus.sources}
        lists |= {section: config.sources for section, config in self.further.items()}
        return {
            f"{section}.sources.{place}": source
            for section, sources in lists.items()
            for place, source in enumerate(sources)
        }

    @property
    def further(self) -> dict[str, FurtherTraining]:
        """The sections that train further on conversations, by their names, which are stages'."""
        sections = {"finetune": self.finetune, "dpo": self.dpo}
        return {name: config for name, config in sections.items() if config}

    @property
    def named_models(self) -> dict[str, str]:
        """Every model that the stages read, by its key: directories and hub ids."""
        vectors, evaluation = self.merge.vectors, self.evaluation
        named = {
            "models.base": self.models.base,
            "models.chat": self.models.chat,
            "training.start": self.training.start,
            **{f"merge.vectors.{place}.base": one.base for place, one in enumerate(vectors)},
            **{f"merge.vectors.{place}.chat": one.chat for place, one in enumerate(vectors)},
            **{f"evaluation.models.{name}": model for name, model in evaluation.models.items()},
            "evaluation.safety.classifier.model": evaluation.classifier,
        }
        return {key: name for key, name in named.items() if name is not None}

    def check_processes(self, processes: int, note: str = "") -> None:
        """Raises `UserError` if a batch does not divide over the processes; `note` names them."""
        self.training.check_processes(processes, note)
        for section, config in self.further.items():
            loop = config.training_config(self.training, 1)
            loop.check_processes(processes, note, section=section)

    @property
    def directory(self) -> Path:
        """The run's folder."""
        return Path(self.runs).expanduser() / self.name


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply overrides `section.key=value`. Raises `UserError`."""
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return parse_section(
        Recipe, values, str(path) if not overrides else f"{path} with its overrides"
    )


def example_recipes() -> dict[str, Path]:
    """The recipes of the package, by name."""
    return {path.stem: path for path in sorted((PACKAGE / "recipes").glob("*.yaml"))}


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping has the same key twice."""


class _RecipeLoader(yaml.SafeLoader):
    """Refuses a repeated key: YAML's safe loader silently takes the last of several equal ones."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raises `_RepeatedKeyError`."""
        seen: dict[str, int] = {}
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                line = name.start_mark.line + 1
                if name.value in seen:
                    lines = f"lines {seen[name.value]} and {line}"
                    raise _RepeatedKeyError(f"{lines}: the key `{name.value}` occurs twice")
                seen[name.value] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file. Raises `UserError` if there is none, or if a key is repeated."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; `cpt-merge example` prints a recipe to start from."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give a recipe, which is a YAML file.") from None
    except PermissionError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path} is not UTF-8 (byte {error.start}); convert it.") from None
    except _RepeatedKeyError as error:
        raise UserError(f"{kind} {path}, {error}; remove one of them.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{kind} {path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        hint = "; see docs/recipe.md" if kind == "recipe" else ""
        raise UserError(f"{kind} {path} is not a mapping of sections{hint}.")
    return values
