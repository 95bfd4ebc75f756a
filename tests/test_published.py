"""What is promised of published checkpoints: transformers and we open each other's, and a broken one is one line.

The golden files of test_model.py and test_vqgan.py show that our numbers are the originals'. Here the layouts
themselves are tried: many shapes, true sizes, and every kind of damage.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file

import model
from model import LLaMA, LLaMAConfig, RopeScaling
from published.llama import config_from_hf, config_to_hf
from support import checkpoint, settings
from support.settings import UserError
from vqgan import VQGAN, VQGANConfig

SMALL = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "initializer_range": 0.3}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHAPES = {  # five models that differ in everything a config.json can say
    "as many key as query heads": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped queries, tied head, llama-3 scaling": {
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE,
        "max_position_embeddings": 128,
    },
    "one key head, a head width of its own": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20},
    "linear scaling, another eps": {
        "num_attention_heads": 3, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    },
    "many thin heads, another theta": {
        "num_attention_heads": 12, "num_key_value_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}  # fmt: skip


def their_llama(shape):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | shape)).eval()


def config_of(saved):
    """What a config.json means."""
    return settings.build(LLaMAConfig, config_from_hf(saved))


def tokens(batch=2, length=40, vocab=96):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(logits, parameters, ids):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, parameters)


# ---- transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_llama_of_transformers_gives_its_logits_and_gradients_here(shape, tmp_path):
    theirs = their_llama(SHAPES[shape])
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, ids = LLaMA.from_pretrained(tmp_path), tokens()
    logits, expected = ours(ids), theirs(ids).logits
    assert expected.std() > 0.5  # differences would show
    assert (logits - expected).abs().max() <= 1e-4
    named = {f"model.{n}".replace("model.lm_head", "lm_head"): p for n, p in ours.named_parameters()}
    wanted = dict(theirs.named_parameters())
    assert named.keys() == wanted.keys()
    mine = loss_and_gradients(logits, list(named.values()), ids)
    reference = loss_and_gradients(expected, [wanted[n] for n in named], ids)
    for name, a, b in zip(named, mine, reference, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_what_we_save(shape, tmp_path):
    theirs = their_llama(SHAPES[shape])
    theirs.save_pretrained(tmp_path / "theirs")
    LLaMA.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info  # no key missing, left over or of another shape
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


def test_pickled_shards_of_the_earlier_years_open_too(tmp_path):
    theirs = their_llama(SHAPES["as many key as query heads"])
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}  # as in 4.28
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(state.items())[i::2]) for i in range(2)}
    for file, part in shards.items():
        torch.save(part, tmp_path / file)
    where = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with torch.no_grad():
        assert (LLaMA.from_pretrained(tmp_path)(tokens()) - theirs(tokens()).logits).abs().max() <= 1e-4


# ---- config.json, 2023 to today --------------------------------------------------------------

OLD = {  # as transformers 4.28 wrote LLaMA's
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.28.1",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("dialect", "meaning"),
    [
        ({}, {}),
        ({"num_key_value_heads": 8, "rope_theta": 5e5}, {"n_kv_heads": 8, "rope_theta": 5e5}),
        ({"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}, {}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"rope_theta": 10000}, {}),  # a whole number, as JSON writers like it
        (  # max_position_embeddings is the context before this scaling
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 0), "max_seq_len": 8192},
        ),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}, "rope_theta": 5e5},
            {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "rope_theta": 5e5},
        ),
        (
            {"rope_parameters": LLAMA3_ROPE, "dtype": "bfloat16"},  # transformers 5
            {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "rope_theta": 5e5},
        ),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
    ],
)
def test_every_dialect_of_config_json_is_understood(dialect, meaning):
    vicuna = vars(LLaMAConfig.named("vicuna_7b"))
    expected = LLaMAConfig(**vicuna | meaning)
    assert config_of(OLD | dialect) == expected
    assert config_of(config_to_hf(expected)) == expected  # and as we write it


# ---- a field of one's own ----------------------------------------------------------------------


@pytest.fixture
def extended(monkeypatch):
    """LLaMAConfig with one more field, as somebody would add it; nothing but model.py would know."""
    cls = dataclasses.make_dataclass("LLaMAConfig", [("qk_norm", bool, False)], bases=(LLaMAConfig,), frozen=True)
    monkeypatch.setattr(model, "LLaMAConfig", cls)
    return cls(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=24)


def test_a_field_that_somebody_adds_is_saved_and_read_again(extended, tmp_path):
    config = dataclasses.replace(extended, qk_norm=True)
    LLaMA(config).save_pretrained(tmp_path)
    assert LLaMA.from_pretrained(tmp_path).config == config
    assert checkpoint.what_is(tmp_path) == "a LLaMA"
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="picturebook_llama"):  # it would leave the field out
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_at_its_default_such_a_field_is_no_news_to_transformers(extended, tmp_path):
    LLaMA(extended).save_pretrained(tmp_path)
    assert config_to_hf(extended) == config_to_hf(LLaMAConfig(20, 16, 1, 2, hidden_dim=24))
    transformers = pytest.importorskip("transformers")
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), transformers.LlamaForCausalLM)


def test_a_field_that_is_not_there_any_more_is_named(extended, tmp_path, monkeypatch):
    LLaMA(dataclasses.replace(extended, qk_norm=True)).save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unknown key qk_norm"):
        LLaMA.from_pretrained(tmp_path)


# ---- true sizes, on the meta device ----------------------------------------------------------

LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA3 = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip


def size(hidden, intermediate, layers, heads):
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


TRUE_SIZES = {
    "lvm_7b": size(4096, 11008, 32, 32) | {"vocab_size": 8292, "max_position_embeddings": 4096},
    "llama2_7b": size(4096, 11008, 32, 32) | LLAMA2,
    "llama2_13b": size(5120, 13824, 40, 40) | LLAMA2,
    "llama2_70b": size(8192, 28672, 80, 64) | LLAMA2 | {"num_key_value_heads": 8},
    "llama3_8b": LLAMA3 | {"max_position_embeddings": 8192, "rope_theta": 5e5},
    "llama31_8b": LLAMA3 | {
        "max_position_embeddings": 131072, "rope_theta": 5e5,
        "rope_scaling": {k: v for k, v in (LLAMA3_ROPE | {"original_max_position_embeddings": 8192}).items()
                         if k != "rope_theta"},
    },
    "smollm2_135m": size(576, 1536, 30, 9) | {
        "vocab_size": 49152, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 1e5,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_keys_and_shapes_at_true_size_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours = config_of(TRUE_SIZES[name] | {"model_type": "llama"})
    assert ours == LLaMAConfig.named(name)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TRUE_SIZES[name])).state_dict()
        mine = LLaMA(ours).state_dict()
    if ours.tie_embeddings:
        theirs.pop("lm_head.weight")  # in memory twice, in the file once
    shapes = {f"model.{n}".replace("model.lm_head", "lm_head"): tuple(w.shape) for n, w in mine.items()}
    assert shapes == {n: tuple(w.shape) for n, w in theirs.items()}


def weight_and_bias(*names):
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def test_the_146m_tokenizer_has_the_published_keys():
    """openMUSE's VQGANModel as LVM uses it, key by key."""
    with torch.device("meta"):
        own = VQGAN(VQGANConfig()).state_dict()
    block = ("norm1", "conv1", "norm2", "conv2")
    ends = [f"{side}.{part}" for side in ("encoder", "decoder") for part in ("conv_in", "norm_out", "conv_out")]
    middle = [f"{s}.mid.block_{i}.{b}" for s in ("encoder", "decoder") for i in (1, 2) for b in block]
    down = [f"encoder.down.{level}.block.{i}.{b}" for level in range(5) for i in range(2) for b in block]
    up = [f"decoder.up.{level}.block.{i}.{b}" for level in range(5) for i in range(3) for b in block]
    shortcuts = [f"encoder.down.{i}.block.0.nin_shortcut" for i in (1, 3, 4)]
    shortcuts += [f"decoder.up.{i}.block.0.nin_shortcut" for i in (0, 2, 3)]
    moves = [f"encoder.down.{i}.downsample.conv" for i in range(4)]
    moves += [f"decoder.up.{i}.upsample.conv" for i in range(1, 5)]
    convs = ("quant_conv", "post_quant_conv")
    expected = weight_and_bias(*ends, *middle, *down, *up, *shortcuts, *moves, *convs) | {"quantize.embedding.weight"}
    assert own.keys() == expected and len(own) == 277
    widths = (128, 256, 256, 512, 768)
    for level, width in enumerate(widths):
        assert own[f"encoder.down.{level}.block.1.conv2.weight"].shape == (width, width, 3, 3)
        assert own[f"decoder.up.{level}.block.2.conv2.weight"].shape == (width, width, 3, 3)
    assert own["encoder.conv_in.weight"].shape == (128, 3, 3, 3)
    assert own["encoder.conv_out.weight"].shape == (64, 768, 3, 3)
    assert own["decoder.conv_in.weight"].shape == (768, 64, 3, 3)
    assert own["decoder.conv_out.weight"].shape == (3, 128, 3, 3)
    assert own["quantize.embedding.weight"].shape == (8192, 64)
    assert own["quant_conv.weight"].shape == own["post_quant_conv.weight"].shape == (64, 64, 1, 1)


def test_maskgits_tokenizer_has_the_published_keys():
    maskgit = {"layout": "maskgit", "z_channels": 256, "quantized_embed_dim": 256, "num_embeddings": 1024}
    with torch.device("meta"):
        own = VQGAN(VQGANConfig(channel_mult=(1, 1, 2, 2, 4), **maskgit)).state_dict()
    bare, norms, biased = set(), [], []
    for side in ("encoder.down", "decoder.up"):
        places = [f"{side}.{level}.block.{i}" for level in range(5) for i in range(2)]
        places += [f"{side.split('.')[0]}.mid.{i}" for i in range(2)]
        bare |= {f"{place}.conv{i}.weight" for place in places for i in (1, 2)}
        norms += [f"{place}.norm{i}" for place in places for i in (1, 2)] + [f"{side.split('.')[0]}.norm_out"]
    bare |= {f"{p}.block.0.nin_shortcut.weight" for p in ("encoder.down.2", "encoder.down.4")}
    bare |= {f"{p}.block.0.nin_shortcut.weight" for p in ("decoder.up.3", "decoder.up.1")} | {"encoder.conv_in.weight"}
    biased = ["encoder.conv_out", "decoder.conv_in", "decoder.conv_out"]
    biased += [f"decoder.up.{level}.upsample_conv" for level in range(1, 5)]
    assert own.keys() == bare | weight_and_bias(*norms, *biased) | {"quantize.embedding.weight"}
    assert len(own) == 168 and own["quantize.embedding.weight"].shape == (1024, 256)
    assert own["encoder.conv_out.weight"].shape == (256, 512, 1, 1)


# ---- loading is lean -------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch
from model import LLaMA, LLaMAConfig

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

with torch.device("meta"):
    LLaMA(LLaMAConfig(n_layers=1))  # torch imports more of itself the first time
before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = LLaMA.from_pretrained({folder!r}, dtype={dtype})
running = False
thread.join()
tensors = [*model.parameters(), *model.buffers()]
print(max(peak, anonymous()) - before, sum(t.numel() * t.element_size() for t in tensors))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A LLaMA of 118 MB. Its embedding is large and in bfloat16: a check that made a copy of it would show."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LLaMAConfig(vocab_size=40000, dim=512, n_layers=12, n_heads=8, hidden_dim=1408, tie_embeddings=True)
    LLaMA(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "share"), [("None", 0.1), ("torch.float32", 1.1), ("'int8'", 1.1)])
def test_loading_needs_hardly_more_memory_than_the_model(large, dtype, share):
    """As stored, the weights stay in the file; else each is copied once. Checking for NaN costs nothing."""
    program = MEASURE.format(root=str(ROOT), folder=str(large), dtype=dtype)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, size = map(int, run.stdout.split())
    # rounding to int8 makes small copies, of which the C library keeps up to 64 MB for the next ones
    assert peak <= share * size + ("int8" in dtype) * 2**26


def test_weights_left_in_the_file_can_be_trained_and_the_file_stays_as_it_is(tmp_path):
    LLaMA(LLaMAConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=24)).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = LLaMA.from_pretrained(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert (model.norm.weight == 2).all()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- eight bits ------------------------------------------------------------------------------


def test_int8_keeps_each_weight_within_half_a_step(tmp_path):
    their_llama(SHAPES["grouped queries, tied head, llama-3 scaling"]).save_pretrained(tmp_path)
    exact, rounded = LLaMA.from_pretrained(tmp_path), LLaMA.from_pretrained(tmp_path, dtype="int8")
    weight, int8 = exact.layers[0].mlp.down_proj.weight, rounded.layers[0].mlp.down_proj
    step = weight.abs().amax(1, keepdim=True) / 127
    assert int8.weight.dtype == torch.int8
    assert ((int8.weight * int8.scale[:, None] - weight).abs() <= 0.5001 * step).all()
    ids = tokens()
    with torch.no_grad():
        assert (rounded(ids) - exact(ids)).std() < 0.05 * exact(ids).std()
    assert rounded.generate(ids[:, :4], 5).shape == (2, 9)


def test_int8_weights_are_not_saved_as_though_they_were_whole(tmp_path):
    their_llama(SHAPES["as many key as query heads"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="int8"):
        LLaMA.from_pretrained(tmp_path, dtype="int8").save_pretrained(tmp_path / "again")


# ---- fifty ways to damage a checkpoint -------------------------------------------------------


class Bomb:
    """A pickle that would run `function(*arguments)` when it is opened by one who trusts it."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def cut(name, share):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])

    return damage


def header(change):
    """Edits the JSON header of model.safetensors as text; its length is kept in step."""

    def damage(folder):
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        text = change(whole[8 : 8 + length].decode())
        file.write_bytes(struct.pack("<Q", len(text.encode("latin-1"))) + text.encode("latin-1") + whole[8 + length :])

    return damage


def flip(name, position, bits=0xFF):
    def damage(folder):
        whole = bytearray((folder / name).read_bytes())
        whole[position] ^= bits
        (folder / name).write_bytes(whole)

    return damage


def replace(name, old, new):
    def damage(folder):
        whole = (folder / name).read_bytes()
        assert old in whole
        (folder / name).write_bytes(whole.replace(old, new))

    return damage


def config(name="config.json", **changes):
    def damage(folder):
        saved = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in saved.items() if v is not Ellipsis}))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def absent(name):
    return lambda folder: (folder / name).unlink()


def weights(change, name="model.safetensors"):
    """Rewrites a weight file with `change` applied to its table."""

    def damage(folder):
        file = folder / name
        if file.suffix == ".safetensors":
            table = {k: v.clone() for k, v in load_file(file).items()}
            change(table)
            checkpoint.write_tensors(file, table)
        else:
            table = torch.load(file, weights_only=file.suffix != ".ckpt")
            change(table)
            torch.save(table, file)

    return damage


def index(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        table = json.loads(file.read_text())
        change(table["weight_map"])
        file.write_text(json.dumps(table))

    return damage


def put(name, value):
    return lambda table: table.__setitem__(name, value)


def spoil(name, value):
    return lambda table: table[name].view(-1).__setitem__(-1, value)


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
BIN, SHARD, PTH = "pytorch_model.bin", "model-00002-of-00004.safetensors", "consolidated.01.pth"


def shell(name):
    """A file `name` whose pickle would leave `it ran` behind."""
    return lambda folder: torch.save({"a": Bomb(os.mkdir, str(folder / "it ran"))}, folder / name)


def bare_pickle(name):
    """The same as a plain pickle, without torch's archive around it."""

    def damage(folder):
        (folder / name).write_bytes(pickle.dumps(Bomb(exec, f"open({str(folder / 'it ran')!r}, 'w')"), protocol=2))

    return damage


DAMAGES = [  # the folder, what happens to it, what the one line names
    ("llama_hf_lvm", cut("model.safetensors", 0), "model.safetensors"),
    ("llama_hf_lvm", cut("model.safetensors", 0.00004), "model.safetensors"),
    ("llama_hf_lvm", cut("model.safetensors", 0.01), "model.safetensors"),
    ("llama_hf_lvm", cut("model.safetensors", 0.5), "model.safetensors"),
    ("llama_hf_lvm", cut("model.safetensors", 0.9999), "model.safetensors"),
    ("llama_hf_lvm", flip("model.safetensors", 0), "model.safetensors"),
    ("llama_hf_lvm", flip("model.safetensors", 3), "model.safetensors"),
    ("llama_hf_lvm", flip("model.safetensors", 7), "model.safetensors"),
    ("llama_hf_lvm", flip("model.safetensors", 8), "model.safetensors"),
    ("llama_hf_lvm", flip("model.safetensors", 40, 0x80), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace("q_proj", "q_pr\xd6j", 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace("q_proj", "q_porj", 1)), "q_proj.weight is missing"),
    ("llama_hf_lvm", header(lambda t: t.replace('"F32"', '"F99"', 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace('"F32"', '"I32"', 1)), "is stored as torch.int32"),
    ("llama_hf_lvm", header(lambda t: t.replace('"F32"', '"F16"', 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace('"shape":[', '"shape":[-', 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace('"shape":[', '"shape":[9', 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t.replace('"data_offsets":[', '"data_offsets":[9', 1)), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: t[:-10]), "model.safetensors"),
    ("llama_hf_lvm", header(lambda t: "[1, 2]"), "model.safetensors"),
    ("llama_hf_lvm", weights(lambda t: t.pop(Q)), "layers.1.self_attn.q_proj.weight is missing"),
    ("llama_hf_lvm", weights(lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    ("llama_hf_lvm", weights(put("model.extra.weight", torch.ones(3))), "extra.weight belongs to no part of LLaMA"),
    ("llama_hf_lvm", weights(put(NORM, torch.ones(3))), "norm.weight is (3,)"),
    ("llama_hf_lvm", weights(put(Q, torch.ones(()))), "q_proj.weight is ()"),
    ("llama_hf_lvm", weights(spoil(Q, float("nan"))), "layers.1.self_attn.q_proj.weight holds NaN"),
    ("llama_hf_lvm", weights(spoil(NORM, float("-inf"))), "norm.weight holds NaN or infinity"),
    ("llama_hf_lvm", weights(put(NORM, torch.ones(32, dtype=torch.bool))), "norm.weight is stored as torch.bool"),
    ("llama_hf_lvm", weights(put(NORM, torch.ones(32).to(torch.float8_e4m3fn))), "stored as torch.float8"),
    ("llama_hf_lvm", absent("model.safetensors"), "no weights in this folder"),
    ("llama_hf_lvm", absent("config.json"), "config.json"),
    ("llama_hf_lvm", text("config.json", b'{"model_type": "lla'), "config.json"),
    ("llama_hf_lvm", text("config.json", b"\xff\xfe\x00"), "config.json"),
    ("llama_hf_lvm", text("config.json", b"[]"), "config.json"),
    ("llama_hf_lvm", config(hidden_size="32"), "hidden_size: expected a whole number"),
    ("llama_hf_lvm", config(hidden_size=...), "hidden_size is missing"),
    ("llama_hf_lvm", config(hidden_size=64), "lm_head.weight is (212, 32), expected (212, 64)"),
    ("llama_hf_lvm", config(num_attention_heads=0), "num_attention_heads 0"),
    ("llama_hf_lvm", config(num_hidden_layers=5), "layers.2."),
    ("llama_hf_lvm", config(rope_scaling=[1]), "rope_scaling"),
    ("llama_hf_lvm", config(rope_scaling={"type": "yarn"}), "yarn"),
    ("llama_hf_31", absent(SHARD), SHARD),
    ("llama_hf_31", cut(SHARD, 0.7), SHARD),
    ("llama_hf_31", index(put(NORM, "../../elsewhere.safetensors")), "elsewhere.safetensors"),
    ("llama_hf_31", index(put(NORM, 7)), "names 7"),
    ("llama_hf_31", text("model.safetensors.index.json", b'{"weight_map": 1}'), "has no table weight_map"),
    ("llama_bin", cut(BIN, 0.6), BIN),
    ("llama_bin", replace(BIN, b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), BIN),
    ("llama_bin", weights(put(Q, "text"), BIN), BIN),
    ("llama_bin", shell(BIN), BIN),
    ("llama_bin", bare_pickle(BIN), BIN),
    ("llama_meta_mp2", absent(PTH), "q_proj.weight is (16, 32), expected (32, 32)"),
    ("llama_meta_mp2", absent("consolidated.00.pth"), "consolidated.00.pth"),
    ("llama_meta_mp2", cut(PTH, 0.5), PTH),
    ("llama_meta_mp2", weights(lambda t: t.pop("norm.weight"), PTH), "norm.weight is not in every piece"),
    ("llama_meta_mp2", weights(put("layers.0.attention.wq.weight", torch.ones(3, 3)), PTH), "layers.0.attention.wq"),
    ("llama_meta_mp2", config("params.json", n_heads="4"), "n_heads: expected a whole number"),
    ("llama_meta_mp2", config("params.json", dim=...), "dim is missing"),
    ("llama_meta_mp2", config("params.json", n_heads=3), "n_heads 3"),
    ("llama_meta_mp2", shell("consolidated.00.pth"), "consolidated.00.pth"),
    ("vqgan_maskgit", config(num_embeddings=99), "quantize.embedding.weight"),
    ("vqgan_maskgit", config(channel_mult="12"), "channel_mult: expected a list"),
    ("vqgan_maskgit", config(_class_name="VAE"), "_class_name"),
    ("vqgan_maskgit", cut(BIN, 0.3), BIN),
    ("vqgan_maskgit", shell(BIN), BIN),
    ("vqgan_taming", absent("model.yaml"), ".yaml"),
    ("vqgan_taming", text("model.yaml", b"model: [1, 2"), "model.yaml"),
    ("vqgan_taming", text("model.yaml", b"!!python/object/apply:os.mkdir ['it ran']"), "model.yaml"),
    ("vqgan_taming", cut("last.ckpt", 0.5), "last.ckpt"),
    ("vqgan_taming", shell("last.ckpt"), "last.ckpt"),
]


@pytest.fixture
def damaged(tmp_path, request, monkeypatch):
    name = request.param
    golden = GOLDEN / name.replace("llama_bin", "llama_hf_lvm")
    folder = tmp_path / name
    shutil.copytree(golden, folder)
    if name == "llama_bin":
        torch.save(load_file(folder / "model.safetensors"), folder / BIN)
        (folder / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(("damaged", "damage", "named"), DAMAGES, indirect=["damaged"], ids=range(len(DAMAGES)))
def test_a_damaged_checkpoint_is_one_line_that_names_the_damage(damaged, damage, named, tmp_path):
    damage(damaged)
    with pytest.raises(UserError) as error:
        (VQGAN if "vqgan" in damaged.name else LLaMA).from_pretrained(damaged)
    assert "\n" not in str(error.value) and named in str(error.value) and str(damaged) in str(error.value)
    assert not list(tmp_path.rglob("it ran"))


def test_a_training_librarys_objects_in_a_ckpt_are_neither_imported_nor_run(tmp_path):
    """The weights beside them are read; even a class that would start a process is only an empty shell."""
    file = tmp_path / "model.ckpt"
    state = torch.load(GOLDEN / "llama_meta" / "consolidated.00.pth", weights_only=True)
    callback = Bomb(subprocess.Popen, ["mkdir", str(tmp_path / "it ran")])
    torch.save({"state_dict": state, "callbacks": [callback]}, file)
    assert checkpoint.read_tensors(file).keys() == state.keys()
    assert not (tmp_path / "it ran").exists()


def test_the_published_names_are_matched_whole():
    """No weight of ours is called as one of the entries that loaders leave out."""
    with torch.device("meta"):
        names = [*LLaMA(LLaMAConfig(n_layers=1)).state_dict(), *VQGAN(VQGANConfig()).state_dict()]
    assert not [name for name in names if re.search(r"^loss\.|inv_freq|rope\.freqs", name)]
