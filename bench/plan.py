"""What a training step needs on a mesh of devices that need not be there: train_tpu.py --plan.

    python train_tpu.py --config configs/lvm.toml model.size=lvm_7b train.batch_size=128 \\
        train.accumulate=1 mesh.fsdp=64 mesh.tensor=4 --plan

The real step is compiled for that many CPU devices, which XLA makes out of one, on abstract arrays:
nothing is allocated. XLA's partitioner turns it into the program of *one* device, loops and
communication included.

    step ─ partitioner ─▶ one device's program, in its intended dtypes ──▶ FLOPs, bytes of each collective
                                          └ CPU compiler, in float32 ────▶ temporaries

The compiler's own count takes a loop's body once. So this file walks the program's text, and counts
every body as often as it runs. A TPU differs in three ways: it needs fewer temporaries (the CPU's
compiler computes bfloat16 in float32 and fuses less: an upper bound), it may choose other
collectives, and it overlaps them with products to an extent that the text does not say.
"""

import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Google's figures for one chip: bfloat16 FLOP/s, bytes of memory, bytes/s to and from it, bytes/s
# sent to other chips of its slice over all links together
CHIPS = {
    "v4": (275e12, 32e9, 1.2e12, 300e9),
    "v5e": (197e12, 16e9, 0.819e12, 200e9),
    "v5p": (459e12, 95e9, 2.765e12, 600e9),
    "v6e": (918e12, 32e9, 1.638e12, 400e9),
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# ---- the compiled program, as text -----------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """%name = type opcode(operands), attributes"""

    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self):
        return sum(BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in self.shapes())

    def shapes(self):
        found = re.findall(r"(\w+)\[([\d,]*)\]", self.type)
        return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in found]

    def dims(self, attribute):
        return [int(n) for n in re.search(attribute + r"=\{([\d,]*)\}", self.attributes)[1].split(",") if n]

    def called(self, attribute):
        return re.search(attribute + r"=%?([\w.\-]+)", self.attributes)[1]


def parse(text):
    """The text of an HLO module → ({computation: {name: Instruction}}, the entry computation)."""
    computations, entry = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computations[head[2]] = current = {}
            entry = head[2] if head[1] else entry
        elif m := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line):
            operands, _, attributes = m[4].partition(")")
            # of a constant, what stands between the parentheses is its value
            names = (operands,) if m[3] == "constant" else tuple(re.findall(r"%([\w.\-]+)", operands))
            current[m[1]] = Instruction(m[2], m[3], names, attributes)
    return computations, entry


def group_size(attributes, devices):
    """How many devices are in one group of a collective: groups are written in three ways."""
    if m := re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", attributes):  # [groups, size]<=[…]
        return int(m[1])
    if m := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):  # mesh['a'=4,'b'=2] {'a'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", m[2]))
    if m := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return m[1].count(",") + 1
    return devices


def count(computations, name, devices):
    """Counter of what one run of a computation costs a device.

    "flops"     of matrix products, two for each multiply-add
    "traffic"   bytes of their operands and results: memory read and written if all else is fused into them
    a collective's name: bytes a device must send, n-1 of n parts (twice that to reduce and hand back)
    """
    total, body = Counter(), computations[name]
    users = Counter()
    for instruction in body.values():
        users.update(set(instruction.operands))
    sliced = {i.operands[0] for i in body.values() if i.opcode == "dynamic-slice"}
    for own, instruction in body.items():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "while":
            trips = loop_trips(computations[instruction.called("condition")])
            for key, value in count(computations, instruction.called("body"), devices).items():
                total[key] += trips * value
        elif opcode in ("call", "fusion"):
            total += count(computations, instruction.called("to_apply" if opcode == "call" else "calls"), devices)
        elif opcode == "dot":
            left, right = body[instruction.operands[0]], body[instruction.operands[1]]
            total["flops"] += product_flops(instruction, left)
            total["traffic"] += instruction.bytes + left.bytes + right.bytes
        elif opcode in COLLECTIVES:
            size = instruction.bytes
            if opcode == "reduce-scatter":
                size = sum(body[operand].bytes for operand in instruction.operands)
            if opcode == "all-reduce" and own in sliced and users[own] == 1:
                opcode = "reduce-scatter"  # each keeps its slice of the sum: a TPU's compiler makes one of the two
            total[opcode] += sent_bytes(opcode, size, group_size(instruction.attributes, devices))
    return total


def loop_trips(condition):
    """How often a loop runs: the constant that its condition compares the counter with."""
    constants = [i for i in condition.values() if i.opcode == "constant" and i.type.startswith("s32")]
    return max(int(constant.operands[0]) for constant in constants)


def product_flops(dot, left):
    """Of a matrix product: two for each entry of the result and of a contracted row of `left`."""
    ((_, left_shape),), ((_, shape),) = left.shapes(), dot.shapes()
    contracted = math.prod(left_shape[d] for d in dot.dims("lhs_contracting_dims"))
    return 2 * math.prod(shape) * contracted


def sent_bytes(opcode, size, n):
    """What a device sends in a collective over `size` bytes in a group of n devices."""
    if opcode == "collective-permute":
        return size
    return (2 if opcode == "all-reduce" else 1) * size * (n - 1) // n


def compile_and_count(lowered, devices):
    """A lowered step → (Counter as above, bytes of temporaries on one device)."""
    with tempfile.TemporaryDirectory() as folder:
        # the program as the partitioner leaves it, before this pass, the CPU compiler's first of
        # its own
        first = "batched_gather_scatter_normalizer"
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": first}
        # this pass would take float32 copies of all layers' activations at once, out of the loop
        # over the layers
        options["xla_disable_hlo_passes"] = "while-loop-invariant-code-motion"
        compiled = lowered.compile(compiler_options=options)
        (dumped,) = Path(folder).glob(f"*.before_{first}*.txt")
        text = dumped.read_text()
    computations, entry = parse(text)
    return count(computations, entry, devices), compiled.memory_analysis().temp_size_in_bytes


# ---- the report ------------------------------------------------------------------------------


def model_flops(c, tokens):
    """6·N·tokens + attention, forward and backward; N without the embedding, which is no product."""
    heads, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    n = c.n_layers * c.dim * (2 * heads + 2 * kv + 3 * c.hidden_dim) + c.dim * c.vocab_size
    return 6 * n * tokens + 12 * c.n_layers * heads * c.max_seq_len * tokens


def report(lowered, c, mesh, parameter_bytes, train):
    """The text of --plan. parameter_bytes: float32, of one device; train: the [train] section."""
    devices = math.prod(mesh.values())
    cost, temporaries = compile_and_count(lowered, devices)
    tokens = train.batch_size * train.accumulate * c.max_seq_len
    averaged = parameter_bytes * bool(train.ema)
    temporaries = max(0, temporaries - parameter_bytes)  # the gradients are among them
    # the optimizer reads weights, moments and gradients and writes all but the last; averages are
    # read and written
    traffic = cost["traffic"] + 7 * parameter_bytes + 2 * averaged
    sent = sum(cost[kind] for kind in COLLECTIVES)
    needed = 4 * parameter_bytes + averaged + temporaries
    grid = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    share = cost["flops"] * devices / model_flops(c, tokens)
    lines = [
        f"{grid} = {devices} devices; {train.batch_size} × {c.max_seq_len} tokens a microstep, {tokens:,} an update",
        "each device, an update:",
        f"  parameters         {_gb(parameter_bytes)}  float32",
        f"  gradients          {_gb(parameter_bytes)}",
        f"  moments            {_gb(2 * parameter_bytes)}",
    ]
    if averaged:
        lines.append(f"  averaged weights   {_gb(averaged)}")
    lines += [
        f"  activations and    {_gb(temporaries)}  the CPU compiler's, in float32: a TPU needs less",
        "  temporaries",
        f"  products           {cost['flops'] / 1e12:9.2f} TFLOP, {share:.2f} × (6·N·tokens + attention)",
        f"  memory traffic     {_gb(traffic)}",
    ]
    lines += [f"  {kind:19}{_gb(cost[kind])}  sent" for kind in COLLECTIVES if cost[kind]]
    lines += [
        "",
        "chip   memory   fits  products    memory   network   a step takes, all overlapped … nothing  largest",
    ]
    for chip in CHIPS:
        lines.append(chip_line(chip, needed, cost["flops"], traffic, sent, train.dtype))
    return "\n".join(lines)


def chip_line(chip, needed, flops, traffic, sent, dtype):
    """Whether the memory of a chip suffices; seconds of a step for products, memory, network."""
    speed, memory, bandwidth, network = CHIPS[chip]
    if dtype == "float32":
        speed /= 6  # a float32 product is six of bfloat16 there
    seconds = {"products": flops / speed, "memory": traffic / bandwidth, "network": sent / network}
    largest = max(seconds, key=seconds.get)
    columns = "".join(f"{value:8.3f} s" for value in seconds.values())
    fits = "yes" if needed <= memory else "no"
    total = sum(seconds.values())
    return (
        f"{chip:4}{memory / 1e9:6.0f} GB{fits:>7}{columns}{seconds[largest]:18.3f} … {total:.3f} s           {largest}"
    )


def _gb(size):
    return f"{size / 1e9:9.3f} GB"
