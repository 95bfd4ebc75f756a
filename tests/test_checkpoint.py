"""What checkpoint.py promises: whole files or none, every tensor accounted for, and nothing but data is read."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from support import checkpoint, runs
from support.settings import UserError

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def linear():
    with torch.device("meta"):
        return nn.Linear(3, 2)


def refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- writing ---------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(KeyError), checkpoint.atomic_file(file) as beside:
        beside.write_text("half of the n")
        raise KeyError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_an_error_while_filling_a_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), runs.new_step(tmp_path, 1) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_nothing_is_seen_under_the_name_until_it_is_whole(tmp_path):
    with runs.new_step(tmp_path, 1) as folder:
        (folder / "state.json").write_text("{}")
        assert checkpoint.step_folders(tmp_path) == []
    assert (tmp_path / "step_00000001" / "state.json").read_text() == "{}"


def test_a_file_can_be_written_again_and_a_step_cannot(tmp_path):
    for text in ("old", "new"):
        checkpoint.write_text(tmp_path / "deep" / "file.txt", text)
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    make_step(tmp_path, 1)
    with pytest.raises(UserError, match="holds state"):
        make_step(tmp_path, 1)
    assert os.listdir(tmp_path / "step_00000001") == ["state.json"]


def test_any_tensor_can_be_written(tmp_path):
    """Strided, shared and gradient-carrying ones as well, which safetensors itself refuses."""
    whole = torch.arange(6.0, requires_grad=True)
    checkpoint.write_tensors(tmp_path / "x.safetensors", {"a": whole.view(2, 3).T, "b": whole, "c": whole})
    read = checkpoint.read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], whole.view(2, 3).T) and torch.equal(read["b"], read["c"])


def test_only_our_own_half_written_files_are_removed(tmp_path):
    for name in (".123.part.model.safetensors", ".my.part.y", ".x.part.y"):
        (tmp_path / name).touch()
    checkpoint.remove_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".my.part.y", ".x.part.y"]


# ---- the steps of a run ----------------------------------------------------------------------


def make_step(run, step, keep=0, ema=False):
    with runs.new_step(run, step, keep) as folder:
        if ema:
            (folder / "ema").mkdir()
        runs.write_state(folder, step)


def test_the_newest_steps_stay_and_latest_points_at_the_last(tmp_path):
    for step in (1, 2, 10):
        make_step(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step_00000002", "step_00000010"]
    assert os.readlink(tmp_path / "latest") == "step_00000010"
    assert checkpoint.latest_step_folder(tmp_path) == tmp_path / "step_00000010"
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000002", "step_00000010"]


def test_keep_0_keeps_all(tmp_path):
    for step in (1, 2, 3):
        make_step(tmp_path, step)
    assert len(checkpoint.step_folders(tmp_path)) == 3


def test_a_folder_left_half_written_by_a_kill_is_ignored(tmp_path):
    make_step(tmp_path, 1)
    (tmp_path / ".step_00000002.123.part").mkdir()
    (tmp_path / "step_00000003.old").mkdir()
    assert checkpoint.latest_step_folder(tmp_path) == tmp_path / "step_00000001"


def test_a_path_means_the_averaged_weights_of_a_runs_newest_step(tmp_path):
    make_step(tmp_path / "run", 1, ema=True)
    make_step(tmp_path / "run", 2, ema=True)
    make_step(tmp_path / "plain", 3)
    assert checkpoint.weights_folder(tmp_path / "run") == tmp_path / "run" / "step_00000002" / "ema"
    assert checkpoint.weights_folder(tmp_path / "plain") == tmp_path / "plain" / "step_00000003"
    assert checkpoint.weights_folder(tmp_path / "run" / "step_00000001") == tmp_path / "run" / "step_00000001"
    assert refused(checkpoint.weights_folder, tmp_path / "absent") == f"{tmp_path / 'absent'}: no such file or folder"


# ---- filling a model -------------------------------------------------------------------------


def test_a_filled_model_holds_the_tensors(tmp_path):
    model = checkpoint.load_into(linear(), WEIGHTS, "file")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in WEIGHTS.items())
    assert checkpoint.load_into(linear(), WEIGHTS, "file", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"weight": WEIGHTS["weight"]}, "file: bias is missing (1 in all)"),
        (WEIGHTS | {"scale": torch.ones(1)}, "file: scale belongs to no part of Linear (1 in all)"),
        (WEIGHTS | {"weight": torch.ones(3, 2)}, "file: weight is (3, 2), expected (2, 3)"),
        (WEIGHTS | {"bias": torch.tensor([0, float("nan")])}, "file: bias holds NaN or infinity"),
        (WEIGHTS | {"bias": torch.tensor([0, -float("inf")])}, "file: bias holds NaN or infinity"),
        (
            WEIGHTS | {"bias": torch.ones(2, dtype=torch.int32)},
            "file: bias is stored as torch.int32, expected floating-point of 16 to 64 bits",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensors, expected):
    assert refused(checkpoint.load_into, linear(), tensors, "file") == expected


def test_weights_that_share_memory_in_the_file_do_not_in_the_model(tmp_path):
    """A file may keep two tensors as windows of one storage; training one must not move the other."""
    window = torch.arange(8.0)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": window[:6].view(2, 3), "bias": window[5:7]}, file)
    before = file.read_bytes()
    model = checkpoint.load_into(linear(), checkpoint.read_tensors(tmp_path), tmp_path)
    with torch.no_grad():
        model.bias.fill_(-1)
    assert model.weight[1, 2] == 5 and file.read_bytes() == before


# ---- reading ---------------------------------------------------------------------------------


def test_a_folder_is_read_whatever_its_weights_are_called(tmp_path):
    for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        if name.endswith(".bin"):
            torch.save(WEIGHTS, folder / name)
        else:
            checkpoint.write_tensors(folder / name, WEIGHTS)
        read = checkpoint.read_tensors(folder)
        assert read.keys() == WEIGHTS.keys() and torch.equal(read["weight"], WEIGHTS["weight"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_as_one(tmp_path, suffix):
    for name, tensor in WEIGHTS.items():
        if suffix == "bin":
            torch.save({name: tensor}, tmp_path / f"{name}.bin")
        else:
            checkpoint.write_tensors(tmp_path / f"{name}.safetensors", {name: tensor})
    stem = "pytorch_model" if suffix == "bin" else "model"
    index = {"weight_map": {name: f"{name}.{suffix}" for name in WEIGHTS}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    assert checkpoint.read_tensors(tmp_path).keys() == WEIGHTS.keys()
    (tmp_path / f"bias.{suffix}").unlink()
    expected = f"{tmp_path / stem}.{suffix}.index.json: names bias.{suffix}, which is no file of weights beside it"
    assert refused(checkpoint.read_tensors, tmp_path) == expected


def test_files_from_before_2020_can_be_read(tmp_path):
    """torchvision's VGG16 and LPIPS's heads are still published in torch's old format, which is no zip."""
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.read_tensors(tmp_path / "old.pth")["weight"], WEIGHTS["weight"])


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_one_line(tmp_path, name, share):
    checkpoint.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)})
    torch.save({"a": torch.ones(100)}, tmp_path / "x.bin")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    assert refused(checkpoint.read_tensors, tmp_path / name).startswith(f"{tmp_path / name}: not a ")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, legacy):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": Bomb()}, file, _use_new_zipfile_serialization=not legacy)
    assert refused(checkpoint.read_tensors, tmp_path).startswith(f"{file}: not a plain file of tensors")
    file.write_bytes(pickle.dumps(Bomb()))
    assert refused(checkpoint.read_tensors, tmp_path).startswith(f"{file}: not a plain file of tensors")
    assert not (tmp_path / "it ran").exists()


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    """A zip anew, each of its records (name, bytes) as `change` makes it; None: left out. Its checksums fit."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            if (data := change(name, data)) is not None:
                archive.writestr(name, data)


RECORDS = {
    "too short": (lambda name, data: data[:-4] if name.endswith("data/1") else data, "data/1 has 8 bytes, and its"),
    "too long": (lambda name, data: data + b"1234" if name.endswith("data/1") else data, "data/1 has 16 bytes, and"),
    "left out": (lambda name, data: None if name.endswith("data/1") else data, "data/1 is missing"),
}


@pytest.mark.parametrize(("change", "says"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_not_its_tensor_s_is_refused_by_name(tmp_path, change, says):
    """torch.load maps the file: of a record that is too short it would read what lies behind it."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.ones(5), "b": torch.ones(3), "c": torch.ones(5)}, file)
    rewritten(file, lambda name, data: data)
    assert checkpoint.read_tensors(file)["b"].tolist() == [1, 1, 1]
    rewritten(file, change)
    assert f"{file}: its record {says}" in refused(checkpoint.read_tensors, file)


def test_a_compressed_record_is_refused_by_name(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.bin")
    rewritten(tmp_path / "x.bin", lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused(checkpoint.read_tensors, tmp_path / "x.bin")


def test_no_flipped_byte_of_a_pickle_changes_a_tensor_in_silence(tmp_path):
    """Any byte of the archive: it is refused, or was none of the tensors'."""
    file = tmp_path / "x.bin"
    torch.save(WEIGHTS, file)
    data = file.read_bytes()
    for at in range(0, len(data), 11):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            read = checkpoint.read_tensors(file)
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
        else:
            assert all(torch.equal(read[name], tensor) for name, tensor in WEIGHTS.items()), at


def test_a_pickle_without_checksums_opens(tmp_path):
    torch.serialization.set_crc32_options(False)
    torch.save(WEIGHTS, tmp_path / "x.bin")
    torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoint.read_tensors(tmp_path / "x.bin")["weight"], WEIGHTS["weight"])


ODD = {
    "sparse": torch.ones(2, 2).to_sparse(),
    "compressed rows": torch.ones(2, 2).to_sparse_csr(),
    "meta": torch.ones(2, 2, device="meta"),
    "quantised": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tensor", ODD.values(), ids=ODD)
def test_what_is_no_plain_tensor_is_one_line(tensor, tmp_path):
    for legacy in (False, True):
        torch.save({"weight": tensor}, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
        assert refused(checkpoint.read_tensors, tmp_path / "x.bin").startswith(f"{tmp_path / 'x.bin'}: ")


@pytest.mark.parametrize("name", ["\udcff", "a\nb", "\x1b[31m", 5, ("a",), None, b"a"])
def test_a_name_that_is_no_text_is_one_line(name, tmp_path):
    torch.save({name: torch.ones(2)}, tmp_path / "x.bin")
    message = refused(checkpoint.read_tensors, tmp_path / "x.bin")
    assert message.startswith(f"{tmp_path / 'x.bin'}: ") and message.isprintable()


def test_a_name_that_is_no_text_in_safetensors_is_one_line(tmp_path):
    checkpoint.write_tensors(tmp_path / "x.safetensors", {"name": torch.ones(2)})
    data = (tmp_path / "x.safetensors").read_bytes()
    for name in (b"\xff\xfe\xfd\xfc", b"a\\nb"):
        (tmp_path / "x.safetensors").write_bytes(data.replace(b"name", name))
        message = refused(checkpoint.read_tensors, tmp_path / "x.safetensors")
        assert message.startswith(f"{tmp_path / 'x.safetensors'}: ") and message.isprintable()


def test_what_holds_no_weights_is_one_line(tmp_path):
    assert refused(checkpoint.read_tensors, tmp_path).startswith(f"{tmp_path}: no weights in this folder")
    for name in ("absent.safetensors", "absent.bin"):
        assert refused(checkpoint.read_tensors, tmp_path / name) == f"{tmp_path / name}: no such file"
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    assert refused(checkpoint.read_tensors, tmp_path / "list.bin").endswith("holds a list, not a table of tensors")
    (tmp_path / "config.json").write_text('{"a": ')
    assert refused(checkpoint.read_json, tmp_path / "config.json").startswith(f"{tmp_path / 'config.json'}: ")


def test_a_header_whose_length_begins_like_a_pickle_is_a_header(tmp_path):
    """640 is written b"\\x80\\x02…", as a pickle's first two bytes are."""
    plain = {"format": "pt"}
    checkpoint.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}, plain | {"pad": ""})
    size = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    checkpoint.write_tensors(tmp_path / "b.safetensors", {"w": torch.ones(2)}, plain | {"pad": "x" * (640 - size)})
    assert (tmp_path / "b.safetensors").read_bytes().startswith(b"\x80\x02")
    assert checkpoint.read_tensors(tmp_path / "b.safetensors")["w"].tolist() == [1, 1]
