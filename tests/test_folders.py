"""What people have on disk, in folders and tars: it opens, or it is called by its name, with the way out.

Each test is one kind of file that other programs of this trade get reports about; what is right stands in it.
"""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata

import numpy as np
import processes
import pytest
from conftest import ROOT
from PIL import Image

import prepare
from data import CaptionRows, DataSettings, Sentences, SourceSettings
from support import files
from support.chance import rng
from support.formats import pick
from support.pictures import ENDINGS, load_picture
from support.settings import UserError, read_text
from support.sources import open_source, read_texts

RED = (200, 30, 30)


def write(folder, contents):
    """{name: bytes, a text, or a colour (a picture in the format that the ending says)} as files; → the folder."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (20, 16), content).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def encoded(form="PNG", color=RED, **options):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(file, form, **options)
    return file.getvalue()


def opened(folder, report=lambda line: None, split="train"):
    return open_source(str(folder), None, split, 0, report)


def captioned(folder):
    """{name: captions} of the pictures of a folder."""
    return {item.name: item.captions for item in opened(folder)}


@pytest.fixture
def check(program):
    """check(path) → (exit code, its output without rows of blanks, with the last line of stderr)."""

    def run(*arguments):
        code, out, err = program(prepare.main, "check", *arguments)
        return code, " ".join((out + err).split())

    return run


# ---- endings -------------------------------------------------------------------------------------


def test_endings_in_capitals_are_endings(tmp_path, check):
    """A camera's and old DOS's: the case capital_txt_silent."""
    write(tmp_path, {"IMG_1.txt": "x", "IMG_1.JPG": encoded("JPEG"), "IMG_2.JPG": encoded("JPEG"), "IMG_2.TXT": "two"})
    write(tmp_path, {"3.PNG": RED, "3.Json": '{"caption": "three"}', "3.DEPTH.PNG": RED})
    assert captioned(tmp_path) == {"3.PNG": ("three",), "IMG_1.JPG": ("x",), "IMG_2.JPG": ("two",)}
    assert opened(tmp_path)[0].modalities >= {"DEPTH"}
    assert "3 captioned pictures, 0 bad" in check(tmp_path)[1]
    texts = {"PG11.TXT": "An old book.", "new.txt": "A new book.", "L.JSONL": '{"text": "L"}'}
    books = write(tmp_path / "books", texts)
    assert sorted(read_texts(books, held_out_fraction=0)) == ["A new book.", "An old book.", "L"]


@pytest.mark.parametrize(
    ("ending", "form"), [("avif", "AVIF"), ("jfif", "JPEG"), ("JPE", "JPEG"), ("tga", "TGA"), ("jp2", "JPEG2000")]
)
def test_what_pillow_opens_is_opened(tmp_path, ending, form):
    write(tmp_path, {f"b.{ending}": encoded(form), "b.txt": "a red square"})
    (item,) = opened(tmp_path)
    assert item.caption == "a red square" and np.abs(item.image[8, 8].astype(int) - RED).max() < 12


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("IMG_1.HEIC", "HEIC photo, which needs another package: pip install pillow-heif"),
        ("DSC_1.NEF", "raw photo of a camera"),
        ("logo.svg", "drawing or page: export it as .png"),
        ("layers.psd", "drawing or page"),
        ("clip.MP4", "film: cut it into NAME.frames/000.png"),
        ("depth.npy", "array of numbers: save it as .png"),
        ("00000.parquet", "table: write its pictures as files"),
        ("00000.tar", "shard: name shards themselves, as in FOLDER/*.tar"),
        ("all.zip", "compressed file: unpack it"),
        ("a.jpg.part", "unfinished download"),
        ("notes.xyz", "file .xyz"),
        ("LICENSE", "file without an ending"),
    ],
)
def test_what_is_not_read_is_named_and_counted(tmp_path, name, says, check):
    """In training, in a line when the source is opened; by check, in its table; alone, in the error."""
    if ENDINGS & {os.path.splitext(name)[1].lower()}:
        pytest.skip("pillow-heif is installed, and opens it")
    write(tmp_path, {name: encoded("JPEG")})
    with pytest.raises(UserError, match="no pictures in it, but 1 × ") as error:
        opened(tmp_path)
    assert says in str(error.value)
    write(tmp_path, {"a.png": RED, "a.txt": "red", name: encoded("JPEG")})
    said = []
    assert len(opened(tmp_path, said.append)) == 1
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}: not read: 1 × {says}") and name in said[0]
    code, out = check(tmp_path)
    assert code == 0 and says in out and f" 1 {name}" in out and "1 captioned pictures, 0 bad" in out


def test_files_of_operating_systems_are_no_pictures(tmp_path):
    names = ["._a.jpg", ".hidden.png", "__MACOSX/._b.jpg", "@eaDir/a.jpg/thumb.jpg", ".git/c.png", "x/.cache/d.png"]
    write(tmp_path, dict.fromkeys(names, encoded("JPEG")) | {"Thumbs.db": b"x", ".DS_Store": b"x", "a.jpg": RED})
    source = opened(tmp_path)
    assert [item.name for item in source] == ["a.jpg"]
    assert source.left_out == {files.SYSTEMS: (8, ".DS_Store")}


# ---- captions ------------------------------------------------------------------------------------


def test_null_is_no_caption_and_a_list_is_several(tmp_path, check):
    """The case captions_null_and_lists; null, NaN and blanks in JSON leave the next file its turn."""
    values = {0: None, 1: "a dog", 2: ["a cat", None, " a kitten "], 3: float("nan"), 4: " ", 5: []}
    for name, value in values.items():
        write(tmp_path, {f"{name}.jpg": RED, f"{name}.json": json.dumps({"caption": value, "status": "success"})})
    row = {"file": "3.jpg", "caption": ["from a list"]}
    write(tmp_path, {"captions.jsonl": json.dumps(row)})
    found = [("a dog",), ("a cat", "a kitten"), ("from a list",)]
    assert captioned(tmp_path) == {"0.jpg": (), **dict(zip(["1.jpg", "2.jpg", "3.jpg"], found, strict=True)),
                                   "4.jpg": (), "5.jpg": ()}  # fmt: skip
    code, out = check(tmp_path)
    assert code == 0 and "6 pictures, 3 captioned, 0 bad" in out


@pytest.mark.parametrize("value", [3, 1.5, True, {"en": "a dog"}, ["a dog", 3]])
def test_a_caption_of_another_type_is_named_and_counted(tmp_path, value, check):
    write(tmp_path, {"1.jpg": RED, "1.json": json.dumps({"caption": value})})
    said = []
    (item,) = opened(tmp_path, said.append)
    assert item.caption == "" and len(said) == 1 and said[0].startswith(f"skipped {tmp_path}/1.json: caption is ")
    assert check(tmp_path)[0] == 2


def test_each_of_several_captions_is_drawn_by_the_rows_own_rng(tmp_path):
    """And the same one at the same place, whenever it is asked for."""
    write(tmp_path, {"a.png": RED, "a.json": json.dumps({"caption": ["a cat", "a kitten"]})})
    settings = DataSettings(side=16, sources=(SourceSettings(path=str(tmp_path)),), held_out_fraction=0)
    drawn = [CaptionRows(settings, 4, 0).pair(i)[1] for i in range(20)]
    assert set(drawn) == {"a cat", "a kitten"} and drawn == [CaptionRows(settings, 4, 0).pair(i)[1] for i in range(20)]
    one = rng("x", 0)
    assert pick(("alone",), one) == "alone" and one.random() == rng("x", 0).random()


def test_pictures_without_a_caption_are_counted_where_captions_are_wanted(tmp_path, capsys):
    write(tmp_path, {"a.png": RED, "a.txt": "red", "b.png": RED, "c.png": RED})
    CaptionRows(DataSettings(side=16, sources=(SourceSettings(path=str(tmp_path)),), held_out_fraction=0), 4, 0)
    assert f"{tmp_path}: 2 of 3 pictures are left out: no caption\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfa red square\r\n",
        "\ufeffa red square".encode("utf-16-le"),
        "\ufeffa red square".encode("utf-16-be"),
        "a red square".encode("utf-16"),
    ],
)
def test_a_byte_order_mark_is_never_text(tmp_path, data):
    """The case byte_order_marks: Notepad, Project Gutenberg, PowerShell."""
    write(tmp_path, {"a.png": RED, "a.txt": data, "books/pg1342.txt": data})
    assert captioned(tmp_path)["a.png"] == ("a red square",)
    (text,) = read_texts(str(tmp_path / "books"), held_out_fraction=0)
    assert text.strip() == "a red square" and read_text(tmp_path / "a.txt") == text


def test_byte_order_marks_in_lists_and_lines(tmp_path):
    mark = b"\xef\xbb\xbf"
    write(tmp_path, {"a.png": RED, "captions.jsonl": mark + b'{"file": "a.png", "caption": "red"}'})
    write(tmp_path, {"t/a.jsonl": mark + b'{"text": "one"}\r\n\r\n{"text": "two"}'})
    write(tmp_path, {"t/b.jsonl": '{"text": "three"}\n{"text": "four"}'.encode("utf-16")})
    assert captioned(tmp_path)["a.png"] == ("red",)
    assert list(read_texts(str(tmp_path / "t"), held_out_fraction=0)) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("un café".encode("latin-1"), "neither UTF-8 nor UTF-16 with its mark (byte 0xe9)"),
        ("a cat".encode("utf-16-le"), "a zero byte in it: UTF-16 without its mark, or no text"),
        (b"\xff\xfea", "neither UTF-8 nor UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the file: git lfs pull"),
    ],
)
def test_damaged_texts_are_skipped_and_counted(tmp_path, data, says, check, capsys):
    write(tmp_path, {"a.png": RED, "a.txt": data, "b.png": RED, "b.txt": "fine"})
    said = []
    assert [item.caption for item in opened(tmp_path, said.append)] == ["", "fine"]
    assert len(said) == 1 and said[0].startswith(f"skipped {tmp_path}/a.txt: {says}")
    code, out = check(tmp_path)
    assert code == 2 and f"{tmp_path}/a.txt: {says}" in out and "1 bad" in out
    texts = {"bad.txt": data, "good.txt": "fine", "empty.txt": "", "l.jsonl": '{"text": ""}'}
    books = write(tmp_path / "books", texts)
    capsys.readouterr()
    assert list(read_texts(books, held_out_fraction=0)) == ["fine"]
    assert sorted(line.split(": ")[0].rpartition("/")[2] for line in capsys.readouterr().err.splitlines()) == [
        "bad.txt", "empty.txt", "l.jsonl:1"]  # fmt: skip


def test_captions_are_read_from_all_common_files_in_one_order(tmp_path, check):
    """NAME.txt, NAME.caption, NAME.json, then lists; where two differ, check says which is not taken."""
    write(tmp_path, dict.fromkeys([f"{n}.png" for n in range(6)], RED))
    write(tmp_path, {"0.txt": "text", "0.caption": "caption", "0.json": '{"caption": "json"}'})
    write(tmp_path, {"1.caption": "caption", "1.json": '{"caption": "json"}', "2.json": '{"text": "json"}'})
    rows = [json.dumps({"file_name": f"{n}.png", "text": "list"}) for n in (2, 3)]
    write(tmp_path, {"metadata.jsonl": "\n".join(rows)})
    write(tmp_path, {"metadata.csv": 'file_name,text\r\n4.png,"one, in a\ntable"\r\n', "5.png.txt": "after its ending"})
    found = [texts[0] for texts in captioned(tmp_path).values()]
    assert found == ["text", "caption", "json", "list", "one, in a\ntable", "after its ending"]
    assert "another caption, which differs from the one that is taken 4 0.caption" in check(tmp_path)[1]


def test_a_comma_outside_quotes_does_not_cut_a_caption(tmp_path, check):
    rows = 'file_name,text\na.png,a dog, brown\nb.png,"a dog, brown"\n'
    write(tmp_path, {"a.png": RED, "b.png": RED, "metadata.csv": rows})
    assert captioned(tmp_path) == {"a.png": (), "b.png": ("a dog, brown",)}
    code, said = check(str(tmp_path))
    assert code == 2 and "metadata.csv:2: more cells than its first line has" in said


def test_names_in_lists_are_normalised(tmp_path):
    """./, \\, %20, a Mac's é; several rows of a picture are several captions; rows of absent pictures are counted."""
    accented = unicodedata.normalize("NFD", "café.png")
    names = ["a.png", "b.png", "s/c.png", "d e.png", "100%.png"]
    write(tmp_path, dict.fromkeys([*names, accented], RED))
    listed = ["./a.png", "a.png", "s/../b.png", "s\\c.png", "d%20e.png", "100%.png", "café.png", "gone.png"]
    write(tmp_path, {"captions.jsonl": "\n".join(json.dumps({"file": n, "caption": n}) for n in listed)})
    write(tmp_path, {"metadata.csv": "file_name,label\na.png,3\n"})
    write(tmp_path, {"s/metadata.jsonl": '{"file_name": "c.png", "text": "from its own folder"}'})
    source = opened(tmp_path)
    assert {item.name: item.captions for item in source} == {
        "a.png": ("./a.png", "a.png"), "b.png": ("s/../b.png",), "s/c.png": ("s\\c.png", "from its own folder"),
        "d e.png": ("d%20e.png",), "100%.png": ("100%.png",), "café.png": ("café.png",)}  # fmt: skip
    without = "row of a list without caption or text or captions"
    assert source.left_out == {"caption of a picture that is not there": (1, "gone.png"), without: (1, "a.png")}
    assert source[0].image.any()  # a name that was composed still opens its file


def test_translations_of_tux_paint_are_no_part_of_a_caption(tmp_path):
    """Lines "de.utf8=…" after the English one; other lines, kohya's tags among them, are the caption's own."""
    quarter = "A quarter.\naf.utf8='n kwart\nca@valencia.utf8=Un\nen_GB.utf8=A quarter.\n"
    write(tmp_path, {"a.png": RED, "a.txt": quarter})
    write(tmp_path, {"b.png": RED, "b.txt": "1girl, solo, rating:safe\nx=3"})
    assert captioned(tmp_path) == {"a.png": ("A quarter.",), "b.png": ("1girl, solo, rating:safe\nx=3",)}


# ---- what belongs together -----------------------------------------------------------------------


def test_a_picture_with_a_caption_of_its_own_is_no_annotation(tmp_path):
    names = ["a.png", "a.depth.png", "a.b.png", "a.2.png"]
    write(tmp_path, dict.fromkeys(names, RED) | {"a.txt": "first", "a.b.txt": "second"})
    assert captioned(tmp_path) == {"a.2.png": (), "a.b.png": ("second",), "a.png": ("first",)}
    assert "depth" in {item.name: item for item in opened(tmp_path)}["a.png"].modalities


def test_two_pictures_may_share_a_caption_and_check_says_so(tmp_path, check):
    write(tmp_path, {"a.jpg": RED, "a.png": RED, "a.txt": "red"})
    assert captioned(tmp_path) == {"a.jpg": ("red",), "a.png": ("red",)}
    assert "caption of several pictures 1 a.txt" in check(tmp_path)[1]


def test_texts_of_pictures_that_are_not_there_are_counted(tmp_path):
    """img2dataset leaves the JSON of downloads that failed."""
    write(tmp_path, {"1.jpg": RED, "1.txt": "x", "2.txt": "y", "2.json": '{"status": "failed_to_download"}'})
    without = {".txt without a picture": (1, "2.txt"), ".json without a picture": (1, "2.json")}
    assert opened(tmp_path).left_out == without


def test_a_folder_that_links_to_itself_ends(tmp_path):
    write(tmp_path, {"x/a.png": RED})
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "x")
    (tmp_path / "b.png").symlink_to(tmp_path / "x" / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    source = opened(tmp_path)
    assert [item.name for item in source] == ["again/a.png", "b.png", "gone.png", "x/a.png"]
    assert [source.readable(item) for item in source if item.name == "gone.png"] == [False]
    assert list(source.reasons) == [f"{tmp_path}/gone.png: No such file or directory"]


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    """As an old Latin-1 disk has them."""
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"nonsense")
    write(tmp_path, {"a.png": RED})
    done = processes.run("prepare.py", "check", tmp_path)
    assert done.returncode == 2 and r"caf\udce9.png: not a picture" in done.stdout and "Traceback" not in done.stderr


# ---- pixels --------------------------------------------------------------------------------------


def test_exif_that_cannot_be_read_costs_the_rotation_only():
    picture = Image.new("RGB", (20, 16), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, broken = io.BytesIO(), io.BytesIO()
    picture.save(turned, "JPEG", exif=exif)
    picture.save(broken, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xffnonsense")
    assert load_picture(turned.getvalue()).shape == (20, 16, 3)
    assert load_picture(broken.getvalue()).shape == (16, 20, 3)


@pytest.mark.parametrize(
    ("values", "form", "shown"),
    [
        (np.array([[0, 2.5, 10]], np.float32), "TIFF", [0, 64, 255]),  # metres
        (np.array([[0, 0.5, 1]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.float32), "TIFF", [0, 128, 255]),
        (np.array([[4, 4, 4]], np.float32), "TIFF", [255, 255, 255]),
        (np.array([[np.nan, 5, np.inf]], np.float32), "TIFF", [0, 255, 255]),
        (np.array([[0, 70000, 140000]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0, 80, 200]], np.int32), "TIFF", [0, 102, 255]),
        (np.array([[0, 32768, 65535]], np.uint16), "PNG", [0, 127, 255]),
        (np.array([[0, 32768, 65535]], np.uint16), "TIFF", [0, 127, 255]),
        (np.array([[0, 32768, 65535]], np.uint16), "PPM", [0, 127, 255]),
        (np.array([[0, 32768, 65535]], ">u2"), "TIFF", [0, 127, 255]),
    ],
)
def test_depth_maps_are_scaled_by_a_stated_rule(values, form, shown):
    """16 bits: 65535 is white. 32 bits and floats: 0 (or the least, if negative) is black, the greatest white."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, form)
    assert load_picture(file.getvalue())[0, :, 0].tolist() == shown


@pytest.mark.parametrize(
    ("values", "says"),
    [(np.full((1, 3), np.nan, np.float32), "not one of its values is a finite number"),
     (np.array([[0, 1, 20]], np.uint16), "16 bits, but no value above 20 of 65535: save it with 8 bits")],
)  # fmt: skip
def test_a_map_that_would_be_black_is_refused(values, says):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    with pytest.raises(UserError, match=says):
        load_picture(file.getvalue(), name="d.tif")


@pytest.mark.parametrize(
    ("mode", "color", "form", "shown"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (0, 0), "PNG", (255, 255, 255)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("RGBA", (0, 0, 0, 128), "PNG", (127, 127, 127)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("P", 7, "GIF", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, color, form, shown):
    image, file = Image.new(mode, (20, 16), color), io.BytesIO()
    image.save(file, form, **({"transparency": 7} if mode == "P" else {}))
    assert tuple(load_picture(file.getvalue())[8, 8]) == shown


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file"),
        (b"\n<!DOCTYPE html><html>403</html>", "a page in HTML, which came instead of the picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing: export it as .png"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: pip install pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (encoded("JPEG")[:-300], "Truncated"),
        (encoded("PNG")[:-40], "truncated|broken"),
        (encoded("WEBP")[:-30], "."),
        (encoded("BMP")[:-30], "truncated"),
    ],
)
def test_what_is_no_whole_picture_is_called_by_its_name(tmp_path, data, says, check):
    write(tmp_path, {"a.jpg": data, "b.jpg": RED})
    with pytest.raises(UserError, match=says):
        load_picture(tmp_path / "a.jpg")
    code, out = check(tmp_path)
    assert code == 2 and f"{tmp_path}/a.jpg: " in out and "1 bad" in out


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png: .*400000000 pixels"):
        load_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize(("form", "name"), [("PNG", "a.png"), ("WEBP", "a.webp"), ("GIF", "a.jpg"), ("GIF", "a.gif")])
def test_an_animation_is_a_clip_under_any_ending(tmp_path, form, name):
    frames = [Image.new("RGB", (20, 16), (40 * i, 0, 0)) for i in range(6)]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(tmp_path / name, form, save_all=True, append_images=frames[1:], **options)
    write(tmp_path, {"still.png": RED})
    clip, still = sorted(opened(tmp_path), key=lambda item: -item.frames)
    assert (clip.frames, still.frames) == (6, 1)
    assert [int(clip.picture("image", t)[8, 8, 0]) for t in range(6)] == [0, 40, 80, 120, 160, 200]
    assert len(Sentences(open_source(str(tmp_path), 16, "train", 0), "video", (), 4).sentence(0)) == 4


# ---- tars ----------------------------------------------------------------------------------------


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            content = encoded("JPEG", content) if isinstance(content, tuple) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_shard_of_img2dataset_is_read(tmp_path, check):
    """Capitals, folders and dots in keys, failed downloads, classes; ._ files of a Mac's tar are none."""
    tar(tmp_path / "00000.tar", {
        "./000000.jpg": RED, "./000000.txt": "zero", "./000000.json": '{"caption": "zero", "status": "success"}',
        "000001.json": '{"caption": "one", "status": "failed_to_download"}',
        "v1.5/a.b.JPG": RED, "v1.5/a.b.TXT": "dots", "._0.jpg": "x", "2.jpg": RED, "2.cls": "7", "2.caption": "two",
    })  # fmt: skip
    source = opened(tmp_path / "00000.tar")
    found = {item.name: (item.caption, item.category) for item in source}
    assert found == {"00000.tar/000000.jpg": ("zero", ""), "00000.tar/v1.5/a.b.JPG": ("dots", "v1.5"),
                     "00000.tar/2.jpg": ("two", "7")}  # fmt: skip
    failed = {".json without a picture": (1, "00000.tar/000001.json")}
    assert source.left_out == failed | {files.SYSTEMS: (1, "00000.tar/._0.jpg")}
    assert check(tmp_path / "00000.tar")[1].endswith("WebDataset, 3 captioned pictures, 0 bad")


def test_braces_name_shards(tmp_path):
    for i in (8, 9, 10):
        tar(tmp_path / f"s-{i:02d}.tar", {f"{i}.jpg": RED})
    assert len(opened(tmp_path / "s-{08..10}.tar")) == 3
    assert len(opened(tmp_path / "s-{08,10}.tar")) == 2
    said = []
    assert len(opened(tmp_path / "s-{08..11}.tar", said.append)) == 3
    assert said == [f"skipped {tmp_path}/s-11.tar: No such file or directory"]
    assert files.braces("a{0..2}{x,y}") == ["a0x", "a0y", "a1x", "a1y", "a2x", "a2y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b"a tar", mtime=0), "is compressed: shards must be plain .tar files, to be read in any order"),
        (b"", "is an empty file"),
        (b"PAR1....", r"is no \.tar file"),
    ],
)
def test_what_is_no_plain_tar_is_named_and_the_others_are_used(tmp_path, content, says):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=says):
        opened(tmp_path / "a.tar")
    tar(tmp_path / "b.tar", {"1.jpg": RED})
    said = []
    assert len(opened(tmp_path / "*.tar", said.append)) == 1
    assert len(said) == 1 and said[0].startswith(f"skipped {tmp_path}/a.tar: ")


def test_of_two_files_of_one_name_in_a_tar_the_later_is_read_and_check_says_so(tmp_path, check):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.png", encoded()), ("a.txt", b"old"), ("a.txt", b"new")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert captioned(tmp_path / "a.tar") == {"a.tar/a.png": ("new",)}  # as tar unpacks them
    code, said = check(str(tmp_path / "a.tar"))
    assert code == 2 and "a.tar/a.txt: two files of that name" in said


def test_links_in_a_tar_are_their_targets(tmp_path):
    with tarfile.open(tar(tmp_path / "a.tar", {"x/1.jpg": RED}), "a") as archive:
        for name, kind, target in (("x/2.jpg", tarfile.SYMTYPE, "1.jpg"), ("3.jpg", tarfile.LNKTYPE, "x/1.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    source = opened(tmp_path / "a.tar")
    assert len(source) == 3 and all((item.image == source[0].image).all() for item in source)


# ---- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("a.png", RED, 0, "a picture of 20×16 pixels"),
        ("a.txt", "A text.", 0, "texts, 1 of them, 7 characters"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', 0, "texts, 2 of them, 6 characters"),
        ("a.jsonl", '{"tokens": "AQAAAA=="}\n', 0, "rows of tokens: 1 rows, 1 tokens"),
        ("a.heic", "x", 2, "pip install pillow-heif"),
        ("phone/a.nef", "x", 2, "no pictures in it, but 1 × raw photo of a camera"),
        ("a.parquet", "PAR1", 2, "Parquet"),
        ("a.safetensors", "x", 2, "python sample.py what"),
        ("model/config.json", "{}", 2, "a model, no data: python sample.py what"),
        ("absent", None, 2, "no such folder or .tar file"),
    ],
)
def test_check_says_what_anything_is(tmp_path, name, content, code, says, check):
    if content is not None:
        write(tmp_path, {name: content, "phone/a.txt": "a caption"})
    found, out = check(tmp_path / name.split("/")[0])
    assert found == code and says in out


def test_check_opens_every_frame_and_every_annotation(tmp_path, check):
    names = ["c.frames/0.png", "c.frames/1.png", "o.views/0.png", "o.views/0.mask.png", "a.png", "a.depth.png"]
    write(tmp_path, dict.fromkeys(names, RED))
    out = check(tmp_path)[1]
    for row in ("clip 1 c.frames", "object of several views 1 o.views", "annotation: mask 1", "annotation: depth 1"):
        assert row in out
    for name in names[1:]:
        write(tmp_path, {name: b"broken"})
        assert f"{tmp_path}/{name}: not a picture" in check(tmp_path)[1]
        write(tmp_path, {name: RED})


@pytest.mark.parametrize("more", [[], ["-u"]])
def test_a_reader_that_leaves_ends_the_program_quietly(tmp_path, more):
    """The case check_piped_to_head: 141 is what a shell says of `yes | true`, too."""
    write(tmp_path, {"rows.jsonl": "{}\n" * 300})
    python = " ".join([sys.executable, *more])
    command = f"{python} prepare.py check {tmp_path}/rows.jsonl | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("141\n", "")
    done = subprocess.run(["bash", "-c", f"{python} prepare.py --help | true"], cwd=ROOT, capture_output=True)
    assert done.stderr == b""


def test_pages_of_a_tiff_after_the_first_are_said_to_be_left_out(tmp_path, capsys):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "scan.tif", save_all=True, append_images=[blue])
    for _ in range(2):
        assert load_picture(tmp_path / "scan.tif")[0, 0].tolist() == [255, 0, 0]
    assert capsys.readouterr().err.count("scan.tif: a TIFF of several pages, of which the first is read") == 1
