"""Settings: one TOML file, a few overrides, frozen dataclasses.

    configs/X.toml ──tomllib──▶ nested dict ──overrides──▶ nested dict ──build──▶ dataclasses
                                   ▲ train.steps=100 on the command line

A dataclass is the whole truth about a section: its fields are the keys, its annotations the types,
its defaults the defaults, and its `__post_init__` checks what no single field can (heads that do not
divide the width). Whatever is wrong becomes a `UserError`: one line that names the key and the
nearest valid one, and exit code 2.

Read next: checkpoint.py (how a run is stored), then data.py.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit code 2, never as a traceback."""


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
    """Run a program's `main`, turning a UserError into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- the sections both trainers share --------------------------------------------------------


@dataclass(frozen=True)
class RunSettings:
    dir: str  # where checkpoints, metrics and samples go


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
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")


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
    dtype: str = "bfloat16"  # of the forward pass; parameters and optimizer stay float32
    compile: bool = True
    activation_checkpointing: bool = False  # recompute each block in the backward pass to save memory
    ema: float = 0.0  # decay per step of the averaged weights; 0: keep none
    save_every: int = 1000
    keep: int = 2  # newest checkpoints kept; 0: all
    eval_every: int = 500  # held-out loss; 0: never
    eval_batches: int = 8
    sample_every: int = 1000  # pictures in samples/; 0: never
    log_every: int = 10

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype "{self.dtype}" must be "float32" or "bfloat16"')
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("seed", "keep", "eval_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0")
        if self.seed >= 2**31:
            raise ValueError(f"seed {self.seed} must be less than 2³¹")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} must lie in [0, 1)")


@dataclass(frozen=True)
class MeshSettings:
    """The grid of devices of train_tpu.py, which train.py leaves unread: rows are split over data × fsdp,
    weights and optimizer over fsdp × tensor."""

    data: int = 1
    fsdp: int = 0  # 0: all devices that the others leave
    tensor: int = 1
    keep: str = "nothing"  # by a recomputed layer: "nothing", or the "products" of its matrices (faster, larger)

    def __post_init__(self):
        if min(self.data, self.tensor) < 1 or self.fsdp < 0:
            raise ValueError("data and tensor must be at least 1, fsdp at least 0")
        if self.keep not in ("nothing", "products"):
            raise ValueError(f'keep "{self.keep}" must be "nothing" or "products"')


# ---- TOML → dict -----------------------------------------------------------------------------


class Override(str):
    """Text from the command line: its meaning waits for the type of the field it lands in."""


def read(path, overrides=()):
    """The TOML file at `path` as a nested dict, with `section.key=value` texts written over it."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        folder = Path(path).parent
        near = _nearest(Path(path).name, [p.name for p in folder.glob("*.toml")])
        raise UserError(f"{path}: no such file" + (f"; did you mean {folder / near}?" if near else "")) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, name = key.split(".")
        if not equals or not sections:
            raise UserError(f"{text!r}: an override is written section.key=value, as in train.steps=100")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{key}: {part} is not a section of {path}")
        section[name] = Override(value)
    return values


# ---- dict → dataclass ------------------------------------------------------------------------


def build(cls, values, where="", known=()):
    """`values` (a dict) as an instance of the dataclass `cls`; `where` is its dotted name in errors."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a section, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = known or known_keys(cls, where)
    for name in values:
        if name not in hints:
            near = _nearest_key(_dotted(where, name), known)
            raise UserError(f"unknown key {_dotted(where, name)}" + (f"; did you mean {near}?" if near else ""))
    arguments = {}
    for field in dataclasses.fields(cls):
        if field.name in values:
            arguments[field.name] = convert(hints[field.name], values[field.name], _dotted(where, field.name), known)
        elif field.default is field.default_factory is dataclasses.MISSING:
            if not dataclasses.is_dataclass(hints[field.name]):
                raise UserError(f"{_dotted(where, field.name)} is missing")
            arguments[field.name] = build(hints[field.name], {}, _dotted(where, field.name))
    try:
        return cls(**arguments)
    except ValueError as error:  # a __post_init__ check across fields
        raise UserError(f"[{where}] {error}" if where else str(error)) from None


def must_agree(written, asked, found, folder):
    """Raises a UserError unless each of the keys `written` in [model] has in `folder`'s model the value asked for."""
    for name in sorted(written):
        if getattr(asked, name) != getattr(found, name):
            raise UserError(
                f"model.{name} is {getattr(asked, name)} in the configuration but {getattr(found, name)} in {folder}"
            )


def convert(hint, value, where, known=()):
    """`value` as the type `hint`, or a UserError that names the key `where`."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(value, Override):
        value = _parse(hint, value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, known)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
        raise UserError(f"{where}: expected {names[hint]}, got {value!r}")
    return value


def _parse(hint, text):
    """An override's text as a TOML value; what is no TOML value, or is meant as text, stays text."""
    try:
        return str(text) if hint is str and text[:1] not in "\"'" else tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return str(text)


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
