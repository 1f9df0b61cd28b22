"""`.bin` weights are read like safetensors; damaged or foreign files are refused, never executed."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.dtypes import STORED
from cpt_merge.checkpoint.pickled import TYPES
from cpt_merge.checkpoint.reader import Checkpoint, stored_tensors
from cpt_merge.core.errors import UserError

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture
def tensors():
    random = torch.Generator().manual_seed(0)
    plain = {
        "a.weight": torch.randn(7, 4, generator=random).bfloat16(),
        "b.weight": torch.randn(5, 3, 2, generator=random).half(),
        "c.bias": torch.randn(6, generator=random),
        "d.scale": torch.tensor(2.5),
        "e.mask": torch.tensor([True, False]),
        "f.none": torch.zeros(0, 4),
        "g.ids": torch.arange(9),
    }
    whole = torch.randn(6, 8, generator=random)
    views = {
        "h.transposed": whole.bfloat16().T,
        "i.tied": plain["a.weight"],
        "j.rows": whole[2:4],
        "k.columns": whole[:, 3:5],
        "l.repeated": torch.randn(1, 3, generator=random).expand(4, 3),
        "m.permuted": plain["b.weight"].permute(2, 0, 1),
    }
    return plain | views


@pytest.fixture
def safe(tmp_path, tensors):
    """The same weights in safetensors, to compare with."""
    (tmp_path / "safe").mkdir()
    save_file(
        {name: values.clone().contiguous() for name, values in tensors.items()},
        tmp_path / "safe" / "model.safetensors",
    )
    return Checkpoint.open(tmp_path / "safe")


@pytest.fixture
def single(tmp_path, tensors):
    return saved(tmp_path / "single", tensors)


@pytest.fixture
def sharded(tmp_path, tensors):
    directory = tmp_path / "sharded"
    names = list(tensors)
    parts = {
        f"pytorch_model-0000{number + 1}-of-00002.bin": names[number::2] for number in range(2)
    }
    for file, part in parts.items():
        saved(directory, {name: tensors[name] for name in part}, file)
    write_index(directory, {name: file for file, part in parts.items() for name in part})
    return directory


def saved(directory, content, file=BIN, **options):
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / file, **options)
    return directory


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(directory, *words):
    with pytest.raises(UserError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0
    assert message.endswith(".")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_bin_reads_as_the_same_weights_in_safetensors(kind, safe, request):
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert set(checkpoint.tensors) == set(safe.tensors)
    for name, info in safe.tensors.items():
        found = checkpoint.info(name)
        assert (found.dtype, found.shape, found.nbytes) == (info.dtype, info.shape, info.nbytes)
        ours, theirs = checkpoint.read(name), safe.read(name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


def test_any_part_of_any_tensor_can_be_read(single, safe):
    checkpoint = Checkpoint.open(single)
    for name, info in safe.tensors.items():
        for start, stop in [
            (0, info.size),
            (info.size // 3, info.size // 2),
            (info.size // 2, info.size // 2),
        ]:
            part = checkpoint.read_flat(name, start, stop)
            assert part.tobytes() == safe.read_flat(name, start, stop).tobytes()
            assert part.flags.writeable
        with pytest.raises(IndexError):
            checkpoint.read_flat(name, 0, info.size + 1)
    rows = np.array([4, 0, 1])
    assert (
        checkpoint.gather_float32("h.transposed", rows) == safe.gather_float32("h.transposed", rows)
    ).all()


def test_several_threads_read_at_once(single, safe):
    checkpoint, names = Checkpoint.open(single), list(safe.tensors) * 50
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(checkpoint.read, names))
    assert all(
        values.tobytes() == safe.read(name).tobytes()
        for name, values in zip(names, found, strict=True)
    )


def test_a_model_saved_as_bin(tmp_path):
    """What torch.save(model.state_dict()) writes: parameters, buffers, metadata, a tied head."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 5, bias=False)
    )
    model[2].weight = model[0].weight
    checkpoint = Checkpoint.open(saved(tmp_path / "state", model.state_dict()))
    assert set(checkpoint.tensors) == set(model.state_dict())
    assert (checkpoint.read("2.weight") == model[0].weight.detach().numpy()).all()
    parameters = saved(tmp_path / "parameters", dict(model.named_parameters()))
    assert (Checkpoint.open(parameters).read("0.weight") == model[0].weight.detach().numpy()).all()


@pytest.mark.parametrize("torch_name", TYPES)
def test_every_type_that_safetensors_has(tmp_path, torch_name):
    values = torch.arange(6).to(getattr(torch, torch_name)).reshape(2, 3)
    directory = saved(tmp_path / "typed", {"x": values})
    checkpoint = Checkpoint(directory, stored_tensors(directory), frozenset())
    assert checkpoint.read("x").dtype == STORED[checkpoint.info("x").dtype]
    assert checkpoint.read("x").tobytes() == bytes(values.view(torch.uint8).flatten().tolist())


def test_safetensors_win(single):
    save_file({"only": torch.ones(2)}, single / "model.safetensors")
    assert list(Checkpoint.open(single).tensors) == ["only"]


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    proof = tmp_path / "it-ran"
    directory = saved(tmp_path / "evil", {"a": torch.ones(2), "b": Runs(proof)})
    refused(directory, BIN, "mkdir", "code", "safetensors")
    assert not proof.exists()
    torch.load(directory / BIN, weights_only=False)  # the trap works
    assert proof.exists()


def test_a_pickle_without_an_archive_does_not_run_either(tmp_path):
    (tmp_path / BIN).write_bytes(pickle.dumps({"a": Runs(tmp_path / "it-ran")}))
    refused(tmp_path, BIN, "torch 1.6", "safetensors")
    assert not (tmp_path / "it-ran").exists()


def test_the_format_before_torch_1_6_is_refused(tmp_path, tensors):
    refused(
        saved(tmp_path / "old", tensors, _use_new_zipfile_serialization=False),
        BIN,
        "transformers",
        "safetensors",
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"a": torch.ones(2), "step": 3}, "'step'"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict'"),
        ({7: torch.ones(2)}, "7"),
        ([torch.ones(2)], "list"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "negated"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
    ],
)
def test_what_is_no_plain_tensor_is_named(tmp_path, content, word):
    refused(saved(tmp_path / "odd", content), BIN, word)


@pytest.mark.parametrize("length", [0, 3, 100, 2000, -1])
def test_a_truncated_file_is_named(single, length):
    path = single / BIN
    path.write_bytes(path.read_bytes()[:length])
    refused(single, BIN, "download")


def rewritten(path, change):
    """Write a .bin again with other records, by `change(name, bytes) -> bytes`, and return its folder."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))
    return path.parent


def test_an_archive_written_again_by_another_program_is_read(single, safe):
    checkpoint = Checkpoint.open(rewritten(single / BIN, lambda name, data: data))
    assert all(
        checkpoint.read(name).tobytes() == safe.read(name).tobytes() for name in safe.tensors
    )


def test_a_broken_pickle_is_named(single):
    refused(
        rewritten(single / BIN, lambda name, data: data[:40] if name.endswith(".pkl") else data),
        BIN,
    )


@pytest.mark.parametrize("seed", range(20))
def test_whatever_bytes_are_damaged_it_is_read_or_refused(tmp_path, seed):
    path, random = (
        saved(tmp_path / "small", {"a": torch.ones(10)}) / BIN,
        np.random.default_rng(seed),
    )
    whole = path.read_bytes()
    for _ in range(10):
        damaged = bytearray(whole)
        for place in random.integers(len(whole), size=3):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(UserError):  # and nothing else is raised
            checkpoint = Checkpoint.open(path.parent)
            assert all(
                checkpoint.read(name).nbytes == info.nbytes
                for name, info in checkpoint.tensors.items()
            )


def test_numbers_of_a_big_endian_machine_are_refused(single):
    refused(
        rewritten(single / BIN, lambda name, data: b"big" if name.endswith("/byteorder") else data),
        BIN,
        "endian",
    )


def test_a_compressed_archive_is_refused(single):
    with zipfile.ZipFile(single / BIN) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(single / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    refused(single, BIN, "compressed")


@pytest.mark.parametrize("file", ["../secret.bin", "/etc/passwd", "sub/pytorch_model.bin", 7])
def test_an_index_cannot_leave_its_folder(sharded, file):
    write_index(sharded, {"a.weight": file})
    refused(sharded, INDEX, "folder")


def test_what_the_index_names_must_be_there(sharded):
    write_index(sharded, {"x.weight": "pytorch_model-00001-of-00002.bin"})
    refused(sharded, "x.weight", "pytorch_model-00001-of-00002.bin")
    write_index(sharded, {"x.weight": "pytorch_model-00003-of-00002.bin"})
    refused(sharded, "pytorch_model-00003-of-00002.bin", "missing")
    (sharded / INDEX).unlink()
    refused(sharded, INDEX)


def test_neither_opening_nor_reading_keeps_the_file_in_memory(tmp_path):
    """96 MB are read in parts: all of a matrix, some of a transposed one."""
    elements = 12 << 20
    content = {"a": torch.ones(elements // 1024, 1024), "b": torch.ones(elements // 1024, 1024).T}
    saved(tmp_path / "large", content)
    code = f"""
import resource, sys, torch
from pathlib import Path
from cpt_merge.checkpoint.reader import Checkpoint, stored_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = Checkpoint.open(Path(sys.argv[1]))
total = sum(float(checkpoint.read_flat("a", at, at + (1 << 18)).sum()) for at in range(0, {elements}, 1 << 18))
total += float(checkpoint.read_flat("b", 1000, 2000).sum())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    total, kilobytes = map(float, done.stdout.split())
    assert total == elements + 1000
    assert kilobytes < 24_000  # far less than the file


def test_torch_is_imported_only_when_a_bin_is_read(single, safe):
    code = """
import sys
from pathlib import Path
import cpt_merge.checkpoint.pickled
from cpt_merge.checkpoint.reader import Checkpoint, stored_tensors
Checkpoint.open(Path(sys.argv[1])).read("a.weight")
print("torch" in sys.modules)
Checkpoint.open(Path(sys.argv[2])).read("a.weight")
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(safe.directory), str(single)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
