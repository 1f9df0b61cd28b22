"""Rows are read as they were saved; a damaged checkpoint is an error that names the file."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError


@pytest.fixture
def tensors():
    random = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 4, generator=random).bfloat16(),
        "b.weight": torch.randn(5, 3, 2, generator=random).half(),
        "c.bias": torch.randn(6, generator=random),
        "d.scale": torch.tensor(2.5),
        "e.mask": torch.tensor([True, False]),
        "f.none": torch.zeros(0, 4),
    }


@pytest.fixture
def single(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path, tensors):
    names = list(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[:3],
        "model-00002-of-00002.safetensors": names[3:],
    }
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    write_index(tmp_path, {name: file for file, part in files.items() for name in part})
    return tmp_path


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_rows_are_those_that_were_saved(kind, tensors, request):
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert set(checkpoint.tensors) == set(tensors)
    for name, values in tensors.items():
        assert checkpoint.info(name).shape == tuple(values.shape)
        if values.is_floating_point():
            assert (checkpoint.read_float32(name) == values.float().numpy()).all()
    assert (
        checkpoint.read_float32("a.weight", 2, 5) == tensors["a.weight"][2:5].float().numpy()
    ).all()
    assert checkpoint.read("a.weight", 3, 3).shape == (0, 4)
    assert checkpoint.read("d.scale").shape == ()
    assert checkpoint.read("e.mask").tolist() == [True, False]
    gathered = checkpoint.gather_float32("b.weight", np.array([4, 0, 1, 1]))
    assert (gathered == tensors["b.weight"][[4, 0, 1, 1]].float().numpy().reshape(4, 6)).all()


def test_bfloat16_comes_as_its_bits_and_can_be_written_to(single, tensors):
    stored = Checkpoint.open(single).read("a.weight")
    assert stored.dtype == np.uint16
    assert stored.flags.writeable
    assert (torch.from_numpy(stored).view(torch.bfloat16) == tensors["a.weight"]).all()


def refused(directory, *words):
    with pytest.raises(UserError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_truncated_file_is_named(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    refused(single, "model.safetensors", "bytes", "download")


@pytest.mark.parametrize(
    "content", [b"", b"\x05\0\0", struct.pack("<Q", 2**60), struct.pack("<Q", 3) + b"{]}   "]
)
def test_a_damaged_header_is_named(single, content):
    (single / "model.safetensors").write_bytes(content)
    refused(single, "model.safetensors", "download")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda header: header["a.weight"].update(data_offsets=[-8, 48]), "a.weight"),
        (lambda header: header["a.weight"].update(data_offsets=[10**9, 10**9 + 56]), "a.weight"),
        (lambda header: header["a.weight"].update(shape=[7, 5]), "a.weight"),
        (lambda header: header["a.weight"].update(shape=[-7, -4]), "a.weight"),
        (lambda header: header["a.weight"].update(dtype="F12"), "F12"),
        (lambda header: header["a.weight"].pop("shape"), "shape"),
        (lambda header: header.update({"a.weight": 3}), "model.safetensors"),
    ],
)
def test_a_header_that_lies_is_refused(single, change, word):
    rewrite_header(single / "model.safetensors", change)
    refused(single, "model.safetensors", word)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F12"])
def test_a_type_that_is_not_read_is_no_damage(tmp_path, dtype):
    save_file({"a.weight": torch.zeros(4, 8, dtype=torch.uint8)}, tmp_path / "model.safetensors")

    def change(header):
        bits = {"F4": 4, "F6_E2M3": 6}.get(dtype, 8)
        header["a.weight"].update(dtype=dtype, shape=[4, 8 * 8 // bits])
        if bits == 6:
            header["a.weight"].update(shape=[4, 8], data_offsets=[0, 24])

    rewrite_header(tmp_path / "model.safetensors", change)
    with pytest.raises(UserError, match=f"contains a.weight as {dtype}|a.weight as {dtype}") as one:
        Checkpoint.open(tmp_path)
    assert "again" not in str(one.value)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", 7]
)
def test_an_index_cannot_leave_its_folder(sharded, file):
    write_index(sharded, {"a.weight": file})
    refused(sharded, "index.json", "folder")


def test_what_the_index_names_must_be_there(sharded):
    write_index(sharded, {"x.weight": "model-00001-of-00002.safetensors"})
    refused(sharded, "x.weight", "model-00001-of-00002.safetensors")
    write_index(sharded, {"x.weight": "model-00003-of-00002.safetensors"})
    refused(sharded, "model-00003-of-00002.safetensors", "missing")


def test_an_index_without_a_map_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("[]")
    refused(sharded, "index.json")
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "index.json", "weight_map")


def test_other_directories(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, ".bin", "safetensors")
    (tmp_path / "unfinished").touch()
    refused(tmp_path, "never finished")


def test_a_missing_config_or_tensor_is_named(single):
    checkpoint = Checkpoint.open(single)
    with pytest.raises(UserError, match=r"config\.json"):
        _ = checkpoint.config
    with pytest.raises(UserError, match="no tensor x"):
        checkpoint.read("x.weight")
    with pytest.raises(IndexError):
        checkpoint.read("a.weight", 3, 9)


def test_a_single_file_out_of_date_beside_a_complete_index_is_named(sharded, tensors):
    stray = sharded / "model.safetensors"
    save_file({"x": torch.zeros(2)}, stray)
    with pytest.raises(UserError, match=rf"contains both model\.safetensors.*remove.*{stray}"):
        Checkpoint.open(sharded)
    save_file(tensors, stray)
    assert set(Checkpoint.open(sharded).tensors) == set(tensors)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_says_how_to_get_the_file(tmp_path, file):
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=rf"{file} is only a pointer.*git lfs pull"):
        Checkpoint.open(tmp_path)
