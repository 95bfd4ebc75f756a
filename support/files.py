"""Files: what lies in a folder or in tars, as names and bytes, and what is left out of it, by its name.

a folder ─▶ folder_files ┐
.tar ─────▶ tar_files ───┴▶ {name: path, or (tar, offset, size)} ──read──▶ bytes ──text_of──▶ str

pattern, shards/{00..09}.tar ──matches──▶ [path, …]
name ──what_is──▶ why a file of that kind is not read, and the way out
"""

import functools
import glob
import itertools
import math
import os
import posixpath
import re
import tarfile
import unicodedata

import numpy as np

from support.index import is_index, open_index
from support.settings import FILE, UserError, content, decode, open_file

# ---- what is left out, and why -------------------------------------------------------------------

UNREAD = {  # by the endings of files
    "HEIC photo, which needs another package: pip install pillow-heif": ".heic .heics .heif .heifs .hif",
    "AVIF picture, which this Pillow cannot open: pip install -U pillow": ".avif .avifs",
    "raw photo of a camera: develop it to .jpg or .png": ".cr2 .cr3 .nef .nrw .arw .dng .orf .rw2 .raf .pef .srw .raw",
    "JPEG XL picture: convert it to .png": ".jxl",
    "drawing or page: export it as .png": ".svg .svgz .eps .ps .ai .pdf .psd .psb .xcf .kra .djvu .wmf .emf",
    "film: cut it into NAME.frames/000.png, … (ffmpeg)": ".mp4 .m4v .mov .avi .mkv .webm .wmv .flv .mpg .mpeg .3gp .ts",
    "array of numbers: save it as .png": ".npy .npz .mat .exr .hdr .pt .pth .pkl .h5 .hdf5 .fits .dcm .nii",
    "sound": ".ogg .oga .opus .wav .mp3 .flac .m4a .aac .mid",
    "shard: name shards themselves, as in FOLDER/*.tar": ".tar",
    "compressed file: unpack it": ".zip .gz .tgz .bz2 .xz .zst .7z .rar .lz4 .br",
    "table: write its pictures as files, its captions as captions.jsonl": (
        ".parquet .arrow .feather .tsv .csv .xlsx .tfrecord .lmdb .mdb .db .sqlite .duckdb"
    ),
    "weights of a model (python sample.py what FILE)": ".safetensors .ckpt .gguf .onnx .msgpack",
    "unfinished download": ".part .crdownload .download .tmp .incomplete .aria2",
}
UNREAD = {ending: reason for reason, endings in UNREAD.items() for ending in endings.split()}

SYSTEMS = "file that an operating system made for itself"
HIDDEN = re.compile(r"(^|/)(\.[^/]|(Thumbs\.db|desktop\.ini|__MACOSX|@eaDir|\$RECYCLE\.BIN)(/|$))", re.IGNORECASE)


def what_is(name, sort="file"):
    """What a file is by its ending, and the way out, for a table of what is left out."""
    ending = os.path.splitext(name)[1].lower()
    return UNREAD.get(ending) or (f"{sort} {ending}" if ending else f"{sort} without an ending")


def is_hidden(name):
    """Whether an operating system made this file for itself: ._a.jpg, .DS_Store, Thumbs.db, __MACOSX/…"""
    return bool(HIDDEN.search(name))


# ---- folders, tars -------------------------------------------------------------------------------


def folder_files(folder):
    """{path inside the folder: path} of all files in it, however deep, but not in a link to a folder around it."""
    files, above = {}, {}  # above: {folder: its real path and those of the folders around it}
    for parent, folders, names in os.walk(folder, followlinks=True):
        around, real = above.get(os.path.dirname(parent), frozenset()), os.path.realpath(parent)
        if real in around:
            folders.clear()
            continue
        above[parent] = around | {real}
        folders.sort()
        for name in sorted(name for name in names if not is_index(name, names)):
            path = os.path.join(parent, name)
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            # a Mac writes é as e and ´: the caption of a file may come from another machine
            composed = unicodedata.normalize("NFC", inside)
            files[inside if composed in files else composed] = path
    return files


NAMES = 1_000_000  # of files, that one pattern writes out


def matches(pattern):
    """The paths that a shell pattern names, sorted; {00..12} and {a,b} in it are written out."""
    paths = []
    for one in braces(pattern):
        # a name with brackets in it is no pattern, if there is such a file
        paths += [one] if os.path.exists(one) else sorted(glob.glob(one)) or [one]
    return paths


BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")


def braces(text):
    """ "s-{08..10}.tar" → ["s-08.tar", "s-09.tar", "s-10.tar"]; "{a,b}" → ["a", "b"], as in a shell."""
    if os.path.exists(text) or not (found := BRACES.search(text)):
        return [text]
    if math.prod(len(_choices(each)) for each in BRACES.finditer(text)) > NAMES:
        raise UserError(f"{text[:80]}: names more than {NAMES} files")
    texts = []
    for choice in _choices(found):
        choice = str(choice).zfill(len(found[1] or ""))
        texts += braces(text[: found.start()] + choice + text[found.end() :])
    return texts


def _choices(found):
    return range(int(found[1]), int(found[2]) + 1) if found[1] else found[3].split(",")


PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd", b"PK": "unzip"}


def tar_files(tars, report):
    """{shard/member: (tar, offset, size)}: of the tars' indexes; the bytes are read when they are wanted.

    What is wrong with a tar goes to `report`, a line each; a UserError if no tar can be read.
    """
    files, wrong = {}, []
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in tars])
    for path in tars:
        shard = os.path.relpath(os.path.abspath(path), top)
        try:
            index = open_index(path, MEMBERS, functools.partial(_scan_tar, path), report)
        except Exception as error:  # tarfile raises nearly everything on broken headers
            wrong.append(f"{path}: {_why_no_tar(path, error)}")
            continue
        names = f"\0{index.columns['names'].tobytes().decode(errors='surrogateescape')}"
        names = names.replace("\0", f"\0{shard}/").split("\0")[1:-1]
        places = zip(itertools.repeat(path), *(index.columns[name].tolist() for name in ("offset", "size")))
        files |= zip(names, places, strict=True)
        for before, after in index.facts["faults"]:
            report(f"skipped {before}{path}{after}")
    if len(wrong) == len(tars):
        raise UserError(wrong[0])
    for line in wrong:
        report(f"skipped {line}")
    return files


MEMBERS = {"names": "u1", "offset": "<i8", "size": "<i8"}  # of a tar's index: a zero byte ends each name


def _scan_tar(path, add):
    """Reads the headers of a tar → {"faults": [(what is lost, in words before the tar's name, and after it), …]}."""
    members, size, broken, faults = {}, os.path.getsize(path), "", []
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:  # uncompressed: it has offsets
        try:
            for member in archive:
                if member.size < 0:  # the next header would be this one again
                    raise tarfile.TarError("a file of negative size")
                name = unicodedata.normalize("NFC", member.name.removeprefix("./"))
                if member.issym() or member.islnk():  # another name of a file that came before
                    beside = posixpath.dirname(name) if member.issym() else ""
                    target = posixpath.normpath(posixpath.join(beside, member.linkname))
                    members[name] = members.get(target, (0, 0))
                elif member.issparse():
                    faults.append(("", f"/{name}: a file with holes: pack it without --sparse"))
                elif member.isfile():
                    if member.offset_data + member.size > size:
                        broken = f"{member.name} is cut off"
                        break
                    if name in members:  # as tar unpacks them, the last one stays
                        faults.append(("", f"/{name}: two files of that name; the later one is read"))
                    members[name] = member.offset_data, member.size
        except Exception as error:
            broken = str(error) or type(error).__name__
    if size % 512:  # tarfile ends in silence where a header is cut short
        broken = broken or "its end is missing"
    if broken:
        faults.append(("the end of ", f": truncated ({broken})"))
    add(names=np.frombuffer("".join(f"{name}\0" for name in members).encode(errors="surrogateescape"), np.uint8))
    offset, sizes = np.array(list(members.values()), np.int64).reshape(-1, 2).T
    add(offset=offset, size=sizes)
    return {"faults": faults}


def _why_no_tar(path, error):
    if os.path.isdir(path):
        return "is a folder: name it alone, without a pattern"
    if getattr(error, "strerror", None):
        return error.strerror
    with open_file(path) as file:
        start = file.read(6)
    for sign, program in PACKED.items():
        if start.startswith(sign):
            return f"is compressed: shards must be plain .tar files, to be read in any order ({program} {path})"
    return f"is no .tar file ({error})" if start else "is an empty file"


def read(files, name, start=None):
    """The bytes of one of `files`, or its first `start` bytes; an OSError where it cannot be read."""
    if isinstance(files[name], str) and start is None:
        return content(files[name], FILE)
    path, offset, size = (files[name], 0, start) if isinstance(files[name], str) else files[name]
    with open_file(path) as file:
        file.seek(offset)
        return file.read(size if start is None else min(start, size))


def stamp(place):
    """What changes when a file does: its size, when it was changed; of a tar's member also where it stands."""
    path, *inside = [place] if isinstance(place, str) else place
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere
        return ()
    return status.st_size, status.st_mtime_ns, *inside


# ---- texts in files ------------------------------------------------------------------------------


def text_of(data):
    """The text in a file's bytes; a ValueError says why there is none."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer, not the file: git lfs pull")
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"neither UTF-8 nor UTF-16 with its mark (byte {error.object[error.start]:#04x})") from None
    if "\0" in text:
        raise ValueError("a zero byte in it: UTF-16 without its mark, or no text")
    return text


def lines_of(path):
    """Yields (number, bytes or text) of each line of a file that is not blank; what is no UTF-8 is decoded whole."""
    with open_file(path) as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            lines = decode(content(path)).encode().split(b"\n")
        else:
            file.seek(0)
            lines = file
        for number, line in enumerate(lines, 1):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, line
