"""Checkpoints written by any number of processes: the same bytes, every element exactly once."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.writer import CheckpointLayout, CheckpointWriter, TensorSpec, natural
from cpt_merge.core.errors import UserError

SPECS = [TensorSpec(f"layers.{n}.weight", "F32", (n + 3, 4)) for n in (10, 2, 0)] + [
    TensorSpec("a.scale", "F16", ())
]
VALUES = {
    spec.name: np.arange(np.prod(spec.shape, dtype=int))
    .reshape(spec.shape)
    .astype("f4" if spec.dtype == "F32" else "f2")
    for spec in SPECS
}


def write_all(writer, ranks=1, rank=0):
    for name, values in VALUES.items():
        rows = len(values) if values.ndim else 1
        start, stop = rows * rank // ranks, rows * (rank + 1) // ranks
        if stop > start:
            writer.write(name, start, values[start:stop] if values.ndim else values)
    writer.close()


def test_a_single_file_loads_with_safetensors(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS))
    writer.prepare()
    write_all(writer)
    writer.publish()
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors"]
    assert not (tmp_path / "out.tmp").exists()
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all((loaded[name] == values).all() for name, values in VALUES.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path):
    layout = CheckpointLayout.by_size(SPECS, shard_bytes=100)
    writer = CheckpointWriter(tmp_path / "out", layout)
    writer.prepare()
    write_all(writer)
    writer.publish()
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "out")) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == layout.nbytes
    assert [index["weight_map"][f"layers.{n}.weight"] for n in (0, 2, 10)] == files
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert all((checkpoint.read(name) == values).all() for name, values in VALUES.items())


def test_the_layout_does_not_depend_on_the_order_of_the_tensors():
    assert CheckpointLayout.by_size(SPECS, 100) == CheckpointLayout.by_size(reversed(SPECS), 100)
    assert sorted(["a.10.b", "a.9.b", "a.9"], key=natural) == ["a.9", "a.9.b", "a.10.b"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, ranks):
    layout = CheckpointLayout.by_size(SPECS, 100)
    writers = [CheckpointWriter(tmp_path / "out", layout, rank) for rank in range(ranks)]
    writers[0].prepare()
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda rank: write_all(writers[rank], ranks, rank), range(ranks)))
    writers[0].publish()
    loaded = {
        name: v
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, v in load_file(file).items()
    }
    assert all((loaded[name] == values).all() for name, values in VALUES.items())


def test_a_row_that_nobody_wrote_is_found(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS))
    writer.prepare()
    for name, values in VALUES.items():
        writer.write(name, 0, values if values.ndim == 0 else values[:3])
    writer.close()
    with pytest.raises(UserError, match=r"12 to 20 of layers\.2\.weight.*never"):
        writer.publish()
    assert not (tmp_path / "out").exists()


def test_a_row_that_two_wrote_is_found(tmp_path):
    layout = CheckpointLayout.by_size(SPECS)
    writers = [CheckpointWriter(tmp_path / "out", layout, rank) for rank in (0, 1)]
    writers[0].prepare()
    write_all(writers[0])
    writers[1].write("layers.2.weight", 1, VALUES["layers.2.weight"][1:2])
    writers[1].close()
    with pytest.raises(UserError, match=r"layers\.2\.weight were written twice"):
        writers[0].publish()


def test_nothing_half_written_is_taken_for_a_checkpoint(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS))
    writer.prepare()
    write_all(writer)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="never finished"):
        Checkpoint.open(writer.directory)


def test_a_failure_leaves_nothing_behind(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS))
    with pytest.raises(ValueError, match="do not fit"), writer.alone():
        writer.write("a.scale", 1, VALUES["a.scale"])
    assert os.listdir(tmp_path) == []


def test_a_second_try_starts_afresh(tmp_path):
    CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS, 100)).prepare()
    test_a_single_file_loads_with_safetensors(tmp_path)


def test_an_output_in_use_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS)).prepare()  # empty: fine
    (tmp_path / "out" / "weights").touch()
    with pytest.raises(UserError, match="not empty"):
        CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS)).prepare()


def test_a_full_disk_is_noticed_before_writing(tmp_path):
    huge = CheckpointLayout.by_size([TensorSpec("weight", "F32", (2**50,))])
    with pytest.raises(UserError, match="MB free"):
        CheckpointWriter(tmp_path / "out", huge).prepare()


def test_a_write_that_does_not_fit_is_refused(tmp_path):
    writer = CheckpointWriter(tmp_path / "out", CheckpointLayout.by_size(SPECS))
    writer.prepare()
    with pytest.raises(ValueError, match="do not fit"):
        writer.write("layers.0.weight", 1, VALUES["layers.0.weight"])
    with pytest.raises(ValueError, match="do not fit"):
        writer.write("layers.0.weight", 0, VALUES["layers.0.weight"].astype("f8"))


def test_room_that_hardly_differs_is_told_with_enough_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    layout = CheckpointLayout.by_size([TensorSpec("weight", "U8", (100_000,))])
    with pytest.raises(UserError, match=r"0\.100000 MB free, the checkpoint needs 0\.10\d*[1-9]"):
        CheckpointWriter(tmp_path / "out", layout).prepare()


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory; choose"):
        CheckpointWriter(tmp_path / "file" / "a" / "out", CheckpointLayout.by_size(SPECS)).prepare()
