"""Check: what training would use of a folder, a tar or a file, and what it would leave out, and why.

    folder, .tar, pattern ──▶ check_pictures     the PictureSource of a run, every picture opened
    .txt, folder of texts ──▶ check_texts        TextFiles
    .jsonl, .json ──────────▶ check_rows         rows for DreamLLM, every picture opened
                              check_texts        rows {"text": …}
                              check_tokens       rows {"tokens": …}

The same classes read here and in training, so that the two cannot disagree.
"""

import collections
import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

from support import files
from support.formats import read_row
from support.pictures import ENDINGS, load_picture
from support.rows import fault_kind, json_rows, names_rows, open_picture, read_rows
from support.settings import UserError, parse_json, plain
from support.sources import TextFiles, open_source, tally
from support.token_rows import RowsFiles, RowsInfo, rows_files


@dataclass
class Findings:
    """What lies at a path: a line about it, and what is used, left out and bad."""

    about: str = ""
    used: list = field(default_factory=list)  # (kind, name)
    left_out: dict = field(default_factory=dict)  # {kind, and the way out: (count, name of the first)}
    bad: list = field(default_factory=list)  # a line for each: "FILE: what is wrong with it"

    def report(self, line):
        """Takes what a source says while it is read; what is left out by its kind stands in `left_out`."""
        if line.startswith("skipped "):
            self.bad.append(line.removeprefix("skipped "))

    def lines(self):
        """The worst first: the bad ones by name, then a table of everything."""
        yield from self.bad[:20]
        if len(self.bad) > 20:
            yield f"… and {len(self.bad) - 20} more"
        reasons = []
        for line in self.bad:
            name, _, reason = line.partition(": ")
            reasons.append((fault_kind(reason), name))
        parts = {"used": tally(self.used), "not used": self.left_out, "bad": tally(reasons)}
        width = min(100, max(map(len, itertools.chain(*parts.values())), default=0))
        for title, part in parts.items():
            if part:
                yield f"{title:{width}}  count  first"
            for kind, (count, first) in part.items():
                yield f"{kind[:width]:{width}} {count:6}  {first}"


def print_findings(path, images=""):
    """Prints what training would use of `path`, and what not; a UserError at its end if any of it is bad.

    images: the folder of the pictures that rows name; "": that of the rows.
    """
    found = look(path, images)
    for line in found.lines():
        print(plain(line))
    if found.bad:
        raise UserError(f"{path}: {found.about}, {len(found.bad)} bad")
    print(f"{path}: {found.about}, 0 bad")


def look(path, images):
    """The Findings of whatever lies at `path`."""
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return check_folder(path)
    if os.path.isfile(path) and ending in ENDINGS:
        height, width, _ = load_picture(path).shape
        return Findings(f"a picture of {width}×{height} pixels (training reads folders and tars of them)")
    if ending == ".txt":
        return check_texts(path)
    if names_rows(path):
        return check_rows_of_any_kind(path, Path(images or Path(path).parent))
    if ending in (".bin", ".npy", ".idx"):
        return check_tokens(path)
    if os.path.isfile(path) and ending != ".tar":
        raise UserError(f"{path}: {files.what_is(path)}: training does not read it")
    return check_pictures(path)


def check_folder(path):
    """Of pictures, else of texts, else an error that says what lies there."""
    names = [name for name in files.folder_files(path) if not files.is_hidden(name)]
    endings = {os.path.splitext(name)[1].lower() for name in names}
    has_pictures = not endings.isdisjoint(ENDINGS)
    is_run = "config.toml" in names or "model_index.json" in names  # which may have pictures, too
    if is_run or ("config.json" in names and not has_pictures):
        raise UserError(f"{path}: a model, no data: python sample.py what {path}")
    has_photos = not endings.isdisjoint((".heic", ".heif", ".hif", ".jxl", ".cr2", ".nef", ".arw", ".dng"))
    if not (has_pictures or has_photos) and not endings.isdisjoint((".txt", ".jsonl")):
        return check_texts(path)
    return check_pictures(path)


# ---- pictures ------------------------------------------------------------------------------------


def check_pictures(path):
    """Opens every picture, frame and annotation of a folder or of tars, and reads every caption."""
    found = Findings()
    source = open_source(path, None, "train", 0, found.report)
    caption_files, others = collections.Counter(), []
    for item in source:
        if not source.readable(item, all_frames(item)):
            continue
        kind = "object of several views" if item.views else "clip" if item.frames > 1 else "picture"
        found.used.append((kind, item.name))
        found.used += [(f"annotation: {modality}", item.name) for modality in item.parts if modality != "image"]
        captions = list(source.caption_files(item))
        if not captions:
            others.append((f"{kind} without a caption (where captions are wanted)", item.name))
            continue
        (file, texts), *more = captions
        found.used.append(("caption", file))
        caption_files[file] += 1
        if file != "a list" and caption_files[file] == 2:
            found.used.append(("caption of several pictures", file))
        for other, differing in more:
            if differing != texts:
                others.append(("another caption, which differs from the one that is taken", other))
    captioned = caption_files.total()
    found.left_out = source.left_out | tally(others)
    found.about = "" if path == "emoji" else "folder, " if os.path.isdir(path) else "WebDataset, "
    if captioned == len(source):
        found.about += f"{captioned} captioned pictures"
    else:
        found.about += f"{len(source)} pictures, {captioned} captioned"
    return found


def all_frames(item):
    """[(modality, frame), …] of all that an item holds."""
    count = max(item.frames, item.views)
    return list(itertools.product(item.parts, range(count) if count > 1 or item.views else [None]))


# ---- texts, tokens -------------------------------------------------------------------------------


def check_texts(path):
    found = Findings()
    texts = TextFiles(path, found.report)
    counts = list(map(len, texts))
    found.used = [("file of texts", name) for name in texts.files]
    found.left_out = texts.left_out
    found.about = f"texts, {len(counts)} of them, {sum(counts)} characters"
    return found


def check_tokens(path):
    rows, info = RowsFiles(rows_files(path)), RowsInfo.read(path)
    made = f", of {info.kind}, made with {info.tokenizer} ({info.vocab_size} codes)" if info else ""
    found = Findings(f"rows of tokens{made}: {len(rows)} rows, {rows.tokens} tokens")
    found.bad = list(rows.reasons)
    return found


# ---- rows in JSON --------------------------------------------------------------------------------


def check_rows_of_any_kind(path, folder):
    """Of tokens, of texts alone, or of what DreamLLM reads, as the first row says that is a table."""
    for _, _, raw in json_rows(rows_files(path)[0]):
        try:
            read_row(raw)
        except ValueError:
            row = None
            with contextlib.suppress(ValueError):
                row = parse_json(raw)
            if not isinstance(row, dict):
                continue
            if "tokens" in row:
                return check_tokens(path)
            if "text" in row:
                return check_texts(path)
        break
    return check_rows(path, folder)


def check_rows(path, folder):
    """Reads every row of the JSON files at `path`, opens every picture that they name."""
    found, problems = Findings(), {}  # picture → what is wrong with it, or None
    formats, rows, left_out = [], 0, []  # formats: [(name, class of the rows) of the first one]
    for row, wrong, name, form in read_rows(path):
        rows += 1
        formats = formats or [(form, type(row))] * bool(form)
        if not wrong and not isinstance(row, formats[0][1]):  # one kind of source cannot use both
            wrong = f"a row of {form} among those of {formats[0][0]}"
        for picture in () if wrong else row.pictures:
            if picture not in problems:
                problems[picture] = problem(folder, picture)
            wrong = wrong or problems[picture]
        if wrong:
            found.bad.append(f"{name}: {wrong}")
            continue
        found.used.append((f"row of {form}", name))
        if what := getattr(row, "left_out", ""):
            left_out.append((f"{what} (the rest of the row is used)", name))
    if not rows:
        raise UserError(f"{path}: no rows in it")
    good = [picture for picture, wrong in problems.items() if not wrong]
    found.used += [("picture of a row", picture) for picture in good]
    found.left_out = tally(left_out)
    found.about = f"{formats[0][0] if formats else 'unknown format'}, {rows} rows, {len(good)} pictures"
    return found


def problem(folder, picture):
    """Why a row's picture cannot be opened, or None."""
    try:
        open_picture(folder, picture)
    except (UserError, ValueError) as error:
        return str(error)
    return None
