"""Training loops of others, as contenders: transformers.Trainer and Lightning's Trainer.

Both train transformers' model with sdpa on sequences packed by position ids, as the documentation
of transformers advises.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.training_contenders import (
    BETAS,
    CLIP,
    LORA_RANK,
    RATE,
    TimedTurn,
    TrainingCase,
    sequences,
)

LIGHTNING = "CPT_MERGE_LIGHTNING"
"""Environment variable: a folder into which Lightning was installed by `pip install --target`."""
_DECAY = 0.1


def trainer(case: TrainingCase, folder: Path, turn: TimedTurn) -> None:
    """transformers.Trainer; sharded by FSDP2 on several processes."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Log(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float], model: Any, **__: Any) -> None:
            assert any(isinstance(part, FSDPModule) for part in model.modules()) == (
                case.processes > 1
            ), "Trainer does not shard as it was asked to"
            if "loss" in logs:
                turn(logs["loss"])

    model = _model(case)
    sharding = (
        _let_trainer_shard(_layer_class(model))
        if case.processes > 1
        else {"use_cpu": not torch.cuda.is_available()}
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=case.steps + 1,
        per_device_train_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=case.micro_batches,
        learning_rate=RATE,
        weight_decay=_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        bf16=case.precision == "bf16",
        logging_steps=case.interval,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **sharding,
    )
    Trainer(model=model, args=arguments, train_dataset=_packed(case), callbacks=[Log()]).train()


def lightning(case: TrainingCase, folder: Path, turn: TimedTurn) -> None:
    """Lightning's Trainer; DDP on several processes, as its sharding strategies need GPUs."""
    sys.path.insert(0, os.environ[LIGHTNING])
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from torch import Tensor

    targets = sequences(case).targets

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = _model(case)
            self.losses: list[Tensor] = []

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            """The mean over the targets of the whole step, of all processes."""
            first = number // case.micro_batches * case.global_batch_size
            whole = targets(range(first, first + case.global_batch_size))
            loss: Tensor = self.inner(**batch, num_items_in_batch=torch.tensor(whole)).loss
            self.losses.append(loss.detach())
            return loss * (case.micro_batches * case.processes)  # Lightning divides by both

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.fit_loop.epoch_loop._should_accumulate():
                return
            total, self.losses = torch.stack(self.losses).sum(), []
            if self.global_step % case.interval == 0:
                turn(float(self.trainer.strategy.reduce(total, reduce_op="sum")))

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            """Lightning's own refuses a fused optimizer in bf16."""
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [one for one in self.inner.parameters() if one.requires_grad]
            groups = [
                {"params": [one for one in trained if one.ndim > 1], "weight_decay": _DECAY},
                {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)

    several: dict[str, Any] = {}
    if case.processes > 1:
        several = {"strategy": "ddp", "plugins": [TorchElasticEnvironment()]}
    run = pl.Trainer(
        accelerator="cpu",
        devices=case.processes,
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",
        max_steps=case.steps + 1,
        accumulate_grad_batches=case.micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **several,
    )
    size = case.processes
    mine = range(run.global_rank, case.global_batch_size * (case.steps + 1), size)
    rows = torch.utils.data.Subset(_packed(case), mine)
    run.fit(Module(), torch.utils.data.DataLoader(rows, case.micro_batch_size))


def _model(case: TrainingCase) -> Any:
    """transformers' model in float32, with the adapters that a case asks for."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        case.inputs.model, dtype=torch.float32, use_cache=False
    )
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    return get_peft_model(model, adapters)


def _layer_class(model: Any) -> str:
    """The class of the decoder layers, which are FSDP's units."""
    names = {type(part).__name__ for part in model.modules()}
    return next(name for name in sorted(names) if name.endswith("DecoderLayer"))


def _packed(case: TrainingCase) -> Any:
    """The sequences of a run, one after the other, as transformers' models take them."""
    import torch

    rows = sequences(case)

    class Packed(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return case.global_batch_size * (case.steps + 1)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            batch = rows.batch([index])
            labels = batch.labels[0]
            return {
                "input_ids": batch.input_ids[0],
                "position_ids": batch.position_ids[0],
                "labels": labels,
                "shift_labels": labels,
            }

    return Packed()


def _let_trainer_shard(layer: str) -> dict[str, Any]:
    """FSDP2 for Trainer, whose units are the layers of this class.

    On a CPU, accelerate would silently use DDP. So it is told that gloo processes are as good as
    GPUs (a private method of accelerate 1.15).
    """
    import torch

    if not torch.cuda.is_available():
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType
        from transformers import training_args

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        training_args.is_torch_bf16_gpu_available = lambda: True
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]},
    }
