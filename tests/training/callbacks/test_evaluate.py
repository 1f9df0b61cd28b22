"""The bits per byte of the base, with which training is compared, are measured once."""

import json
from pathlib import Path

import pytest

from cpt_merge.core.distributed import stop_process_group
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.data.tokenise import write_store
from cpt_merge.training.callbacks.evaluate import REFERENCE_FILE, reference_line
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import start_parallel
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import ask_for


@pytest.fixture(scope="module")
def store_with_base(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("data") / "store"
    write_store(corpus, model, folder, base=model)
    return folder


def measured(base: Path, store: Path, out: Path, rows: int) -> dict[str, float]:
    ask_for("fsdp2")
    parallel = start_parallel()
    config = TrainingConfig(**{**CONFIG, "evaluate_sequences": rows})
    found = reference_line(base, Store.open(store), config, parallel, out)
    stop_process_group()
    return found


@pytest.mark.slow
def test_it_is_kept_and_measured_again_on_other_sequences(
    model: Path, store_with_base: Path, tmp_path: Path
) -> None:
    found = run_ranks(measured, 2, model, store_with_base, tmp_path, 6)
    assert found[0] == found[1]
    assert found[0].keys() == {"ko", "en"}
    kept = json.loads((tmp_path / REFERENCE_FILE).read_text())
    kept["bits_per_byte"]["ko"] = 1.0
    (tmp_path / REFERENCE_FILE).write_text(json.dumps(kept))
    assert run_ranks(measured, 1, model, store_with_base, tmp_path, 6)[0]["ko"] == 1.0
    assert run_ranks(measured, 1, model, store_with_base, tmp_path, 2)[0]["ko"] not in (
        1.0,
        found[0]["ko"],
    )
