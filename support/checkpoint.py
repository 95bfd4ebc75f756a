"""Checkpoints: published weight files in, published weight files out, and never half a file.

    folder or file ──read_tensors──▶ {name: tensor} ──load──▶ model        (from_pretrained)
    model ──write_tensors──▶ model.safetensors                             (save_pretrained)

Everything is written beside its final name and renamed when it is whole: a kill at any instant leaves
the last good file. Tensors are read as data only: safetensors, or pickles with `weights_only`.

torch is imported only where tensors are read or written: the data code does without. How a run's
folder is laid out: runs.py.
"""

import collections
import contextlib
import functools
import json
import mmap
import os
import re
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

from support import foreign, pickles, settings, whole
from support.settings import UserError, read_json

UMASK = os.umask(0)  # which new files are kept from whom; asking for it sets it
os.umask(UMASK)

# ---- one file --------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path):
    """Gives a temporary path beside `path`, to write to; renames it when the block ends without an error.

    The data is flushed to disk first. A file that is there is replaced; a folder is not.
    """
    if not _writes_whole_files:
        yield Path(os.devnull)
        return
    target = Path(os.path.realpath(out_file(path)))  # a link stays one: what it leads to is replaced
    with renamed_when_whole(target) as beside:
        yield beside


@contextlib.contextmanager
def atomic_folder(path, ours=None):
    """The same for a folder, which is made already. One that is there is replaced only as `out_folder` says."""
    path = out_folder(path, ours)
    with renamed_when_whole(path) as beside:
        beside.mkdir()
        yield beside
        if path.exists():
            _refuse_others_files(path, ours)
            shutil.rmtree(path)


@contextlib.contextmanager
def renamed_when_whole(path):
    """Gives a temporary path beside `path`, and renames what is made there; whatever happens, nothing is left over.

    What is made is flushed to disk before, unless the folder that it lies in will be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    _remove(beside)  # left over from a killed process with the same pid
    try:
        yield beside
        files = [file for file in [beside, *beside.rglob("*")] if file.is_file() and not file.is_symlink()]
        for file in files:
            file.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read
        if not any(re.match(PART, parent.name) for parent in path.parents):
            whole.flush(files)
        os.replace(beside, path)
    finally:
        _remove(beside)


PART = r"\.\d+\.part\.."  # so begins the name of what is not whole yet


def _beside(path):
    number = f"{os.getpid()}{int(os.environ.get('RANK', 0)):05}"  # on several hosts processes may have one pid
    return path.with_name(f".{number}.part.{path.name}")  # the ending stays: it tells Pillow the format


def out_file(path, endings=(), inputs=()):
    """`path`, if a command may write a file there; otherwise a UserError, before any work is done.

    endings: what the name must end in, if anything; inputs: files that the command reads, and must not replace.
    """
    if str(path).endswith(("/", os.sep)) or _writable(path).is_dir():
        raise UserError(f"{path}: is a folder: name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is no regular file: name another")
    for file in inputs:
        if os.path.exists(path) and os.path.exists(file) and os.path.samefile(path, file):
            raise UserError(f"{path}: is read by this command: name another file to write")
    if endings and Path(path).suffix.lower() not in endings:
        raise UserError(f"{path}: a picture's name must end in one of {', '.join(endings)}")
    return Path(path)


def out_folder(path, ours=None):
    """`path`, if a command may make it its folder: nothing is there, or only files whose names match `ours`.

    ours: a regex of whole file names; None: the folder must be absent or empty.
    """
    path = _writable(path)
    if os.path.realpath(path) == os.getcwd():
        raise UserError(f"{path}: is the folder you are in: name one of its own")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file: name a folder")
    if path.exists():
        _refuse_others_files(path, ours)
    return path


def _refuse_others_files(folder, ours):
    for file in sorted(folder.iterdir()):
        if not ours or not file.is_file() or not re.fullmatch(ours, file.name):
            raise UserError(f"{folder}: holds {file.name}, which this command did not write: name another folder")


def _writable(path):
    """`path`, if a file or folder of that name can be made: tried with an empty one of the temporary name."""
    name, path = str(path), Path(path)
    try:
        parent = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), Path("/"))
        beside = _beside(parent / (path.name or "x"))
        beside.touch()
        beside.unlink()
        if not name:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        shown = name if len(name) < 100 else f"{name[:40]}…{name[-40:]}"
        raise UserError(f"{shown!r}: cannot be written ({getattr(error, 'strerror', error)})") from None
    return path


def remove_parts(folder):
    """Deletes what killed processes left half-written in `folder`."""
    for part in Path(folder).glob(".*.part.*"):
        if re.match(PART, part.name):  # as _beside names them, and nobody else
            _remove(part)


def remove_folder(folder):
    """Deletes a folder. Under its name it is whole or gone, even if this is killed; remove_parts takes what is left."""
    beside = _beside(folder)
    os.replace(folder, beside)
    _remove(beside)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    with atomic_file(path) as beside:
        beside.write_text(text)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def disk_errors(path):
    """Within, what the disk refuses safetensors or torch is an OSError with its number, as if Python wrote itself."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:  # a RuntimeError of torch comes after the OSError of its file
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else getattr(error.__context__, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def write_tensors(path, tensors, metadata=None):
    """A safetensors file of `tensors`; shared or strided storage is copied out first.

    Sharded tensors are written by all ranks together, each its own rows: see write_shares.
    """
    import torch
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return write_shares(path, tensors, metadata)
    alone = _alone_in_storage(tensors)

    def plain(name, tensor):  # safetensors refuses what is strided, and what shares its storage
        whole = alone[name] and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor = tensor.detach().cpu()
        return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)

    if _writes_whole_files:
        tensors = {name: plain(name, tensor) for name, tensor in tensors.items()}
        with atomic_file(path) as beside, disk_errors(path):
            save_file(tensors, beside, metadata={"format": "pt"} | (metadata or {}))


_writes_whole_files = True


@contextlib.contextmanager
def shares_only():
    """Within, this process writes its shares of sharded tensors, and nothing that another one writes as well."""
    global _writes_whole_files
    _writes_whole_files = False
    try:
        yield
    finally:
        _writes_whole_files = True


FILE_BYTES = 5 << 30  # larger tables of tensors are split into several files, as the hub's are
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def write_shares(path, tensors, metadata=None):
    """A safetensors file of tensors of which each rank holds some rows, written by all ranks at once.

    Such a file is the length of its header (8 bytes), the header, a JSON table {name: dtype, shape, where its bytes
    begin and end}, and those bytes, rows after rows. The rows of a rank are therefore one run of bytes in it. `path`
    must lie on a disk that all ranks share, in a folder that gets its name when all have written.
    """
    import torch.distributed as dist

    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    files = shards(path.stem, sizes, FILE_BYTES)
    for file, names in files.items():
        header, begins = _safetensors_header({name: tensors[name] for name in names}, sizes, metadata)
        if _writes_whole_files:
            with open(path.with_name(file), "wb") as out:
                out.write(header)
                out.truncate(len(header) + sum(sizes[name] for name in names))
        dist.barrier()  # the file is there, and as long as it will be
        begins = {name: len(header) + begin for name, begin in begins.items()}
        _write_rows(path.with_name(file), {name: tensors[name] for name in names}, begins)
    if len(files) > 1:
        write_index(path.with_name(f"{path.name}.index.json"), files, sum(sizes.values()))


def _safetensors_header(tensors, sizes, metadata):
    """→ (the bytes before the tensors', {name: where its bytes begin after those})."""
    table, begins, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, {}, 0
    for name, tensor in tensors.items():
        begins[name], end = end, end + sizes[name]
        offsets = [begins[name], end]
        dtype = SAFETENSORS_DTYPES[dtype_name(tensor)]
        table[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, begins


def write_bin(path, tensors):
    """The same as a pickle of plain tensors, for layouts that want `.bin` files."""
    import torch
    from torch.distributed.tensor import DTensor

    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        _write_bin_shares(path, tensors)
        return
    with atomic_file(path) as beside, disk_errors(path), open(beside, "wb") as file:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, file)


def _write_bin_shares(path, tensors):
    """Such a pickle, an uncompressed zip archive with one record a tensor, written by all ranks at once."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode

    if _writes_whole_files:
        with FakeTensorMode():
            shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(shapes, path)  # all but the numbers
    dist.barrier()
    archive = torch._C.PyTorchFileReader(str(path))
    begins = {name: archive.get_record_offset(f"data/{number}") for number, name in enumerate(tensors)}
    _write_rows(path, tensors, begins)
    dist.barrier()
    if _writes_whole_files:
        _write_checksums(path, {f"data/{number}": begins[name] for number, name in enumerate(tensors)})


def _write_rows(path, tensors, begins):
    """Writes this rank's rows of each tensor into a file that is there; begins: where each tensor's bytes do."""
    import torch
    from torch.distributed.tensor import DTensor

    from support.parallel import first_row, local

    with open(path, "r+b") as out:
        for name, tensor in tensors.items():
            part, sharded = local(tensor.detach()), isinstance(tensor, DTensor)
            if not part.numel() or not (sharded or _writes_whole_files):
                continue
            row = tensor.numel() * tensor.element_size() // len(tensor) if sharded else 0
            out.seek(begins[name] + (first_row(tensor) * row if sharded else 0))
            out.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _write_checksums(path, begins):
    """Puts the CRC-32 of records that were filled later into a zip archive; begins: {record: where its bytes do}.

    It stands behind the record's bytes (APPNOTE.TXT 4.3.9) and in the central directory (4.3.12).
    """
    with zipfile.ZipFile(path) as archive, open(path, "r+b") as file:
        entry = archive.start_dir
        with mmap.mmap(file.fileno(), 0) as whole:
            for record in archive.infolist():
                begin = begins.get(record.filename.partition("/")[2])
                if begin is not None and record.file_size:
                    end = begin + record.file_size
                    checksum = zlib.crc32(memoryview(whole)[begin:end]).to_bytes(4, "little")
                    whole[end + 4 : end + 8] = whole[entry + 16 : entry + 20] = checksum
                entry += 46 + len(record.filename) + len(record.extra) + len(record.comment)


YAML = 1 << 18  # bytes of a YAML file: it is read slowly


def read_yaml(path):
    """A YAML file as data: nothing that it names is built, nothing repeated (* makes a gigabyte of a line)."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: to read it, pip install pyyaml") from None
    text, depth = settings.read_text(path, YAML), 0
    try:
        for bracket in re.findall(r"[\[\]{}]", text):  # before it is read: depth costs its square
            depth = max(0, depth + (1 if bracket in "[{" else -1))
            if depth > settings.DEPTH:
                raise ValueError("nested too deeply")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("repeats a part of itself by its name (*): write it out")
        return settings.parse(yaml.safe_load, text)
    except Exception as error:  # besides its own errors, it lets through what its values raise: no day 99, no key []
        raise UserError(f"{path}: {_first_line(error)}") from None


# ---- weights ---------------------------------------------------------------------------------

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model")
WEIGHT_FILES = tuple(f"{stem}.{ending}" for stem in STEMS for ending in ("safetensors", "bin"))
VARIANT = r"(?!\S*-\d+-of-)[\w-]+"  # fp16, non_ema, …


def weight_files(folder):
    """The weight files of a folder, or indices of shards, {file: variant}: what is read if nobody chooses comes first.

    Files of no variant ("") come before others, all but non_ema before that, safetensors before .bin.
    """
    name = re.compile(rf"({'|'.join(STEMS)})(?:\.({VARIANT}))?\.(safetensors|bin)(?:\.index(?:\.({VARIANT}))?\.json)?")
    found = []
    for file in folder.iterdir():
        if match := name.fullmatch(file.name):
            stem, before, ending, after = match.groups()
            variant = before or after or ""
            order = bool(variant), variant == "non_ema", variant, ending == "bin", STEMS.index(stem), file.name
            found.append((order, file, variant))
    return {file: variant for _, file, variant in sorted(found)}


def find_weights(folder, variant=None):
    """The weight file of a folder, or the index of its shards, under a name that libraries write; None: there is none.

    variant: one that diffusers
    knows files by ("fp16", "non_ema"; "": none); if there is no such file, but others, that is a UserError.
    """
    files = weight_files(folder)
    if variant is not None and files:
        if variant not in files.values():
            there = ", ".join(map(str, files))
            raise UserError(f"{folder}: has no weights of the variant {variant!r}, but {there}")
        return next(file for file, own in files.items() if own == variant)
    if files:
        return next(iter(files))
    return None


def read_tensors(path, variant=None):
    """All tensors of a weight file, or of a folder that holds one, whole or in shards: {name: tensor}.

    They stay mapped to the file, using no memory of their own, wherever the format allows (not in pickles
    from before torch 1.6). Within torch.device("meta") they have names, shapes and dtypes only.
    What training programs wrap around a model is taken off. A UserError names a file that is absent, cut
    short, or holds something else (support/foreign.py).
    """
    path = Path(path)
    if os.path.isdir(path):
        file = find_weights(path, variant)
        if file is None:
            raise UserError(f"{path}: no weights in this folder, {_reason(path)}")
        if variant is None and len(set((others := weight_files(path)).values())) > 1:
            left = ", ".join(other.name for other in others if other != file)
            print(f"{path}: {file.name} is read; {left}: not", file=sys.stderr)
        path = file
    if not os.path.exists(path) and os.path.exists(index := path.with_name(f"{path.name}.index.json")):
        path = index
    if re.search(r"\.index(\.\S+)?\.json$", path.name):
        return _read_shards(path)
    try:
        foreign.refuse(path, foreign.of_file(path))
    except OSError as error:
        raise UserError(f"{path}: {'no such file' if not os.path.exists(path) else error.strerror}") from None
    tensors = _unwrapped(_read_file(path), path)
    foreign.refuse(path, foreign.of_names(tensors))
    return {name: tensor.to("meta") for name, tensor in tensors.items()} if _headers_only() else tensors


def _headers_only():
    """Whether this runs within torch.device("meta")."""
    import torch

    return torch.get_default_device().type == "meta"


def _reason(folder):
    """Why no weights were found in a folder."""
    found = foreign.of_folder(folder, has_weights=False)
    return f"which is {found[0]}; {found[1]}" if found else f"which holds none of {', '.join(WEIGHT_FILES)}"


def _read_file(path):
    """What a safetensors file, a pickle of torch or a TorchScript archive holds."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if _is_safetensors(path) else pickles.read(path, _headers_only())
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({_first_line(error)})") from None
    except Exception as error:  # torch.load raises many kinds, and some span pages
        raise UserError(f"{path}: not a plain file of tensors ({_first_line(error)})") from None


def _is_safetensors(path):
    """By its bytes, eight of a length, then JSON, as some are named .bin; a pickle under its name is a UserError."""
    with open(path, "rb") as file:
        start = file.read(9)
    whole = start[8:] == b"{"  # a length may begin as a pickle does
    if path.suffix == ".safetensors" and not whole and start.startswith((b"PK\3\4", b"\x80\2")):
        raise UserError(f"{path}: is a pickle of torch, no safetensors file: name it .bin")
    return whole or path.suffix == ".safetensors"


AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "params_ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "module", "params", "net")  # the first one is read
PREFIXES = {"module", "ema_model"}  # of all names: DistributedDataParallel's, AveragedModel's, ema_pytorch's
MARKS = r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."  # torch.compile's …
COUNTERS = ("n_averaged", "initted", "step")  # beside averaged weights


def _unwrapped(saved, path):
    """The table of tensors that training programs keep within other tables, and under longer names."""
    import torch

    foreign.refuse(path, foreign.of_names(saved) if isinstance(saved, dict) else None)
    while wrappers := [name for name in WRAPPERS if _holds_tensors(saved, name)]:
        raw = [name for name in wrappers if name not in AVERAGED]
        if wrappers[0] in AVERAGED and raw:
            print(f"{path}: {wrappers[0]!r} is read, the averaged weights; {raw[0]!r} is not", file=sys.stderr)
        saved = saved[wrappers[0]]
    is_module = isinstance(saved, pickles.Inert)
    if is_module or not isinstance(saved, dict):
        kind = "whole pickled module: save its state_dict()" if is_module else type(saved).__name__
        raise UserError(f"{path}: holds a {kind}, not a table of tensors")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__.strip("_").lower()
            raise UserError(f"{path}: holds a dict, not a table of tensors: {name!r:.60} is of type {kind}")
        if not name.isprintable():
            raise UserError(f"{path}: {name!r:.60} is no name of a tensor")
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta > _headers_only():
            raise UserError(f"{path}: {name} holds no plain numbers (sparse, quantised, nested or meta): save it dense")
    tensors = {re.sub(MARKS, "", name): tensor for name, tensor in saved.items()}
    if len(tensors) < len(saved):
        raise UserError(f"{path}: holds a tensor twice, with and without a mark of torch.compile or FSDP")
    return _without_prefixes(tensors, path)


def _holds_tensors(saved, name):
    """Whether saved[name] is a table that has tensors in it, or tables with some."""
    import torch

    table = saved.get(name) if isinstance(saved, dict) else None
    if not isinstance(table, dict):
        return False
    return torch.Tensor in map(type, table.values()) or any(_holds_tensors(table, inner) for inner in WRAPPERS)


def _without_prefixes(tensors, path):
    """The same without the prefixes that all names share, and without what counts steps beside them."""
    first = {name.partition(".")[0] for name in tensors} - {*COUNTERS}
    if first == {"ema_model", "online_model"}:
        print(f"{path}: 'ema_model' is read, the averaged weights; 'online_model' is not", file=sys.stderr)
        first = {"ema_model"}
    if first <= PREFIXES and len(first) == 1:
        return _without_prefixes(pop_prefix(tensors, f"{first.pop()}."), path)
    return tensors


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_shards(index):
    tensors, where = {}, read_json(index)
    if not isinstance(where, dict) or not isinstance(where.get("weight_map"), dict):
        raise UserError(f"{index}: has no table weight_map")
    shards = where["weight_map"].values()
    for shard in sorted(set(map(str, shards))):
        if Path(shard).name != shard or shard.endswith(".json") or not os.path.isfile(index.parent / shard):
            raise UserError(f"{index}: names {shard:.200}, which is no file of weights beside it")
        tensors |= read_tensors(index.parent / shard)
    return tensors


def check_tensors(tensors, model, path):
    """Raises a UserError unless `tensors` are exactly what `model` is made of: names, shapes, finite numbers."""
    import torch

    own = model.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing ({len(missing)} in all)")
    if extra:
        raise UserError(f"{path}: {extra[0]} belongs to no part of {type(model).__name__} ({len(extra)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"{path}: {name} is stored as {tensor.dtype}, expected floating-point of 16 to 64 bits")
        check_finite({name: tensor}, path)


def check_finite(tensors, path, negative=True):
    """Raises a UserError unless all numbers in `tensors` are finite, and, without `negative`, none is below 0."""
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel():
            continue
        # least and greatest tell of NaN (it is either) and infinity, and need no memory, as isfinite would
        least, greatest = tensor.aminmax()
        if not (least.isfinite() and greatest.isfinite()):
            raise UserError(f"{path}: {name} holds NaN or infinity")
        if least < 0 and not negative:
            raise UserError(f"{path}: {name} holds negative numbers")


def shards(stem, sizes, limit):
    """{tensor's name: bytes} → {file: [name, …]}: in order, at most `limit` bytes a file (or one larger tensor).

    A single file is called stem.safetensors; several are numbered, as Hugging Face's are.
    """
    groups, filled = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{n + 1:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups)}


def write_index(path, files, total_size):
    """The index that belongs to several files {file: [tensor's name, …]} of total_size bytes."""
    where = {}
    for file, names in files.items():
        where |= dict.fromkeys(names, file)
    write_json(path, {"metadata": {"total_size": total_size}, "weight_map": where})


def check_same(tensors, like, path):
    """Raises a UserError unless `tensors` have exactly the names, shapes and dtypes of the tensors `like`."""
    for name in like:
        if name not in tensors:
            raise UserError(f"{path}: {name} is missing")
    for name, tensor in tensors.items():
        if name not in like:
            raise UserError(f"{path}: {name} belongs to nothing in this run")
        found, expected = (f"{dtype_name(t)} {tuple(t.shape)}" for t in (tensor, like[name]))
        if found != expected:
            raise UserError(f"{path}: {name} is {found}, expected {expected}")


def load(cls, config, tensors, path, dtype=None, device="cpu"):
    """A model of the class `cls` with these weights, ready for use; see load_into."""
    import torch

    with torch.device("meta"):  # no weights of its own
        model = cls(config)
    return load_into(model, tensors, path, dtype, device).eval()


def load_into(model, tensors, path, dtype=None, device="cpu"):
    """Puts `tensors` into `model` (built on the meta device), every one of them, or says which is wrong.

    dtype None keeps each weight as it is stored and, on the CPU, where it is stored: memory-mapped, copy-on-write,
    so that training does not alter the file. With a dtype, each gets memory of its own. Weights that are stored in
    several dtypes (a merged QLoRA's) all get one of these.
    """
    check_tensors(tensors, model, path)
    if dtype is None and len({tensor.dtype for tensor in tensors.values()}) > 1:
        dtype = common_dtype(tensors, path)
    alone = _alone_in_storage(tensors)  # pickled tensors may share storage: training one would change the other
    placed = {k: t.to(device, dtype, copy=dtype is not None or not alone[k]) for k, t in tensors.items()}
    model.load_state_dict(placed, assign=True)
    return model


def common_dtype(tensors, path):
    """The dtype for weights that are stored in several: what config.json beside them names, else the commonest."""
    import torch

    counts = collections.Counter()
    for tensor in tensors.values():
        counts[dtype_name(tensor)] += tensor.numel()
    config = (path if path.is_dir() else path.parent) / "config.json"
    saved = read_json(config) if config.exists() else None
    named = (saved.get("dtype") or saved.get("torch_dtype")) if isinstance(saved, dict) else None
    name = named if named in ("float32", "bfloat16", "float16") else counts.most_common(1)[0][0]
    print(f"{path}: weights in {' and '.join(sorted(counts))}: all are read as {name}", file=sys.stderr)
    return getattr(torch, name)


def renamed(tensors, table):
    """{name: tensor} under other names: in each, the (regex, replacement) pairs of `table` are applied in order.

    A replacement of None leaves out what its regex finds.
    """
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.search(pattern, name):
                break
        else:
            out[name] = tensor
    return out


def pop_prefix(tensors, prefix):
    """Moves the entries whose names begin with `prefix` out of `tensors`, into a dict of their own without it."""
    return {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}


def dtype_name(tensor):
    """A tensor's dtype as configurations write it, e.g. "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def _alone_in_storage(tensors):
    """{name: whether no other of these tensors lies in the same storage}."""
    users = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {name: users[tensor.untyped_storage().data_ptr()] == 1 for name, tensor in tensors.items()}


def weights_folder(path):
    """The folder of weights that `path` means: of a run, its newest step's, averaged where they are kept.

    Of the hub's cache it is the snapshot.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises an error if a name is too long, here and below
        reason = "a link to what is not there" if os.path.islink(path) else "no such file or folder"
        raise UserError(f"{path}: {reason}")
    path = _snapshot(path)
    newest = latest_step_folder(path)
    if newest is None:
        return path
    return newest / "ema" if (newest / "ema").is_dir() else newest


def _snapshot(path):
    """`path`, or what the hub's cache there holds: models--OWNER--NAME/snapshots/COMMIT, as refs/main names it."""
    if (path / "snapshots").is_dir():
        main = path / "refs" / "main"
        found = [path / "snapshots" / settings.read_text(main).strip()] if main.exists() else []
        if not found or not os.path.isdir(found[0]):
            found = sorted((path / "snapshots").iterdir())
        inside = "snapshots"
    else:
        found, inside = sorted([*path.glob("models--*--*"), *path.glob("hub/models--*--*")]), "models"
        if not found:
            return path
    if len(found) == 1:
        return _snapshot(found[0])
    what = f"{len(found)} {inside}: name one of them, {', '.join(map(str, found[:5]))}" if found else f"no {inside} yet"
    raise UserError(f"{path}: the hub's cache, which holds {what}")


def step_folders(run):
    """The checkpoints of a run, whole or not, oldest first."""
    found = [p for p in Path(run).glob("step_*") if re.fullmatch(r"step_[0-9]{8,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def latest_step_folder(run, ranks=None):
    """The newest whole checkpoint of a run, None if it has none at all. A newer one that is damaged is named.

    ranks: of a resume, which looks at everything (see whole.trouble) and which all of them must ask for; None: to
    sample from. A UserError if all are damaged.
    """
    troubles = []
    for folder in reversed(step_folders(run)):
        found = whole.trouble(folder, ranks, sampled=ranks is None)
        if found is None:
            for trouble in troubles if ranks is None or ranks.is_main else ():
                say_once(f"{trouble}; {folder.name} is used")
            return folder
        troubles.append(found)
    if troubles:
        way_out = "move its step_* away to start anew" if ranks else "a step's folder itself opens as far as it can"
        raise UserError(f"{troubles[0]}; {run} has no other checkpoint that is whole: {way_out}")
    return None


@functools.cache
def say_once(line):
    print(line, file=sys.stderr)


KINDS = {  # what a config.json says of the model whose weights lie beside it: (key, value) → its name
    ("model_type", "llama"): "a LLaMA",
    ("model_type", "picturebook_llama"): "a LLaMA",
    ("model_type", "dreamllm"): "a DreamLLM",
    ("model_type", "clip"): "a CLIP",
    ("model_type", "clip_text_model"): "a CLIP text tower",
    ("model_type", "clip_vision_model"): "a CLIP vision tower",
    ("_class_name", "VQGANModel"): "a VQGAN",
    ("_class_name", "MaskGitVQGAN"): "a VQGAN",
    ("_class_name", "VQModel"): "a VQGAN",
    ("_class_name", "PicturebookVQGAN"): "a VQGAN",
    ("_class_name", "AutoencoderKL"): "an autoencoder of latent diffusion",
    ("_class_name", "UNet2DConditionModel"): "a U-Net of latent diffusion",
}


SIGNS = (  # the same of weights without a config.json: a regex that some tensor's name fits, the first one counts
    (r"^model\.diffusion_model\.", "a latent diffusion pipeline"),
    (r"^quantize\.embedding", "a VQGAN"),
    (r"^(visual\.(conv1|transformer)|vision_model|text_model|transformer\.resblocks)\.", "a CLIP"),
    (r"\blayers\.0\.(self_attn\.q_proj|attention\.wq)\.", "a LLaMA"),
)


def what_is(path):
    """What the run, folder or file at `path` holds, in words ("a VQGAN"); None: unknown.

    Its small files say it, and where there are none, the names of its tensors. A UserError names what
    opens nowhere here.
    """
    path = weights_folder(path)
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        foreign.refuse(path, foreign.of_file(path))
    else:
        foreign.refuse(path, foreign.of_folder(folder))
    if (folder / "model_index.json").exists() or (folder / "unet").is_dir():
        foreign.refuse(path, foreign.of_pipeline(folder / "model_index.json"))
        return "a latent diffusion pipeline"
    if (folder / "config.json").exists():
        saved = read_json(folder / "config.json")
        saved = saved if isinstance(saved, dict) else {}
        foreign.refuse(folder, foreign.of_config(saved, KINDS))
        for (key, value), name in KINDS.items():
            if saved.get(key) == value:
                return name
    if (folder / "params.json").exists():
        return "a LLaMA"
    file = path if path.is_file() else _only_weights(folder)
    return file and _sign(file)


def _only_weights(folder):
    """The weights of a folder without config.json, taming's log folders among them; a UserError if it has none."""
    ckpts = sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
    file = find_weights(folder) or next(reversed(ckpts), None)  # last.ckpt comes after epoch=….ckpt
    if file is None and not (folder / "config.json").exists():
        foreign.refuse(folder, foreign.of_folder(folder, has_weights=False))
    return file


def _sign(file):
    """The name that SIGNS has for a file of weights, or None."""
    import torch

    with torch.device("meta"):
        names = read_tensors(file)
    for sign, kind in SIGNS:
        if any(re.search(sign, name) for name in names):
            return kind
    return None


def expect(path, *wanted):
    """Raises a UserError that says what `path` holds, if that is known and none of `wanted` (names in KINDS)."""
    found = what_is(path)
    if found and found not in wanted:
        folder = weights_folder(path)
        config = (folder if folder.is_dir() else folder.parent) / "config.json"
        silent = config.exists() and not foreign.json_table(config).keys() & {key for key, _ in KINDS}
        hint = "; config.json does not say what it is, its tensors' names do" if silent else ""
        raise UserError(f"{path}: holds {found}, but {' or '.join(wanted)} is wanted{hint}")
