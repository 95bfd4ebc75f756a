"""What a checkpoint is, in a few lines: for `sample.py what`. No weight is read, only names, shapes and dtypes."""

from support import checkpoint, foreign, settings
from support.settings import UserError
from support.tokenizer import FILES, CLIPTokenizer, Tokenizer, find_clip_files

TOKENIZER = "a tokenizer"


def kind_of(path):
    """What lies at `path` (see checkpoint.KINDS), a tokenizer too; a UserError if it is nothing that opens."""
    kind = checkpoint.what_is(path)
    folder = checkpoint.weights_folder(path)
    if kind is None and tokenizer_of(folder):
        return TOKENIZER
    if kind is None:
        found = foreign.of_folder(folder, has_weights=False) if folder.is_dir() else None
        known = f"not {', '.join(sorted({*checkpoint.KINDS.values(), TOKENIZER}))}"
        reason = f"it is {found[0]}; {found[1]}" if found else known
        raise UserError(f"{path}: nothing that opens here, as far as its files say: {reason}")
    return kind


def tokenizer_of(path):
    """A line about the tokenizer of a folder, or in the file at `path`; None if there is none."""
    folder = path if path.is_dir() else path.parent
    names = [name for name in FILES if (folder / name).exists()]
    if names:
        tokenizer = Tokenizer.from_pretrained(path if path.name in FILES else folder)
        return f"{tokenizer.file.name}, {tokenizer.vocab_size:,} tokens"
    if names := find_clip_files(folder):
        return f"{' + '.join(names)}, {len(CLIPTokenizer.from_pretrained(folder).vocabulary):,} tokens"
    return None


def origin(path):
    """A line about the run of ours that `path` belongs to, or None."""
    folder = checkpoint.weights_folder(path)
    averaged = ", averaged weights" if folder.name == "ema" else ""
    step = folder.parent if averaged else folder
    run = step.resolve().parent
    if not step.name.startswith("step_") or not (run / "config.toml").exists():
        return None
    model = settings.read(run / "config.toml").get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    return f'model.kind "{kind}", {step.name}{averaged}'


def size(model):
    """→ (a line about how many parameters it has, and their bytes; a line about their dtypes)."""
    count, total, dtypes = 0, 0, set()
    for tensor in model.parameters():
        count, total = count + tensor.numel(), total + tensor.nbytes
        dtypes.add(checkpoint.dtype_name(tensor))
    amount = f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"
    return f"{count:,} parameters, {amount}", ", ".join(sorted(dtypes))


def reach(config):
    """A line about what a model with this configuration reads at once, and makes."""
    parts = []
    for owner in (config, getattr(config, "vision", None), getattr(config, "text", None)):
        for name, unit in (
            ("max_seq_len", "tokens"),
            ("context_length", "tokens"),
            ("num_embeddings", "codes"),
            ("resolution", "pixels a side"),
            ("image_size", "pixels a side"),
            ("sample_size", "cells or pixels a side"),
        ):
            if getattr(owner, name, None):
                parts.append(f"{getattr(owner, name):,} {unit}")
    return ", ".join(parts)
