"""Pickles of torch (.bin, .pt, .pth, .ckpt): read as data, none of their code is run, and no byte is taken unchecked.

    a zip       data.pkl, a pickle that names records; data/0, data/1, …, their bytes ─ read ─▶ mapped to the file
    TorchScript  the same, of modules ──────────────────────────────────────────── read_torchscript ─▶ {name: tensor}
    before 1.6   one pickle, the bytes behind it ────────────────────────────────────── read ─▶ in memory

torch.load maps a zip and trusts it: of a record that is too short it reads what lies behind it, and no checksum is
compared. Here both are, before it reads. checkpoint.py decides which file is read, and what becomes of its content.
"""

import contextlib
import pickle
import pickletools
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

from support import whole
from support.settings import UserError, open_file


def read(path, headers_only=False):
    """What a pickle of torch holds; its tensors stay mapped to the file, but for those of files from before torch 1.6.

    headers_only: nobody will look at the tensors' values, so their checksums are not computed.
    """
    import torch

    if is_torchscript(path):
        return read_torchscript(path, headers_only)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_records(path, headers_only)
    with inert_classes(path) if is_zip else contextlib.nullcontext():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


# ---- records ---------------------------------------------------------------------------------


def check_records(path, sizes_only=False):
    """Raises a UserError unless every record of the zip at `path` is as long as its tensor, and as it was written."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    pickled = next(record for record in records if record.filename.endswith("/data.pkl"))
    root = pickled.filename.removesuffix("data.pkl")
    sizes = {record.filename.removeprefix(root): record.file_size for record in records}
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: its record {record.filename} is compressed: save it again with torch.save")
    with open(path, "rb") as file:
        file.seek(begin_of(file, pickled))
        expected = storages(file.read(pickled.file_size))
    for key, size in expected.items():
        found = sizes.get(f"data/{key}")
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes, and its tensor {size:,}"
            raise UserError(f"{path}: its record data/{key} {what}")
    if not sizes_only:
        check_sums(path, records)


def begin_of(file, record):
    """Where a record's bytes begin: behind 30, the last of which say how long a name and what follows it are."""
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + name + extra


def check_sums(path, records):
    """Raises a UserError unless the CRC-32 of each record is the one that the zip says; 0: it was not computed."""

    def fits(record):
        with open(path, "rb") as file:
            begin = begin_of(file, record)
        return record.CRC in (0, whole.crc32(path, begin, record.file_size))

    with ThreadPoolExecutor() as pool:
        for record, is_whole in zip(records, pool.map(fits, records), strict=True):
            if not is_whole:
                raise UserError(f"{path}: its record {record.filename} is not what was written (CRC-32): get it again")


STORAGES = {  # their names in a pickle, torch's dtypes
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",  # of float8, say
}


def storages(data):
    """{key: bytes} of what a pickle takes from beside it, as ("storage", class, key, device, elements)."""
    import torch

    sizes, memo, stack = {}, {}, []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "BINPERSID":
            _, kind, key, _, count, _ = stack[-6:]  # the last one stands for the TUPLE around them
            dtype = STORAGES[kind.rpartition(" ")[2]]  # kind: "torch FloatStorage"
            sizes[key] = count * getattr(torch, dtype).itemsize
        else:
            stack.append(argument)
    return sizes


# ---- code that is not run ----------------------------------------------------------------------


class Inert(dict):
    """Stands for a class that a pickle names: takes what the pickle gives it and does nothing."""

    def __new__(cls, *arguments):
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *arguments):
        super().__init__()

    def __setstate__(self, state):
        self.state = state


def inert_classes(path):
    """Inside this context, torch.load puts an empty object where `path` names a class it does not know.

    Training programs keep callbacks and settings beside the weights. None of their code is imported or
    run; what torch blocks outright (os.system and the like) stays refused.
    """
    import torch

    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return torch.serialization.safe_globals([(Inert, name) for name in unknown])


def is_torchscript(path):
    """Whether the file at `path` is a TorchScript archive: those alone keep their constants apart."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # on broken records, zipfile raises more than its own
        return False


def read_torchscript(path, headers_only=False):
    """The tensors of a TorchScript archive, {dotted name: tensor}. Its code is not read, and its pickle runs none.

    Such an archive (OpenAI's CLIP, LPIPS) is a zip: code/, constants.pkl, and data.pkl, a pickle of modules whose
    tensors lie in data/0, data/1, …
    """
    import torch

    def strided(storage, offset, shape, strides, *_):
        return storage.as_strided(shape, strides, offset)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "torch" and name in STORAGES:
                return getattr(torch, STORAGES[name])
            return strided if (module, name) == ("torch._utils", "_rebuild_tensor_v2") else Inert

        def persistent_load(self, key):
            _, dtype, number, _, count = key  # ("storage", type, name in the archive, device, elements)
            if headers_only:
                return torch.empty(count, dtype=dtype)
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{number}")), dtype=dtype)

    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        module = Unpickler(archive.open(f"{root}/data.pkl")).load()
    tensors, seen, todo = {}, set(), [("", module)]
    while todo:
        prefix, module = todo.pop()
        seen.add(id(module))
        for name, value in module.state.items():
            if isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, Inert) and id(value) not in seen:  # a pickle can hold circles
                todo.append((f"{prefix}{name}.", value))
    return tensors
