"""The chat model in memory, at one ratio after the other.

Only its tokenizer and configuration are written to disk. Every ratio is merged from the
checkpoints, which the operating system caches, and never from the weights of the ratio before:
rounding does not add up, and the model equals what a merge at that ratio would write.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from cpt_merge.checkpoint.model_names import find_stored
from cpt_merge.checkpoint.stored_shards import stored_views
from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.chat_template import ChatTemplate, check_prompts, read_chat_template
from cpt_merge.evaluation.config import DEFAULTS, MERGED, EvaluationConfig
from cpt_merge.evaluation.gpus import Gpus
from cpt_merge.evaluation.models import LanguageModel
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.finish import write_all_but_weights
from cpt_merge.merge.memory import merge_into, ranges_of
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.plan import MergePlan, plan_again


class MergedModel:
    """A model and its chat template. Call `merge` before using the weights."""

    def __init__(
        self,
        the_plan: MergePlan,
        local_rank: int,
        evaluation: EvaluationConfig = DEFAULTS,
    ) -> None:
        """Raises `UserError` if the chat model has no chat template, or not one as `evaluation`
        says."""
        if the_plan.format.template is None:
            raise UserError(
                f"{the_plan.chat.source.chat_directory} has no chat template, so the merged model "
                "cannot be prompted; add a chat_template to its tokenizer."
            )
        self.plan = the_plan
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_all_but_weights(the_plan, directory)
            weights = the_plan.cpt.directories[-1]  # for the shapes; an adapter has its base's
            self.model = LanguageModel.open(MERGED, directory, Gpus.one(local_rank), weights)
            loaded = self.model.loaded
            self.template: ChatTemplate = read_chat_template(directory, evaluation, MERGED)
            check_prompts({MERGED: directory}, self.template, [], evaluation)
        shapes = {name: info.shape for name, info in the_plan.cpt.tensors.items()}
        found = find_stored(loaded, shapes, the_plan.cpt.directory)
        self._tensors: dict[str, Tensor] = stored_views(found, loaded.state_dict())
        self._ranges: dict[str, TensorRange] = {}

    @property
    def kinds(self) -> set[str]:
        """The kinds of modules in the model."""
        return {kind_of(tensor.name) for tensor in self.plan.tensors}

    def merge(self, config: MergeConfig) -> float:
        """Set the model's weights to those of this merge. Returns the seconds that it took."""
        started = time.monotonic()
        the_plan = plan_again(self.plan, config)
        self._ranges = ranges_of(the_plan, self._ranges)
        merge_into(the_plan, self._tensors, self._ranges)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.monotonic() - started
