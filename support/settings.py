"""Settings: one TOML file, a few overrides, frozen dataclasses.

    configs/X.toml ──tomllib──▶ nested dict ──overrides──▶ nested dict ──build──▶ dataclasses
                                   ▲ train.steps=100 on the command line

    published JSON ──published──▶ Fields ──build──▶ dataclasses

Each section is one dataclass: its fields are the keys, its annotations the types, its defaults the
defaults. Its `__post_init__` checks bounds, and what no single field can say (heads that do not
divide the width), with `within`, `at_least`, `one_of` and others below. Whatever is wrong, in our TOML or in a
published file, becomes a `UserError`: one line that names the file and the key, and exit code 2.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import math
import os
import re
import stat
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix: shown as one line, exit code 2, never as a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake on the command line is one line instead of a page of usage."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_with_overrides(self):
        """The arguments, with every `section.key=value` among them, wherever it stands, in `.overrides`."""
        arguments, rest = self.parse_known_args()
        for text in rest:
            if text.startswith("-") or "=" not in text:
                self.error(f"unrecognized argument {text}")
        arguments.overrides = rest
        return arguments


def run_main(main):
    """Run a program's `main`, turning a UserError into one line on stderr and exit code 2.

    If whoever reads its output leaves (`| head`), it ends quietly.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            main()
        except UserError as error:
            print("error: " + plain(" ".join(str(error).split())), file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = plain(" ".join(str(error).split()))[:200]
            print(f"error: the memory is too small for what is asked for ({reason})", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        for output in (1, 2):  # what Python still holds back for them goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        sys.exit(141)  # as the shell has it for any program that a closed pipe ends


def plain(text):
    """The text with its control characters replaced: a stranger's names and what a model wrote can have any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))


def is_out_of_memory(error):
    """Whether an exception says that memory is short: Python's, numpy's, torch's or JAX's."""
    signs = "out of memory|can't allocate memory|RESOURCE_EXHAUSTED|Storage size calculation overflowed"
    return isinstance(error, MemoryError) or bool(re.search(signs, str(error)))


def memory():
    """The bytes of this machine's memory; infinity where the system does not say it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


# ---- the sections both trainers share --------------------------------------------------------


@dataclass(frozen=True)
class RunSettings:
    dir: str  # where checkpoints, metrics and samples go

    def __post_init__(self):
        if not self.dir.strip():
            raise ValueError("dir is empty: name the run's folder")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its learning rate: linear warm-up to `lr`, then a cosine down to `min_lr`."""

    lr: float = 3e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0  # the step at which the cosine ends; 0: the last step of the run
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping

    def __post_init__(self):
        at_least(self, 0, "lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "clip")
        above(self, 0, "eps")  # with 0, a weight that has had no gradient becomes NaN
        fraction(self, "beta1", "beta2")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must be at most lr {self.lr}")


def learning_rate(o, step, steps):
    """Linear warm-up to o.lr, then half a cosine down to o.min_lr at o.decay_steps (else the last step)."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    progress = (step - o.warmup_steps) / max(1, (o.decay_steps or steps) - o.warmup_steps)
    return o.min_lr + (o.lr - o.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class TrainSettings:
    steps: int
    batch_size: int  # rows per microstep, over all ranks together
    accumulate: int = 1  # microsteps per update
    seed: int = 0
    dtype: str = "auto"  # of the forward pass: bfloat16 where the processor has it; else float32, as all weights
    parallel: str = "ddp"  # several processes: "ddp", each holds the whole model; "fsdp", each a share of it
    compile: bool = True
    activation_checkpointing: bool = False  # recompute each block in the backward pass to save memory
    ema: float = 0.0  # decay per step of the averaged weights; 0: keep none
    save_every: int = 1000
    keep: int = 2  # newest checkpoints kept; 0: all
    eval_every: int = 500  # held-out loss; 0: never
    eval_batches: int = 8
    sample_every: int = 1000  # pictures in samples/; 0: never
    log_every: int = 10
    log: str = ""  # beside metrics.jsonl: "tensorboard" or "wandb", if that package is installed
    profile: tuple[int, ...] = ()  # [10, 13]: torch.profiler records steps 10 to 13
    max_skipped: int = 10  # steps in a row whose loss or gradient is not finite: then the run stops

    def __post_init__(self):
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        one_of(self, ("ddp", "fsdp"), "parallel")
        within(self, 1, 2**20, "batch_size", "accumulate")  # rows lie in memory together
        at_least(self, 1, "steps", "save_every", "log_every", "eval_batches", "max_skipped")
        at_least(self, 0, "seed", "keep", "eval_every", "sample_every")
        one_of(self, ("", "tensorboard", "wandb"), "log")
        fraction(self, "ema")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.steps):
            raise ValueError(f"profile {list(self.profile)} must be two of the steps 1 to {self.steps}, in order")


@dataclass(frozen=True)
class MeshSettings:
    """The grid of devices of train_tpu.py, which train.py leaves unread: rows are split over data × fsdp,
    weights and optimizer over fsdp × tensor."""

    data: int = 1
    fsdp: int = 0  # 0: all devices that the others leave
    tensor: int = 1
    keep: str = "nothing"  # by a recomputed layer: "nothing", or the "products" of its matrices (faster, larger)

    def __post_init__(self):
        at_least(self, 1, "data", "tensor")
        at_least(self, 0, "fsdp")
        one_of(self, ("nothing", "products"), "keep")


# ---- the sections of a run ---------------------------------------------------------------------


def with_dtype(config, has_bfloat16):
    """A run's configuration with train.dtype as it is computed: "auto" becomes bfloat16 if the device has it."""
    if config.train.dtype != "auto":
        return config
    dtype = "bfloat16" if has_bfloat16 else "float32"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))


def run_class(model, data, **others):
    """The sections that a run of one kind has, as a dataclass: those of every run, and `others` {name: class}.

    model: the dataclass of [model], beside whose fields stand kind, init (a run or a published folder to start
    from) and size (a published size by name; keys beside it override its numbers).
    """
    keys = [("kind", str, ""), ("init", str, ""), ("size", str, "")]
    section = dataclasses.make_dataclass("ModelSection", keys, bases=(model,), frozen=True)
    sections = {"run": RunSettings, "model": section, "data": data, "train": TrainSettings, "optim": OptimSettings}
    return dataclasses.make_dataclass("Run", (sections | others).items(), frozen=True)


def read_run(path, overrides, runs, sizes):
    """The configuration at `path` → (settings, the keys of [model] that are written down in it, dotted ones too).

    runs: {model.kind: its run_class}; sizes: {model.kind: {model.size: the keys that this size stands for}}.
    """
    values = read(path, overrides)
    model = values.setdefault("model", {})
    if not isinstance(model, dict):
        raise UserError(f"{path}: model: expected a section, got {_short(model)}")
    kind, size = str(model.get("kind", "")), str(model.get("size", ""))
    if kind not in runs:
        raise UserError(f'{path}: model.kind is "{kind}", must be one of {", ".join(runs)}')
    if size:
        named = sizes.get(kind, {})
        if size not in named:
            raise UserError(f'{path}: model.size "{size}" is not one of {", ".join(named) or "any, for this kind"}')
        values["model"] = named[size] | model
    keys = set(values["model"])
    for name, section in values["model"].items():
        keys |= {f"{name}.{key}" for key in section} if isinstance(section, dict) else set()
    return build_from(path, runs[kind], values), keys


# ---- files: one door for each kind ---------------------------------------------------------------
# What comes from others is checked where it comes in; what lies behind these functions need not fear it.

CONFIGURATION = 1 << 20  # bytes of a TOML file
FILE = 1 << 30  # bytes of a picture, a caption, or a JSON file that is read whole: tokenizers have up to 40 MB
DEPTH = 100  # lists and tables within each other, in TOML, JSON and YAML
STREAMS = ("/dev/stdin", "/dev/fd/")  # besides regular files: what the shell has opened already, as <(…) does

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # so begins what git leaves in a large file's place


def open_file(path):
    """A file, open for reading bytes; an OSError if there is none, or what waits or never ends: a pipe, a device."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(STREAMS)):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return open(path, "rb")  # of a folder it says so


def content(path, most=None):
    """A file's bytes, or an OSError; most: how many they may be."""
    with open_file(path) as file:
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"has more than {most >> 20} MiB", str(path))
    return data


def read_bytes(path, most=None):
    """The same, or a UserError."""
    try:
        data = content(path, most)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if data.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; fetch that: git lfs pull")
    return data


BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def decode(data):
    """The text in a file's bytes: UTF-8, or what its byte order mark says, without that mark.

    Its lines end in \\n, however they end in the file. What is no text is a UnicodeDecodeError.
    """
    encoding = next((encoding for mark, encoding in BOMS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path, most=None):
    """The text of a file (see `decode`), or a UserError."""
    try:
        return decode(read_bytes(path, most))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from None


def parse(parser, text):
    """What `parser` (json.loads, tomllib.loads, …) makes of a text; a ValueError if it is too deep, or anything else.

    Nothing that is nested deeper than DEPTH comes through: what walks through it may do so by recursion.
    """
    try:
        value = parser(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEPTH):
        containers = [inner for inner in level if isinstance(inner, dict | list)]
        level = []
        for inner in containers:
            level += inner.values() if isinstance(inner, dict) else inner
        if not level:
            return value
    raise ValueError("nested too deeply")


def parse_json(text):
    """The value in JSON, a text or bytes; a ValueError says why there is none. The one reader of all JSON."""
    return parse(json.loads, text)


DOTTED = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){{{DEPTH}}}""")


def parse_toml(text):
    """The table in TOML; a ValueError says why there is none."""
    if DOTTED.search(text):  # before it is read: the length of such a key costs its square
        raise ValueError("nested too deeply")
    return parse(tomllib.loads, text)


def read_json(path):
    """The value in a JSON file, or a UserError."""
    try:
        return parse_json(read_text(path, FILE))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


# ---- TOML → dict -----------------------------------------------------------------------------


class Override(str):
    """Text from the command line: its meaning waits for the type of the field it lands in."""


def read(path, overrides=()):
    """The TOML file at `path` as a nested dict, with `section.key=value` texts written over it."""
    if not os.path.lexists(path):
        folder = Path(path).parent
        near = _nearest(Path(path).name, [p.name for p in folder.glob("*.toml")])
        raise UserError(f"{path}: no such file" + (f"; did you mean {folder / near}?" if near else ""))
    try:
        values = parse_toml(read_text(path, CONFIGURATION))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, name = key.split(".")
        if not equals or not sections or len(sections) > DEPTH:
            raise UserError(f"{text[:80]!r}: an override is written section.key=value, as in train.steps=100")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{key}: {part} is not a section of {path}")
        section[name] = Override(value)
    return values


# ---- dict → dataclass ------------------------------------------------------------------------


class Fields(dict):
    """A dataclass's fields as a published configuration gives them; errors call them by its file and its own names.

    path: the file (or the part of one); names: {ours: theirs} of those that are called otherwise there.
    """

    def __init__(self, values, path, names=()):
        super().__init__(values)
        self.path, self.names = path, dict(names)
        self.paths = {}  # {ours: file} of the fields that come from another one

    def add(self, other):
        """Takes over the fields of `other`, whose own file errors go on to name."""
        self.update(other)
        self.names |= other.names
        self.paths |= dict.fromkeys(other, other.path)

    def path_of(self, name):
        return self.paths.get(name, self.path)


def published(saved, path, names, wants=None, fixed=None, required=()):
    """A published configuration (a JSON file's content) as the Fields of one of our dataclasses.

    names     {our field: their key}; a key that is absent or null keeps our default
    wants     {key: value, or a tuple of possible ones} that tell what the file is; each must be there
    fixed     {key: value} of what our code does: a file may leave the key out or say null, but not contradict
    required  our fields that must be there
    """
    if not isinstance(saved, dict):
        raise UserError(f"{path}: expected a table, got {_short(saved)}")
    for key, value in (wants or {}).items():
        possible = value if isinstance(value, tuple) else (value,)
        if saved.get(key) not in possible:
            raise UserError(f"{path}: {key} is {_short(saved.get(key))}, expected {' or '.join(map(repr, possible))}")
    for key, value in (fixed or {}).items():
        # an absent key means the value that is fixed; True is not taken for 1
        if (found := saved.get(key)) is not None and (
            found != value or isinstance(found, bool) != isinstance(value, bool)
        ):
            raise UserError(f"{path}: {key} is {_short(found)}; only {value!r} is supported")
    for name in required:
        if saved.get(names[name]) is None:
            raise UserError(f"{path}: {names[name]} is missing")
    return Fields({ours: saved[key] for ours, key in names.items() if saved.get(key) is not None}, path, names)


def build(cls, values, where=""):
    """`values` as an instance of the dataclass `cls`, or a UserError that names the key that is wrong.

    values: a section of a TOML file, whose dotted name is `where`; or a published configuration's Fields.
    """
    try:
        return _build(cls, values, where)
    except _UnknownKey as error:
        key, inner, inner_where = error.args
        near = _nearest_key(key, known_keys(cls, where) + known_keys(inner, inner_where))
        file = f"{values.path}: " if isinstance(values, Fields) else ""
        raise UserError(f"{file}unknown key {key}" + (f"; did you mean {near}?" if near else "")) from None


def build_from(path, cls, values, where=""):
    """The same, of the content of the file `path`, which its errors name."""
    try:
        return build(cls, values, where)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class _UnknownKey(Exception):
    """(its dotted name, the dataclass that has no such field, that section's dotted name)."""


def _build(cls, values, where):
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a section, got {_short(values)}")
    hints = typing.get_type_hints(cls)
    theirs = isinstance(values, Fields)
    for name in values:
        if name not in hints:
            raise _UnknownKey(_dotted(where, name), cls, where)
    arguments = {}
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], field.name
        key = f"{values.path_of(name)}: {values.names.get(name, name)}" if theirs else _dotted(where, name)
        if name in values:
            arguments[name] = convert(hint, values[name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if not dataclasses.is_dataclass(hint):
                raise UserError(f"{key} is missing")
            arguments[name] = _build(hint, {}, key)  # a section that is left out
    try:
        return cls(**arguments)
    except ValueError as error:  # what __post_init__ found: a bound, or fields that do not fit each other
        message = str(error)
        if theirs:
            path = values.path_of(message.split()[0])  # messages begin with the field that they are about
            message = re.sub(r"\w+", lambda word: values.names.get(word[0], word[0]), message)
            raise UserError(f"{path}: {message}") from None
        raise UserError(f"[{where}] {message}" if where else message) from None


def convert(hint, value, where):
    """`value` as the type `hint`, or a UserError that names the key `where`."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(value, Override):
        value = _parse(hint, value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {_short(value)}")
        return tuple(convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
        raise UserError(f"{where}: expected {names[hint]}, got {_short(value)}")
    if (hint is int and abs(value) >= 2**63) or (hint is float and value and not LEAST <= abs(value) <= GREATEST):
        raise UserError(f"{where}: {_short(value)} is no number to compute with")
    if hint is str and not is_text(value):
        raise UserError(f"{where}: {_short(value)} is no UTF-8")
    return value


LEAST, GREATEST = 1e-37, 1e38  # of floats in configurations, but for 0: so far float32 reaches


def is_text(value):
    """Whether a str is text: the bytes of a command line that are no UTF-8 come as halves of characters."""
    return value == value.encode(errors="ignore").decode()


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _parse(hint, text):
    """An override's text as a TOML value; what is no TOML value, or is meant as text, stays text."""
    try:
        return str(text) if hint is str and text[:1] not in "\"'" else parse_toml(f"x = {text}")["x"]
    except ValueError:
        return str(text)


def must_agree(written, asked, found, folder):
    """Raises a UserError unless each of the keys `written` in [model] has in `folder`'s model the value asked for.

    A dotted key is compared alone; its section is not, but for whether it is there.
    """
    sections = {key.partition(".")[0] for key in written if "." in key}
    for key in sorted(written):
        name, _, inner = key.partition(".")
        ours, theirs = getattr(asked, name), getattr(found, name)
        if inner and ours is not None and theirs is not None:
            ours, theirs = getattr(ours, inner, None), getattr(theirs, inner, None)
        if ours != theirs and not (key in sections and ours is not None and theirs is not None):
            raise UserError(f"model.{key} is {ours} in the configuration but {theirs} in {folder}")


# ---- what may stand in a field: for __post_init__, whose ValueErrors `build` turns into one line --


def within(config, low, high, *names):
    """Raises a ValueError unless each field of these names, or each number in it, lies in low..high."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                bound = f"at least {low}" if number < low else f"at most {high}"
                raise ValueError(f"{name} {_short(value)} must be {bound}")


def at_least(config, low, *names):
    """The same without an upper end, but that of whole numbers: 2³¹ - 1."""
    for name in names:
        value = getattr(config, name)
        first = value[0] if isinstance(value, tuple) and value else value
        within(config, low, math.inf if isinstance(first, float) else 2**31 - 1, name)


def fraction(config, *names):
    """Raises a ValueError unless each field of these names lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must lie in [0, 1)")


def above(config, low, *names):
    """Raises a ValueError unless each field of these names, or each number in it, is greater than `low`."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not number > low:
                raise ValueError(f"{name} {_short(value)} must be greater than {low}")


def one_of(config, choices, *names):
    """Raises a ValueError unless each field of these names, a text, is one of the choices."""
    for name in names:
        value = getattr(config, name)
        if value not in choices:
            near = _nearest(value, list(choices))
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f'{name} "{value}" must be one of {", ".join(map(str, choices))}{hint}')


def known_keys(cls, where=""):
    """Every dotted key that `cls` understands, those of its sections included."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        keys += known_keys(hint, _dotted(where, name)) if nested else [_dotted(where, name)]
    return keys


def _nearest_key(key, known):
    """The known key (or section) most like `key`; the same last part under another section comes first."""
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    sections = [k.rpartition(".")[0] for k in known]
    return _nearest(key, same) or next(iter(same), None) or _nearest(key, [*sections, *known])


def _dotted(*parts):
    return ".".join(part for part in parts if part)


def _nearest(name, names):
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


# ---- dataclass → TOML ------------------------------------------------------------------------


def dumps(settings):
    """A dataclass of sections as TOML text that `read` and `build` turn back into an equal one."""
    lines = []
    for name, section in dataclasses.asdict(settings).items():
        lines += [*_table(name, section), ""]
    return "\n".join(lines)


def _table(name, table, brackets="[{}]"):
    lines, after = [brackets.format(name)], []
    for key, value in table.items():
        if isinstance(value, dict):
            after += _table(f"{name}.{key}", value)
        elif isinstance(value, tuple | list) and value and isinstance(value[0], dict):
            for item in value:
                after += _table(f"{name}.{key}", item, "[[{}]]")
        elif value is not None:
            lines.append(f"{key} = {_literal(value)}")
    return lines + after


def _literal(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # JSON's escapes are TOML's
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
