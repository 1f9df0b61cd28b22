"""The engine that the recipe asks for."""

from __future__ import annotations

from pathlib import Path

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.generate.config import TRANSFORMERS, VLLM
from cpt_merge.evaluation.generate.engine import Engine
from cpt_merge.evaluation.generate.server import ServerEngine
from cpt_merge.evaluation.generate.transformers import TransformersEngine
from cpt_merge.evaluation.generate.vllm import VllmEngine
from cpt_merge.evaluation.gpus import Gpus
from cpt_merge.evaluation.models import LanguageModel


def engine_for(
    model: LanguageModel, directory: Path, gpus: Gpus, ranks: Ranks, config: EvaluationConfig
) -> Engine:
    """Who generates the replies of a model in `directory`; nothing is started."""
    name, setting = config.engine_for(model.name), config.engine_setting(model.name)
    if name == TRANSFORMERS:
        return TransformersEngine(model, ranks)
    if name == VLLM:
        return VllmEngine(model, ranks, config.server, config.vllm, directory, gpus, setting)
    return ServerEngine(model, ranks, config.server, name, directory, setting)
