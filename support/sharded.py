"""Arrays on a mesh of devices ⇄ weight files, without a whole model in any process.

    {name in the files: tensor} ── load_sharded ──▶ {name: array}       a process reads its devices' slices only
    {name: array} ── file_tensors, write_sharded ──▶ files              one tensor at a time is brought together

The arrays of a model's layers are stacked along a first dimension, and its vocabulary is padded;
the files have one tensor a layer and no padding. `layout` is a train_tpu.Layout.
"""

import math
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from support import checkpoint
from support.settings import UserError

FILE_BYTES = 2 << 30  # larger tables of tensors are split into several files


def tensor_names(layout):
    """(name here, layer or None, name in the files, shape there) of every tensor."""
    for name, w in layout.table.items():
        if name.startswith("layers."):
            for i in range(layout.config.n_layers):
                yield name, i, f"layers.{i}.{name.removeprefix('layers.')}.weight", w.shape[1:]
        else:  # the vocabulary's padding is not in the files
            rows = layout.config.vocab_size if name in ("embed_tokens", "lm_head") else w.shape[0]
            yield name, None, f"{name}.weight", (rows, *w.shape[1:])


def load_sharded(tensors, ending, layout, path):
    """{name in the files + ending: tensor} → {name: array} on the mesh.

    Of layers.mlp.up_proj (L, F, D) a device may hold the slice [0:L, 128:256, 64:96]: for each
    layer i the slice [128:256, 64:96] of the tensor layers.i.mlp.up_proj.weight. The tensors are
    mapped to memory; what is in no slice is never read.
    """
    parts = {}  # name: its tensors, one a layer
    for name, _, file_name, shape in tensor_names(layout):
        tensor = tensors.get(file_name + ending)
        if tensor is None:
            raise UserError(f"{path}: {file_name}{ending} is missing")
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {file_name}{ending} is {tuple(tensor.shape)}, expected {shape}")
        parts.setdefault(name, []).append(tensor)

    def read_slice(name, index):
        """The part of the array `name` that a device holds: index, a slice for each dimension."""
        shape = layout.table[name].shape
        array = np.zeros([len(range(n)[i]) for i, n in zip(index, shape, strict=True)], np.float32)
        if name.startswith("layers."):
            for n, layer in enumerate(range(shape[0])[index[0]]):
                array[n] = parts[name][layer][index[1:]].float().numpy()
        else:
            rows = parts[name][0][index].float().numpy()
            array[: len(rows)] = rows  # what remains is the vocabulary's padding
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name}{ending} holds NaN or infinity")
        if ending == ".exp_avg_sq" and array.min() < 0:
            raise UserError(f"{path}: {name}{ending} holds negative numbers")
        return array

    shardings = layout.shardings()
    return {
        name: jax.make_array_from_callback(w.shape, shardings[name], partial(read_slice, name))
        for name, w in layout.table.items()
    }


@partial(jax.jit, static_argnums=2)
def replicate(array, layer, mesh):
    """A weight, or one layer of it, on every device."""
    whole = array if layer is None else array[layer]
    return jax.lax.with_sharding_constraint(whole, NamedSharding(mesh, PartitionSpec()))


def file_tensors(layout, tree, ending=""):
    """{name: array} → {name in the files + ending: (array, layer or None, shape there)}."""
    return {
        file_name + ending: (tree[name], None if layer is None else np.int32(layer), shape)
        for name, layer, file_name, shape in tensor_names(layout)
    }


def write_sharded(stem, tensors, mesh, extra=None):
    """Writes file_tensors, and `extra` arrays, as stem.safetensors or several files and an index.

    All processes bring one tensor at a time together; the one that writes its file keeps it.
    """
    sizes = {name: 4 * math.prod(shape) for name, (_, _, shape) in tensors.items()}
    files = checkpoint.shards(stem.name, sizes, FILE_BYTES)
    for number, (file, names) in enumerate(files.items()):
        mine = number % jax.process_count() == jax.process_index()
        held = dict(extra or {}) if number == 0 else {}
        for name in names:
            array, layer, shape = tensors[name]
            whole = replicate(array, layer, mesh)
            if mine:
                held[name] = np.asarray(whole.addressable_data(0))[tuple(map(slice, shape))]
        if mine:
            path = stem.with_name(file)
            with checkpoint.atomic_file(path) as beside, checkpoint.disk_errors(path):
                save_file(held, beside, metadata={"format": "pt"})
    if len(files) > 1 and jax.process_index() == 0:
        files[next(iter(files))] += extra or {}
        checkpoint.write_index(stem.with_name(f"{stem.name}.safetensors.index.json"), files, sum(sizes.values()))
