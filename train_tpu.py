"""LVM's LLaMA in pure JAX on a mesh of devices: from one core to a pod of TPUs, one program.

    python train_tpu.py --config configs/tiny_llama.toml         on every device of this machine
    python train_tpu.py --config configs/lvm.toml model.size=lvm_7b train.batch_size=128 train.accumulate=1 \\
        mesh.fsdp=64 mesh.tensor=4 --distributed auto            on each host of a slice of 256 chips
    … --plan                                                     what that would need; runs on a laptop

The program below is written for one device of unlimited memory. What makes it run on 256 is a *sharding* for
each array: a mesh axis beside each dimension that is split. XLA's partitioner (Xu et al. 2021, GSPMD) follows
them through the program and inserts the communication. The devices stand in a grid (data, fsdp, tensor):

    data      copies of the model, each with its own rows       gradients are summed, once a microstep
    fsdp      rows, and slices of every weight (ZeRO-3:         a layer's weights are gathered before use,
              Rajbhandari et al. 2020)                          its gradients summed and scattered
    tensor    heads, hidden units and vocabulary (Megatron:     two sums of activations a layer, each way
              Shoeybi et al. 2019)

    tokens (B, T) ─ embed ─▶ x (B, T, D) ─ scan over stacked layers ─▶ x ─ norm ─ head, a piece of T at a time ─▶ loss
           B over data × fsdp          weights over fsdp × tensor         never all logits (B, T, V) at once

Same configurations, rows, metrics and run folder as train.py; either finishes what the other began (pictures in
samples/ only train.py makes). All processes must see the same files. Float32 weights and moments, `train.dtype`
for computing. How a run starts: (1) resume; else (2) `model.init`; else (3) scratch.

Read before: model.py (the same model), train.py (the same loop). Read next: bench/plan.py (what a mesh costs).
"""

import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from tqdm import tqdm

from data import DataSettings, TokenRows, prefetch
from model import SIZES, LLaMAConfig, config_from_hf, config_to_hf
from support import checkpoint, runs, settings
from support.settings import MeshSettings, OptimSettings, RunSettings, TrainSettings, UserError
from support.tokenizer import Tokenizer

# ---- the mesh --------------------------------------------------------------------------------

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows are split over both


def make_mesh(m, devices):
    """The devices as a grid (data, fsdp, tensor), neighbours on the network where it can be had.

    Of several TPU slices, each holds whole copies of the model: only sums over `data` cross between them.
    """
    shape = (m.data, m.fsdp or max(1, len(devices) // (m.data * m.tensor)), m.tensor)
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh data {shape[0]} × fsdp {shape[1]} × tensor {shape[2]} is not {len(devices)} devices")
    types = (AxisType.Auto,) * 3  # the partitioner decides what we do not say
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if m.data % slices:
        raise UserError(f"mesh.data {m.data} must be a multiple of the {slices} slices")
    if slices == 1:  # an axis of the mesh may be a part of one of the torus
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside, across = (m.data // slices, *shape[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


@dataclass(frozen=True)
class Weight:
    """One weight, declared once."""

    shape: tuple[int, ...]  # (out, in) as in the Hugging Face files, so that a shard is a slice of a file
    axes: P  # the mesh axis that splits each dimension
    std: float = 0.02  # of its initial values; 0: all ones


def declare(c, tensor):
    """{name: Weight} of a LLaMA; those of its layers are stacked along a new first dimension.

    The vocabulary is padded to a multiple of `tensor`; the padding is never predicted, learned or saved.
    """
    D, F, Q, K = c.dim, c.hidden_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    V = math.ceil(c.vocab_size / tensor) * tensor
    inward, outward = P("tensor", "fsdp"), P("fsdp", "tensor")  # into, and out of, the part that `tensor` splits
    layer = {
        "input_layernorm": Weight((D,), P(None), std=0),
        "self_attn.q_proj": Weight((Q, D), inward),
        "self_attn.k_proj": Weight((K, D), inward),
        "self_attn.v_proj": Weight((K, D), inward),
        "self_attn.o_proj": Weight((D, Q), outward),
        "post_attention_layernorm": Weight((D,), P(None), std=0),
        "mlp.gate_proj": Weight((F, D), inward),
        "mlp.up_proj": Weight((F, D), inward),
        "mlp.down_proj": Weight((D, F), outward),
    }
    table = {"embed_tokens": Weight((V, D), inward), "norm": Weight((D,), P(None), std=0)}
    if not c.tie_embeddings:
        table["lm_head"] = Weight((V, D), inward)
    for name, w in layer.items():
        table[f"layers.{name}"] = Weight((c.n_layers, *w.shape), P(None, *w.axes), w.std)
    return table


def check(c, table, mesh, rows):
    """What must divide for a model to lie on the mesh; otherwise a UserError names it."""
    for name, w in table.items():
        for size, axis in zip(w.shape, w.axes, strict=True):
            if axis and size % mesh.shape[axis]:
                raise UserError(f"mesh.{axis} {mesh.shape[axis]} does not divide {size}, a dimension of {name}")
    if c.n_kv_heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor {mesh.shape['tensor']} does not divide the {c.n_kv_heads} key/value heads")
    if rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"train.batch_size {rows} is no multiple of mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}: "
            "raise it, and lower train.accumulate"
        )


def initialize(table, seed):
    """Fresh weights: N(0, 0.02), norms 1. The same on every mesh, for a draw depends on its place only."""
    keys = dict(zip(table, jax.random.split(jax.random.key(seed), len(table)), strict=True))
    return {n: w.std * jax.random.normal(keys[n], w.shape) if w.std else jnp.ones(w.shape) for n, w in table.items()}


# ---- the model: symbols as in model.py -------------------------------------------------------

constrain = jax.lax.with_sharding_constraint


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight, axes, dtype):
    """FSDP: a weight's fsdp slices, brought together just before use, in the dtype of computing.

    Backward, gradients are summed over the rows and scattered to the same slices.
    """
    sliced = constrain(weight.astype(dtype), axes)  # said explicitly: cast first, then communicate half the bytes
    return constrain(sliced, P(*(axis if axis == "tensor" else None for axis in axes)))


def gather_forward(weight, axes, dtype):
    return gather(weight, axes, dtype), None


def gather_backward(axes, dtype, _, gradient):
    return (constrain(gradient, axes).astype(jnp.float32),)


gather.defvjp(gather_forward, gather_backward)


def rms_norm(x, weight, eps):
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
    return h.astype(x.dtype) * weight


def rotary_angles(length, c):
    """→ cos, sin (T, E/2), float32; see model.rotary_angles."""
    frequency = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)  # (E/2,)
    if s := c.rope_scaling:
        turns = s.original_max_position_embeddings * frequency / (2 * jnp.pi)
        keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency  # (T, E/2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i+E/2}) of x (B, T, H, E)."""
    cos, sin = (a[:, None] for a in angles)  # (T, 1, E/2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


def block(x, w, angles, c):
    """One layer: x (B, T, D) → (B, T, D). Only heads and hidden units are split over `tensor`."""

    def heads(name):
        y = jnp.einsum("btd,ed->bte", h, w[f"self_attn.{name}_proj"])
        return constrain(y.reshape(*y.shape[:2], -1, c.head_dim), P(ROWS, None, "tensor"))

    h = rms_norm(x, w["input_layernorm"], c.norm_eps)
    q, k, v = rotate(heads("q"), angles), rotate(heads("k"), angles), heads("v")  # (B, T, H | K, E)
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (B, T, H, E)
    h = jnp.einsum("bte,de->btd", h.reshape(*h.shape[:2], -1), w["self_attn.o_proj"])
    x = x + constrain(h, P(ROWS))

    h = rms_norm(x, w["post_attention_layernorm"], c.norm_eps)
    gate, up = (jnp.einsum("btd,fd->btf", h, w[f"mlp.{name}_proj"]) for name in ("gate", "up"))  # (B, T, F)
    return x + constrain(jnp.einsum("btf,df->btd", jax.nn.silu(gate) * up, w["mlp.down_proj"]), P(ROWS))


KEPT = {  # what a layer keeps for its backward pass, besides its input; never its weights, which are gathered again
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of x with weights
    "everything": jax.checkpoint_policies.dots_saveable,  # all but what is cheap to compute again
}


def mean_loss(params, tokens, s, c, table):
    """tokens (2, B, T), inputs and targets → mean cross-entropy of the next token, in nats."""
    inputs, targets = tokens
    dtype = jnp.dtype(s.train.dtype)
    angles = rotary_angles(inputs.shape[1], c)

    def ready(name, weight):
        return gather(weight, P(*tuple(table[name].axes)[-weight.ndim :]), dtype)

    def layer(x, weights):
        w = {name.removeprefix("layers."): ready(name, weight) for name, weight in weights.items()}
        return block(x, w, angles, c), None

    kept = KEPT[s.mesh.keep if s.train.activation_checkpointing else "everything"]
    layer = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    # the constraint holds backward too: each device adds up its own rows' gradients, then these are summed
    embedding = constrain(ready("embed_tokens", params["embed_tokens"]), P("tensor"))  # (V, D)
    x = constrain(embedding[inputs], P(ROWS))  # (B, T, D)
    x, _ = jax.lax.scan(layer, x, {name: w for name, w in params.items() if name.startswith("layers.")})
    x = rms_norm(x, ready("norm", params["norm"]), c.norm_eps)

    name = "embed_tokens" if c.tie_embeddings else "lm_head"
    # the float32 changes no value: it is the dtype in which the pieces' gradients add up
    head = ready(name, params[name]).astype(jnp.float32)  # (V, D)
    ids = jnp.arange(len(head))

    @partial(jax.checkpoint, prevent_cse=False)  # backward, a piece's logits are computed again
    def piece(total, part):
        x, targets = part  # (B, t, D), (B, t)
        logits = jnp.einsum("btd,vd->btv", x, head.astype(dtype), preferred_element_type=jnp.float32)
        logits = jnp.where(ids < c.vocab_size, constrain(logits, P(ROWS, None, "tensor")), -jnp.inf)
        # not an indexing, which would bring the split vocabulary together
        true = jnp.where(ids == targets[..., None], logits, 0).sum(-1)  # (B, t)
        return total + (jax.nn.logsumexp(logits, axis=-1) - true).sum(), None

    length = inputs.shape[1]
    size = next(n for n in range(min(length, 512), 0, -1) if length % n == 0)
    parts = (x.reshape(len(x), -1, size, c.dim), targets.reshape(len(x), -1, size))
    total, _ = jax.lax.scan(piece, jnp.float32(0), jax.tree.map(lambda a: a.swapaxes(0, 1), parts))
    return total / targets.size


# ---- one update ------------------------------------------------------------------------------


def update(state, batch, rates, s, c, table):
    """AdamW (Loshchilov & Hutter 2019) on the mean over microsteps: → the next state, {"loss", "grad_norm"}.

    state   {"params" | "exp_avg" | "exp_avg_sq" | maybe "ema": {name: array}}, float32
    batch   (A, 2, B, T): A microsteps of inputs and targets
    rates   learning rate, 1 − β1^t, 1 − β2^t, 1 − decay of the averaged weights
    """
    o, params = s.optim, state["params"]

    def microstep(sums, tokens):
        loss, gradients = jax.value_and_grad(mean_loss)(params, tokens, s, c, table)
        gradients = {name: constrain(g, table[name].axes) for name, g in gradients.items()}
        return jax.tree.map(jnp.add, sums, (loss, gradients)), None

    zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (loss, sums), _ = jax.lax.scan(microstep, zeros, batch)
    g = {name: total / len(batch) for name, total in sums.items()}
    norm = jnp.sqrt(sum(jnp.square(x).sum() for x in g.values()))
    scale = jnp.minimum(1, o.clip / (norm + 1e-6)) if o.clip else 1

    lr, correction1, correction2, blend = rates
    new = {kind: {} for kind in state}
    for name, w in params.items():
        m = o.beta1 * state["exp_avg"][name] + (1 - o.beta1) * scale * g[name]
        v = o.beta2 * state["exp_avg_sq"][name] + (1 - o.beta2) * jnp.square(scale * g[name])
        step = (m / correction1) / (jnp.sqrt(v / correction2) + o.eps)
        w = w - lr * (step + o.weight_decay * w)
        new["params"][name], new["exp_avg"][name], new["exp_avg_sq"][name] = w, m, v
        if "ema" in state:
            new["ema"][name] = state["ema"][name] + blend * (w - state["ema"][name])
    return new, {"loss": loss / len(batch), "grad_norm": norm}


def rates(s, step):
    """The numbers of `update` that change from step to step, computed in double precision."""
    o, t = s.optim, step + 1
    decay = min(s.train.ema, t / (t + 9))  # early on the average follows quickly: it forgets the random start
    lr = settings.learning_rate(o, step, s.train.steps)
    return np.array([lr, 1 - o.beta1**t, 1 - o.beta2**t, 1 - decay], np.float32)


def prepare(s, c, mesh):
    """→ {name: Weight}, the compiled-on-first-use update and loss, and the abstract state and batch they take."""
    table = declare(c, mesh.shape["tensor"])
    check(c, table, mesh, s.train.batch_size)
    split = {name: NamedSharding(mesh, w.axes) for name, w in table.items()}
    abstract = {name: jax.ShapeDtypeStruct(w.shape, "float32", sharding=split[name]) for name, w in table.items()}
    state = dict.fromkeys(["params", "exp_avg", "exp_avg_sq"] + ["ema"] * bool(s.train.ema), abstract)
    shape = (s.train.accumulate, 2, s.train.batch_size, c.max_seq_len)
    batch = jax.ShapeDtypeStruct(shape, "int32", sharding=NamedSharding(mesh, P(None, None, ROWS)))
    out = (dict.fromkeys(state, split), NamedSharding(mesh, P()))
    step = jax.jit(partial(update, s=s, c=c, table=table), out_shardings=out, donate_argnums=0)
    loss = jax.jit(partial(mean_loss, s=s, c=c, table=table))
    return table, step, loss, state, batch


# ---- checkpoints: train.py's files, without the whole model ever being in one place ----------

FILE_BYTES = 2 << 30  # larger tables of tensors are split into numbered files with an index, as Hugging Face's are


def places(table, c):
    """Where the weights lie in the files: (name, layer or None, name there, shape there) for every tensor."""
    for name, w in table.items():
        if name.startswith("layers."):
            for i in range(c.n_layers):
                yield name, i, f"layers.{i}.{name.removeprefix('layers.')}.weight", w.shape[1:]
        else:
            rows = c.vocab_size if name in ("embed_tokens", "lm_head") else w.shape[0]  # the padding stays here
            yield name, None, f"{name}.weight", (rows, *w.shape[1:])


def place(tensors, ending, table, c, mesh, path):
    """{name in the files + ending: tensor} → {name: array} on the mesh. A process reads its devices' slices only."""
    found = {}
    for name, layer, there, shape in places(table, c):
        if there + ending not in tensors:
            raise UserError(f"{path}: {there}{ending} is missing")
        found[name, layer] = tensor = tensors[there + ending]  # mapped into memory, not yet read
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {there}{ending} is {tuple(tensor.shape)}, expected {shape}")

    def read(name, shape, index):
        part = np.zeros([len(range(n)[i]) for i, n in zip(index, shape, strict=True)], np.float32)
        if name.startswith("layers."):
            for n, layer in enumerate(range(shape[0])[index[0]]):
                part[n] = found[name, layer][index[1:]].float().numpy()
        else:
            rows = found[name, None][index].float().numpy()
            part[: len(rows)] = rows  # what remains is the vocabulary's padding
        if not np.isfinite(part).all():
            raise UserError(f"{path}: {name}{ending} holds NaN or infinity")
        return part

    return {
        name: jax.make_array_from_callback(w.shape, NamedSharding(mesh, w.axes), partial(read, name, w.shape))
        for name, w in table.items()
    }


def read_weights(folder, table, c, mesh):
    """The weights of a Hugging Face folder, every one of them or a UserError: {name: array}."""
    tensors = {k.removeprefix("model."): v for k, v in checkpoint.read_tensors(folder).items()}
    known = {there for _, _, there, _ in places(table, c)} | ({"lm_head.weight"} if c.tie_embeddings else set())
    for name in tensors.keys() - known:
        if not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{folder}: {name} belongs to no part of a LLaMA")
    return place(tensors, "", table, c, mesh, folder)


@partial(jax.jit, static_argnums=2)
def whole(array, layer, mesh):
    """A weight, or one layer of it, on every device."""
    return constrain(array if layer is None else array[layer], NamedSharding(mesh, P()))


def write(stem, trees, table, c, mesh, extra=None):
    """Writes {ending: {name: array}}, and `extra` arrays, as stem.safetensors or numbered files beside an index.

    One tensor at a time is brought together, by all processes, and kept by the one that writes its file.
    """
    tensors = []
    for ending, tree in trees.items():
        for name, layer, there, shape in places(table, c):
            # transformers has all weights but the head in a module `model`
            there = there + ending if ending or name == "lm_head" else f"model.{there}"
            tensors.append((there, tree[name], None if layer is None else np.int32(layer), shape))
    sizes = [4 * math.prod(shape) for *_, shape in tensors]
    _, numbers = np.unique(np.cumsum(sizes) // FILE_BYTES, return_inverse=True)  # which file each goes to
    last = int(numbers[-1])
    names = [f"{stem.name}-{n + 1:05d}-of-{last + 1:05d}.safetensors" if last else f"{stem.name}.safetensors"
             for n in range(last + 1)]  # fmt: skip
    for number, file in enumerate(names):
        mine = number % jax.process_count() == jax.process_index()
        held = dict(extra or {}) if number == 0 else {}
        for i in np.flatnonzero(numbers == number):
            there, array, layer, shape = tensors[i]
            tensor = whole(array, layer, mesh)
            if mine:
                held[there] = np.asarray(tensor.addressable_data(0))[tuple(slice(n) for n in shape)]
        if mine:
            with checkpoint.atomic_file(stem.with_name(file)) as beside:
                save_file(held, beside, metadata={"format": "pt"})
    if last and jax.process_index() == 0:
        where = {there: names[number] for (there, *_), number in zip(tensors, numbers, strict=True)}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where | dict.fromkeys(extra or {}, names[0])}
        checkpoint.write_text(stem.with_name(f"{stem.name}.safetensors.index.json"), json.dumps(index) + "\n")


def save(run, step, keep, state, table, c, mesh, words=None):
    """One checkpoint, step_XXXXXXXX/: see checkpoint.py for its layout. It stands there whole or not at all.

    words: the Tokenizer of a run on text, to be saved beside the weights.
    """
    is_main = jax.process_index() == 0
    with runs.new_step(run, step, keep) if is_main else contextlib.nullcontext() as folder:
        # the is_main's temporary name is everyone's
        text = np.frombuffer(str(folder).encode().ljust(4096), np.uint8)
        folder = Path(bytes(multihost_utils.broadcast_one_to_all(text)).decode().rstrip())
        for name, tree in {"": state["params"], "ema": state.get("ema")}.items():
            if tree:
                if is_main:
                    (folder / name).mkdir(exist_ok=True)
                    config = config_to_hf(c, words) | {"torch_dtype": "float32"}
                    checkpoint.write_text(folder / name / "config.json", json.dumps(config, indent=2) + "\n")
                    if words:
                        words.save_pretrained(folder / name)
                write(folder / name / "model", {"": tree}, table, c, mesh)
        counts = {f"{there}.step": np.array(step, np.float32) for _, _, there, _ in places(table, c)}
        moments = {f".{kind}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        write(folder / "training" / "optimizer.model", moments, table, c, mesh, counts)
        if is_main:
            checkpoint.write_tensors(folder / "training" / "state.safetensors", {})
            checkpoint.write_text(folder / "state.json", json.dumps({"step": step}) + "\n")
        multihost_utils.sync_global_devices(f"written {step}")


def start(s, c, mesh, table, resume):
    """→ (state, step) from `resume` (a step's folder), else model.init, else fresh."""
    shardings = {name: NamedSharding(mesh, w.axes) for name, w in table.items()}
    folder = resume or (s.model.init and checkpoint.weights_folder(s.model.init))
    if folder:
        params = read_weights(folder, table, c, mesh)
    else:
        params = jax.jit(partial(initialize, table), out_shardings=shardings)(s.train.seed)
    zeros = jax.jit(lambda: {n: jnp.zeros(w.shape) for n, w in table.items()}, out_shardings=shardings)
    state = {"params": params, "exp_avg": zeros(), "exp_avg_sq": zeros()}
    if resume:
        file = resume / "training" / "optimizer.model.safetensors"
        tensors = checkpoint.read_tensors(file)
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = place(tensors, f".{kind}", table, c, mesh, file)
    if s.train.ema:
        kept = resume and (resume / "ema").is_dir()
        state["ema"] = read_weights(resume / "ema", table, c, mesh) if kept else jax.tree.map(jnp.copy, params)
    return state, checkpoint.read_json(resume / "state.json")["step"] if resume else 0


# ---- the run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSection(LLaMAConfig):
    kind: str = "llama"
    init: str = ""
    size: str = ""


@dataclass(frozen=True)
class Run:
    run: RunSettings
    model: ModelSection
    data: DataSettings
    train: TrainSettings
    optim: OptimSettings = field(default_factory=OptimSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)


def read_run(path, overrides=()):
    """The configuration at `path`, as train.py reads it → (settings, the keys of [model] that were written down)."""
    values = settings.read(path, overrides)
    model = values.setdefault("model", {})
    if model.get("kind") != "llama":
        raise UserError(f'{path}: model.kind is "{model.get("kind", "")}", but train_tpu.py trains "llama" only')
    if size := model.get("size"):
        if size not in SIZES:
            raise UserError(f'{path}: model.size "{size}" is not one of {", ".join(SIZES)}')
        values["model"] = SIZES[size] | model
    return settings.build(Run, values), set(values["model"])


def model_config(s, explicit_keys, folder):
    """The LLaMAConfig of the run: that of `folder`, if it starts from one; the keys written down must agree."""
    names = [f.name for f in dataclasses.fields(LLaMAConfig)]
    c = LLaMAConfig(**{name: getattr(s.model, name) for name in names})
    if folder:
        saved = config_from_hf(checkpoint.read_json(folder / "config.json"), folder / "config.json")
        settings.must_agree(explicit_keys & set(names), c, saved, folder)
        c = saved
    return c


def open_batches(rows, sharding):
    """→ batch(numbers) → the microsteps of these numbers, (len, 2, B, T) int32. A process reads its devices' rows."""

    def batch(numbers):
        shape = (len(numbers), 2, rows.batch_size, rows.context)
        ours = {i[2].indices(shape[2])[:2] for i in sharding.addressable_devices_indices_map(shape).values()}
        parts = {r: np.stack([np.stack(rows.batch(n, range(*r))) for n in numbers]).astype(np.int32) for r in ours}
        return jax.make_array_from_callback(shape, sharding, lambda i: parts[i[2].indices(shape[2])[:2]])

    return batch


def train(s, explicit_keys, devices=None):
    """Runs (or resumes) the training that the settings `s` describe, on all devices or these. → the run's folder."""
    t, run, is_main = s.train, Path(s.run.dir), jax.process_index() == 0
    mesh = make_mesh(s.mesh, devices or jax.devices())
    resume = checkpoint.latest_step_folder(run)
    c = model_config(s, explicit_keys, resume or (s.model.init and checkpoint.weights_folder(s.model.init)))
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **vars(c)))
    # a TPU multiplies float32 in bfloat16 unless told otherwise
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest" if t.dtype == "float32" else "default"):
        table, update_step, loss_of, _, abstract_batch = prepare(s, c, mesh)
        if not s.data.rows:
            raise UserError("data.rows is empty: name the JSONL files to train on (prepare.py tokenize makes them)")

        def open_rows(paths, **options):
            rows = TokenRows(paths, c.max_seq_len, t.batch_size, t.seed, vocab_size=c.vocab_size, **options)
            return rows, open_batches(rows, abstract_batch.sharding)

        _, microsteps = open_rows(s.data.rows, weights=s.data.weights)
        held_out, held_out_batch = open_rows(s.data.held_out) if s.data.held_out else (None, None)
        state, first = start(s, c, mesh, table, resume)
        if first >= t.steps:
            if is_main:
                print(f"{run} is complete: step {first} of {t.steps}")
            return run
        if is_main:
            count = sum(math.prod(shape) for *_, shape in places(table, c))
            origin = f"resumed from {resume}" if resume else f"from {s.model.init}" if s.model.init else "from scratch"
            grid = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            print(f"llama, {count:,} parameters, {origin}, on {mesh.devices.flat[0].platform}, {grid}; run: {run}")
            runs.start_run(run, s, first)

        def evaluate(params):
            count = min(t.eval_batches, max(1, held_out.tokens // (t.batch_size * c.max_seq_len)))
            loss = sum(float(loss_of(params, held_out_batch([i])[0])) for i in range(count)) / count
            return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 50))}

        words = Tokenizer.from_pretrained(s.data.text_tokenizer) if s.data.text_tokenizer else None
        batches = prefetch(
            lambda step: microsteps(range(step * t.accumulate, (step + 1) * t.accumulate)),
            range(first, t.steps), s.data.workers,
        )  # fmt: skip
        bar = tqdm(total=t.steps, initial=first, disable=not is_main, unit="step", dynamic_ncols=True)
        metrics = open(run / "metrics.jsonl", "a") if is_main else None
        clock, since = time.perf_counter(), first
        for step, batch in zip(range(first, t.steps), batches, strict=True):
            state, values = update_step(state, batch, rates(s, step))  # returns at once: the devices work behind
            done = step + 1
            evaluates = t.eval_every and (done % t.eval_every == 0 or done == t.steps)
            saves = done % t.save_every == 0 or done == t.steps
            if done % t.log_every == 0 or done == t.steps or saves or evaluates:
                lr = settings.learning_rate(s.optim, step, t.steps)
                entry = {"step": done, **{name: float(value) for name, value in values.items()}, "lr": lr}
                bad = [f"{name} is {value}" for name, value in entry.items() if not math.isfinite(value)]
                if bad:
                    good = checkpoint.latest_step_folder(run) or "none was saved"
                    raise UserError(
                        f"step {done}: {', '.join(bad)}; stopped. Try a lower optim.lr (last good checkpoint: {good})"
                    )
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                rate = (done - since) * t.batch_size * t.accumulate * c.max_seq_len / elapsed
                entry["tokens_per_second"], since = round(rate, 1), done
                if evaluates and held_out:
                    entry |= evaluate(state.get("ema", state["params"]))
                if is_main:
                    metrics.write(json.dumps(entry) + "\n")
                    metrics.flush()
                    bar.set_postfix_str(f"loss {entry['loss']:.4f}, {rate:,.0f} tokens/s")
                    if evaluates:
                        shown = ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k != "step")
                        bar.write(f"step {done}: {shown}")
            if saves:
                save(run, done, t.keep, state, table, c, mesh, words)
            if evaluates or saves:
                clock = time.perf_counter()  # the rate is that of training alone
            bar.update()
        bar.close()
    return run


def plan(s, explicit_keys, devices):
    """What a step would need on a mesh of these devices: compiled, not run. → text"""
    from bench.plan import report

    c = model_config(s, explicit_keys, s.model.init and checkpoint.weights_folder(s.model.init))
    mesh = make_mesh(s.mesh, devices)
    with jax.set_mesh(mesh):
        _, update_step, _, state, batch = prepare(s, c, mesh)
        lowered = update_step.lower(state, batch, jax.ShapeDtypeStruct((4,), "float32"))
    here = sum(4 * math.prod(a.sharding.shard_shape(a.shape)) for a in state["params"].values())
    return report(lowered, c, dict(mesh.shape), here, s.train)


def main():
    parser = settings.Parser(prog="python train_tpu.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a TOML file of configs/, with model.kind llama")
    parser.add_argument(
        "--distributed", metavar="WHERE", help="for several processes: auto (TPU pods, Slurm), or HOST:PORT,N,I"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what a step would need, for mesh.fsdp and the others as given; run nothing",
    )
    arguments = parser.parse_with_overrides()
    s, explicit_keys = read_run(arguments.config, arguments.overrides)
    if arguments.plan:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", s.mesh.data * max(1, s.mesh.fsdp) * s.mesh.tensor)
        print(plan(s, explicit_keys, jax.devices()))
        return
    if arguments.distributed:
        try:
            if arguments.distributed == "auto":
                jax.distributed.initialize()
            else:
                address, processes, number = arguments.distributed.split(",")
                jax.distributed.initialize(address, int(processes), int(number))
        except (ValueError, IndexError, RuntimeError) as error:
            parser.error(f"--distributed {arguments.distributed}: {str(error).splitlines()[0]}")
    train(s, explicit_keys)


if __name__ == "__main__":
    settings.run_main(main)
