"""Pages of text and pictures, and the commands that make a DreamLLM look, answer and draw.

The commands run a toy: random weights, pictures of 8 pixels, and a taste for few words: it says a, b, "draw now" and
"end" whatever it reads.
"""

import base64
import html.parser
import io

import numpy as np
import pytest
from PIL import Image

import sample
from settings import UserError

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
    sample.save_page(pieces, tmp_path / "page", title="<b>food & drink</b>")
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
    sample.save_page([*NASTY, picture()], tmp_path / "page", title="")
    page = Reader(markdown.render((tmp_path / "page" / "page.md").read_text(encoding="utf-8")))
    assert set(page.tags) == {"p", "br", "img"} and page.sources == ["picture_01.png"]
    lines = [line.strip() for text in NASTY for line in text.splitlines() if line.strip()]
    assert "".join(page.texts).replace("\n", "") == "".join(lines)


def test_bytes_that_no_page_can_hold_are_marked(tmp_path):
    sample.save_page(["a\x00\x1b[31mb\tc\r\n"], tmp_path / "page", title="\x07")
    for name in ("page.html", "page.md"):
        text = (tmp_path / "page" / name).read_text(encoding="utf-8")
        assert "a��" in text and not any(c in text for c in "\x00\x1b\x07\r")


@pytest.mark.parametrize("older", [False, True])
def test_a_page_that_is_cut_short_leaves_nothing(tmp_path, older):
    """The older page, if there is one, stays as it was."""
    if older:
        sample.save_page(["old"], tmp_path / "page", title="")

    def pieces():
        yield from ("a", picture())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.save_page(pieces(), tmp_path / "page", title="")
    assert [file.name for file in tmp_path.iterdir()] == (["page"] if older else [])
    assert not older or (tmp_path / "page" / "page.md").read_text() == "old\n"


def test_only_a_page_is_replaced(tmp_path):
    """Of the older page nothing is left; a folder with anything else in it, or a file, is not touched."""
    sample.save_page(["a", picture(), picture()], tmp_path / "page", title="")
    sample.save_page(["b"], tmp_path / "page", title="")
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == ["page.html", "page.md"]
    (tmp_path / "page" / "diary.txt").touch()
    (tmp_path / "file").touch()
    for name in ("page", "file"):
        with pytest.raises(UserError, match=f"{name}: is there, and no page of an earlier document"):
            sample.save_page(["c"], tmp_path / name, title="")
    assert (tmp_path / "page" / "diary.txt").exists() and "b" in (tmp_path / "page" / "page.md").read_text()


def test_what_comes_is_printed_as_it_comes(capsys):
    """Each piece is out before the next is asked for; a picture's place has a line of its own."""

    def stream():
        for piece, expected in [("a", ""), (" b", "a"), (first, " b"), (" c", "\n[picture 1]\n"), (second, "c")]:
            assert capsys.readouterr().out == expected
            yield piece

    first, second = picture(1), picture(2)
    assert sample.tell(stream(), lambda _, number: f"picture {number}") == ["a b", first, "c", second]
    assert capsys.readouterr().out == "\n[picture 2]\n"


def test_an_answer_is_shown_without_the_space_that_begins_it(capsys):
    assert sample.tell([" ", " a", " b"], answer=True) == ["a b"]
    assert sample.tell([" a"]) == [" a"] and sample.tell([]) == []
    assert capsys.readouterr().out == "a b\n a\n\n"
