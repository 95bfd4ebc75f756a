"""What is promised of a published LLaMA's context and dtype: it trains and is sampled in the context that its user
sets, scaled angles mean what their users mean, and weights in several dtypes open in one."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import sample
import tasks
import train
import train_tpu
from model import LLaMA, LLaMAConfig, RopeScaling
from published.llama import in_context
from support import parallel
from support.settings import UserError
from support.token_rows import encode_row
from support.tokenizer import Tokenizer

SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES["num_attention_heads"] = 4
QUIET = ["train.eval_every=0", "train.sample_every=0", "train.compile=false", "train.dtype=float32"]
CONFIG = '[model]\nkind = "llama"\n[train]\nsteps = 2\nbatch_size = 2\n'


def published(folder, **config):
    """A folder as transformers writes it, with random weights, and the tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | config)).save_pretrained(folder)
    Tokenizer.from_pretrained("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory):
    """A model of context 8192, as SmolLM2 is."""
    return published(tmp_path_factory.mktemp("published"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def vicuna_16k(tmp_path_factory):
    """Linear scaling by 8, and the context before it: as the folders of Vicuna-16k and LongChat say it."""
    scaling = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    folder = tmp_path_factory.mktemp("vicuna")
    return published(folder, max_position_embeddings=2048, rope_parameters=scaling)


def logits(folder, tokens):
    """Ours and transformers'."""
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        return LLaMA.from_pretrained(folder)(tokens), theirs


def read_run(tmp_path, *overrides, reader=tasks.read_run):
    rows = tmp_path / "rows.jsonl"
    texts = [f"{i} bottles of beer on the wall. " * 3 for i in range(40)]
    rows.write_text("".join(encode_row(np.frombuffer(text.encode(), np.uint8).astype(np.int32)) for text in texts))
    (tmp_path / "config.toml").write_text(CONFIG)
    overrides = [f"run.dir={tmp_path / 'run'}", f'data.rows=["{rows}"]', *QUIET, *overrides]
    return reader(tmp_path / "config.toml", overrides)


def test_a_published_model_trains_in_a_shorter_context(long_llama, tmp_path):
    """Rows are packed to it, the saved configuration says it, and transformers' logits are ours."""
    config = read_run(tmp_path, f"model.init={long_llama}", "model.max_seq_len=64")
    run = train.train(*config, device="cpu")
    saved = json.loads((run / "step_00000002" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 64
    before, after = LLaMA.from_pretrained(long_llama), LLaMA.from_pretrained(run)
    assert after.config == in_context(before.config, max_seq_len=64)
    assert not torch.equal(after.embed_tokens.weight, before.embed_tokens.weight)
    ours, theirs = logits(run / "step_00000002", torch.randint(258, (2, 64)))
    assert (ours - theirs).abs().max() < 1e-5


def test_a_run_that_is_resumed_keeps_its_context(long_llama, tmp_path):
    """model.init is looked at once; from then on, the run's own context is the one to agree with."""
    shorter = [f"model.init={long_llama}", "model.max_seq_len=64"]
    train.train(*read_run(tmp_path, *shorter), device="cpu")
    run = train.train(*read_run(tmp_path, *shorter, "train.steps=4"), device="cpu")
    assert LLaMA.from_pretrained(run).config.max_seq_len == 64
    with pytest.raises(UserError, match=r"model\.max_seq_len is 32 in the configuration but 64 in"):
        train.train(*read_run(tmp_path, shorter[0], "model.max_seq_len=32", "train.steps=6"), device="cpu")


def test_in_a_longer_context_the_angles_may_be_scaled(long_llama, tmp_path, capsys):
    scaling = "model.rope_scaling={factor = 2.0, original_max_position_embeddings = 0}"
    config = read_run(tmp_path, f"model.init={long_llama}", "model.max_seq_len=16384", scaling)
    task = tasks.LLaMATask(*config, parallel.Ranks(0, 1, torch.device("cpu")), None)
    task.open_data(None)
    assert task.model.config.rope_scaling == RopeScaling(2.0, 1.0, 4.0, 0)
    assert task.rows.context == 16384
    assert "note" not in capsys.readouterr().err


def test_a_longer_context_without_scaling_is_said(capsys):
    config = LLaMAConfig(max_seq_len=2048)
    assert in_context(config, max_seq_len=4096).max_seq_len == 4096
    said = "a context of 4096 tokens; the model was made for 2048, and its rotary angles are not scaled"
    assert capsys.readouterr().err == f"note: {said}\n"


def test_the_tpu_trainer_takes_the_same_context(long_llama, tmp_path):
    s, keys = read_run(tmp_path, f"model.init={long_llama}", "model.max_seq_len=64", reader=train_tpu.read_run)
    assert train_tpu.model_config(s, keys, None).max_seq_len == 64


@pytest.mark.parametrize("change", ["model.dim=64", "model.norm_eps=1e-3", "model.vocab_size=300"])
def test_what_the_weights_decide_must_still_agree(long_llama, tmp_path, change):
    with pytest.raises(UserError, match=rf"{change.split('=')[0]} is .* in the configuration but"):
        train.train(*read_run(tmp_path, f"model.init={long_llama}", change), device="cpu")


# ---- scaled angles -----------------------------------------------------------------------------


def test_linear_scaling_stretches_the_context(vicuna_16k, tmp_path):
    """2048 · 8 = 16384, as FastChat and vLLM count; and what we save says so again."""
    llama = LLaMA.from_pretrained(vicuna_16k)
    assert llama.config.max_seq_len == 16384
    ours, theirs = logits(vicuna_16k, torch.randint(258, (1, 3000)))
    assert (ours - theirs).abs().max() < 1e-5
    llama.save_pretrained(tmp_path)
    assert LLaMA.from_pretrained(tmp_path).config == llama.config
    ours, theirs = logits(tmp_path, torch.randint(258, (1, 300)))
    assert (ours - theirs).abs().max() < 1e-5


LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}
CONTEXTS = {  # what people's files say: what they mean
    "the context before the scaling": ({"max_position_embeddings": 4096} | LINEAR, 16384),
    "and after it, as Vicuna-16k": ({"max_position_embeddings": 4096, "max_sequence_length": 16384} | LINEAR, 16384),
    "only the one after it": ({"max_position_embeddings": 16384, "max_sequence_length": 16384} | LINEAR, 16384),
    "neither: transformers' 2048": (LINEAR, 8192),
    "no scaling": ({"max_position_embeddings": 131072, "rope_scaling": None}, 131072),
}


@pytest.mark.parametrize(("saved", "context"), CONTEXTS.values(), ids=CONTEXTS)
def test_the_context_that_a_configuration_means(vicuna_16k, tmp_path, saved, context):
    config = json.loads((vicuna_16k / "config.json").read_text())
    del config["rope_parameters"], config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | saved))
    (tmp_path / "model.safetensors").symlink_to(vicuna_16k / "model.safetensors")
    assert LLaMA.from_pretrained(tmp_path).config.max_seq_len == context


def test_a_context_that_the_factor_does_not_divide_survives_saving(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 0)
    shape = {"vocab_size": 20, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    LLaMA(LLaMAConfig(**shape, max_seq_len=100, rope_scaling=scaling)).save_pretrained(tmp_path)
    assert LLaMA.from_pretrained(tmp_path).config.max_seq_len == 100


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_other_scalings_are_refused_by_name(vicuna_16k, tmp_path, kind):
    config = json.loads((vicuna_16k / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(vicuna_16k / "model.safetensors")
    with pytest.raises(UserError, match=f"rope_parameters: rope type '{kind}' is not supported"):
        LLaMA.from_pretrained(tmp_path)


# ---- sampling ----------------------------------------------------------------------------------


def test_a_prompt_may_fill_the_context_that_is_asked_for(long_llama, program):
    """Without it, the model's own; with it, one that is shorter, or longer and said to be."""
    ask = ["text", "--run", long_llama, "--prompt", "a" * 20, "--max-new", 3, "--seed", 1]
    assert program(sample.main, *ask)[0] == 0
    code, _, err = program(sample.main, *ask, "--context", 16)
    assert code == 2 and "fill the model's context of 16" in err
    code, _, err = program(sample.main, *ask, "--context", 9000)
    assert code == 0 and "note: a context of 9000 tokens; the model was made for 8192" in err


def test_perplexity_reads_no_further_than_the_context(long_llama, program, tmp_path):
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text()[:500])
    _, out, _ = program(
        sample.main, "perplexity", "--run", long_llama, "--input", tmp_path / "text.txt", "--context", 32
    )
    assert "seen through a window of 32" in out


# ---- several dtypes ----------------------------------------------------------------------------


def with_dtypes(folder, path, name, others, **config):
    """A copy of `folder`: norms and head in `name`, the rest in `others`; config: more of config.json."""
    tensors = load_file(folder / "model.safetensors")
    path.mkdir(exist_ok=True)
    kept = {k: v.to(name if "norm" in k or k == "lm_head.weight" else others) for k, v in tensors.items()}
    save_file(kept, path / "model.safetensors")
    saved = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "dtype"} | config))
    return path


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float16),  # the commonest
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),  # what config.json names, before transformers 4.56
        ({"dtype": "float32"}, torch.float32),  # … and since
        ({"torch_dtype": "auto"}, torch.float16),
    ],
)
def test_weights_in_several_dtypes_open_in_one(long_llama, tmp_path, capsys, config, dtype):
    """A merged QLoRA: the head and the norms stayed in float32."""
    path = with_dtypes(long_llama, tmp_path / "merged", torch.float32, torch.float16, **config)
    llama = LLaMA.from_pretrained(path)
    assert {weight.dtype for weight in llama.parameters()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    assert capsys.readouterr().err == f"{path}: weights in float16 and float32: all are read as {name}\n"
    assert llama(torch.randint(258, (1, 8))).isfinite().all()


def test_what_is_asked_for_goes_before(long_llama, tmp_path, capsys):
    path = with_dtypes(long_llama, tmp_path / "merged", torch.float32, torch.float16)
    llama = LLaMA.from_pretrained(path, dtype=torch.float32)
    assert {weight.dtype for weight in llama.parameters()} == {torch.float32}
    assert capsys.readouterr().err == ""
    ours = llama(torch.arange(8)[None])
    int8 = LLaMA.from_pretrained(path, dtype="int8")(torch.arange(8)[None])
    assert (ours - int8).abs().max() < 0.02 * ours.abs().max()


def test_weights_in_one_dtype_stay_as_stored_whatever_the_configuration_names(long_llama, tmp_path, capsys):
    path = with_dtypes(long_llama, tmp_path / "half", torch.float16, torch.float16, torch_dtype="float32")
    assert LLaMA.from_pretrained(path).lm_head.weight.dtype == torch.float16
    assert capsys.readouterr().err == ""
