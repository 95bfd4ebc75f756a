"""Captions: what the texts beside pictures say of them.

    a.txt, a.caption ──of_text──▶ ("a caption",)        a.json ──of_json──▶ ("a caption", "another", …)
    captions.jsonl, metadata.jsonl, metadata.csv ──listed──▶ {picture: ("a caption", …)}

No text, null, NaN and "" are no caption: (). A list holds several, of which training draws one each
time. Anything else is a ValueError.
"""

import csv
import io
import posixpath
import re
import unicodedata
from urllib.parse import unquote

from support.files import text_of
from support.formats import caption_list
from support.settings import parse_json

LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv")  # the last two: Hugging Face's ImageFolder
FILE_KEYS = ("file", "file_name", "filename", "image", "path")
CAPTION_KEYS = ("caption", "text", "captions")

TRANSLATION = re.compile(r"^[a-z]{2,3}(_[A-Z]{2})?(@[a-z]+)?\.utf8=.*\n?", re.MULTILINE)  # of Tux Paint's stamps


def of_text(data):
    """The bytes of a text file → its caption: all of it, but for Tux Paint's lines "de.utf8=…"."""
    return of_value(TRANSLATION.sub("", text_of(data)))


def of_json(data):
    """The bytes of a JSON file → the captions under the first of CAPTION_KEYS that has some."""
    return of_row(_table(text_of(data)))


def of_row(row):
    """The captions of a table {"caption": …}; a ValueError if it has no such key."""
    found = [row[key] for key in CAPTION_KEYS if key in row]
    if not found:
        raise ValueError(f"neither {' nor '.join(CAPTION_KEYS)} among its keys ({', '.join(map(str, row))[:60]})")
    return next(filter(None, map(of_value, found)), ())


def of_value(value):
    """A text, null or NaN, or a list of them → a tuple of texts, none of them empty."""
    return tuple(map(str.strip, caption_list(value)))


def _table(text):
    try:
        row = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not a table {{…}}")
    return row


def listed(name, data, known, skip, unused):
    """Yields (a picture, its captions) of each row of a list.

    name      of the list: its pictures are named from its folder on, with / or \\, %20 or blanks
    known     the names of all pictures
    skip      is called with (number, reason) for each row that is broken
    unused    a list that takes (reason, picture) of rows without a picture, or without a caption
    """
    for number, raw in _rows(name, text_of(data)):
        try:
            row = raw if isinstance(raw, dict) else _table(raw)
            if None in row:  # so csv calls them
                raise ValueError('more cells than its first line has: write "a text, with a comma" in quotes')
            file = next((row[key] for key in FILE_KEYS if row.get(key)), None)
            if not isinstance(file, str):
                raise ValueError('not a row {"file": …, "caption": …}')
            file = unicodedata.normalize("NFC", file.replace("\\", "/"))
            places = [posixpath.normpath(posixpath.join(posixpath.dirname(name), f)) for f in (file, unquote(file))]
            place = next((place for place in places if place in known), None)
            if place is None:
                unused.append(("caption of a picture that is not there", file))
            elif row.keys().isdisjoint(CAPTION_KEYS):
                unused.append((f"row of a list without {' or '.join(CAPTION_KEYS)}", file))
            else:
                yield place, of_row(row)
        except ValueError as error:
            skip(number, error)


def _rows(name, text):
    """Yields (number, a line of JSON, or a table) of a list; of a table's first line, row 2 is the first below it."""
    if name.endswith(".csv"):
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text)), 2)
        except csv.Error as error:
            raise ValueError(f"not CSV ({error})") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line
