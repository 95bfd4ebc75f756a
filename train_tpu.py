"""LVM's LLaMA in pure JAX on a mesh of devices: from one core to a pod of TPUs, one program.

    python train_tpu.py --config configs/tiny_llama.toml         on every device of this machine
    python train_tpu.py --config configs/lvm.toml model.size=lvm_7b train.batch_size=128 train.accumulate=1 \\
        mesh.fsdp=64 mesh.tensor=4 --distributed auto            on each host of a slice of 256 chips
    … --plan                                                     what that would need; runs on a laptop

The program below is written for one device of unlimited memory. What makes it run on 256 is a
*sharding* for each array: a mesh axis beside each dimension that is split. XLA's partitioner (Xu et
al. 2021, GSPMD) follows them through the program and inserts the communication. The devices stand
in a grid (data, fsdp, tensor):

    data      copies of the model, each with its own rows       gradients are summed, once a microstep
    fsdp      rows, and slices of every matrix (ZeRO-3:         a layer's weights are gathered before use,
              Rajbhandari et al. 2020)                          its gradients summed and scattered
    tensor    heads, hidden units and vocabulary (Megatron:     two sums of activations a layer, each way
              Shoeybi et al. 2019)

    tokens (B, T) ─ embed ─▶ x (B, T, D) ─ scan over stacked layers ─▶ x ─ norm ─ head, a chunk of T at a time ─▶ loss
           B over data × fsdp          weights over fsdp × tensor         never all logits (B, T, V) at once

Same configurations, rows, metrics and run folder as train.py; either finishes what the other began
(pictures in samples/ only train.py makes). All processes must see the same files. Float32 weights
and moments, `train.dtype` for computing. How a run starts: (1) resume; else (2) `model.init`; else
(3) scratch.

Symbols: those of model.py; Q, K rows of q_proj and of k_proj; c LLaMAConfig, s all settings, w a
weight (in `block` the layer's weights by name).
"""

import contextlib
import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.plan import report
from data import DataSettings, TokenRows
from model import SIZES, LLaMAConfig
from published import llama
from support import checkpoint, runs, settings, signals
from support.settings import MeshSettings, UserError
from support.sharded import file_tensors, load_sharded, tensor_names, write_sharded
from support.threads import prefetch
from support.token_rows import check_rows
from support.tokenizer import Tokenizer

# ---- the mesh --------------------------------------------------------------------------------

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # rows are split over both


def make_mesh(m, devices):
    """The devices as a grid (data, fsdp, tensor), adjacent ones side by side where possible.

    Of several TPU slices, each holds whole copies of the model: only sums over `data` cross them.
    """
    shape = (m.data, m.fsdp or max(1, len(devices) // (m.data * m.tensor)), m.tensor)
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh data {shape[0]} × fsdp {shape[1]} × tensor {shape[2]} is not {len(devices)} devices")
    types = (AxisType.Auto,) * 3  # the partitioner decides what is not declared
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

    The vocabulary is padded to a multiple of `tensor`: never predicted, learned or saved.
    """
    D, F, Q, K = c.dim, c.hidden_dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    V = math.ceil(c.vocab_size / tensor) * tensor
    inward, outward = P("tensor", "fsdp"), P("fsdp", "tensor")  # what `tensor` splits: outputs, inputs
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


class Layout(NamedTuple):
    """A LLaMA on a mesh of devices."""

    config: LLaMAConfig
    table: dict[str, Weight]  # what `declare` says
    mesh: Mesh

    def shardings(self):
        return {name: NamedSharding(self.mesh, w.axes) for name, w in self.table.items()}


def lay_out(c, mesh):
    """→ Layout; a UserError names what a dimension of the mesh does not divide."""
    table = declare(c, mesh.shape["tensor"])
    for name, w in table.items():
        for size, axis in zip(w.shape, w.axes, strict=True):
            if axis and size % mesh.shape[axis]:
                raise UserError(f"mesh.{axis} {mesh.shape[axis]} does not divide {size}, a dimension of {name}")
    if c.n_kv_heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor {mesh.shape['tensor']} does not divide the {c.n_kv_heads} key/value heads")
    return Layout(c, table, mesh)


def initialize(table, seed):
    """Fresh weights: N(0, 0.02), norms 1; a number depends on its weight and index only, on every mesh."""
    keys = dict(zip(table, jax.random.split(jax.random.key(seed), len(table)), strict=True))
    return {n: w.std * jax.random.normal(keys[n], w.shape) if w.std else jnp.ones(w.shape) for n, w in table.items()}


# ---- the model: symbols as in model.py -------------------------------------------------------

constrain = jax.lax.with_sharding_constraint


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight, axes, dtype):
    """FSDP: a weight's fsdp slices, gathered just before use, in the dtype of computing.

    Backward, gradients are summed over the rows and scattered to the same slices.
    """
    sliced = constrain(weight.astype(dtype), axes)  # keeps the cast on this side of the gather: bfloat16 travels
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
    """→ cos, sin (T, A/2), float32; see model.rotary_angles."""
    frequency = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)  # (A/2,)
    if s := c.rope_scaling:
        turns = s.original_max_position_embeddings * frequency / (2 * jnp.pi)
        keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        frequency = frequency * (keep + (1 - keep) / s.factor)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency  # (T, A/2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i+A/2}) of x (B, T, H, A)."""
    cos, sin = (a[:, None] for a in angles)  # (T, 1, A/2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


def block(x, w, angles, c):
    """One layer: x (B, T, D) → (B, T, D). Only heads and hidden units are split over `tensor`."""

    def heads(name, h):
        y = jnp.einsum("btd,ed->bte", h, w[f"self_attn.{name}_proj"])
        return constrain(y.reshape(*y.shape[:2], -1, c.head_dim), P(ROWS, None, "tensor"))

    h = rms_norm(x, w["input_layernorm"], c.norm_eps)
    q, k, v = rotate(heads("q", h), angles), rotate(heads("k", h), angles), heads("v", h)  # (B, T, H | G, A)
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (B, T, H, A)
    h = jnp.einsum("bte,de->btd", h.reshape(*h.shape[:2], -1), w["self_attn.o_proj"])
    # a device has summed over its own heads only: P(ROWS), without "tensor", makes XLA add the parts up
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

    def gathered(name, weight):
        return gather(weight, P(*tuple(table[name].axes)[-weight.ndim :]), dtype)

    def layer(x, weights):
        w = {name.removeprefix("layers."): gathered(name, weight) for name, weight in weights.items()}
        return block(x, w, angles, c), None

    kept = KEPT[s.mesh.keep if s.train.activation_checkpointing else "everything"]
    layer = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    # the constraint holds backward too: gradients of a device's own rows are added up first
    embedding = constrain(gathered("embed_tokens", params["embed_tokens"]), P("tensor"))  # (V, D)
    x = constrain(embedding[inputs], P(ROWS))  # (B, T, D)
    x, _ = jax.lax.scan(layer, x, {name: w for name, w in params.items() if name.startswith("layers.")})
    x = rms_norm(x, gathered("norm", params["norm"]), c.norm_eps)

    name = "embed_tokens" if c.tie_embeddings else "lm_head"
    # the float32 changes no value: it is the dtype in which the chunks' gradients add up
    head = gathered(name, params[name]).astype(jnp.float32)  # (V, D)
    ids = jnp.arange(len(head))

    @partial(jax.checkpoint, prevent_cse=False)  # backward, a chunk's logits are computed again
    def head_chunk(total, part):
        x, targets = part  # (B, t, D), (B, t)
        logits = jnp.einsum("btd,vd->btv", x, head.astype(dtype), preferred_element_type=jnp.float32)
        logits = jnp.where(ids < c.vocab_size, constrain(logits, P(ROWS, None, "tensor")), -jnp.inf)
        # a mask and a sum: indexing would gather the split vocabulary onto every device
        true = jnp.where(ids == targets[..., None], logits, 0).sum(-1)  # (B, t)
        return total + (jax.nn.logsumexp(logits, axis=-1) - true).sum(), None

    length = inputs.shape[1]
    size = next(n for n in range(min(length, 512), 0, -1) if length % n == 0)
    parts = (x.reshape(len(x), -1, size, c.dim), targets.reshape(len(x), -1, size))
    total, _ = jax.lax.scan(head_chunk, jnp.float32(0), jax.tree.map(lambda a: a.swapaxes(0, 1), parts))
    return total / targets.size


# ---- one update ------------------------------------------------------------------------------


def update(state, batch, constants, s, c, table):
    """AdamW (Loshchilov & Hutter 2019) on the mean over microsteps → state, {"loss", "grad_norm"}.

    If one of these is not finite, the state stays as it was.

    state       {"params" | "exp_avg" | "exp_avg_sq" | maybe "ema": {name: array}}, float32
    batch       (microsteps, 2, B, T): inputs and targets
    constants   what step_constants returns
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

    lr, correction1, correction2, blend = constants
    new = {kind: {} for kind in state}
    for name, w in params.items():
        m = o.beta1 * state["exp_avg"][name] + (1 - o.beta1) * scale * g[name]
        v = o.beta2 * state["exp_avg_sq"][name] + (1 - o.beta2) * jnp.square(scale * g[name])
        step = (m / correction1) / (jnp.sqrt(v / correction2) + o.eps)
        w = w - lr * (step + o.weight_decay * w)
        new["params"][name], new["exp_avg"][name], new["exp_avg_sq"][name] = w, m, v
        if "ema" in state:
            new["ema"][name] = state["ema"][name] + blend * (w - state["ema"][name])
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return new, {"loss": loss / len(batch), "grad_norm": norm}


def step_constants(s, step):
    """(4,): learning rate, 1 − β1^t, 1 − β2^t, 1 − decay of the average; in double precision."""
    o, t = s.optim, step + 1
    decay = min(s.train.ema, t / (t + 9))  # early on the average follows quickly: it forgets the random start
    lr = settings.learning_rate(o, step, s.train.steps)
    return np.array([lr, 1 - o.beta1**t, 1 - o.beta2**t, 1 - decay], np.float32)


class Program(NamedTuple):
    """A run's two functions, compiled at their first call, and the abstract arrays they take."""

    update: Any  # (state, batch, step_constants) → (the next state, {"loss", "grad_norm"})
    loss: Any  # (params, (2, B, T)) → mean cross-entropy
    state: dict
    batch: jax.ShapeDtypeStruct  # (microsteps, 2, B, T)

    def lower(self):
        """`update` as the partitioner's input."""
        return self.update.lower(self.state, self.batch, jax.ShapeDtypeStruct((4,), "float32"))


def prepare(s, layout):
    """→ Program: an update and an evaluation for this mesh, with the shapes and shardings that they take."""
    c, table, mesh = layout
    t, row_groups = s.train, mesh.shape["data"] * mesh.shape["fsdp"]
    if t.batch_size % row_groups:
        raise UserError(
            f"train.batch_size {t.batch_size} is no multiple of mesh data {mesh.shape['data']} × fsdp "
            f"{mesh.shape['fsdp']}: raise it, and lower train.accumulate"
        )
    split = layout.shardings()
    abstract = {name: jax.ShapeDtypeStruct(w.shape, "float32", sharding=split[name]) for name, w in table.items()}
    state = dict.fromkeys(["params", "exp_avg", "exp_avg_sq"] + ["ema"] * bool(t.ema), abstract)
    shape = (t.accumulate, 2, t.batch_size, c.max_seq_len)
    batch = jax.ShapeDtypeStruct(shape, "int32", sharding=NamedSharding(mesh, P(None, None, ROWS)))
    out = (dict.fromkeys(state, split), NamedSharding(mesh, P()))
    step = jax.jit(partial(update, s=s, c=c, table=table), out_shardings=out, donate_argnums=0)
    return Program(step, jax.jit(partial(mean_loss, s=s, c=c, table=table)), state, batch)


# ---- checkpoints: train.py's files -----------------------------------------------------------


def read_weights(path, layout):
    """The weights of a published LLaMA, every one of them or a UserError: {name: array}."""
    _, tensors = llama.read(path)
    known = {file_name for _, _, file_name, _ in tensor_names(layout)}
    if layout.config.tie_embeddings:
        known.add("lm_head.weight")  # some files hold the tied weight twice
    if extra := tensors.keys() - known:
        raise UserError(f"{path}: {min(extra)} belongs to no part of a LLaMA")
    return load_sharded(tensors, "", layout, path)


def save(run, step, keep, state, layout, tokenizer=None):
    """Writes the checkpoint step_XXXXXXXX/ (see runs.py for its layout), whole or not at all.

    tokenizer: of a run on text; it is saved beside the weights.
    """
    is_main = jax.process_index() == 0
    for weight in state["params"].values():
        if not jnp.isfinite(weight).all():
            raise UserError(f"step {step}: weights are not finite any more; not saved. Try a lower optim.lr")
    with runs.new_step(run, step, keep) if is_main else contextlib.nullcontext() as folder:
        # all processes use the temporary folder of the main one
        text = np.frombuffer(str(folder).encode().ljust(4096), np.uint8)
        folder = Path(bytes(multihost_utils.broadcast_one_to_all(text)).decode().rstrip())
        save_weights(folder, state["params"], layout, tokenizer)
        if "ema" in state:
            save_weights(folder / "ema", state["ema"], layout, tokenizer)
        moments = file_tensors(layout, state["exp_avg"], ".exp_avg")
        moments |= file_tensors(layout, state["exp_avg_sq"], ".exp_avg_sq")
        counts = {f"{file_name}.step": np.array(step, np.float32) for _, _, file_name, _ in tensor_names(layout)}
        write_sharded(folder / "training" / "optimizer.model", moments, layout.mesh, counts)
        if is_main:
            checkpoint.write_tensors(folder / "training" / "state.safetensors", {})
        runs.write_state(folder, step, ranks())
        multihost_utils.sync_global_devices(f"written {step}")


def ranks():
    """Which of all processes this is, and how they exchange numbers: see support/whole.py."""

    def gather(numbers):  # each below 2³²
        return multihost_utils.process_allgather(np.array(numbers, np.uint32)).reshape(jax.process_count(), -1)

    number, wait = jax.process_index(), lambda: multihost_utils.sync_global_devices("written")
    return SimpleNamespace(rank=number, world=jax.process_count(), is_main=number == 0, gather=gather, wait=wait)


def save_weights(folder, params, layout, tokenizer):
    """Fills `folder` with the published layout of a LLaMA."""
    if jax.process_index() == 0:
        config = llama.config_to_hf(layout.config, tokenizer) | {"torch_dtype": "float32"}
        checkpoint.write_json(folder / "config.json", config)
        if tokenizer:
            tokenizer.save_pretrained(folder)
    write_sharded(folder / "model", llama.to_hf_names(file_tensors(layout, params)), layout.mesh)


def start(s, layout, resume):
    """→ the first state: from `resume` (a step's folder), else model.init, else fresh."""
    shardings = layout.shardings()
    folder = resume or (s.model.init and checkpoint.weights_folder(s.model.init))
    if folder:
        params = read_weights(folder, layout)
    else:
        params = jax.jit(partial(initialize, layout.table), out_shardings=shardings)(s.train.seed)
    zeros = jax.jit(lambda: {n: jnp.zeros(w.shape) for n, w in layout.table.items()}, out_shardings=shardings)
    state = {"params": params, "exp_avg": zeros(), "exp_avg_sq": zeros()}
    if resume:
        file = resume / "training" / "optimizer.model.safetensors"
        tensors = checkpoint.read_tensors(file)
        known = {f"{name}.{key}" for _, _, name, _ in tensor_names(layout) for key in ("step", "exp_avg", "exp_avg_sq")}
        if extra := tensors.keys() - known:
            raise UserError(f"{file}: {min(extra)} belongs to nothing in this run")
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = load_sharded(tensors, f".{kind}", layout, file)
    if s.train.ema:
        kept = resume and (resume / "ema").is_dir()
        state["ema"] = read_weights(resume / "ema", layout) if kept else jax.tree.map(jnp.copy, params)
    return state


# ---- the run ---------------------------------------------------------------------------------

RUNS = {"llama": settings.run_class(LLaMAConfig, DataSettings, mesh=MeshSettings)}

# the fields of LLaMAConfig that this file knows what to do with
IMPLEMENTED = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "max_seq_len"}
IMPLEMENTED |= {"norm_eps", "rope_theta", "rope_scaling", "tie_embeddings"}


def read_run(path, overrides=()):
    """The configuration at `path` → (settings, the keys of [model] that were written down)."""
    s, explicit_keys = settings.read_run(path, overrides, RUNS, {"llama": SIZES})
    return settings.with_dtype(s, has_bfloat16=True), explicit_keys  # every TPU has it


def model_config(s, explicit_keys, resume):
    """The LLaMAConfig of `resume` (a step's folder), else of model.init, else of [model].

    The keys that were written down must agree with it, and this file must implement every field.
    """
    names = [field.name for field in dataclasses.fields(LLaMAConfig)]
    c = LLaMAConfig(**{name: getattr(s.model, name) for name in names})
    if start := resume or s.model.init:
        checkpoint.expect(start, "a LLaMA")
        folder = checkpoint.weights_folder(start)
        saved = settings.build(LLaMAConfig, llama.read(folder)[0])
        own_context = set() if resume else llama.CONTEXT & explicit_keys
        settings.must_agree(explicit_keys & set(names) - own_context, c, saved, folder)
        c = llama.in_context(saved, **{name: getattr(c, name) for name in own_context})
    for field in dataclasses.fields(LLaMAConfig):
        value = getattr(c, field.name)
        if field.name not in IMPLEMENTED and value != field.default:
            raise UserError(f"model.{field.name} = {value}: train_tpu.py does not implement it, train.py does")
    return c


def open_data(s, c):
    """→ (training rows, held-out rows or None, the Tokenizer of a run on text or None)."""
    if not s.data.rows:
        raise UserError("data.rows is empty: name the JSONL files to train on (prepare.py tokenize makes them)")
    shared = (c.max_seq_len, s.train.batch_size, s.train.seed)
    check_rows(s.data, c.vocab_size)
    options = {"vocab_size": c.vocab_size, "dtype": s.data.row_dtype}
    rows, held_out, tokenizer = TokenRows(s.data.rows, *shared, s.data.weights, **options), None, None
    if s.data.held_out:
        held_out = TokenRows(s.data.held_out, *shared, **options)
    elif s.train.eval_every and jax.process_index() == 0:
        print("no held-out metrics: data.held_out is empty", file=sys.stderr)
    if s.data.text_tokenizer:
        tokenizer = Tokenizer.from_pretrained(s.data.text_tokenizer)
        if tokenizer.vocab_size > c.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, but model.vocab_size is {c.vocab_size}"
            raise UserError(f"data.text_tokenizer has {sizes}")
    return rows, held_out, tokenizer


def sharded_batch(rows, numbers, sharding):
    """The batches of these numbers, (len(numbers), 2, B, T) int32; each process reads its rows."""

    @functools.cache  # several devices hold the same rows
    def read(start, stop):
        batches = [np.stack(rows.batch(number, range(start, stop))) for number in numbers]
        return np.stack(batches).astype(np.int32)

    shape = (len(numbers), 2, rows.batch_size, rows.context)
    return jax.make_array_from_callback(shape, sharding, lambda index: read(*index[2].indices(shape[2])[:2]))


def held_out_metrics(s, held_out, program, params):
    """The mean loss over held-out batches, and its exponential."""
    tokens = held_out.batch_size * held_out.context
    count = min(s.train.eval_batches, max(1, held_out.tokens // tokens))
    total = 0.0
    for number in range(count):
        total += float(program.loss(params, sharded_batch(held_out, [number], program.batch.sharding)[0]))
    return {"held_out_loss": total / count, "held_out_perplexity": math.exp(min(total / count, 50))}


def check_memory(layout):
    """Raises a UserError if weights and moments do not fit: on a CPU, which gives more memory away than it has."""
    count = sum(math.prod(shape) for *_, shape in tensor_names(layout))
    if layout.mesh.devices.flat[0].platform == "cpu" and 12 * count > settings.memory():
        size = f"{count:,} parameters, 12 bytes each with their moments"
        raise UserError(f"[model] describes a LLaMA of {size}: too large for the memory")


def announce(s, layout, run, resume, state):
    """Prints what is trained from which start, and makes the run's folder."""
    count = sum(math.prod(shape) for *_, shape in tensor_names(layout))
    origin = f"resumed from {resume}" if resume else f"from {s.model.init}" if s.model.init else "from scratch"
    grid = " × ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    print(f"llama, {count:,} parameters, {origin}, on {layout.mesh.devices.flat[0].platform}, {grid}; run: {run}")
    # a folder that the model was loaded from decides about its shape
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, **vars(layout.config)))
    runs.start_run(run, s, state)


def device_memory(seconds):
    """{"memory_gb": the most that was in use so far of this process's first device}; {} of a CPU. For runs.Log."""
    stats = jax.local_devices()[0].memory_stats()
    return {"memory_gb": round(stats["peak_bytes_in_use"] / 1e9, 3)} if stats else {}


def train(s, explicit_keys, devices=None):
    """Runs (or resumes) the training that `s` describes, on all devices or these → its folder."""
    run, is_main = Path(s.run.dir), jax.process_index() == 0
    if s.train.profile:
        raise UserError("train.profile: train_tpu.py does not implement it, train.py does")
    with signals.Stop() as stop, runs.ending(run, is_main):
        resume, progress = runs.newest_step(run, s.model.kind, ranks())
        first = progress["step"]
        if first >= s.train.steps:
            if is_main:
                print(runs.already_complete(run, s, explicit_keys, first))
            return run
        layout = lay_out(model_config(s, explicit_keys, resume), make_mesh(s.mesh, devices or jax.devices()))
        check_memory(layout)
        # a TPU multiplies float32 in bfloat16 unless told otherwise
        precision = "highest" if s.train.dtype == "float32" else "default"
        with jax.set_mesh(layout.mesh), jax.default_matmul_precision(precision):
            program = prepare(s, layout)
            data = open_data(s, layout.config)
            with runs.way_out(resume):
                state = start(s, layout, resume)
            if is_main:
                announce(s, layout, run, resume, progress)
            loop(s, layout, program, state, data, first, stop)
    return run


def loop(s, layout, program, state, data, first, stop):
    """Makes the steps of a run from `first` on, or until `stop`, a signals.Stop, has a signal; data: of open_data."""
    t, run, (rows, held_out, tokenizer) = s.train, Path(s.run.dir), data

    def microsteps(step):
        return sharded_batch(rows, range(step * t.accumulate, (step + 1) * t.accumulate), program.batch.sharding)

    batches = prefetch(microsteps, range(first, t.steps), s.data.workers)
    is_main, items = jax.process_index() == 0, t.batch_size * t.accumulate * rows.context
    waiting = []  # [(step, its values)] that are not logged yet
    with contextlib.closing(runs.Log(run, t, first, "tokens", items, is_main, device_memory)) as log:
        stop.waits = True
        waited_for = log.waiting(batches, lambda: state["exp_avg"]["norm"].is_ready())
        for step, batch in enumerate(waited_for, first):
            state, values = program.update(state, batch, step_constants(s, step))  # returns at once: devices work on
            done, told_to_stop = step + 1, told(stop)
            waiting.append((done, values))
            if log.due(done) or told_to_stop:
                values = finite_values(log, waiting, t.accumulate)
                waiting.clear()
            if log.due(done):
                entry = log.entry(done, values | {"lr": settings.learning_rate(s.optim, step, t.steps)})
                if log.evaluates(done) and held_out and not told_to_stop:
                    with log.paused():
                        entry |= held_out_metrics(s, held_out, program, state.get("ema", state["params"]))
                log.write(entry)
            if log.saves(done) or told_to_stop:
                with log.paused():
                    save(run, done, t.keep, state, layout, tokenizer)
            if told_to_stop:
                raise signals.Stopped(told_to_stop)
            log.advance()


def told(stop):
    """The signal that some process was sent; 0: none. Several processes wait here for each other, once a step."""
    if jax.process_count() == 1:
        return stop.number
    return int(multihost_utils.process_allgather(np.int32(stop.number)).max())


def finite_values(log, waiting, accumulate):
    """The values of the last step as floats, {} if it was skipped; every skipped one in `waiting` is logged."""
    for done, values in jax.device_get(waiting):
        values = {name: float(value) for name, value in values.items()}
        if bad := runs.not_finite(values):
            log.skip(done, f"{bad} ({runs.batches(done - 1, accumulate)})")
            values = {}
    return values


PLANNED_DEVICES = 2**14


def plan(s, explicit_keys, devices):
    """What a step would need on a mesh of these devices: compiled, not run. → text"""
    layout = lay_out(model_config(s, explicit_keys, None), make_mesh(s.mesh, devices))
    with jax.set_mesh(layout.mesh):
        program = prepare(s, layout)
        lowered = program.lower()
    shards = [array.sharding.shard_shape(array.shape) for array in program.state["params"].values()]
    parameter_bytes = sum(4 * math.prod(shape) for shape in shards)
    return report(lowered, layout.config, dict(layout.mesh.shape), parameter_bytes, s.train)


def connect(where, parser):
    """Joins the other processes: where is "auto", or "HOST:PORT,N,I"."""
    try:
        if where == "auto":
            jax.distributed.initialize()
        else:
            address, processes, number = where.split(",")
            jax.distributed.initialize(address, int(processes), int(number))
    except (ValueError, IndexError, RuntimeError) as error:
        parser.error(f"--distributed {where}: {str(error).splitlines()[0]}")


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
        count = s.mesh.data * max(1, s.mesh.fsdp) * s.mesh.tensor
        if count > PLANNED_DEVICES:
            raise UserError(f"[mesh] has {count} devices; a plan is made for {PLANNED_DEVICES} at most")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        print(plan(s, explicit_keys, jax.devices()))
        return
    if arguments.distributed:
        connect(arguments.distributed, parser)
    train(s, explicit_keys)


if __name__ == "__main__":
    settings.run_main(main)
