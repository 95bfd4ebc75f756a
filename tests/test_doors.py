"""What comes in from others can't hurt: too deep, too large, no text, no file. One line names it, soon."""

import io
import json
import os
import resource
import socket
import struct
import tarfile
import threading
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
import tasks
from documents import KINDS
from model import LLaMA, LLaMAConfig, sample_token
from support import checkpoint, files, pictures, settings
from support.pictures import load_picture, stretch
from support.rows import JsonRows
from support.settings import UserError
from support.sources import TextFiles, open_source
from support.tokenizer import CLIPTokenizer, Tokenizer

DEEP = 100_000


def refused(function, *arguments):
    """The one line in which `function` says what is wrong."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- texts: TOML, JSON, YAML ---------------------------------------------------------------------


@pytest.mark.parametrize("deep", ["[" * DEEP, '{"a":' * DEEP, "[" * 150 + "]" * 150])
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path, deep):
    file = tmp_path / "config.json"
    file.write_text(deep)
    assert refused(checkpoint.read_json, file) == f"{file}: nested too deeply"


def test_json_may_be_nested_a_hundred_deep():
    settings.parse_json("[" * 99 + "1" + "]" * 99)


@pytest.mark.parametrize("text", ["x = " + "[" * DEEP, ".".join("a" * 200) + " = 1", "x = " + "9" * 5000])
def test_toml_that_is_too_deep_or_too_long_is_one_line(tmp_path, text):
    file = tmp_path / "x.toml"
    file.write_text(text)
    assert refused(settings.read, file).startswith(f"{file}: ")


@pytest.mark.parametrize("value", ["[" * DEEP, "9" * 5000, "{a = " * DEEP])
def test_so_is_an_override(value):
    assert "train.steps" in refused(tasks.read_run, ROOT / "configs" / "tiny_vqgan.toml", [f"train.steps={value}"])


def test_yaml_that_repeats_itself_is_not_unfolded(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "model.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    file.write_text("\n".join(lines))
    assert "repeats a part of itself" in refused(checkpoint.read_yaml, file)


@pytest.mark.parametrize("text", ["2020-99-99", "[" * DEEP, "? []\n: 1", "!!python/name:os.abort", "!!int ''"])
def test_yaml_of_any_other_kind_is_one_line(tmp_path, text):
    pytest.importorskip("yaml")
    file = tmp_path / "model.yaml"
    file.write_text(text)
    assert refused(checkpoint.read_yaml, file).startswith(f"{file}: ")


def test_an_index_that_names_itself_is_refused(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": file.name}}))
    assert f"names {file.name}" in refused(checkpoint.read_tensors, tmp_path)


def test_a_list_of_merges_that_unpacks_to_a_gigabyte_is_refused(tmp_path):
    packer = zlib.compressobj(9, wbits=31)  # 31: gzip's
    file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(20)) + packer.flush())
    assert "more than 16 MiB" in refused(CLIPTokenizer.from_pretrained, tmp_path)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "optim.clip=-1",
        "optim.weight_decay=-0.1",
        "optim.eps=0",
        "optim.eps=-1e-8",
        "optim.beta1=1",
        "optim.beta2=-0.1",
        "optim.lr=inf",
        "optim.lr=nan",
        "optim.lr=-1",
        "optim.lr=1e300",
        "train.ema=1",
        'run.dir=""',
        "run.dir=a\udcff",
    ],
)
def test_settings_have_bounds(override):
    key = override.partition("=")[0].rpartition(".")[2]
    assert key in refused(tasks.read_run, ROOT / "configs" / "tiny_vqgan.toml", [override])


def test_a_model_larger_than_the_memory_is_refused_before_any_of_it_is_made():
    huge = LLaMAConfig(2**10, 2**16, 10, 1, hidden_dim=2**16)  # no matrix larger than 17 GB, 2 TB of them
    assert "too large for the memory" in refused(tasks.fresh_model, LLaMA, huge)


def test_asking_first_changes_no_weight():
    config = LLaMAConfig(64, 32, 1, 4, hidden_dim=64)
    torch.manual_seed(0)
    asked = tasks.fresh_model(LLaMA, config).state_dict()
    torch.manual_seed(0)
    assert all(map(torch.equal, asked.values(), LLaMA(config).state_dict().values()))


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 TiB"), RuntimeError("CUDA out of memory")])
def test_too_little_memory_is_one_line(program, error):
    def main():
        raise error

    code, _, told = program(main)
    assert code == 2 and told.startswith("error: the memory is too small") and told.count("\n") == 1


# ---- files that are none -------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path):
    """A folder with a picture among a pipe, a socket, a device, a link to nothing and a link to itself."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's name must be short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
    os.chdir(here)
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("no/such.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    return tmp_path


def test_what_is_no_file_among_pictures_is_named_and_left_out(strange):
    told = []
    source = open_source(str(strange), 8, "train", 0, told.append)
    assert [item.name for item in source if source.readable(item)] == ["good.png"]
    assert source.skipped == 5
    assert f"skipped {strange}/pipe.png: is no regular file" in told


@pytest.mark.parametrize("name", ["pipe.png", "socket.png", "device.png", "gone.png"])
def test_every_door_refuses_it(strange, name):
    file = strange / name
    for read in (load_picture, checkpoint.read_json, checkpoint.read_tensors, settings.read, settings.read_bytes):
        assert str(file) in refused(read, file)
    (strange / "x.jsonl").symlink_to(name)
    assert "x.jsonl" in refused(JsonRows, str(strange / "x.jsonl"), KINDS["pair"], "", "train", 0, None)
    texts = TextFiles(str(strange / "x.jsonl"), str) if name != "gone.png" else []
    assert list(texts) == []
    (strange / "x.tar").symlink_to(name)
    assert "x.tar" in refused(open_source, str(strange / "x.tar"), 8)


# ---- pictures ------------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side):
    """The beginning of a PNG of side × side pixels in RGB."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


@pytest.mark.parametrize("side", [8193, 13_300, 2**31 - 1])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(file) in refused(load_picture, file, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_jpeg_of_too_many_pixels_is_decoded_smaller(monkeypatch, tmp_path):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 320))
    file = tmp_path / "large.jpg"
    Image.fromarray(ramp).convert("RGB").save(file, quality=95)
    whole = load_picture(file, 16)
    monkeypatch.setattr(pictures, "PIXELS", 128 * 160)
    smaller = load_picture(file, 16)
    assert smaller.shape == (16, 16, 3) and 0 < np.abs(whole.astype(int) - smaller).max() <= 3
    assert "pixels, more than" in refused(load_picture, file)  # at its full size


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch, tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    monkeypatch.setattr(pictures, "LARGE", 16)
    with pictures._one_at_a_time:
        waiting = threading.Thread(target=load_picture, args=(file, 4))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


def test_floats_are_stretched_in_strips_to_the_same_bytes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(700, 5)).astype(np.float32)
    values[3, 2], values[600, 1] = np.nan, np.inf
    finite = values.astype(np.float64)[np.isfinite(values)]
    low, high = finite.min(), finite.max()
    expected = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    expected = ((expected - low) * (255 / (high - low))).round().astype(np.uint8)
    assert np.array_equal(stretch(values), expected)


# ---- tars ----------------------------------------------------------------------------------------


def tar_of(path, *members):
    """A tar of a small PNG under each of these names, which may be bytes."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(picture.getvalue())
            tar.addfile(info, io.BytesIO(picture.getvalue()))
    return path


def test_names_in_a_tar_that_are_no_text_are_read(tmp_path):
    source = open_source(str(tar_of(tmp_path / "x.tar", b"a\xff\xfe.png", b"b.png")), 8, "train", 0)
    assert len(source) == 2 and all(map(source.readable, source))


def test_a_member_of_negative_size_ends_a_tar(tmp_path):
    path = tar_of(tmp_path / "x.tar", b"a.png", b"b.png")
    data = bytearray(path.read_bytes())
    place = data.index(b"b.png")
    data[place + 124 : place + 136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    path.write_bytes(data)
    told = []
    assert len(files.tar_files([str(path)], told.append)) == 1 and "negative size" in told[0]


def test_a_pattern_of_a_million_million_names_is_refused():
    assert "names more than" in refused(files.braces, "{0..999999}{0..999999}.tar")


# ---- what is typed, and what is shown ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 0])
def test_the_colder_the_surer(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -float("inf")]] * 50)
    assert (sample_token(logits, temperature) == 1).all()


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", "1e-300"),
        ("--temperature", "nan"),
        ("--prompt", "a\udcff"),
        ("--system", "\udcff"),
        ("--top-p", "1e-300"),
        ("--seed", "9" * 5000),
        ("--max-new", "1e9"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(program, option):
    code, _, told = program(sample.main, "text", "--run", "no/such", *option)
    assert code == 2 and option[0] in told and told.count("\n") == 1


def test_a_stranger_s_names_cannot_write_to_the_terminal(program, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b]0;mine\x07\x9b31m"}))
    code, out, told = program(sample.main, "what", str(tmp_path))
    assert code == 2 and not set("\x1b\x07\x9b") & set(out + told)


def test_a_regular_expression_that_takes_forever_is_given_up(tmp_path, monkeypatch):
    Tokenizer.from_pretrained("bytes").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(x|xx)+[yz]"}, "behavior": "Isolated", "invert": False}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, saved["pre_tokenizer"]]}
    file.write_text(json.dumps(saved))
    monkeypatch.setattr("support.tokenizer.patience", lambda text: 0.1)
    assert str(file) in refused(Tokenizer.from_pretrained(tmp_path).encode, "x" * 40 + "w")
