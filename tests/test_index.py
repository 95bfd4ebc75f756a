"""Starts that do not grow with the data: orders without a table, and indexes beside large files.

An index must say what reading everything would say, belong to this very file, and never be in the way.
"""

import base64
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from test_documents import png, rows_of

from data import TokenRows
from support import files, index, latents, token_rows
from support.chance import shuffled
from support.parallel import Ranks
from support.settings import UserError
from support.sources import open_source
from support.token_rows import RowsFiles, encode_row, new_rows, rows_index

# ---- orders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 255, 1000, 4097, 70_001])
def test_a_pass_has_each_item_once(size):
    for number in range(3):
        order = shuffled("rows", (0,), size, np.arange(size) + number * size)
        assert np.array_equal(np.sort(order), np.arange(size))


def test_a_place_of_a_huge_pass_is_found_alone():
    """No two of 10⁵ places of 2²⁰ + 7, or of 10¹², have one item, and none is outside."""
    for size in (2**20 + 7, 10**12):
        items = shuffled("rows", (0,), size, np.arange(10**5) * (size // 10**5))
        assert len(np.unique(items)) == 10**5 and items.min() >= 0 and items.max() < size


def test_orders_look_random():
    """Place and item have nothing to do with each other, nor has a pass with the next, nor one seed with another."""
    n = 10_000
    place, first = np.arange(n), shuffled("rows", (0,), n, np.arange(n))
    others = shuffled("rows", (0,), n, np.arange(n) + n), shuffled("rows", (1,), n, np.arange(n))
    for a, b in ((place, first), (first, others[0]), (first, others[1]), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # five standard deviations
        assert (a == b).sum() < 10
    assert abs((first % 2 == place % 2).mean() - 0.5) < 0.025
    # of three items all six orders come, each about equally often
    orders = [tuple(order) for order in shuffled("rows", (0,), 3, np.arange(600)).reshape(-1, 3).tolist()]
    assert len(set(orders)) == 6 and min(map(orders.count, set(orders))) > 15


# ---- rows of tokens --------------------------------------------------------------------------------


def some_rows(count=50, low=1, high=20):
    random = np.random.default_rng(0)
    return [random.integers(0, 8192, random.integers(low, high)) for _ in range(count)]


def written(path, rows=None):
    path.write_text("".join(map(encode_row, some_rows() if rows is None else rows)))
    return path


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_scanning_all_at_once_finds_what_line_by_line_finds(dtype):
    lines = []
    for codes in some_rows():
        text = base64.b64encode(codes.astype(token_rows.DTYPES[dtype]).tobytes()).decode()
        lines.append(json.dumps({"tokens": text}) + "\n")
    block = "".join(lines).encode()
    slow, wrong = token_rows.scan_lines(block, dtype)
    assert np.array_equal(token_rows.scan_plain(block, dtype), slow) and not wrong


@pytest.mark.parametrize(
    "line",
    [
        "{oops\n",
        '{"tokens": "AA=="}\n',
        '{"tokens": "AAAA=AAA"}\n',
        '{"tokens": "AAAAA==="}\n',
        '{"tokens": ""}\n',
        "\n",
        '{"tokens": [1, 2]}\n',
        '{"tokens":"AQAAAA=="}\n',
        '{"tokens": "AQAAAA==", "id": 1}\n',
        '{"tokens": "AQAA\\/A=="}\n',
    ],
)
def test_a_block_with_any_other_line_is_read_line_by_line(line):
    block = (encode_row([1, 2]) + line + encode_row([3])).encode()
    assert token_rows.scan_plain(block, "int32") is None


def test_a_second_opening_reads_the_index_and_no_row(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl")
    first = [row.tolist() for row in RowsFiles([path])]
    monkeypatch.setattr(token_rows, "_scan", lambda *_: pytest.fail("it was read again"))
    again = RowsFiles([path])
    assert [row.tolist() for row in again] == first == [row.tolist() for row in some_rows()]
    assert again.tokens == sum(map(len, first)) and len(again) == 50
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "rows.jsonl.index"]


def test_faults_are_said_at_every_opening(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(encode_row([1]) + "{oops\n\n" + encode_row([9, 9]) + encode_row([2]))
    said = []
    for vocab_size in (8, 8, 10):
        rows = RowsFiles([path], vocab_size)
        said.append((rows.skipped, rows.tokens, [row.tolist() for row in rows], capsys.readouterr().err))
    assert said[0] == said[1] and said[0][:3] == (2, 2, [[1], [2]])
    assert ":2: not a JSON row" in said[0][3] and ":4: code 9 lies outside the vocabulary of 8" in said[0][3]
    assert said[2][:3] == (1, 4, [[1], [9, 9], [2]])


def test_a_file_that_changed_gets_a_new_index_and_it_is_said(tmp_path, capsys):
    path = written(tmp_path / "rows.jsonl", [[1], [2]])
    RowsFiles([path])
    written(path, [[3, 4]])
    assert [row.tolist() for row in RowsFiles([path])] == [[3, 4]]
    assert capsys.readouterr().err.count("rows.jsonl: has changed") == 1
    beside = tmp_path / "rows.jsonl.index"
    whole = beside.read_bytes()
    flipped = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    for damaged in (whole[:-8], whole[:40], index.SIGN + b"}\n", flipped):
        beside.write_bytes(damaged)
        assert [row.tolist() for row in RowsFiles([path])] == [[3, 4]]
        assert "the index was made anew" in capsys.readouterr().err
    RowsFiles([path])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("others", [lambda path: path.mkdir(), lambda path: path.write_text("mine")])
def test_where_no_index_can_be_kept_it_is_said_and_rows_are_read(tmp_path, others, capsys):
    """What has its name and is somebody else's is left alone."""
    path = written(tmp_path / "rows.jsonl", [[1], [2, 3]])
    others(tmp_path / "rows.jsonl.index")
    rows = RowsFiles([path])
    assert [row.tolist() for row in rows] == [[1], [2, 3]]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no index can be kept beside it" in said
    assert (tmp_path / "rows.jsonl.index").is_dir() or (tmp_path / "rows.jsonl.index").read_text() == "mine"


def test_a_pattern_of_rows_takes_no_index_for_rows(tmp_path):
    for name in "ab":
        RowsFiles([written(tmp_path / f"rows-{name}", [[1]])])
    assert len(RowsFiles(token_rows.rows_files(tmp_path / "rows-*"))) == 2


def test_a_damaged_index_too_large_for_its_checksum_to_be_compared_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(encode_row, some_rows(10))))
    RowsFiles([str(path)], 8192)
    file = tmp_path / "rows.jsonl.index"
    data = bytearray(file.read_bytes())
    data[data.index(b"\n") + 9] ^= 1  # where the second row begins
    file.write_bytes(data)
    monkeypatch.setattr(index, "CHECKED", 0)
    with pytest.raises(UserError, match=rf"{path}:2: is not as its index says"):
        RowsFiles([str(path)], 8192)[1]


def test_tokenize_writes_the_index_with_the_rows(tmp_path, monkeypatch):
    info = token_rows.RowsInfo("text", "bytes", 256, "")
    with new_rows(tmp_path / "rows.jsonl", info) as file:
        file.write(encode_row([1, 2]))
    monkeypatch.setattr(token_rows, "_scan", lambda *_: pytest.fail("it was read again"))
    assert rows_index(tmp_path / "rows.jsonl", "int32").facts["tokens"] == 2


def test_rows_of_one_length_and_of_several_are_found_alike(tmp_path):
    """The windows in the middle of the third epoch are those that a walk from the start finds."""
    for rows in ([[i, i] for i in range(9)], [[i] * (i % 3 + 1) for i in range(9)]):
        reader = TokenRows([written(tmp_path / f"{len(rows[0])}.jsonl", rows)], 4, 1, seed=0)
        reader.block = 4  # an epoch is of several
        order = reader.order(np.arange(40)).tolist()
        stream = np.concatenate([rows[i] for i in order])
        for start in range(0, len(stream) - 9):
            assert np.array_equal(reader.stream(start, 9), stream[start : start + 9])


# ---- tars, rows in JSON ------------------------------------------------------------------------------


def tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
    return path


def test_a_tar_is_read_once(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in (3, 1, 2)] + ["é/\udcff.png"]
    path = tar(tmp_path / "a.tar", names)
    first = files.tar_files([str(path)], print)
    assert list(first) == [f"a.tar/{name}" for name in names]
    monkeypatch.setattr(tarfile, "open", None)
    assert files.tar_files([str(path)], print) == first
    assert files.read(first, "a.tar/1.png") == png()


def test_a_damaged_tar_is_said_at_every_opening_wherever_it_lies(tmp_path):
    path = tar(tmp_path / "a.tar", ["1.png", "2.png"])
    path.write_bytes(path.read_bytes()[:3600])
    for folder in (tmp_path, tmp_path / "moved"):
        if not folder.exists():
            folder.mkdir()
            shutil.copy2(path, folder)
            shutil.copy2(f"{path}.index", folder)
        said = []
        assert len(files.tar_files([str(folder / "a.tar")], said.append)) == 1
        assert said == [f"skipped the end of {folder}/a.tar: truncated (2.png is cut off)"]


def test_indexes_are_no_files_of_a_folder(tmp_path):
    tar(tmp_path / "a.tar", ["1.png"])
    (tmp_path / "1.png").write_bytes(png())
    files.tar_files([str(tmp_path / "a.tar")], print)
    (tmp_path / "my.index").write_text("")
    assert [*files.folder_files(tmp_path)] == ["1.png", "a.tar", "my.index"]
    assert len(open_source(str(tmp_path), 8, held_out_fraction=0, report=lambda line: None)) == 1


def test_rows_in_json_are_read_once_for_each_kind(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(20)]
    file.write_text("\n".join([*map(json.dumps, rows), "{oops"]))
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    found = []
    for kind in ("pair", "image", "pair"):
        source = rows_of(file, kind, create=kind == "image").sources[0]
        found.append(([source.where(i) for i in range(len(source))], capsys.readouterr().err))
        if len(found) == 2:
            monkeypatch.setattr("support.rows.json_rows", None)
    assert found[0] == found[2] and len(found[0][0]) == 20 and ":21: not JSON" in found[2][1]
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["rows.jsonl.image.index", "rows.jsonl.pair.index"]


# ---- latents -----------------------------------------------------------------------------------------


def test_latents_are_made_once_and_a_broken_picture_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    encoded, random = [], torch.randn(10, 2, 3, 2, 2)

    def encode(numbers):
        encoded.extend(numbers)
        good = [number for number in numbers if number != 5]
        return good, random[good]

    options = (tmp_path, 10, encode, Ranks(0, 1, torch.device("cpu")), "latents")
    first = latents.Latents(*options)
    (tmp_path / "00001.safetensors").unlink()  # a start that was killed
    again = latents.Latents(*options)
    assert encoded == [*range(10), *range(4, 8)] and len(again) == 9
    good = [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert first.places.tolist() == again.places.tolist() == good
    assert torch.equal(again[[8, 0, 5]], random[[9, 0, 6]])
    assert again.std() == pytest.approx(random[good, 0].std().item(), rel=1e-6)
