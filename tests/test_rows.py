"""What people's rows are: formats as their authors write them, and rows of tokens as other programs leave them.

Each is read, or called by its name with the way out; nothing is lost without being counted.
"""

import base64
import gzip
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image
from test_documents import byte_writer, png, rows_of, shown, turn

import prepare
from data import TokenRows
from support.formats import read_row
from support.rows import fault_kind, json_rows, open_picture, read_rows, row_name
from support.settings import UserError
from support.token_rows import RowsFiles, decode_row, encode_row, tell_dtype

HUMAN, GPT = turn("human", "<image>\nWhat?"), turn("gpt", "Blue.")


def said(row):
    """A row's format, its messages as "role: text", and its pictures."""
    form, row = read_row(json.dumps(row))
    return form, [f"{message['role']}: {message['content']}" for message in row.messages], row.pictures


# ---- conversations ---------------------------------------------------------------------------------


ASKED = ["user: <image>\nWhat?", "assistant: Blue."]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("LLaVA", {"id": 7, "image": "1.jpg", "conversations": [HUMAN, GPT]}),
        ("LLaVA", {"images": ["1.jpg"], "conversations": [HUMAN, GPT]}),  # LLaMA-Factory, NeMo
        ("LLaVA", {"conversations": [HUMAN | {"modal_info": {"<image>": ["image", ["1.jpg"]]}}, GPT]}),  # DreamLLM
        ("LLaVA", {"image": "1.jpg", "conversations": [HUMAN, turn("obj365", "Blue.")]}),  # DreamLLM
        ("LLaVA", {"image": {"path": "1.jpg", "bytes": None}, "conversations": [HUMAN, GPT]}),  # datasets
        ("LLaVA", {"image": "1.jpg", "conversations": [turn("Human", HUMAN["value"]), turn("GPT", "Blue.")]}),
        ("LLaVA", {"image": "1.jpg", "conversations": [{"role": "user", "content": HUMAN["value"]}, GPT]}),  # MiniCPM
        ("ShareGPT", {"id": "a", "image": "1.jpg", "items": [HUMAN, turn("bing", "Blue.")]}),
        (
            "messages",
            {"images": ["1.jpg"], "messages": [turn("user", HUMAN["value"]), turn("assistant", "Blue.")]},
        ),
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "1.jpg", "detail": "low"}},
                            {"type": "text", "text": "What?"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
                ]
            },
        ),
        (
            "messages",  # TRL: the parts say where, the row says which
            {
                "images": ["1.jpg"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "Blue."},
                ],
            },
        ),
        ("Alpaca", {"instruction": "<image>\nWhat?", "input": "", "output": "Blue.", "images": ["1.jpg"]}),
    ],
)
def test_one_question_in_the_ways_in_which_it_is_written(form, row):
    assert said(row) == (form, ASKED, ["1.jpg"])


def test_an_instruction_has_its_input_below_and_its_history_before():
    """As LLaMA-Factory lays out Alpaca's rows; Dolly calls them context and response."""
    alpaca = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}
    _, messages, _ = said(alpaca | {"system": "Be brief."})
    assert messages == ["system: Be brief.", "user: Hi", "assistant: Hello", "user: Add.\n1, 2", "assistant: 3"]
    assert said({"instruction": "Add.", "context": "1, 2", "response": "3"})[:2] == ("Dolly", messages[3:])


def test_modal_info_names_a_picture_for_each_place_in_its_own_text():
    """Of two placeholders each takes from its own list, in the order in which they stand in the text."""
    info = {"<dream>": ["image", ["d.jpg"]], "<image>": ["image", ["a.jpg", "b.jpg"]]}
    asked = turn("human", "<image> <dream> <image>") | {"modal_info": info}
    assert said({"conversations": [asked, GPT]})[2] == ["a.jpg", "d.jpg", "b.jpg"]
    for text, says in (("<image>", "names more pictures"), ("<image> <image> <image> <dream>", "names too few")):
        with pytest.raises(ValueError, match=rf"conversations\[0\].modal_info {says}"):
            read_row(json.dumps({"conversations": [asked | {"value": text}, GPT]}))


def test_an_answer_before_the_first_question_is_left_out_and_the_row_is_kept():
    """ShareGPT cuts long chats; FastChat and LLaVA leave that turn out, too."""
    chat = [turn("gpt", "Hello"), turn("human", "One plus two?"), turn("gpt", "3")]
    _, row = read_row(json.dumps({"conversations": chat}))
    assert [message["content"] for message in row.messages] == ["One plus two?", "3"]
    assert row.left_out == "an answer before the first question"
    _, row = read_row(json.dumps({"conversations": [turn("system", "Be brief."), *chat]}))
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    assert read_row(json.dumps({"conversations": chat[1:]}))[1].left_out == ""


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [turn("human", "a"), turn("gpt", "b"), turn("gpt", "c")]}, "message 3 is of the assistant"),
        ({"conversations": [turn("observation", "a"), GPT]}, 'conversations[0].from is "observation": one of human'),
        ({"video": "a.mp4", "conversations": [turn("human", "<video>\nWhat?"), GPT]}, 'it has "video", which is not'),
        ({"tools": '[{"name": "f"}]', "messages": [turn("user", "a"), GPT]}, 'it has "tools", which is not read'),
        ({"conversations": [turn("human", "<img>1.jpg</img>"), GPT]}, "conversations[0].value has <img>…</img>: write"),
        ({"messages": [{"role": "user", "content": None}, GPT]}, "messages[0].content is null, not a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, GPT]},
            'messages[0].content[0].type is "input_audio": only text and images are read',
        ),
        ({"image": {"bytes": "x"}, "conversations": [HUMAN, GPT]}, "image holds a picture's bytes: write them"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "its keys chosen, rejected are of a preference"),
        ({"url": "http://x", "caption": "a cat"}, "a link to a picture: download them (img2dataset)"),
        ({"tokens": "AAAA"}, "a row of tokens, as an LVM or a LLaMA reads it: name the file in data.rows"),
        ({"text": "Once upon"}, 'a text alone, which a LLaMA learns from: kind = "text"'),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}, "of COCO's table: write a row"),
        ({"a": {"image": "1.jpg"}, "b": {"image": "2.jpg"}}, "a table of 2 rows by their names: write its values"),
        ({"image": "a.jpg", "question": "a", "answer": "b"}, 'a question: write {"conversations": '),
        ({"version": 1, "data": [{"a": 1}] * 3}, 'a table around 3 rows: write its list "data" into a file of its own'),
    ],
)
def test_what_is_not_read_is_called_by_its_name(row, says):
    with pytest.raises(ValueError) as error:
        read_row(json.dumps(row))
    assert says in str(error.value)


# ---- captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "caption": "a cat", "image_id": 3},
        {"image": "a.png", "text": "a cat"},
        {"file_name": "a.png", "text": "a cat"},  # datasets' ImageFolder: metadata.jsonl
        {"file": "a.png", "caption": "a cat"},  # captions.jsonl
        {"image": "a.png", "captions": [None, "a cat", "", float("nan")]},
    ],
)
def test_a_caption_in_the_ways_in_which_it_is_written(row):
    form, row = read_row(json.dumps(row))
    assert (form, row.picture, row.captions) == ("captions", "a.png", ["a cat"])


@pytest.mark.parametrize("nothing", [None, float("nan"), "", "  ", [], [None]])
def test_a_picture_without_a_caption_is_no_pair_but_can_be_drawn_again(tmp_path, nothing, capsys):
    """null is what a link without a text has, NaN what pandas makes of it; neither is a text to train on."""
    rows = [{"image": "0.png", "caption": nothing}, {"image": "0.png", "caption": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "0.png").write_bytes(png(0))
    pairs = rows_of(tmp_path / "rows.jsonl", "pair", create=False)
    assert len(pairs.sources[0]) == pairs.skipped == 1
    assert capsys.readouterr().err == f"skipped {tmp_path}/rows.jsonl:1: it has no caption\n"
    assert len(rows_of(tmp_path / "rows.jsonl", "image").sources[0]) == 2


def test_of_several_captions_each_sample_draws_one_and_always_the_same(tmp_path):
    """BLIP's files of COCO have five of a picture; a resumed run must draw what it drew before."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "caption": ["a cat", "a kitten", None]}))
    (tmp_path / "0.png").write_bytes(png(0))
    first, again = (rows_of(tmp_path / "rows.jsonl", "pair", create=False) for _ in range(2))
    drawn = [shown(byte_writer(), first.sample(i)) for i in range(30)]
    assert set(drawn) == {"[<s>](look)[a cat</s>]", "[<s>](look)[a kitten</s>]"}
    assert drawn[7] == shown(byte_writer(), again.sample(7))


@pytest.mark.parametrize("value", [7, {"en": "a cat"}, [["a cat"]], True])
def test_a_caption_of_another_type_is_named(value):
    with pytest.raises(ValueError, match=r"caption is .*, not a text"):
        read_row(json.dumps({"image": "a.png", "caption": value}))


# ---- pictures that rows name -----------------------------------------------------------------------


def test_a_picture_may_stand_in_the_row_itself(tmp_path):
    """OpenAI's data: addresses."""
    address = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    assert np.array_equal(np.asarray(open_picture(tmp_path, address)), np.asarray(Image.open(io.BytesIO(png(3)))))
    with pytest.raises(ValueError, match=r"the picture in the row, data:.*a%b, cannot be read"):
        open_picture(tmp_path, "data:image/png;base64,a%b")


def test_names_may_be_windows_own_and_those_of_another_machine_are_named(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.png").write_bytes(png(1))
    assert open_picture(tmp_path, "coco\\1.png").size == open_picture(tmp_path, "coco/1.png").size == (24, 20)
    with pytest.raises(ValueError, match=r"/data/ann/1.png: no such file on this machine: write names inside"):
        open_picture(tmp_path, "/data/ann/1.png")


# ---- files -----------------------------------------------------------------------------------------


ROWS = [{"image": f"{i}.png", "caption": f"naïve {i} 日本"} for i in range(4)]
BOM = "\ufeff"


@pytest.mark.parametrize(("row", "disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_may_be_written_otherwise_on_the_disk(tmp_path, row, disk):
    (tmp_path / unicodedata.normalize(disk, "café.png")).write_bytes(png())
    assert open_picture(tmp_path, unicodedata.normalize(row, "café.png")).size == (24, 20)


@pytest.mark.parametrize(
    ("name", "says"),
    [(".", "a folder, no picture"), ("iVBORw0KGgo" * 100, "data:image/png;base64,"), ("a" * 300, "too long")],
)
def test_what_is_no_files_name_is_said(tmp_path, name, says):
    with pytest.raises((ValueError, UserError), match=says):
        open_picture(tmp_path, name)


@pytest.mark.parametrize("extra", [{"tool_calls": [{"id": "1"}]}, {"reasoning_content": "Hm."}, {"weight": 0}])
def test_what_a_turn_says_beyond_its_text_is_not_lost(extra):
    answer = turn("assistant", "Blue.") | extra
    with pytest.raises(ValueError, match=rf"messages\[1\] has .?{next(iter(extra))}"):
        read_row(json.dumps({"messages": [turn("user", "What?"), answer]}))


def test_check_takes_what_training_takes_conversations_of_several_formats(tmp_path, program):
    rows = [{"messages": [turn("user", "What?"), turn("assistant", "Blue.")]}, {"instruction": "Go.", "output": "No."}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = program(prepare.main, "check", str(file))
    assert code == 0 and "2 rows" in out


@pytest.mark.parametrize(
    ("row", "says"),
    [('{"tokens": [1, 2]}', "1 rows, 2 tokens, 1 bad"), ('{"text": "a"}', "1 of them, 1 characters, 1 bad")],
)
def test_a_broken_first_row_does_not_hide_what_the_others_are(tmp_path, row, says, program):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{row[:8]}\n{row}\n")
    code, out, err = program(prepare.main, "check", str(file))
    assert code == 2 and says in out + err and "unknown format" not in out + err


def test_empty_lines_between_rows_of_tokens_are_no_faults(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"tokens": [1, 2]}\n\n{"tokens": [3]}\n \n')
    rows = RowsFiles([file])
    assert rows.skipped == 0 and [row.tolist() for row in rows] == [[1, 2], [3]]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
        BOM + "\n".join(map(json.dumps, ROWS)),
        json.dumps(ROWS),
        BOM + json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),  # objects over many lines, one after the other
        ",\n".join(map(json.dumps, ROWS)),
        json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:]),  # two lists, put together with cat
    ],
)
def test_rows_are_found_by_what_a_file_holds_whatever_it_is_called(tmp_path, text):
    """JSON Lines, a list, objects over many lines; with a byte order mark, CRLF, empty lines."""
    for name in ("rows.json", "rows.jsonl", "ROWS.JSON"):
        (tmp_path / name).write_bytes(text.encode())
        found = list(json_rows(tmp_path / name))
        assert [json.loads(raw.decode("utf-8-sig")) for _, _, raw in found] == ROWS
        assert [row.caption for row, *_ in read_rows(str(tmp_path / name))] == [row["caption"] for row in ROWS]


def test_each_row_of_a_one_line_file_counts_by_itself(tmp_path, capsys):
    """300 bad rows are 300: each has its number. Ten are said one by one, the others in a line that counts them."""
    rows = [{"id": i, "conversations": [turn("human", f"{i}?")]} for i in range(300)]
    rows += [{"id": i, "conversations": [turn("human", "Hi"), turn("gpt", "Yes?")]} for i in range(100)]
    file = tmp_path / "one_line.json"
    file.write_text(json.dumps(rows))
    read = rows_of(file, "conversation")
    assert (len(read.sources[0]), read.skipped) == (100, 300)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[1] == f"skipped {file} (row 2): it has no answer"
    assert lines[10] == f"{file}: skipped 300 × it has no answer ({file}:1)"
    names = [row_name("x", place) for place, *_ in json_rows(file)]
    assert (names[0], names[1], names[399]) == ("x:1", "x (row 2)", "x (row 400)")
    assert read.sources[0].where(0) == f"{file} (row 301)"


def test_what_is_left_out_of_rows_is_counted(tmp_path, capsys):
    chat = [turn("gpt", "Hello"), turn("human", "One plus two?"), turn("gpt", "3")]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": chat}] * 5))
    assert len(rows_of(tmp_path / "rows.json", "conversation").sources[0]) == 5
    says = f"left out of rows: 5 × an answer before the first question ({tmp_path}/rows.json:1)\n"
    assert capsys.readouterr().err == f"{tmp_path}/rows.json: {says}"


@pytest.mark.parametrize("indent", [None, 1])
def test_behind_a_broken_row_of_a_list_the_others_are_read(tmp_path, indent):
    """The next row is where one begins as the first did."""
    text = json.dumps(ROWS, indent=indent).replace('1.png"', "1.png")
    (tmp_path / "rows.json").write_text(text)
    found = list(read_rows(str(tmp_path / "rows.json")))
    assert [row.picture for row, *_ in found if row] == ["0.png", "2.png", "3.png"]
    assert [problem[:8] for _, problem, *_ in found] == ["", "not JSON", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl.gz", gzip.compress(b'{"image": 1}', mtime=0), "is compressed: gunzip it"),
        ("rows.jsonl", gzip.compress(b'{"image": 1}', mtime=0), "is compressed: gunzip it"),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd....", "is compressed: zstd -d it"),
        ("rows.parquet", b"PAR1....", "is Parquet: write it as JSON Lines"),
        ("data.arrow", b"\xff\xff\xff\xff....", "is Arrow: write it as JSON Lines"),
        ("rows.csv", b"image,caption\na.png,a cat\n", "is CSV: write it as JSON Lines"),
        ("rows.json", json.dumps(ROWS).encode("utf-16"), "is in UTF-16: write it as UTF-8"),
        ("rows.json", json.dumps(ROWS).encode("utf-16-le"), "is in UTF-16: write it as UTF-8"),
        ("rows.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file"),
        ("rows.json", b"<!doctype html>\n<html>", "is a page of the web, not the file"),
    ],
)
def test_a_file_that_holds_no_json_is_called_by_its_name(tmp_path, name, content, says, program):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {says}"):
        rows_of(tmp_path / name, "pair")
    with pytest.raises(UserError, match=f"{name}: {says}"):
        list(read_rows(str(tmp_path / name)))


def test_equal_faults_are_counted_together_whatever_their_numbers():
    faults = ['conversations[3].from is "bot": one of', 'conversations[12].from is "tool": one of', "1 × <image>"]
    faults += ["in/a b.jpg: no such file", "in/c d.jpg: no such file", "2.jpg: no such file"]
    assert [*map(fault_kind, faults[1:3])] == ["conversations[…].from is …: one of", "… × <image>"]
    assert len(set(map(fault_kind, faults))) == 4


# ---- rows of tokens --------------------------------------------------------------------------------


CODES = np.random.default_rng(0).integers(0, 1024, (6, 64))


def written(path, dtype, codes=CODES):
    """A rows file whose codes are of a dtype, as other programs' numpy leaves them."""
    tokens = [base64.b64encode(np.asarray(row, dtype).tobytes()).decode() for row in codes]
    path.write_text("".join(json.dumps({"tokens": text}) + "\n" for text in tokens))
    return path


BY_DTYPE = {"<i4": "", "<u4": "", "<i8": "int64", "<u8": "int64", "<u2": "uint16"}


@pytest.mark.parametrize(("dtype", "said"), BY_DTYPE.items())
def test_a_row_is_read_in_the_dtype_that_its_bytes_tell(tmp_path, dtype, said, capsys):
    """int64 read as int32 would be a zero behind every code; uint16 read so, codes that no vocabulary has."""
    rows = RowsFiles([written(tmp_path / "rows.jsonl", dtype)], vocab_size=1024)
    assert [rows[i].tolist() for i in range(6)] == CODES.tolist() and rows[0].dtype == np.int32
    printed = capsys.readouterr().err
    assert f"rows.jsonl: its codes are read as {said}, by their bytes" in printed if said else not printed


@pytest.mark.parametrize("vocab_size", [2, 8, 8192, 50257])
def test_a_vocabulary_of_any_size_tells_uint16(tmp_path, vocab_size):
    codes = np.random.default_rng(1).integers(0, vocab_size, (9, 16))
    rows = RowsFiles([written(tmp_path / "rows.jsonl", "<u2", codes)], vocab_size)
    assert [rows[i].tolist() for i in range(9)] == codes.tolist()


@pytest.mark.parametrize(("made_with", "read_with"), [(128_256, 100_000), (128_256, 65_536), (128_256, 8192), (64, 8)])
def test_rows_of_a_larger_vocabulary_are_not_taken_for_uint16(made_with, read_with):
    """They are int32, and refused for the codes that they have."""
    codes = np.random.default_rng(1).integers(0, made_with, (9, 64))
    assert tell_dtype(map(encode_row, codes), read_with) == "int32"


def test_an_odd_number_of_uint16_is_told_by_its_length(tmp_path):
    rows = RowsFiles([written(tmp_path / "rows.jsonl", "<u2", CODES[:, :63])], vocab_size=1024)
    assert rows.dtypes == ["uint16"] and rows[5].tolist() == CODES[5, :63].tolist()


@pytest.mark.parametrize("codes", [[[0] * 64], [[5, 0]], [[3, 0, 0, 0], [1, 2]], [[70000, 1, 99999]], [[-1, 4]], [[7]]])
def test_lvms_own_rows_are_never_taken_for_others(codes):
    """Zeros alone, short rows, padding, large vocabularies, a broken code: still int32."""
    assert tell_dtype(map(encode_row, codes)) == "int32"


def test_the_setting_decides_where_bytes_cannot(tmp_path):
    """[5, 0] in int32 is [5] in int64."""
    path = written(tmp_path / "rows.jsonl", "<i8", [[5]])
    assert TokenRows([path], 1, 1, 0).tokens == 2 and TokenRows([path], 1, 1, 0, dtype="int64").tokens == 1


def test_show_reads_rows_as_training_does(tmp_path, program, tokenizer_run):
    """A sheet of int64 rows is that of int32 rows."""
    sheets = []
    for dtype in ("<i4", "<i8"):
        path = written(tmp_path / f"{dtype[1:]}.jsonl", dtype, CODES % 32)
        code, _, err = program(prepare.main, "show", path, "--tokenizer", tokenizer_run, "--out", f"{path}.png")
        assert code == 0, err
        sheets.append(np.asarray(Image.open(f"{path}.png")))
    assert np.array_equal(*sheets)


def test_many_broken_rows_are_counted_by_their_faults(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text((encode_row([9]) + encode_row([1])) * 30)
    assert RowsFiles([tmp_path / "rows.jsonl"], vocab_size=8).skipped == 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0] == f"skipped {tmp_path}/rows.jsonl:1: code 9 lies outside the vocabulary of 8"
    assert lines[10] == f"rows: skipped 30 × code … lies outside the vocabulary of … ({tmp_path}/rows.jsonl:1)"


def test_plain_lists_of_numbers_are_rows():
    assert decode_row(b'{"tokens": [3, 1, 2]}\r', 4).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"tokens": [1, 9]}', "code 9 lies outside the vocabulary of 4"),
        ('{"tokens": [1, -1]}', "code -1 lies outside the vocabulary of 4"),
        ('{"tokens": [1, 0.5]}', "its tokens are no list of whole numbers"),
        ('{"tokens": [[1, 2], [3]]}', "its tokens are no list of whole numbers"),
        ('{"tokens": []}', "its tokens are no list of whole numbers"),
        ('{"tokens": ""}', "0 bytes are no whole number of int32 codes"),
        ('{"input_ids": [1, 2]}', 'not a JSON row {"tokens": "…"}: its keys are input_ids'),
        ("[1, 2]", 'not a JSON row {"tokens": "…"}'),
    ],
)
def test_what_is_wrong_with_a_row_of_tokens_is_said(line, says):
    with pytest.raises(ValueError) as error:
        decode_row(line, 4)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train.bin", "is a stream of codes without rows"),
        ("x.idx", "is the index of a .bin"),
        ("x.npy", "is an array of numpy"),
        ("x.jsonl.gz", "is compressed: gunzip it"),
    ],
)
def test_what_holds_codes_in_another_way_is_called_by_its_name(tmp_path, name, says):
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=f"{name}: {says}"):
        RowsFiles([tmp_path / name])
