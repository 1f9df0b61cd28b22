"""Documents are apart in layers that carry a state along the sequence."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import IGNORED, Batch
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.attention import check_attention
from cpt_merge.training.model.build import CausalLM, build_model, load_weights
from cpt_merge.training.model.documents import (
    NOTHING_ELSE,
    boundary_arguments,
    group_by_length,
    padding_share,
)
from tests.training.conftest import CONFIG
from tests.training.families import HYBRIDS, apart, documents, make_family

CPU = torch.device("cpu")
TRAINED = [family for family in HYBRIDS if family != "recurrent-gemma"]  # whose head differs


def loaded(folder: Path, **changes: Any) -> CausalLM:
    module = build_model(folder, TrainingConfig(**{**CONFIG, **changes}))
    load_weights(module, folder, CPU)
    return module


def plain_losses(folder: Path, batch: Batch) -> tuple[Tensor, Any]:
    """The summed loss of each document, by transformers alone, and its model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    losses = []
    for part in apart(batch):
        logits = model(input_ids=part.input_ids, use_cache=False).logits[0].float()
        losses.append(
            F.cross_entropy(logits, part.labels[0], ignore_index=IGNORED, reduction="sum")
        )
    return torch.stack(losses).nansum(), model


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "auto") for family in (*TRAINED, "gpt-oss")),
        ("qwen3-next", "eager"),
        ("zamba2", "sdpa"),
    ],
)
def test_losses_and_gradients_are_those_of_transformers_document_by_document(
    family: str, attention: str, tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    module, batch = loaded(tmp_path, attention=attention), documents(3)
    targets_everywhere = batch.labels.where(batch.labels != IGNORED, 5)  # as where a sequence cuts
    batch = dataclasses.replace(batch, labels=targets_everywhere)
    loss = module(batch)
    loss.backward()
    expected, model = plain_losses(tmp_path, batch)
    expected.backward()
    targets = int((batch.labels != IGNORED).sum())
    assert loss.item() / targets == pytest.approx(expected.item() / targets, abs=1e-5)
    theirs = dict(model.named_parameters())
    for name, parameter in module.model.named_parameters():
        if (wanted := theirs[name].grad) is None:
            assert parameter.grad is None, name
        else:
            assert torch.allclose(parameter.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), name  # fmt: skip
    check_attention(module, TrainingConfig(**CONFIG), CPU)


def test_without_it_the_check_sees_documents_influence_each_other(tmp_path: Path) -> None:
    make_family(tmp_path, "lfm2", tied=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    module = CausalLM(model, 20)
    assert module.choice.separation == NOTHING_ELSE
    with pytest.raises(UserError, match="lets a document see the document before it"):
        check_attention(module, TrainingConfig(**CONFIG), CPU)


def test_sequences_of_one_document_go_through_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, "qwen3.5", tied=False)
    module, shapes = loaded(tmp_path), list[Any]()
    (kind,) = module.choice.separation.one_by_one
    forward = kind.forward

    def seeing(self: Any, hidden_states: Tensor, *others: Any, **names: Any) -> Any:
        shapes.append(tuple(hidden_states.shape[:2]))
        return forward(self, hidden_states, *others, **names)

    monkeypatch.setattr(kind, "forward", seeing)
    module(documents(2, (33,)))
    module(documents(1, (33,)))
    module(documents(2, (3, 30)))
    assert shapes == [(2, 33), (1, 33), (4, 30)]  # 30 and 3 differ by less than 32


def test_a_copy_of_the_model_sees_its_own_documents(tmp_path: Path) -> None:
    make_family(tmp_path, "qwen3.5", tied=False)
    module = loaded(tmp_path)
    other = copy.deepcopy(module)
    with torch.no_grad():
        expected = module(documents(2)).item()
        other(documents(1, (4, 6)))
        module(documents(1, (4, 6)))
        assert other(documents(2)).item() == expected
        assert module(documents(2)).item() == expected


def test_padding_stays_below_a_quarter_and_groups_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 4096, (300,), generator=generator).tolist()
    groups = group_by_length(lengths)
    assert sorted(number for group in groups for number in group) == list(range(300))
    for group in groups:
        sizes = [lengths[number] for number in group]
        assert sizes[0] == max(sizes)
        assert min(sizes) >= min(sizes[0] * 3 / 4, sizes[0] - 32)
    assert len(groups) < 30
    packed = documents(1, tuple(lengths))
    assert packed.lengths == tuple(lengths)
    assert 0 < padding_share([packed]) < 0.25
    assert padding_share([documents(2, (7, 7, 7))]) == 0
    assert padding_share([documents(1, (30, 10))]) == pytest.approx(1 - 40 / 60)
    assert group_by_length([5, 5, 5]) == [[0, 1, 2]]
    assert group_by_length([]) == []


def test_boundaries_are_those_of_the_flattened_batch() -> None:
    given = boundary_arguments(documents(2, (3, 2)))
    assert given["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10]
    assert given["max_length_k"] == 3
    assert given["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 3]]
    assert given["seq_idx"].dtype == torch.int32


def test_kernels_that_take_the_boundaries_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of fla and causal-conv1d, which need a GPU: the same functions document by document."""
    from transformers.models.qwen3_next import modeling_qwen3_next as code

    make_family(tmp_path, "qwen3-next", tied=False)
    rule, convolution = code.torch_chunk_gated_delta_rule, code.causal_conv1d_fn
    calls = []

    def by_boundaries(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Any = None, **names: Any) -> Any:  # fmt: skip
        names = {name: names[name] for name in ("use_qk_l2norm_in_kernel", "output_final_state")}
        if cu_seqlens is None:
            return rule(query, key, value, g=g, beta=beta, **names)
        calls.append(cu_seqlens)
        assert query.shape[0] == 1, "as fla demands"
        cuts = zip(*(torch.split(one, cu_seqlens.diff().tolist(), 1) for one in (query, key, value, g, beta)), strict=True)  # fmt: skip
        return torch.cat(
            [rule(q, k, v, g=d, beta=b, **names)[0] for q, k, v, d, b in cuts], 1
        ), None

    def by_index(hidden: Tensor, *others: Any, activation: str, seq_idx: Any = None, **names: Any) -> Tensor:  # fmt: skip
        sizes = [hidden.shape[2]] if seq_idx is None else seq_idx[0].bincount().tolist()
        return torch.cat([convolution(one, *others, activation=activation) for one in torch.split(hidden, sizes, 2)], 2)  # fmt: skip

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", by_boundaries)
    monkeypatch.setattr(code, "causal_conv1d_fn", by_index)
    module = loaded(tmp_path)
    assert module.choice.separation.boundaries
    batch = documents(3)
    monkeypatch.undo()
    expected, _ = plain_losses(tmp_path, batch)
    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", by_boundaries)
    monkeypatch.setattr(code, "causal_conv1d_fn", by_index)
    calls.clear()
    assert module(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert [call.tolist() for call in calls] == [batch.cu_seqlens.tolist()]
