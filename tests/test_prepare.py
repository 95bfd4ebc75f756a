"""What prepare.py promises: rows that are their sentences' codes, or their texts' ids, and say what they were made
with; sheets that show them. Each test is one promise."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_data import SIDE, folder_of, open_source

import prepare
from data import DataSettings, Sentences, TokenRows
from support import sources
from support.settings import UserError
from support.token_rows import RowsInfo, check_rows, decode_row, encode_row
from support.tokenizer import Tokenizer, train_bpe
from vqgan import VQGAN, VQGANConfig

# ---- pictures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A VQGAN of a few thousand weights, as it falls out of the generator: 4 codes a picture of 16 pixels."""
    torch = pytest.importorskip("torch")

    torch.manual_seed(0)
    config = VQGANConfig(
        resolution=SIDE, hidden_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=8,
        num_embeddings=32, quantized_embed_dim=8,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vqgan")
    VQGAN(config).save_pretrained(path)
    return path


def run(capsys, *words):
    """prepare.py's command line in this process: what it printed."""
    previous, sys.argv = sys.argv, ["prepare.py", *map(str, words)]
    try:
        prepare.main()
    finally:
        sys.argv = previous
    return capsys.readouterr().out


@pytest.fixture
def config(tmp_path, tokenizer):
    folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(10)])
    (tmp_path / "x.toml").write_text(f"""
        [train]
        seed = 4
        [model]
        kind = "llama"
        [data]
        side = {SIDE}
        pictures = 4
        held_out_fraction = 0.0
        tokenizer = "{tokenizer}"
        [[data.sources]]
        path = "{tmp_path / "pictures"}"
        kind = "colorization"
        passes = 2
        [[data.sources]]
        path = "{tmp_path / "pictures"}"
        kind = "image"
    """)
    return tmp_path / "x.toml"


def test_tokenize_writes_the_codes_of_each_sentence_and_show_reads_them(tmp_path, capsys, config, tokenizer):
    """A row is its sentence's pictures, encoded and laid end to end; `show` decodes them to a sheet."""
    import torch

    out = run(capsys, "tokenize", "--config", config, "--out", tmp_path / "rows.jsonl")
    assert "13 rows, 208 tokens" in out  # (2 passes × 5 + 3 sentences) × 4 pictures × 4 codes
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    source = open_source(str(tmp_path / "pictures"), SIDE, held_out_fraction=0)
    shown = np.stack(Sentences(source, "colorization", (), 4, seed=4).sentence(6))  # the second of pass 1
    images = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255
    codes = VQGAN.from_pretrained(tokenizer).eval().encode(images)
    assert decode_row(lines[6]).tolist() == codes.flatten().tolist()
    run(capsys, "show", tmp_path / "rows.jsonl", "--config", config, "--out", tmp_path / "g.png", "--rows", 3)
    assert Image.open(tmp_path / "g.png").size == (4 * (SIDE + 2) + 2, 3 * (SIDE + 2) + 2)


def test_shards_together_are_the_whole(tmp_path, capsys, config):
    """--shard i/n takes every n-th sentence: dealt back together, the shards are the file of one machine."""
    words = ("tokenize", "--config", config, "data.workers=1", "--out")
    run(capsys, *words, tmp_path / "whole.jsonl")
    shards = []
    for i in range(3):
        run(capsys, *words, tmp_path / f"{i}.jsonl", "--shard", f"{i}/3")
        shards.append((tmp_path / f"{i}.jsonl").read_text().splitlines())
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert [shards[i % 3][i // 3] for i in range(len(whole))] == whole


@pytest.mark.parametrize("row, says", [("{}\n", "not a JSON row"), (encode_row([99] * 4), "code 99 lies outside")])
def test_show_refuses_a_bad_row(tmp_path, capsys, tokenizer, row, says):
    """A file that was named is not half shown: the line and what is wrong with it."""
    (tmp_path / "r.jsonl").write_text(row)
    with pytest.raises(UserError, match=f"r.jsonl:1: {says}"):
        run(capsys, "show", tmp_path / "r.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "g.png")


def test_show_needs_no_rows_to_show_the_sentences(tmp_path, capsys, config):
    """Without a rows file the sheet holds the sentences themselves, pixel for pixel; no tokenizer is opened."""
    words = ("show", "data.tokenizer=absent", "--config", config, "--rows", 13)
    assert "13 of 13 rows" in run(capsys, *words, "--out", tmp_path / "g.png")
    sheet = np.array(Image.open(tmp_path / "g.png"))
    source = open_source(str(tmp_path / "pictures"), SIDE, held_out_fraction=0)
    shown = Sentences(source, "colorization", (), 4, seed=4).sentence(6)
    top = 2 + 6 * (SIDE + 2)
    assert np.array_equal(sheet[top : top + SIDE, 2 : 2 + SIDE], shown[0])
    with pytest.raises(UserError, match="name a rows file, or a --config"):
        run(capsys, "show", "--out", tmp_path / "g.png")


# ---- what rows were made with ----------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, capsys, config):
    """Rows of pictures, with their info beside them, and how a run names them."""
    run(capsys, "tokenize", "--config", config, "--out", tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


def test_rows_say_what_they_were_made_with(rows, tokenizer, tmp_path, capsys):
    info = RowsInfo.read(rows)
    assert (info.kind, info.tokenizer, info.vocab_size) == ("pictures", str(tokenizer), 32)
    assert (info.side, info.grid) == (SIDE, (2, 2))
    assert info == RowsInfo.of_pictures(tokenizer, VQGAN.from_pretrained(tokenizer), SIDE)
    run(capsys, "show", rows, "--out", tmp_path / "g.png", "--rows", 1)  # nothing else need be named
    assert Image.open(tmp_path / "g.png").size == (4 * (SIDE + 2) + 2, SIDE + 4)


def test_the_info_is_no_rows_file(rows):
    """A pattern that would match both means the rows."""
    assert TokenRows([str(rows.parent / "rows*")], 4, 1, seed=0).skipped == 0


def test_rows_and_info_are_written_whole_or_not_at_all(rows, tmp_path, capsys, config, monkeypatch):
    before = {path: path.read_bytes() for path in tmp_path.glob("rows.jsonl*")}
    assert len(before) == 3
    monkeypatch.setattr(prepare, "encode_row", lambda codes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "tokenize", "--config", config, "--out", rows)
    assert {path: path.read_bytes() for path in tmp_path.glob("*rows.jsonl*")} == before


@pytest.mark.parametrize(
    ("data", "vocab_size", "says"),
    [
        ({}, 32, None),
        ({"side": 32}, 32, f"rows.jsonl was made at side {SIDE}, data.side is 32"),
        ({}, 31, "has 32 codes, but model.vocab_size is 31"),
        ({"held_out": ("absent.jsonl",)}, 32, None),  # opening it will say so
    ],
)
def test_a_run_refuses_rows_that_were_made_otherwise(rows, tokenizer, data, vocab_size, says):
    data = DataSettings(**({"side": SIDE, "rows": (str(rows.parent / "rows*.jsonl"),)} | data))
    own = RowsInfo.of_pictures(tokenizer, VQGAN.from_pretrained(tokenizer), data.side)
    if says is None:
        check_rows(data, vocab_size, [own])
        check_rows(data, vocab_size)
        return
    with pytest.raises(UserError, match=says):
        check_rows(data, vocab_size, [own])


def test_a_run_refuses_rows_of_another_tokenizer(rows, tokenizer, tmp_path):
    """The path may be the same: a tokenizer that was trained on has other codes."""
    import torch

    data, vqgan = DataSettings(side=SIDE, rows=(str(rows),)), VQGAN.from_pretrained(tokenizer)
    with torch.no_grad():
        vqgan.quantize.embedding.weight[0] += 1
    with pytest.raises(UserError, match=r"which is not, or no longer, what .* is .*: tokenize again"):
        check_rows(data, 99, [RowsInfo.of_pictures(tokenizer, vqgan, SIDE)])
    text = RowsInfo.of_text("bytes", Tokenizer.from_pretrained("bytes"))
    with pytest.raises(UserError, match="holds pictures, but bytes is for text"):
        check_rows(data, 258, [text])
    with pytest.raises(UserError, match=f"{rows} was made with 32 codes, but model.vocab_size is 9"):
        check_rows(data, 9)


def test_rows_that_say_nothing_are_read_as_ever(rows, tmp_path):
    """LVM's own rows files have no info."""
    shutil.copy(rows, tmp_path / "lvm.jsonl")
    check_rows(DataSettings(side=999, rows=(str(tmp_path / "lvm.jsonl"),)), 1)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"kind": "songs", "tokenizer": "", "vocab_size": 1}'])
def test_a_damaged_info_is_one_line(rows, content):
    (rows.parent / "rows.jsonl.info.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.jsonl\.info\.json: ") as error:
        RowsInfo.read(rows)
    assert "\n" not in str(error.value)


# ---- text --------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    """A folder of texts: two files of one each, and one of forty; and what its rows should say."""
    texts = [f"text {i}, naïve 🎉" for i in range(42)]
    (tmp_path / "library" / "deep").mkdir(parents=True)
    (tmp_path / "library" / "a.txt").write_text(texts[0])
    (tmp_path / "library" / "deep" / "b.txt").write_text(texts[1])
    lines = [json.dumps({"text": text, "more": 1}) for text in texts[2:]]
    lines[20:20] = ["{oops", '{"text": null}', r'{"text": "\ud800"}']
    (tmp_path / "library" / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "library" / "d.md").write_text("not a text of ours")
    return tmp_path / "library", texts


def test_a_text_is_a_file_or_a_line(library, capsys):
    folder, texts = library
    assert sorted(sources.read_texts(str(folder), held_out_fraction=0)) == sorted(texts)
    left_out, *lines = capsys.readouterr().err.splitlines()
    assert left_out == f"{folder}: not read: 1 × neither .txt nor .jsonl, but .md ({folder / 'd.md'})"
    assert [line.split(": ")[0] for line in lines] == [f"skipped {folder / 'c.jsonl'}:{n}" for n in (21, 22, 23)]
    assert list(sources.read_texts(str(folder / "a.txt"), held_out_fraction=0)) == texts[:1]


def test_a_text_is_held_out_by_what_it_says(library):
    """More texts, or the same in another file, move none from one split to the other."""
    folder, texts = library
    train, held_out = (list(sources.read_texts(str(folder), split, 0.3)) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(texts) and train and held_out
    (folder / "again.txt").write_text(held_out[0])
    assert set(sources.read_texts(str(folder), "train", 0.3)) == set(train)


def test_the_texts_of_emoji_have_the_pictures_split():
    """Each name alone, and after its category: so that a language model knows which belong together."""
    texts, items = list(sources.read_texts("emoji", "combo")), open_source("emoji", SIDE, "combo")
    assert texts[::2] == [item.caption for item in items]
    assert texts[1::2] == [f"{item.category.lower()}: {item.caption}" for item in items]


def test_a_vocabulary_is_made_of_the_texts_to_train_on(tmp_path, capsys):
    """A folder of it is a text_tokenizer, in which they are shorter than in bytes; what is held out has no part."""
    texts = [f"{i * 7919 % 1000} {i * 104729 % 1000} naïve" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config, out = ROOT / "configs" / "tiny_llama.toml", tmp_path / "words"
    overrides = [f'data.sources=[{{path = "{tmp_path}", kind = "text"}}]', "data.held_out_fraction=0.3"]
    run(capsys, "vocabulary", "--config", config, "--out", out, *overrides, "model.vocab_size=290")
    words = Tokenizer.from_pretrained(out)
    assert words.vocab_size == 290
    for text in texts:
        assert words.decode(words.encode(text)) == text and len(words.encode(text)) < len(text.encode())
    joins = train_bpe(sources.read_texts(str(tmp_path), "train", 0.3), 32)
    assert [words.bytes_of[256 + n] for n in range(32)] == [first + second for first, second in joins]
    assert joins != train_bpe(texts, 32)


@pytest.mark.parametrize(
    ("kind", "size", "out", "says"),
    [
        ("image", 300, "words", "a vocabulary is made of texts"),
        ("text", 257, "words", "model.vocab_size 257: 256 bytes, what begins and what ends"),
        ("text", 9000, "words", "these texts give [0-9]+ tokens at most: set model.vocab_size = "),
        ("text", 300, "book.txt", "book.txt: is a file"),
        ("text", 300, "run", "run: holds .*, which this command did not write"),
    ],
)
def test_no_vocabulary_where_there_can_be_none(kind, size, out, says, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("low lower lowest")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    overrides = [f'data.sources=[{{path = "{tmp_path}/book.txt", kind = "{kind}"}}]', f"model.vocab_size={size}"]
    config = ROOT / "configs" / "tiny_llama.toml"
    with pytest.raises(UserError, match=says):
        run(capsys, "vocabulary", "--config", config, "--out", tmp_path / out, *overrides, "data.held_out_fraction=0")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["book.txt", "config.json", "run"]


def test_no_vocabulary_of_texts_that_are_all_held_out(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("low lower lowest")
    overrides = [f'data.sources=[{{path = "{tmp_path}/book.txt", kind = "text"}}]', "data.held_out_fraction=0.999"]
    config = ROOT / "configs" / "tiny_llama.toml"
    with pytest.raises(UserError, match="none of the texts falls into the train split"):
        run(capsys, "vocabulary", "--config", config, "--out", tmp_path / "x", *overrides, "model.vocab_size=300")
    with pytest.raises(UserError, match="how many tokens"):
        run(capsys, "vocabulary", "--config", ROOT / "configs" / "lvm.toml", "--out", tmp_path / "x", *overrides)


def test_rows_of_text_are_rows(library, tmp_path, capsys):
    """begin, the text's bytes, end: TokenRows reads them as it reads pictures."""
    folder, texts = library
    source = f'data.sources=[{{path = "{folder}", kind = "text"}}]'
    words = [source, "data.text_tokenizer=bytes", "data.held_out_fraction=0.3"]
    config = ROOT / "configs" / "tiny_llama.toml"
    found = []
    for split in ("train", "held_out"):
        shards = [tmp_path / f"{split}-{i}.jsonl" for i in range(2)]
        for i, shard in enumerate(shards):
            run(capsys, "tokenize", "--config", config, "--out", shard, "--split", split, "--shard", f"{i}/2", *words)
        rows = [decode_row(line, 258).tolist() for shard in shards for line in shard.read_text().splitlines()]
        assert {(row[0], row[-1]) for row in rows} == {(256, 257)}
        assert RowsInfo.read(shards[0]) == RowsInfo.of_text("bytes", Tokenizer.from_pretrained("bytes"))
        found += [bytes(row[1:-1]).decode() for row in rows]
        assert TokenRows([str(tmp_path / f"{split}-*.jsonl")], 8, 2, seed=0).tokens == sum(map(len, rows))
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize(
    ("sources", "more", "says"),
    [
        ('[{kind = "text"}, {kind = "image"}]', ["data.text_tokenizer=bytes"], "mixes text and pictures"),
        ('[{kind = "text"}]', [], "no tokenizer for text: set data.text_tokenizer"),
        ('[{kind = "text", passes = 2}]', [], "of kind text it takes nothing but a path"),
        ('[{path = "configs", kind = "text"}]', ["data.text_tokenizer=bytes"], "configs: no .txt or .jsonl file"),
        ('[{path = "requirements.txt", kind = "text"}]', ["data.text_tokenizer=bytes"], "into the held_out split"),
    ],
)
def test_texts_that_cannot_be_are_one_line(sources, more, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = ROOT / "configs" / "tiny_llama.toml"
    with pytest.raises(UserError, match=says):
        words = ["--out", tmp_path / "x.jsonl", "--split", "held_out", f"data.sources={sources}", *more]
        run(capsys, "tokenize", "--config", config, *words)
    assert not list(tmp_path.iterdir())
