"""docs/families.md says what small models of all families do."""

from pathlib import Path

import pytest
import torch

from tests.families.llama_cpp import VARIABLE, llama_cpp
from tests.families.matrix import FAMILY, MERGED, WITHOUT_LLAMA_CPP, documented, row


def test_every_family_has_a_row() -> None:
    assert list(documented()) == list(FAMILY)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY)
def test_the_row_is_what_the_pipeline_does(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = row(family, tmp_path / "row", WITHOUT_LLAMA_CPP)
    assert found == {name: documented()[family][name] for name in found}


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp(), reason=f"{VARIABLE} names no llama.cpp; see docs/families.md")
@pytest.mark.parametrize("family", FAMILY)
def test_the_column_gguf_is_what_llama_cpp_does(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = row(family, tmp_path / "row", (*MERGED, "GGUF"))
    assert found == {name: documented()[family][name] for name in found}
