"""docs/families.md says what small models of all families do."""

from pathlib import Path

import pytest
import torch

from tests.families.matrix import FAMILY, documented, row


def test_every_family_has_a_row() -> None:
    assert list(documented()) == list(FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY)
def test_the_row_is_what_the_pipeline_does(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert row(family, tmp_path / "row") == documented()[family]
