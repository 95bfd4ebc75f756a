"""Pages of text and pictures, and the commands that make a DreamLLM look, answer and draw.

The commands run the golden DreamLLM (tests/golden/dreamllm: random weights, pictures of 16 pixels), bent to have a
taste for few words: whatever it reads, it says "boat", "draw now" or "the end". What it draws depends on all it read.
"""

import argparse
import base64
import html.parser
import io

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import sample
from documents import chat_parts
from dreamllm import DreamLLM
from support.chat import BOS
from support.pages import save_page
from support.pictures import load_picture
from support.settings import UserError

# ---- pages -----------------------------------------------------------------------------------

NASTY = [
    '<script>alert("x")</script>',
    "5 &lt; 6 & 7 > 3",
    "# no heading\n- no list\n12. no list\n---\n===\n> said nobody\n    no code",
    "![no picture](http://example.org/x.png) [no link](x) <http://example.org>",
    "*no* _stress_ `or` ~~line~~ \\ | a | b |\n|---|---|\n| c | d |",
    "two paragraphs\n\nof 中文 and é",
]


def picture(seed=0, size=(8, 6)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Reader(html.parser.HTMLParser):
    """What a browser would see: the tags, the text of each <p>, the title, the sources of pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources, self.title, self.inside = [], [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("p", "title", "style"):
            self.inside = tag
        if tag == "p":
            self.texts.append("")

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "p":
            self.texts[-1] += data
        elif self.inside == "title":
            self.title += data


def test_a_page_in_html_holds_its_texts_and_pictures_and_needs_nothing_else(tmp_path):
    """Whatever the text says, it stays text; pictures are data: URIs of the PNGs beside it, pixel for pixel."""
    pieces = [*NASTY, picture(1), "between", picture(2, (30, 20))]
    save_page(pieces, tmp_path / "page", title="<b>food & drink</b>")
    files = sorted(file.name for file in (tmp_path / "page").iterdir())
    assert files == ["page.html", "page.md", "picture_01.png", "picture_02.png"]
    page = Reader((tmp_path / "page" / "page.html").read_text(encoding="utf-8"))
    assert page.tags == ["meta", "meta", "title", "style", *["p"] * len(NASTY), "img", "p", "img"]
    assert page.texts == [*NASTY, "between"] and page.title == "<b>food & drink</b>"
    for number, source in enumerate(page.sources, 1):
        kind, data = source.split(",")
        png = base64.b64decode(data, validate=True)
        assert kind == "data:image/png;base64" and png == (tmp_path / "page" / f"picture_0{number}.png").read_bytes()
        assert np.array_equal(Image.open(io.BytesIO(png)), picture(number, [(8, 6), (30, 20)][number - 1]))


def test_a_page_in_markdown_shows_the_same_letters(tmp_path):
    """Read by a Markdown library: paragraphs, line ends and our pictures, no other mark-up."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    save_page([*NASTY, picture()], tmp_path / "page", title="")
    page = Reader(markdown.render((tmp_path / "page" / "page.md").read_text(encoding="utf-8")))
    assert set(page.tags) == {"p", "br", "img"} and page.sources == ["picture_01.png"]
    lines = [line.strip() for text in NASTY for line in text.splitlines() if line.strip()]
    assert "".join(page.texts).replace("\n", "") == "".join(lines)


def test_bytes_that_no_page_can_hold_are_marked(tmp_path):
    save_page(["a\x00\x1b[31mb\tc\r\n"], tmp_path / "page", title="\x07")
    for name in ("page.html", "page.md"):
        text = (tmp_path / "page" / name).read_text(encoding="utf-8")
        assert "a��" in text and not any(c in text for c in "\x00\x1b\x07\r")


@pytest.mark.parametrize("older", [False, True])
def test_a_page_that_is_cut_short_leaves_nothing(tmp_path, older):
    """The older page, if there is one, stays as it was."""
    if older:
        save_page(["old"], tmp_path / "page", title="")

    def pieces():
        yield from ("a", picture())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_page(pieces(), tmp_path / "page", title="")
    assert [file.name for file in tmp_path.iterdir()] == (["page"] if older else [])
    assert not older or (tmp_path / "page" / "page.md").read_text() == "old\n"


def test_only_a_page_is_replaced(tmp_path):
    """Of the older page nothing is left; a folder with anything else in it, or a file, is not touched."""
    save_page(["a", picture(), picture()], tmp_path / "page", title="")
    save_page(["b"], tmp_path / "page", title="")
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == ["page.html", "page.md"]
    (tmp_path / "page" / "diary.txt").touch()
    (tmp_path / "file").touch()
    for name in ("page", "file"):
        with pytest.raises(UserError, match=f"{name}: (holds diary.txt|is a file)"):
            save_page(["c"], tmp_path / name, title="")
    assert (tmp_path / "page" / "diary.txt").exists() and "b" in (tmp_path / "page" / "page.md").read_text()


def test_what_comes_is_printed_as_it_comes(capsys):
    """Each piece is out before the next is asked for; a picture's place has a line of its own."""

    def stream():
        for piece, expected in [("a", ""), (" b", "a"), (first, " b"), (" c", "\n[picture 1]\n"), (second, "c")]:
            assert capsys.readouterr().out == expected
            yield piece

    first, second = picture(1), picture(2)
    assert sample.print_stream(stream(), lambda _, number: f"picture {number}") == ["a b", first, "c", second]
    assert capsys.readouterr().out == "\n[picture 2]\n"


def test_an_answer_is_shown_without_the_space_that_begins_it(capsys):
    assert sample.print_stream([" ", " a", " b"], answer=True) == ["a b"]
    assert sample.print_stream([" a"]) == [" a"] and sample.print_stream([]) == []
    assert capsys.readouterr().out == "a b\n a\n\n"


# ---- the toy ---------------------------------------------------------------------------------

FEW = ["--device", "cpu", "--steps", 2, "--max-new", 20]  # few steps of the U-Net, few tokens


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    """(the model, the folder where it is saved)."""
    pytest.importorskip("sentencepiece")
    model = DreamLLM.from_pretrained(GOLDEN / "dreamllm" / "checkpoint", torch.float32)
    tokenizer, llama = model.tokenizer, model.llama
    with torch.no_grad():
        # One number of 64 towers above all others at every place, so that the final norm makes it about 7 …
        for weight in (llama.embed_tokens.weight, model.dream_queries, model.projector.projector.bias):
            weight[..., 0] = 20
        llama.norm.weight[0] = 1
        # … and the head reads there what comes next, as logits
        llama.lm_head.weight[:, 0] = 0
        for ids, logit in ((tokenizer.encode("boat"), 10), ([tokenizer.special["<dream_start>"]], 10), ([2], 8)):
            llama.lm_head.weight[ids, 0] = logit / 7
    folder = tmp_path_factory.mktemp("dream") / "model"
    model.save_pretrained(folder)
    # Opened as the commands open it: weights that lie elsewhere in memory may be summed in another order.
    return DreamLLM.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def shown(pictures):
    """Two picture files, and what load_picture makes of them."""
    paths = sorted(pictures.iterdir())[:2]
    return paths, [Image.fromarray(load_picture(path)) for path in paths]


# ---- python sample.py document ---------------------------------------------------------------


def test_a_document_is_a_page_of_what_the_model_says_and_draws(dream, shown, program, tmp_path):
    """It begins with the pictures and the text that were given."""
    model, folder = dream
    (path, _), (given, _) = shown
    options = [*FEW, "--prompt", "A dog", "--image", path, "--out", tmp_path / "page", "--seed", 1]
    code, out, err = program(sample.main, "document", "--run", folder, *options)
    assert code == 0, err
    said = model.generate_document([given, "A dog"], 20, steps=2, seed=1)
    assert isinstance(said[0], str) and not all(isinstance(piece, str) for piece in said)
    drawn = [piece for piece in said if not isinstance(piece, str)]
    page = Reader((tmp_path / "page" / "page.html").read_text(encoding="utf-8"))
    texts = [f"A dog{said[0]}", *(piece for piece in said[1:] if isinstance(piece, str))]
    assert page.title == "A dog" and page.texts == [text.strip() for text in texts if text.strip()]
    for number, picture in enumerate([given, *drawn], 1):
        assert np.array_equal(Image.open(tmp_path / "page" / f"picture_{number:02d}.png"), picture)
    assert out.startswith("[picture_01.png]\nA dog boat") and "\n[picture_02.png]\n" in out
    assert out.endswith(f"{tmp_path / 'page'}: page.html, page.md; pictures drawn: {len(drawn)}\n")


def test_the_same_seed_writes_the_same_page(dream, program, tmp_path):
    """Without a prompt: from nothing. The page is the same to the byte."""
    pages = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = [*FEW, "--out", tmp_path / name, "--seed", seed, "--max-pictures", 1]
        assert program(sample.main, "document", "--run", dream[1], *options)[0] == 0
        pages.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("p*.[mp][dn]*")})
    a, b, c = pages
    assert a.keys() == {"page.md", "picture_01.png"} and a == b and a != c


def test_an_instruction_is_not_part_of_the_page(dream, program, tmp_path):
    options = [*FEW, "--template", "vicuna", "--prompt", "Write!", "--out", tmp_path / "page", "--seed", 1]
    code, out, err = program(sample.main, "document", "--run", dream[1], *options)
    said = dream[0].generate_document(chat_parts([{"role": "user", "content": "Write!"}]), 20, steps=2, seed=1)
    page = Reader((tmp_path / "page" / "page.html").read_text(encoding="utf-8"))
    assert code == 0 and page.title == "Write!" and "Write!" not in out, err
    assert page.texts == [piece.strip() for piece in said if isinstance(piece, str)]


# ---- python sample.py chat -------------------------------------------------------------------


def test_a_chat_prints_the_answer_and_saves_its_pictures(dream, shown, program, tmp_path):
    """Two pictures stand before the question, in the template that was asked for."""
    model, folder = dream
    paths, pictures = shown
    options = [*FEW, "--image", *paths, "--prompt", "Which?", "--system", "Be brief.", "--seed", 1]
    code, out, err = program(sample.main, "chat", "--run", folder, *options, "--out", tmp_path / "x.png")
    assert code == 0, err
    question = [{"role": "user", "content": "<image>\n<image>\nWhich?"}]
    said = model.generate_document(chat_parts(question, pictures, system="Be brief."), 20, steps=2, seed=1)
    texts = [piece.strip() for piece in said if isinstance(piece, str)]
    drawn = [piece for piece in said if not isinstance(piece, str)]
    lines, places = out.splitlines(), [f"[{tmp_path}/x_0{number + 1}.png]" for number in range(len(drawn))]
    assert drawn and [line for line in lines if line.startswith("[")] == places
    assert [line for line in lines if not line.startswith("[")] == texts
    for number, picture in enumerate(drawn, 1):
        assert np.array_equal(Image.open(tmp_path / f"x_0{number}.png"), picture)


def asked(run, prompt, pictures=(), template=None, system=None):
    """What the model reads of a question."""
    return sample.chat_prompt(argparse.Namespace(run=run, prompt=prompt, template=template, system=system), pictures)


def test_a_run_knows_its_form_of_conversation(tmp_path):
    """data.template and data.system of its configuration, unless others are asked for; vicuna where none is known."""
    assert asked(tmp_path, "Why?") == chat_parts([{"role": "user", "content": "Why?"}], (), "vicuna")
    (tmp_path / "config.toml").write_text('[data]\ntemplate = "plain"\nsystem = "Hm."\n')
    assert asked(tmp_path, "Why?") == [BOS, "Hm.\nWhy?"]
    assert asked(tmp_path, "Why?", system="") == [BOS, "\nWhy?"]
    assert asked(tmp_path, "Why?", template="vicuna") == [BOS, "Hm. USER: Why? ASSISTANT:"]


def test_pictures_stand_before_the_question_or_where_it_says(tmp_path):
    a, b = picture(1), picture(2)
    (tmp_path / "config.toml").write_text('[data]\ntemplate = "plain"\n')
    assert asked(tmp_path, "Same?", [a, b]) == [BOS, a, "\n", b, "\nSame?"]
    assert asked(tmp_path, "Is <image> in <image>?", [a, b]) == [BOS, "Is ", a, " in ", b, "?"]


def test_without_a_question_it_describes_and_draws_nothing(dream, shown, program, tmp_path, monkeypatch):
    model, folder = dream
    monkeypatch.chdir(tmp_path)
    code, out, err = program(sample.main, "chat", "--run", folder, *FEW, "--image", shown[0][0], "--seed", 1)
    (said,) = model.generate_document([shown[1][0]], 20, max_pictures=0, seed=1)
    assert code == 0 and out == said.lstrip() + "\n" and not list(tmp_path.iterdir()), err


# ---- python sample.py image ------------------------------------------------------------------


def test_image_draws_with_a_dreamllm(dream, shown, program, tmp_path):
    """As text_to_image does, by ddpm; a subject, shown before the prompt, changes the drawing."""
    model, folder = dream
    (path, _), (subject, _) = shown
    options = ["--prompt", "A dog.", "--negative", "blur", "--steps", 2, "--seed", 5, "--count", 2, "--device", "cpu"]
    files = []
    for name, more, prompt in (("a", [], "A dog."), ("b", ["--subject", path], [subject, "A dog."])):
        out = tmp_path / f"{name}.png"
        code, text, err = program(sample.main, "image", "--run", folder, *options, *more, "--out", out)
        assert (code, text) == (0, f"{out}: 2 × 16×16, 2 steps of ddpm\n"), err
        drawn = model.text_to_image([prompt] * 2, negative="blur", steps=2, seed=5)  # (2, 3, 16, 16)
        grid = np.asarray(Image.open(out))
        for n, picture in enumerate((drawn * 255).round().byte().permute(0, 2, 3, 1).numpy()):
            assert np.array_equal(grid[2:18, 2 + 18 * n : 18 + 18 * n], picture)
        files.append(out.read_bytes())
    assert files[0] != files[1]


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("chat", [], "give a --prompt, or an --image to be described, or both"),
        ("chat", ["--prompt", "a <image> b"], "--prompt: 1 × <image> or <dream> in its texts, but 0 pictures"),
        ("chat", ["--image", "absent.png"], "absent.png: no such file"),
        ("chat", ["--prompt", "a", "--max-pictures", "-1"], "'-1' is not a whole number from 0 on"),
        ("chat", ["--prompt", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        ("chat", ["--prompt", "a " * 999], "fill the context of 512"),
        ("document", ["--system", "Hm."], "--system needs --template"),
        ("document", ["--out", "."], ".: is the folder you are in"),
        ("chat", ["--prompt", "a", "--out", "answer"], "a picture's name must end in one of .png"),
        ("image", ["--prompt", "a", "--size", "8,8"], "--size does not apply"),
        ("image", ["--prompt", "a", "--strength", "0.5"], "--strength does not apply"),
        ("image", ["--prompt", "a", "--subject", "absent.png"], "absent.png: no such file"),
    ],
)
def test_a_mistake_is_one_line(dream, program, tmp_path, monkeypatch, command, options, expected):
    (tmp_path / "other.txt").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = program(sample.main, command, "--run", dream[1], "--device", "cpu", *options)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_what_only_a_dreamllm_reads_is_refused_by_latent_diffusion(dream_parts, program, tmp_path):
    run = dict(part.split("=") for part in dream_parts)["model.diffusion"]
    code, _, err = program(sample.main, "image", "--run", run, "--prompt", "a", "--subject", "x.png")
    assert code == 2 and f"--subject does not apply: {run} is no DreamLLM" in err


def test_a_size_can_only_be_the_start_s_own_where_there_is_one(dream_parts, program):
    run = dict(part.split("=") for part in dream_parts)["model.diffusion"]
    code, _, err = program(sample.main, "image", "--run", run, "--prompt", "a", "--size", "original")
    assert (code, err) == (2, "error: --size original needs an --image\n")
