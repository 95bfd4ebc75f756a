"""Pages: texts and pictures in reading order, as a folder that anyone can open.

    [text, Pillow picture, …] ─ save_page ─▶ page.md          Markdown, with links to …
                                             picture_01.png   … these
                                             page.html        the same in one file, pictures inside

The texts come from a model, so all of them are shown as they are: mark-up is escaped, control
characters are replaced.
"""

import base64
import html
import os
import re

from support import checkpoint
from support.settings import plain

PAGE_FILE = r"page\.(md|html)|picture_\d+\.png"  # what a page's folder holds, and nothing else
STYLE = """
:root { color-scheme: light dark }
body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem; font: 1.1rem/1.6 Georgia, serif }
p { white-space: pre-wrap; overflow-wrap: anywhere }
img { display: block; width: min(100%, 24rem); margin: 1.5rem auto }
"""


def save_page(pieces, folder, title):
    """Writes texts and Pillow pictures, in reading order, as a page.

    The folder appears when it is complete. An earlier page in it is replaced; a folder with any
    other file in it is a UserError.
    """
    markdown, body, number = [], [], 0
    with checkpoint.atomic_folder(os.path.realpath(folder), PAGE_FILE) as beside:
        for piece in pieces:
            if isinstance(piece, str):
                text = plain(piece).strip()
                markdown.append(as_markdown(text))
                body.append(f"<p>{html.escape(text)}</p>")
            else:
                number += 1
                file = beside / picture_name(number)
                piece.save(file)
                data = base64.b64encode(file.read_bytes()).decode()
                markdown.append(f"![picture {number}]({file.name})")
                body.append(f'<img alt="picture {number}" src="data:image/png;base64,{data}">')
        head = [
            "<!doctype html>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(plain(title).strip())}</title>",
            f"<style>{STYLE}</style>",
        ]
        for name, lines in (("page.md", ["\n\n".join(markdown)]), ("page.html", [*head, *body])):
            # a title from a command line may be no text
            (beside / name).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def as_markdown(text):
    """Markdown that shows the characters of `text` as they are, line by line."""
    text = re.sub(r"[\\`*_~|<>\[\]#]|&(?=#?\w+;)", r"\\\g<0>", text)
    lines = []
    for line in text.splitlines():
        lines.append(re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line.strip()))  # no lists, no rules
    return "  \n".join(lines)  # two spaces make a line break


def picture_name(number):
    """The file of a page's picture, counted from 1."""
    return f"picture_{number:02d}.png"
