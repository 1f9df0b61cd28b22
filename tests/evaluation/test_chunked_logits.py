"""Losses from chunks of logits equal those from all of them, in families that finish logits in their own ways."""

import pytest
import torch
import torch.nn.functional as F

import cpt_merge.evaluation.chunked_logits
from cpt_merge.evaluation.chunked_logits import token_losses
from tests.training.families import make_family

FAMILIES = ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "mixtral", "opt", "exaone4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_losses_of_all_logits(family, tmp_path, monkeypatch):
    model = make_family(tmp_path, family, tied=False)
    torch.manual_seed(1)
    ids = torch.randint(2, 100, (3, 13))
    lengths = (13, 7, 1)
    mask = torch.tensor([[1] * length + [0] * (13 - length) for length in lengths])
    targets = torch.randint(2, 100, (sum(lengths),))
    sizes: list[int] = []
    head = model.get_output_embeddings()
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        expected = F.cross_entropy(logits.float(), targets, reduction="none")
        head.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
        monkeypatch.setattr(cpt_merge.evaluation.chunked_logits, "LOGITS_AT_ONCE", 450)
        found = token_losses(model, ids, mask, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sizes[1:] == [400] * 5 + [100], "4 tokens of 100 logits at a time"
    assert sizes[0] <= 300, "the decoder's own pass makes the logits of one place per row"
    assert "forward" not in model.get_decoder().__dict__
