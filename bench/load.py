"""How fast, and in how much memory, is a checkpoint opened? Ours beside transformers', in turns.

    pip install -r requirements-test.txt; python bench/load.py --rounds 3

transformers writes a LLaMA of 1.1B parameters (TinyLlama's shape, random weights, bfloat16, 2.2 GB)
into a temporary folder; each loader then opens it in a process of its own, once to warm the disk's
cache and then `--rounds` times. Seconds are of from_pretrained alone, after the imports; memory is
what it adds: anonymous (held by the process itself: the peak, sampled every millisecond) and the
most resident at once, which also counts the file's pages while they are mapped.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import settings

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
WRITE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(LlamaConfig(**{shape})).save_pretrained({folder!r})
"""
LOADERS = {
    "picturebook": (
        "from model import LLaMA, LLaMAConfig\nwith torch.device('meta'): LLaMA(LLaMAConfig(n_layers=1))",
        "LLaMA.from_pretrained({folder!r})",
    ),
    "transformers": (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaConfig\n"
        "with torch.device('meta'): LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))",
        "AutoModelForCausalLM.from_pretrained({folder!r}, dtype='auto')",
    ),
}
MEASURE = """
import json, sys, threading, time, torch
sys.path.insert(0, {root!r})
{imports}

def memory(*names):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) / 2**20 for name in names]  # kB -> GiB

(anonymous, resident), peak, running = memory("RssAnon", "VmRSS"), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, *memory("RssAnon"))
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
began = time.perf_counter()
model = {load}
seconds = time.perf_counter() - began
running = False
thread.join()
print(json.dumps([seconds, max(peak, *memory("RssAnon")) - anonymous, memory("VmHWM")[0] - resident]))
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise settings.UserError(f"a process failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def main():
    parser = settings.Parser(prog="python bench/load.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run(WRITE.format(shape=SHAPE, folder=folder))
        size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 2**30
        results = {name: [] for name in LOADERS}
        for turn in range(rounds + 1):
            for name, (imports, load) in LOADERS.items():
                program = MEASURE.format(root=str(ROOT), imports=imports, load=load.format(folder=folder))
                if turn:  # the first only warms the disk's cache
                    results[name].append(json.loads(run(program).splitlines()[-1]))
                else:
                    run(program)
    print(f"1.1B parameters in bfloat16, {size:.2f} GiB; medians of {rounds}")
    print(f"{'':14}{'seconds':>9}{'anonymous GiB':>16}{'resident GiB':>15}")
    for name, values in results.items():
        seconds, anonymous, resident = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:14}{seconds:9.2f}{anonymous:16.2f}{resident:15.2f}")


if __name__ == "__main__":
    settings.run_main(main)
