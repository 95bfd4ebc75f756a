"""What documents.py promises: the original's sequences, id for id and label for label; spans that are never cut;
every format read as its authors write it; what is broken named, left out and replaced; batches that are pure functions.

The faults of the original that are not copied are each a test of their own.
"""

import functools
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.numpy import load_file

import documents
import prepare
from documents import IGNORED, DocumentRows, DocumentSettings, DocumentSource, Writer, chat_parts
from support import rows as formats
from support import settings, sources
from support.chat import BOS, EOS, Special
from support.rows import read_row
from support.settings import UserError
from support.tokenizer import ADDED, Tokenizer

DREAMLLM = GOLDEN / "dreamllm"
FAULTS = ("conversation_image_truncated_at_image", "conversation_text_truncated")  # tested below, one by one
BEFOREHAND = ("pretokenized_pair",)  # ids made elsewhere: tested below


def golden(name):
    return json.loads((DREAMLLM / name).read_text())


def names_of(file):
    return [case["name"] for case in golden(file)["cases"] if case["name"] not in (*FAULTS, *BEFOREHAND)]


def case_of(file, name):
    return next(case for case in golden(file)["cases"] if case["name"] == name)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """file of golden sequences → the tokenizer that made them."""
    pytest.importorskip("sentencepiece")

    @functools.cache
    def opened(file):
        if file == "sequences_tiny.json":
            return Tokenizer.from_pretrained(DREAMLLM / "checkpoint")
        model = Path(pytest.importorskip("mistral_common").__file__).parent / "data" / "tokenizer.model.v1"
        folder = tmp_path_factory.mktemp("32k")
        shutil.copy(model, folder / "tokenizer.model")
        later = {name: i for name, i in golden(file)["special_ids"].items() if name in ADDED}
        (folder / "added_tokens.json").write_text(json.dumps(later))
        config = {"legacy": file != "sequences_32k_legacy_false.json"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.from_pretrained(folder)

    return opened


def writer_of(file, case, tokenizers, context=None):
    sizes, mode = golden(file), case["mode"]
    return Writer(
        tokenizers(file),
        sizes["clip_len"],
        sizes["dream_len"],
        context or case["model_max_length"],
        understand=mode != "creation_only",
        create=mode != "comprehension_only",
    )


def write(writer, case):
    source = case["source"]
    if "text" in source:
        return writer.pair(source["text"], "picture", case["np_random_rand"])
    if "images" in source:
        return writer.image_to_image("picture", "picture")
    return writer.write(read_row(json.dumps(source))[1], case.get("np_random_rand"))


# ---- the original's sequences --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (file, name)
        for file in ("sequences_tiny.json", "sequences_32k.json", "sequences_32k_legacy_false.json")
        for name in names_of(file)
    ],
)
def test_a_sample_is_the_originals_id_for_id_and_label_for_label(file, name, tokenizers):
    """All six kinds, both modes and either alone, long and short; SentencePiece's two ways with first spaces."""
    case = case_of(file, name)
    sample = write(writer_of(file, case, tokenizers), case)
    assert sample.tokens.tolist() == case["input_ids"]
    assert sample.labels.tolist() == case["labels"]
    assert (len(sample.images), len(sample.images_dm)) == (case["n_images"], case["n_images_dm"])


def test_a_pair_of_ids_made_elsewhere_is_the_pair_that_we_make_of_its_text(tokenizers):
    """The original reads such ids from files, with one difference to its own: of them <s> is not learned."""
    case = case_of("sequences_32k.json", BEFOREHAND[0])
    writer = writer_of("sequences_32k.json", case, tokenizers)
    sample = writer.pair(case["source"]["text"], "picture", 0.9)
    assert sample.tokens.tolist() == case["input_ids"]
    assert sample.labels.tolist() == [writer.bos[0], *case["labels"][1:]]


def test_fault_of_the_original_a_conversation_cut_within_a_picture(tokenizers):
    """It cuts at 111 tokens, which lie within the picture, and is left with eight words of the frame. Ours leaves
    out whole turns; if not even the first fits, there is nothing to learn, and it says so."""
    case = case_of("sequences_tiny.json", FAULTS[0])
    assert len(case["input_ids"]) == 8 and set(case["labels"]) == {IGNORED}
    with pytest.raises(ValueError, match="its first question and answer do not fit into 111 tokens"):
        write(writer_of("sequences_tiny.json", case, tokenizers), case)
    short = write(writer_of("sequences_tiny.json", case, tokenizers, context=160), case)
    whole = write(writer_of("sequences_tiny.json", case, tokenizers, context=512), case)
    assert len(short.tokens) < 160 < len(whole.tokens) and len(short.images) == 1
    assert short.tokens.tolist() == whole.tokens[: len(short.tokens)].tolist()
    assert short.labels.tolist() == whole.labels[: len(short.tokens)].tolist()
    assert short.labels[-1] == 2  # the first answer, up to its </s>


def test_fault_of_the_original_a_conversation_cut_before_its_first_answer(tokenizers):
    """60 tokens of a frame, every label -100: a row that teaches nothing. Ours refuses it."""
    case = case_of("sequences_tiny.json", FAULTS[1])
    assert len(case["input_ids"]) == 60 and set(case["labels"]) == {IGNORED}
    with pytest.raises(ValueError, match="its first question and answer do not fit into 60 tokens"):
        write(writer_of("sequences_tiny.json", case, tokenizers), case)


def test_pictures_are_resized_as_the_original_does():
    """Its CLIP view and its target to draw; the two round half a pixel differently, and so do we."""
    expected = load_file(DREAMLLM / "preprocess.safetensors")
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for i in ("0", "3"):
        picture = Image.fromarray(expected[f"{i}/raw_uint8"])
        drawn = documents.draw_view(picture, 16) / np.float32(127.5) - 1  # (16, 16, 3) in [-1, 1]
        assert np.abs(drawn.transpose(2, 0, 1) - expected[f"{i}/sd_pixel_values_noflip"]).max() < 1e-6
        seen = (documents.clip_view(picture, 32) / 255 - mean) / std
        assert np.abs(seen.transpose(2, 0, 1) - expected[f"{i}/clip_pixel_values"]).max() < 1e-6


def test_the_view_of_clip_is_what_clip_preprocess_normalises():
    import clip

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 64, 3), np.uint8))
    seen = documents.clip_view(picture, 32).transpose(2, 0, 1)
    assert np.array_equal((clip.preprocess([picture], 32, (0,) * 3, (1,) * 3)[0] * 255).round().numpy(), seen)


# ---- the writer ------------------------------------------------------------------------------------

PATCHES, QUERIES = 4, 2


def byte_words():
    words = Tokenizer.from_pretrained("bytes")
    words.add(ADDED)
    return words


def byte_writer(context=640, **options):
    return Writer(byte_words(), PATCHES, QUERIES, context, **{"system": ""} | options)


def shown(writer, sample):
    """A sample's tokens as text, spans as (look) and (draw), what is learned in brackets."""
    names = {i: name for name, i in writer.tokenizer.special.items()}
    text, learning = "", False
    for i, label in zip(sample.tokens.tolist(), sample.labels.tolist(), strict=True):
        if (label != IGNORED) != learning:
            text, learning = text + ("]" if learning else "["), not learning
        text += chr(i) if i < 256 else names[i]
    text += "]" if learning else ""
    patch = "<im_patch>"
    text = text.replace(f"<im_start>{patch * PATCHES}<im_end>", "(look)")
    text = text.replace(f"[<dream_start>]{patch * QUERIES}<dream_end>", "([draw])")
    text = text.replace(f"<dream_start>]{patch * QUERIES}<dream_end>", "(draw)]")
    text = text.replace(f"<dream_start>{patch * QUERIES}<dream_end>", "(draw)")
    return text.replace("<|begin_of_text|>", "<s>").replace("<|end_of_text|>", "</s>")


def test_the_six_kinds_of_samples():
    """The table at the top of documents.py: brackets are what is learned; (draw)] means: <dream_start> is, too."""
    writer = byte_writer()
    said = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A <dream>"}]
    assert shown(writer, writer.pair(" taco ", 1, 0.5)) == "[<s>](look)[taco</s>]"
    assert shown(writer, writer.pair("taco", 1, 0.49)) == "<s>taco(draw)</s>"
    pieces = [("food: taco", 1), ("", 2), (" ham ", None)]
    assert shown(writer, writer.document(pieces)) == "[<s>food: taco(draw)](look)([draw])(look)[ham</s>]"
    assert shown(writer, writer.document([("taco", 1)], "Show.")) == (
        "<s>USER: Show. ASSISTANT:[taco(draw)](look)[</s>]"
    )
    assert shown(writer, writer.conversation(said, [1, 2])) == (
        "<s>USER: (look)\nWhat? ASSISTANT:[ A ](draw)(look)[</s>]"
    )
    assert shown(writer, writer.image_to_image(1, 2)) == "<s>(look)(draw)</s>"


def test_pictures_come_in_the_order_of_their_spans():
    writer = byte_writer()
    said = [
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "So: <dream>"},
        {"role": "user", "content": "And <image>?"},
        {"role": "assistant", "content": "No."},
    ]
    sample = writer.conversation(said, ["a", "b", "c", "d"])
    assert (sample.images, sample.images_dm) == (["a", "b", "c", "d"], ["c"])
    sample = writer.restricted_to(True, False).conversation(said, ["a", "b", "c", "d"])
    assert (sample.images, sample.images_dm) == (["a", "b", "c", "d"], [])
    sample = writer.restricted_to(False, True).conversation(said, ["a", "b", "c", "d"])
    assert (sample.images, sample.images_dm) == (["a", "b", "d"], ["c"])
    sample = writer.document([("1", "a"), ("2", "b")])
    assert (sample.images, sample.images_dm) == (["a", "b"], ["a", "b"])
    sample = writer.image_to_image("a", "b")
    assert (sample.images, sample.images_dm) == (["a"], ["b"])


def spans_are_whole(writer, sample):
    """Whether every patch token belongs to a whole span, one for each picture that comes along."""
    tokens, looks, draws, place = sample.tokens.tolist(), 0, 0, 0
    spans = {writer.img[0]: writer.img, writer.dream[0]: writer.dream}
    while place < len(tokens):
        if span := spans.get(tokens[place]):
            if tokens[place : place + len(span)] != span:
                return False
            looks, draws, place = looks + (span is writer.img), draws + (span is writer.dream), place + len(span)
        elif tokens[place] in (*writer.img, *writer.dream):
            return False
        else:
            place += 1
    return (looks, draws) == (len(sample.images), len(sample.images_dm))


SAID = [
    {"role": role, "content": text}
    for text_pair in [("<image>\nWhat?", "A cat."), ("Draw it.", "Here: <dream>"), ("Thanks!", "Oh.")]
    for role, text in zip(("user", "assistant"), text_pair, strict=True)
]


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", ["pair", "document", "instructed", "conversation", "image_to_image"])
def test_no_context_cuts_a_span(kind, modes):
    """At every length from the least possible to more than enough: whole spans, an end, labels that agree."""
    whole, lengths = None, []
    for context in reversed(range(14, 140)):
        writer = byte_writer(context, understand=modes[0], create=modes[1])
        arguments = {
            "pair": ("pair", "a caption that is somewhat long", 1, context % 2),
            "document": ("document", [("One.", 1), ("Two.", 2), ("", 3), ("The end.", None)]),
            "instructed": ("document", [("One.", 1), ("Two.", 2), ("The end.", None)], "Go!"),
            "conversation": ("conversation", SAID, [1, 2]),
            "image_to_image": ("image_to_image", 1, 2),
        }[kind]
        try:
            sample = getattr(writer, arguments[0])(*arguments[1:])
        except ValueError as error:
            assert "into" in str(error) and kind in ("instructed", "conversation")
            continue
        whole = whole or sample
        lengths.append(len(sample.tokens))
        assert len(sample.tokens) <= context and sample.tokens[-1] == writer.eos[0]
        assert spans_are_whole(writer, sample)
        assert all(label in (IGNORED, token) for token, label in zip(sample.tokens, sample.labels, strict=True))
    assert len(set(lengths)) > (1 if kind != "image_to_image" else 0)  # contexts did decide


def test_a_context_without_room_for_a_picture_is_refused():
    with pytest.raises(UserError, match="a context of 11 tokens is too short: one picture alone takes 12"):
        byte_writer(11)


def test_a_document_keeps_all_that_fits_and_no_more():
    """Its length never shrinks where the context grows, and one token more would have let the next part in."""
    pieces = [("abc", 1), ("de", None), ("f", 2)]
    ends = [3 + 10, 2, 1 + 10]  # text and both spans
    assert len(byte_writer(2 + sum(ends)).document(pieces).tokens) == 2 + sum(ends)
    assert len(byte_writer(2 + sum(ends) - 1).document(pieces).tokens) == 2 + sum(ends) - 10
    with pytest.raises(ValueError, match="nothing of it fits"):
        byte_writer(20).document([("a text that is longer than the context", 1)])


def test_answers_are_found_in_every_template(tmp_path):
    """What an answer adds to the prompt is learned, whatever the frame around it looks like."""
    words = byte_words()
    words.add(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    said = [
        {"role": role, "content": text}
        for role, text in [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "So long")]
    ]
    learned = {}
    for template in ("plain", "vicuna", "llama2", "llama3"):
        sample = Writer(words, PATCHES, QUERIES, 640, template=template, system="").conversation(said, [])
        assert words.encode_chat([{"role": "system", "content": ""}, *said], template) == sample.tokens.tolist()
        runs = np.split(sample.labels, np.flatnonzero(np.diff(sample.labels == IGNORED)) + 1)
        learned[template] = [words.decode(run.tolist(), special=True) for run in runs if run[0] != IGNORED]
    assert learned["vicuna"] == [" Yes?<|end_of_text|>", " So long<|end_of_text|>"]
    assert learned["llama2"] == [" Yes? <|end_of_text|>", " So long <|end_of_text|>"]
    assert learned["llama3"] == ["Yes?<|eot_id|>", "So long<|eot_id|>"]
    assert learned["plain"][1] == "\nSo long<|end_of_text|>"


def test_a_prompt_is_what_training_showed_before_the_answer():
    """chat_parts gives generate_document the tokens that stood before the label of the first answer."""
    writer, said = byte_writer(), SAID[:1]
    parts = chat_parts(said, ["picture"], system="")
    assert parts == [BOS, "USER: ", "picture", "\nWhat? ASSISTANT:"]
    ids = [i for part in parts for i in (writer.img if part == "picture" else render_chat(writer, part))]
    sample = writer.conversation(SAID[:2], ["picture"])
    assert sample.tokens[: len(ids)].tolist() == ids and sample.labels[len(ids)] != IGNORED
    assert set(sample.labels[: len(ids)].tolist()) == {IGNORED}
    longer = chat_parts(SAID[:3], ["picture"])
    assert longer[-2:] == [EOS, "USER: Draw it. ASSISTANT:"] and longer[1].startswith("A chat between")
    with pytest.raises(ValueError, match="1 × <image> or <dream> in its texts, but 0 pictures"):
        chat_parts(said)


def render_chat(writer, part):
    return writer.tokenizer.special_ids(part) if isinstance(part, Special) else writer.tokenizer.encode(part)


def test_a_tokenizer_without_the_added_tokens_is_refused():
    with pytest.raises(UserError, match=r"the tokenizer has no \[PAD\]"):
        Writer(Tokenizer.from_pretrained("bytes"), PATCHES, QUERIES, 640)
    with pytest.raises(UserError, match=r"needs <\|start_header_id\|>"):
        byte_writer(template="llama3")


# ---- rows -------------------------------------------------------------------------------------------


def test_an_mmc4_picture_stands_behind_the_text_it_matches():
    """Several at one text in the order in which they are listed."""
    infos = [("c", 2), ("a", 0), ("b", 0)]
    row = {
        "text_list": ["one", "two", "three"],
        "image_info": [{"image_name": name, "matched_text_index": i, "matched_sim": 0.3} for name, i in infos],
    }
    form, said = read_row(json.dumps(row))
    assert form == "MMC4" and said.pieces == [("one", "a"), ("", "b"), ("two", None), ("three", "c")]


def test_obelics_lists_are_read_side_by_side():
    row = {"images": [None, "a.jpg", "b.jpg", None], "texts": ["one", None, None, "two"]}
    form, said = read_row(json.dumps(row))
    assert form == "OBELICS"
    assert said.pieces == [("one", None), ("", "a.jpg"), ("", "b.jpg"), ("two", None)]


def test_a_llava_row_is_a_conversation():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
    _, said = read_row(json.dumps({"id": "7", "conversations": turns}))
    assert said.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert said.pictures == []


def test_the_examples_of_the_documentation_are_rows(tmp_path):
    """What a user copies from there is read."""
    forms = []
    for block in re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL):
        (tmp_path / "rows.json").write_text(block)
        forms.append({read_row(raw)[0] for _, _, raw in formats.json_rows(tmp_path / "rows.json")})
    assert forms == [{"captions"}, {"MMC4"}, {"OBELICS"}, {"LLaVA"}]


def turn(role, text):
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON (Expecting property name"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "a str, not a table"),
        ({"url": "x"}, "its keys url are of no known row: text_list, image_info (MMC4)"),
        ({"image": 7, "caption": "x"}, "image is 7, not a text"),
        ({"image": "a.png", "caption": "\ud800"}, "surrogates not allowed"),
        ({"text_list": "abc", "image_info": []}, 'text_list is "abc", not a list'),
        ({"text_list": ["a", 1], "image_info": []}, "text_list[1] is 1, not a text"),
        ({"text_list": ["a"], "image_info": [1]}, "image_info[0] is 1, not a table"),
        ({"text_list": ["a"], "image_info": [{}]}, "image_info[0].image_name is null, not a text"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": -1}]},
            "image_info[0].matched_text_index -1 is not the index of one of the 1 texts",
        ),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": True}]},
            "image_info[0].matched_text_index is true, not a whole number",
        ),
        ({"images": ["x"], "texts": []}, "1 images but 0 texts"),
        ({"images": ["x"], "texts": ["a"]}, "images[0] and texts[0] are both set"),
        ({"conversations": [turn("bot", "a")]}, 'conversations[0].from is "bot": one of human, gpt'),
        ({"conversations": [turn("human", 1)]}, "conversations[0].value is 1, not a text"),
        ({"conversations": [turn("gpt", "a")]}, "message 1 is of the assistant: user and assistant must take turns"),
        ({"conversations": [turn("human", "a")]}, "it has no answer"),
        ({"conversations": []}, "a conversation needs a message"),
        (
            {"image": "x.png", "conversations": [turn("human", "a"), turn("gpt", "b")]},
            "0 × <image> or <dream> in its texts, but 1 pictures",
        ),
        (
            {"conversations": [turn("human", "<image>"), turn("gpt", "b")]},
            "1 × <image> or <dream> in its texts, but 0 pictures",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, says):
    raw = row if isinstance(row, str) else json.dumps(row)
    with pytest.raises(ValueError) as error:
        read_row(raw)
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- files: ten rows of each format, as a user would write them ----------------------------------------


def png(seed=0, size=(20, 24)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures/0.png … 9.png, and rows about them in every format."""
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(i))

    def info(i, index):
        return {"image_name": f"{i}.png", "matched_text_index": index}

    human, gpt = turn("human", "<image>\nWhich number?"), [turn("gpt", f"Number {i}.") for i in range(10)]
    rows = {
        "captions": [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(10)],
        "mmc4": [{"text_list": [f"See {i}.", "Done."], "image_info": [info(i, 0)]} for i in range(10)],
        "obelics": [{"texts": [f"See {i}.", None], "images": [None, f"{i}.png"]} for i in range(10)],
        "llava": [{"id": i, "image": f"{i}.png", "conversations": [human, gpt[i]]} for i in range(10)],
    }
    rows["instructed"] = [row | {"instruction": "Show a number."} for row in rows["mmc4"]]
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (tmp_path / "llava.json").write_text(json.dumps(rows["llava"], indent=1))
    for i in range(10):
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"number {i}\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted((tmp_path / "pictures").iterdir()):
            tar.add(file, file.name)
    return tmp_path


def rows_of(path, kind, split="train", fraction=0.0, seed=0, **table):
    source = DocumentSource(str(path), kind, **table)
    settings = DocumentSettings(sources=(source,), held_out_fraction=fraction)
    return DocumentRows(settings, byte_writer(), 8, 4, 5, seed, split)  # batches of 5


EXPECTED = {
    "captions.jsonl": ("pair", "[<s>](look)[number {}</s>]"),
    "pictures": ("pair", "[<s>](look)[number {}</s>]"),
    "shard.tar": ("pair", "[<s>](look)[number {}</s>]"),
    "mmc4.jsonl": ("document", "[<s>See {}.(draw)](look)[Done.</s>]"),
    "obelics.jsonl": ("document", "[<s>See {}.(draw)](look)[</s>]"),
    "instructed.jsonl": ("instructed", "<s>USER: Show a number. ASSISTANT:[See {}.(draw)](look)[Done.</s>]"),
    "llava.jsonl": ("conversation", "<s>USER: (look)\nWhich number? ASSISTANT:[ Number {}.</s>]"),
    "llava.json": ("conversation", "<s>USER: (look)\nWhich number? ASSISTANT:[ Number {}.</s>]"),
}


@pytest.mark.parametrize("file", EXPECTED)
def test_every_format_is_read_and_text_and_picture_stay_together(folder, file):
    """An epoch is all ten rows once; the picture of number i stands beside the text that says i."""
    kind, text = EXPECTED[file]
    images = {} if file in ("pictures", "shard.tar") else {"images": str(folder / "pictures")}
    rows = rows_of(folder / file, kind, create=kind != "pair", **images)
    samples = [rows.sample(i) for i in range(len(rows))]
    written = [shown(rows.writers[0], sample) for sample in samples]
    assert sorted(written) == [text.format(i) for i in range(10)]
    for line, sample in zip(written, samples, strict=True):
        i = next(i for i in range(10) if text.format(i) == line)
        truth = np.array(Image.open(io.BytesIO(png(i))))
        assert all(np.array_equal(np.asarray(picture), truth) for picture in sample.images + sample.images_dm)
    assert rows.skipped == 0


def test_a_picture_can_be_drawn_again(folder):
    rows = rows_of(folder / "captions.jsonl", "image", images=str(folder / "pictures"))
    sample = rows.sample(0)
    assert shown(rows.writers[0], sample) == "<s>(look)(draw)</s>"
    assert sample.images[0] is sample.images_dm[0]


def test_a_list_and_lines_of_the_same_rows_are_the_same_data(folder):
    pictures = str(folder / "pictures")
    lines, whole = (rows_of(folder / f"llava.{end}", "conversation", images=pictures) for end in ("jsonl", "json"))
    for i in range(10):
        assert np.array_equal(lines.sample(i).tokens, whole.sample(i).tokens)


def test_a_pattern_names_many_files(folder):
    rows = rows_of(folder / "[mo]*.jsonl", "document", images=str(folder / "pictures"))
    assert len(rows) == 20


def test_letters_beyond_ascii_do_not_move_the_rows_of_a_list(tmp_path):
    """A list is cut by bytes: names and texts with é, 日 and 🎉 before a row shift nothing."""
    rows = [{"image": f"é{i}.png", "caption": "日本🎉" * i} for i in range(1, 4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    found = list(formats.json_rows(str(tmp_path / "rows.json")))
    assert [json.loads(raw) for _, _, raw in found] == rows
    assert [line for line, _, _ in found] == [2, 6, 10]
    text = (tmp_path / "rows.json").read_bytes()
    assert all(text[start : start + len(raw)] == raw for _, start, raw in found)


@pytest.mark.parametrize("file", ["captions.jsonl", "llava.json", "mmc4.jsonl"])
def test_a_picture_is_on_one_side_of_the_split_only(folder, file):
    """Whatever rows are added later, each row stays where it was, with all others of its picture."""
    kind, images = EXPECTED[file][0], str(folder / "pictures")
    sides = []
    for split in ("train", "held_out"):
        rows = rows_of(folder / file, kind, split, 0.5, images=images)
        sides.append({rows.sources[0].read(i, None).pictures[0] for i in range(len(rows.sources[0]))})
    train, held_out = sides
    assert train and held_out and not train & held_out and len(train | held_out) == 10
    assert held_out == {f"{i}.png" for i in range(10) if sources.hash_to_unit(f"{i}.png") < 0.5}
    with pytest.raises(UserError, match="none of its 10 rows falls into the held_out split"):
        rows_of(folder / file, kind, "held_out", 0.0, images=images)


# ---- what is broken ----------------------------------------------------------------------------------------


def test_broken_rows_are_named_once_left_out_and_replaced(folder, capsys):
    """A row that is no row, a picture that is absent, one that is cut short: training goes on without them."""
    file = folder / "captions.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:-5]
    file.write_text("\n".join(lines) + "\n\n")
    (folder / "pictures" / "4.png").unlink()
    (folder / "pictures" / "5.png").write_bytes(png(5)[:100])
    rows = rows_of(file, "pair", images=str(folder / "pictures"), create=False)
    said = [shown(rows.writers[0], rows.sample(i)) for i in range(2 * len(rows))]
    assert {text.removeprefix("[<s>](look)[number ")[0] for text in said} == set("0136789")
    warnings = capsys.readouterr().err.splitlines()
    assert rows.skipped == len(warnings) == 3
    assert f"skipped {file}:3: not JSON" in warnings[0]
    assert any(f"{file}:5: {folder}/pictures/4.png: no such file" in line for line in warnings)
    assert any(f"{file}:6: {folder}/pictures/5.png: " in line for line in warnings)


def test_a_captionless_picture_of_a_folder_is_named_and_replaced(folder, capsys):
    (folder / "pictures" / "3.txt").unlink()
    rows = rows_of(folder / "pictures", "pair")
    assert len(rows) == 10 and [rows.sample(i).tokens is not None for i in range(10)]
    assert f"skipped {folder}/pictures/3.png: it has no caption\n" == capsys.readouterr().err and rows.skipped == 1


def test_an_instruction_that_shows_a_picture_is_named_and_replaced(folder, capsys):
    """No format gives a picture for it: its span would stand there without one."""
    file = folder / "instructed.jsonl"
    file.write_text(file.read_text().replace("Show a number.", "Show <image>.", 1))
    rows = rows_of(file, "instructed", images=str(folder / "pictures"))
    assert all(spans_are_whole(rows.writers[0], rows.sample(i)) for i in range(10))
    assert f"{file}:1: 1 × <image> or <dream> in its texts, but 0 pictures" in capsys.readouterr().err


def test_a_text_too_long_for_the_context_is_named_and_replaced(tmp_path, capsys):
    rows = [{"text_list": ["x" * (2000 if i else 10)], "image_info": []} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    some = rows_of(tmp_path / "rows.jsonl", "document")
    assert [len(some.sample(i).tokens) for i in range(3)] == [12, 12, 12] and some.skipped == 2
    assert "rows.jsonl:2: nothing of it fits into 640 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "kind", "says"),
    [
        ("mmc4.jsonl", "pair", 'no row in it can be used for kind "pair"'),
        ("mmc4.jsonl", "instructed", 'no row in it can be used for kind "instructed"'),
        ("pictures", "document", 'kind "document" needs rows in a .jsonl or .json file'),
        ("absent.jsonl", "pair", "absent.jsonl: No such file or directory"),
        ("a\0b.jsonl", "pair", "embedded null byte"),
        ("absent", "pair", "no such folder or .tar file"),
        ("captions.jsonl", "pair", "not one of 10 rows can be used; the last: "),  # its pictures lie elsewhere
    ],
)
def test_a_source_that_cannot_serve_is_refused_in_one_line(folder, file, kind, says):
    with pytest.raises(UserError) as error:
        rows_of(folder / file, kind).sample(0)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_settings_refuse_what_does_not_fit_together():
    for values, message in (
        ({"kind": "dokument"}, 'kind "dokument" must be one of pair, .*; did you mean document?'),
        ({"understand": False, "create": False}, "understand and create are both false"),
        ({"path": "photos", "move": True}, 'move = true is for path = "emoji" only, not for photos'),
    ):
        with pytest.raises(UserError, match=rf"\[data.sources\[0\]\] {message}"):
            settings.build(DocumentSettings, {"sources": [values]}, "data")
    with pytest.raises(UserError, match="every weight is 0"):
        settings.build(DocumentSettings, {"sources": [{"weight": 0}]}, "data")
    with pytest.raises(UserError, match=r'\[data\] template "vicunja" must be one of .*; did you mean vicuna?'):
        settings.build(DocumentSettings, {"template": "vicunja"}, "data")
    with pytest.raises(UserError, match="leave nothing of what the stage is to learn"):
        byte_writer(create=False).restricted_to(False, True)


WRONG = (None, 0, -1, 2**31, 2**64, 1e308, float("nan"), float("inf"), "x", [], [1], {}, True)


@pytest.mark.parametrize("key", settings.known_keys(DocumentSource))
def test_any_wrong_value_of_a_source_is_one_line(key, folder):
    """Each is refused, or is a setting with which a batch can be made or refused."""
    good = {"path": str(folder / "captions.jsonl"), "images": str(folder / "pictures")}
    for value in WRONG:
        try:
            data = settings.build(DocumentSettings, {"sources": [good, good | {key: value}]}, "data")
            DocumentRows(data, byte_writer(), 8, 4, 5, 0).batch(0, range(5))
        except UserError as error:
            assert key in str(error) or key in ("path", "images"), (value, str(error))
            assert "\n" not in str(error)


@pytest.mark.parametrize("key", settings.known_keys(DocumentSettings))
def test_any_wrong_value_of_the_data_section_is_one_line(key):
    for value in WRONG:
        try:
            data = settings.build(DocumentSettings, {"sources": [{}]} | {key: value}, "data")
            assert 1 <= data.workers <= 1024 and 0 <= data.held_out_fraction < 1
        except UserError as error:
            assert key in str(error) and "\n" not in str(error), (value, str(error))


# ---- python prepare.py check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("captions.jsonl", "captions, 10 rows, 10 pictures, 0 bad"),
        ("mmc4.jsonl", "MMC4, 10 rows, 10 pictures, 0 bad"),
        ("obelics.jsonl", "OBELICS, 10 rows, 10 pictures, 0 bad"),
        ("llava.jsonl", "LLaVA, 10 rows, 10 pictures, 0 bad"),
        ("llava.json", "LLaVA, 10 rows, 10 pictures, 0 bad"),
        ("shard.tar", "WebDataset, 10 captioned pictures, 0 bad"),
        ("pictures", "folder, 10 captioned pictures, 0 bad"),
    ],
)
def test_check_recognises_each_format(folder, file, counts, program):
    code, out, err = program(prepare.main, "check", folder / file, "--images", folder / "pictures")
    table, summary = out.splitlines()[:-1], out.splitlines()[-1]
    assert (code, summary, err) == (0, f"{folder / file}: {counts}", "")
    assert table[0].split() == ["used", "count", "first"] and [line.split()[-2] for line in table[1:]] == ["10", "10"]


def test_check_names_every_bad_row(folder, program):
    """File, line and reason for each; exit code 2."""
    file = folder / "llava.json"
    rows = json.loads(file.read_text())
    rows[1]["conversations"][0]["value"] = "Which number?"
    rows[3]["image"] = "33.png"
    rows[4] = {"image": "4.png", "caption": "number 4"}
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    code, out, err = program(prepare.main, "check", file, "--images", folder / "pictures")
    assert code == 2 and out.splitlines()[:3] == [
        f"{file}:3: 0 × <image> or <dream> in its texts, but 1 pictures",
        f"{file}:5: {folder}/pictures/33.png: no such file",
        f"{file}:6: a row of captions among those of LLaVA",
    ]
    assert err == f"error: {file}: LLaVA, 10 rows, 7 pictures, 3 bad\n"


def test_check_says_where_a_list_breaks_off(folder, program):
    file = folder / "llava.json"
    file.write_text(file.read_text()[:-60])
    code, out, _ = program(prepare.main, "check", file, "--images", folder / "pictures")
    assert code == 2 and out.startswith(f"{file}:") and "not JSON" in out


def test_check_shows_twenty_and_counts_the_rest(tmp_path, program):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 50)
    code, out, err = program(prepare.main, "check", tmp_path / "rows.jsonl")
    lines = out.splitlines()
    assert code == 2 and lines[20] == "… and 30 more" and "50 bad" in err
    assert len(lines) == 23 and lines[22].split()[-2] == "50"  # the table: one reason, fifty times


def test_check_names_what_is_wrong_with_pictures_and_captions(folder, program):
    """In a folder, and in a .tar cut short."""
    (folder / "pictures" / "1.txt").unlink()
    (folder / "pictures" / "2.png").write_bytes(b"nonsense")
    code, out, err = program(prepare.main, "check", folder / "pictures")
    assert code == 2 and "1 bad" in err
    lines = [re.sub(" +", " ", line) for line in out.splitlines()]
    assert lines[0] == f"{folder}/pictures/2.png: not a picture"
    assert "picture without a caption (where captions are wanted) 1 1.png" in lines
    assert f"not a picture 1 {folder}/pictures/2.png" in lines and ".txt without a picture" not in out
    tar = folder / "shard.tar"
    tar.write_bytes(tar.read_bytes()[:11_000])
    code, out, err = program(prepare.main, "check", tar)
    assert code == 2 and "truncated" in out and "WebDataset" in err


def test_an_address_is_no_picture(folder, program):
    """OBELICS comes with addresses of pictures: they must be downloaded first, and the check says so."""
    row = {"texts": ["a", None], "images": [None, "https://example.org/a.jpg"]}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    code, out, _ = program(prepare.main, "check", folder / "rows.jsonl")
    assert code == 2 and "https://example.org/a.jpg is an address, not a file: download the pictures" in out


def test_a_picture_thin_as_a_line_is_refused(folder):
    (folder / "pictures" / "0.png").write_bytes(png(0, (1, 500)))
    with pytest.raises(ValueError, match="of its 500×1 pixels one side is over 100 times the other"):
        formats.open_picture(folder / "pictures", "0.png")


# ---- emoji -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji():
    """kind → the texts made of held-out emoji."""
    opened = sources.open_source("emoji", None, "held_out")
    return lambda kind: formats.EmojiTexts(opened, documents.KINDS[kind])


@pytest.mark.parametrize("kind", documents.KINDS)
def test_emoji_give_every_kind_and_only_from_their_split(kind, emoji):
    """No picture and no name of the training split is in any sample, wrong answers' names included."""
    texts = emoji(kind)
    train = {item.caption for item in sources.open_source("emoji", None, "train")}
    own = {item.caption for item in texts.emoji}
    for index in range(0, len(texts), 5):
        said = texts.read(index, np.random.default_rng(index))
        assert {picture.name for picture in said.pictures} <= {item.name for item in texts.emoji}
        if isinstance(said, formats.Conversation):
            question = said.messages[0]["content"]
            if "Is it a " in question:
                assert question.split("Is it a ")[1].removesuffix("?") in own
        elif isinstance(said, formats.Document) and kind != "conversation":
            assert not {text.split(": ")[-1] for text, _ in said.pieces} & (train - own)


def test_an_emoji_document_is_neighbours_of_one_category(emoji):
    texts, lengths = emoji("document"), set()
    for index in range(0, len(texts), 7):
        said = texts.read(index, np.random.default_rng(index))
        category = texts.emoji[index].category
        items = said.pictures
        lengths.add(len(items))
        assert {item.category for item in items} == {category} and texts.emoji[index] in items
        assert [text for text, _ in said.pieces] == [
            f"{category.lower()}: {items[0].caption}",
            *(item.caption for item in items[1:]),
        ]
        places = [texts.index_in_category[i] for i in range(len(texts)) if texts.emoji[i] in items]
        assert np.diff(places).tolist() == [1] * (len(items) - 1)
    assert lengths <= {1, 2, 3, 4} and {2, 3, 4} <= lengths


def test_an_instructed_emoji_document_answers_its_instruction(emoji):
    said = emoji("instructed").read(0, np.random.default_rng(0))
    first = said.pictures[0]
    assert said.prompt == f"Show {first.category.lower()}." and said.pieces[0] == (first.caption, first)


def test_questions_about_emoji_have_true_answers_half_of_them_yes(emoji):
    """Four questions, equally often; "Draw …" is written as an instructed document, so that drawing is learned."""
    texts, seen, answers, near = emoji("conversation"), {}, [], []
    for number in range(600):
        index = number % len(texts)
        item, said = texts.emoji[index], texts.read(index, np.random.default_rng(number))
        if isinstance(said, formats.Document):
            assert (said.prompt, said.pieces) == (f"Draw {item.caption}.", [("", item)])
            seen["draw"] = seen.get("draw", 0) + 1
            continue
        question, answer = (message["content"] for message in said.messages)
        assert question.startswith("<image>\n") and said.pictures == [item]
        question = question.removeprefix("<image>\n")
        if question == formats.WHAT:
            assert answer == item.caption
        elif question == formats.CATEGORY:
            assert answer == item.category.lower()
        else:
            name = question.removeprefix("Is it a ").removesuffix("?")
            assert answer == ("yes" if name == item.caption else "no")
            answers.append(answer)
            if answer == "no":
                near.append(name in texts.captions[item.category])
            question = "yes or no"
        seen[question] = seen.get(question, 0) + 1
    assert len(seen) == 4 and min(seen.values()) > 110
    assert 0.35 < np.mean([answer == "yes" for answer in answers]) < 0.65
    assert 0.25 < np.mean(near) < 0.75


# ---- batches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(folder):
    """Three sources of unlike weight, twice opened."""
    pictures = str(folder / "pictures")
    tables = (
        DocumentSource(str(folder / "captions.jsonl"), "pair", 1.0, pictures),
        DocumentSource(str(folder / "mmc4.jsonl"), "document", 3.0, pictures),
        DocumentSource(str(folder / "llava.json"), "conversation", 2.0, pictures),
        DocumentSource(str(folder / "absent.jsonl"), "pair", 0.0),  # of weight 0: not even opened
    )
    settings = DocumentSettings(sources=tables, held_out_fraction=0.0)
    return lambda seed=0: DocumentRows(settings, byte_writer(), 8, 4, 5, seed)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_batch_is_a_pure_function_of_its_number(mixed):
    """Another object, another order of calls: the same bytes; another seed or number: others."""
    a, b = mixed(), mixed()
    first = a.batch(5, range(6))
    for number in (9, 0, 5):
        again = b.batch(number, range(6))
    assert same(first, again) and not same(first, a.batch(6, range(6))) and not same(first, mixed(1).batch(5, range(6)))


def test_the_ranks_slices_make_the_batch(mixed):
    """Row by row, padding aside: how many machines there are changes nothing."""
    rows = mixed()
    whole, parts = rows.batch(3, range(6)), [rows.batch(3, range(i, i + 2)) for i in (0, 2, 4)]
    for name in ("images", "images_dm"):
        assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    for i, row in enumerate(whole["tokens"]):
        part = parts[i // 2]
        length = part["tokens"].shape[1]
        assert np.array_equal(row[:length], part["tokens"][i % 2]) and set(row[length:].tolist()) <= {rows.pad}
        assert np.array_equal(whole["labels"][i, :length], part["labels"][i % 2])
        assert set(whole["labels"][i, length:].tolist()) <= {IGNORED}


def test_a_batchs_shapes_hold_without_pictures(tmp_path):
    rows = [{"text_list": ["a" * (i + 1)], "image_info": []} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    some = rows_of(tmp_path / "rows.jsonl", "document")
    batch = some.batch(0, range(4))
    assert batch["tokens"].shape == batch["labels"].shape == (4, 6) and batch["tokens"].dtype == np.int64
    assert batch["images"].shape == (0, 8, 8, 3) and batch["images_dm"].shape == (0, 4, 4, 3)
    assert ((batch["tokens"] == some.pad) <= (batch["labels"] == IGNORED)).all()


def test_every_row_comes_once_a_pass_and_weights_decide_the_shares(mixed):
    """30 rows an epoch, mixed 1 : 3 : 2: a batch of the first source, three of the second, two of the third."""
    rows = mixed()
    epochs = [[rows.locate(30 * epoch + i) for i in range(30)] for epoch in range(4)]
    for epoch in epochs:
        assert [sum(which == i for which, _ in epoch) for i in range(3)] == [5, 15, 10]
        assert {row for which, row in epoch if which == 2} == set(range(10))
    for pair_of_epochs in (epochs[:2], epochs[2:]):  # of the first source, a pass takes two epochs
        assert {row for epoch in pair_of_epochs for which, row in epoch if which == 0} == set(range(10))
    assert epochs[0] != epochs[1]


def test_the_coin_is_fair_and_falls_by_position():
    rows = rows_of("emoji", "pair", "combo")
    drawn = [len(rows.sample(i).images_dm) for i in range(200)]
    assert 70 < sum(drawn) < 130


def test_a_batch_is_of_one_source(mixed):
    rows = mixed()
    for number in range(6):
        assert len({rows.locate(5 * number + i)[0] for i in range(5)}) == 1


def test_emoji_to_look_at_are_moved_and_those_to_draw_are_not():
    plain, moves = (rows_of("emoji", "image", "train", move=move) for move in (False, True))
    a, b = plain.sample(3), moves.sample(3)
    assert np.array_equal(np.asarray(a.images_dm[0]), np.asarray(b.images_dm[0]))
    assert not np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
    held_out = rows_of("emoji", "image", "combo", move=True).sample(3)
    assert held_out.images[0] is held_out.images_dm[0]
