"""What model.py promises: the reference's numbers, its file layout, and a sampler that does what each knob says."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file

from model import (
    SIZES,
    LLaMA,
    LLaMAConfig,
    RopeScaling,
    rotary_angles,
    rotate,
    sample_token,
)
from published.llama import HF_NAMES, config_from_hf
from support import checkpoint, settings
from support.settings import UserError

TINY = LLaMAConfig(vocab_size=20, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, max_seq_len=32)
GOLDEN_LLAMAS = ("llama_hf_lvm", "llama_hf_31", "llama_meta", "llama_meta_mp2")  # of Meta's: whole, and in two pieces


def tiny(seed=0, **changes):
    """A LLaMA with weights large enough that its predictions differ clearly."""
    torch.manual_seed(seed)
    model = LLaMA(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(15)
    return model


def config_of(saved):
    """What a config.json means."""
    return settings.build(LLaMAConfig, config_from_hf(saved))


def prompt(batch=2, length=5, seed=0):
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=GOLDEN_LLAMAS)
def golden(request):
    """(model, what the reference implementation made of the same weights)."""
    folder = GOLDEN / request.param
    return LLaMA.from_pretrained(folder), load_file(folder / "io.safetensors")


# ---- as published ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lvm_100m", 116_974_720),
        ("lvm_300m", 290_968_576),
        ("lvm_600m", 648_396_288),
        ("lvm_1b", 1_147_119_616),
        ("lvm_3b", 3_274_742_400),
        ("lvm_7b", 6_544_199_680),
        ("lvm_13b", 12_773_094_400),
        ("lvm_20b", 20_722_710_528),
        ("lvm_30b", 32_213_342_720),
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_a_named_size_has_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.named(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"lvm_100m.*lvm_30b"):
        LLaMAConfig.named("lvm_2b")
    assert all(LLaMAConfig.named(name).max_seq_len >= 2048 for name in SIZES)


def test_logits_are_the_references(golden):
    model, io = golden
    with torch.no_grad():
        assert (model(io["tokens"]) - io["logits"]).abs().max() <= 1e-4


def test_greedy_tokens_are_the_references(golden):
    model, io = golden
    drawn = model.generate(io["tokens"], io["greedy_ids"].shape[1], temperature=0)
    assert torch.equal(drawn[:, io["tokens"].shape[1] :], io["greedy_ids"])


def test_saving_and_loading_changes_no_bit(golden, tmp_path):
    """From whatever layout it came."""
    model, _ = golden
    model.save_pretrained(tmp_path)
    again = LLaMA.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama_hf_lvm", "llama_hf_31"])
def test_a_hugging_face_folder_is_saved_with_the_same_keys_and_bits(name, tmp_path):
    LLaMA.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    published, saved = (checkpoint.read_tensors(folder) for folder in (GOLDEN / name, tmp_path))
    assert saved.keys() == {name for name in published if not name.endswith("inv_freq")}
    assert all(torch.equal(saved[name], published[name]) for name in saved)


@pytest.mark.parametrize("name", ["llama_hf_lvm", "llama_hf_31"])
def test_old_and_new_configurations_of_one_model_mean_the_same(name):
    """config.json of the 4.2x years, and as transformers 5 writes it."""
    old, new = (json.loads((GOLDEN / name / f"config{era}.json").read_text()) for era in ("", ".transformers5"))
    assert config_of(old) == config_of(new)


def test_a_file_says_what_wrote_it(tmp_path):
    """transformers refuses safetensors without this entry."""
    tiny().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_loading_keeps_the_stored_dtype_unless_told(tmp_path):
    tiny().bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert LLaMA.from_pretrained(tmp_path).norm.weight.dtype == torch.bfloat16
    assert LLaMA.from_pretrained(tmp_path, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_a_tied_head_has_no_key_of_its_own(tmp_path):
    tiny(tie_embeddings=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert LLaMA.from_pretrained(tmp_path).config.tie_embeddings
    # some files carry the tied weight twice
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    checkpoint.write_tensors(tmp_path / "model.safetensors", twice)
    model = LLaMA.from_pretrained(tmp_path)
    assert torch.equal(model.logits(torch.eye(16)), model.embed_tokens.weight.T)


def test_a_new_model_starts_as_published():
    """Every matrix and embedding N(0, 0.02), every norm 1."""
    torch.manual_seed(0)
    for name, weight in LLaMA(dataclasses.replace(TINY, dim=64, vocab_size=512)).named_parameters():
        if weight.ndim == 2:
            assert abs(weight.std() - 0.02) < 0.002 and abs(weight.mean()) < 0.002, name
        else:
            assert (weight == 1).all(), name


# ---- config.json -----------------------------------------------------------------------------


def test_a_config_of_2023_lacks_what_later_ones_say():
    """No num_key_value_heads, no rope_theta: as many as query heads, 10000."""
    config = config_of(json.loads((GOLDEN / "llama_hf_lvm" / "config.json").read_text()))
    assert (config.n_kv_heads, config.rope_theta, config.head_dim, config.rope_scaling) == (4, 10000.0, 8, None)


def test_transformers_5_keeps_rotary_settings_in_one_table():
    old = json.loads((GOLDEN / "llama_hf_31" / "config.json").read_text())
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "float32", "rope_parameters": old["rope_scaling"] | {"rope_theta": old["rope_theta"]}}
    assert config_of(new) == config_of(old)
    assert config_of(old).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    plain = {k: v for k, v in new.items() if k != "rope_parameters"}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    assert config_of(plain).rope_theta == 7.0 and config_of(plain).rope_scaling is None


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias is True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 is supported"),
        ({"rope_interleaved": True}, "rope_interleaved is True; only False is supported"),
        ({"sliding_window": 4096}, "sliding_window is 4096; only None is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None is supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling: rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": [1]}}, "rope_scaling: rope type [1] is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor does not belong to rope type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling: factor 0.0 must be greater than 0"),
        ({"rope_scaling": ROPE | {"low_freq_factor": None}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, "rope_scaling: high_freq_factor 1.0 must be greater than"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "rope_parameters: partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta: expected a number, got '1e4'"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 32"),
    ],
)
def test_a_config_we_do_not_implement_is_refused(change, expected):
    saved = json.loads((GOLDEN / "llama_hf_lvm" / "config.json").read_text())
    with pytest.raises(UserError) as error:
        config_of(saved | change)
    assert str(error.value).startswith(f"config.json: {expected}")


WRONG = (0, -1, 10**12, 10**30, 1.5, math.nan, math.inf, "8", True, [8], {"a": 1})
ACCEPTED = {  # of these, where they mean something
    "n_kv_heads": (0,),
    "head_dim": (0,),
    "norm_eps": (10**12, 1.5),
    "rope_theta": (10**12, 1.5),
    "tie_embeddings": (True,),
}


@pytest.mark.parametrize("name", [*HF_NAMES, "rope_scaling"])
def test_a_wrong_number_is_one_line_in_toml_and_in_json_alike(name):
    toml = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    theirs = HF_NAMES.get(name, name)
    saved = json.loads((GOLDEN / "llama_hf_lvm" / "config.json").read_text())
    for value in WRONG:
        if (type(value), value) in [(type(good), good) for good in ACCEPTED.get(name, ())]:
            config_of(saved | {theirs: value})
            continue
        with pytest.raises(UserError) as in_toml:
            settings.build(LLaMAConfig, toml | {name: value}, "model")
        with pytest.raises(UserError) as in_json:
            config_of(saved | {theirs: value})
        assert name in str(in_toml.value) and theirs in str(in_json.value)
        assert "\n" not in str(in_toml.value) + str(in_json.value)


# ---- rotary embedding ------------------------------------------------------------------------


def scores(positions_q, positions_k, config=TINY):
    """q·k of one fixed pair, turned to these positions."""
    q, k = torch.randn(2, config.head_dim, generator=torch.Generator().manual_seed(0)).unbind()
    q, k = (
        rotate(x.expand(1, 1, len(p), -1), rotary_angles(p, config)) for x, p in ((q, positions_q), (k, positions_k))
    )
    return (q * k).sum(-1).flatten()


def test_scores_depend_on_the_distance_only():
    """Shifting both positions changes nothing; changing one of them does."""
    p = torch.arange(8)
    torch.testing.assert_close(scores(p + 3, p), scores(p + 20, p + 17), rtol=0, atol=1e-5)
    assert (scores(p + 3, p) - scores(p + 4, p)).abs().min() > 1e-2


def test_all_4096_positions_stay_distinct():
    """In bfloat16 they would not: this is why angles are float32 whatever the model's dtype."""
    cos, sin = rotary_angles(torch.arange(4096), LLaMAConfig())
    angle = torch.atan2(sin, cos)  # (T, E/2): the slowest pair does not turn round once
    assert angle.dtype == torch.float32 and len(angle[:, -1].unique()) == 4096


def test_llama_3_scaling_stretches_long_wavelengths_only():
    """Pairs that turn often within the original context stay; those that hardly turn, turn `factor` times slower."""
    plain = LLaMAConfig(dim=64, n_heads=1, hidden_dim=64)
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    scaled = dataclasses.replace(plain, rope_scaling=scaling)
    before, after = (torch.atan2(*reversed(rotary_angles(torch.tensor([1]), c)))[0].double() for c in (plain, scaled))
    turns = 64 * before / (2 * torch.pi)  # of each pair, in the original context
    ratio = before / after
    assert torch.allclose(ratio[turns > 4], torch.ones_like(ratio[turns > 4]), atol=1e-4)
    assert torch.allclose(ratio[turns < 1], torch.full_like(ratio[turns < 1], 8), atol=1e-3)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and (between > 1).all() and (between < 8).all() and (between.diff() > 0).all()


# ---- attention -------------------------------------------------------------------------------


def reference_attention(q, k, v, visible):
    """softmax(q·kᵀ/√E)·v, the slow and obvious twin of the fused one. visible (T, S): who sees whom."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_the_slow_obvious_attention_equals_the_fused_one(n_kv_heads):
    """Each group of H/K query heads looks at the same keys and values."""
    attention = tiny(n_kv_heads=n_kv_heads).layers[0].self_attn
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(torch.arange(7), TINY)
    q, k, v = (f(x).view(2, 7, -1, 4).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    k, v = (t.repeat_interleave(4 // n_kv_heads, dim=1) for t in (rotate(k, angles), v))
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    h = reference_attention(rotate(q, angles), k, v, visible)  # (B, H, T, E)
    slow = attention.o_proj(h.transpose(1, 2).reshape(2, 7, 16))
    torch.testing.assert_close(attention(x, angles), slow, rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one():
    model, tokens = tiny(), prompt(1, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % TINY.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [5, 1, 2]])
def test_decoding_with_a_cache_equals_decoding_without(pieces):
    """However the tokens arrive: all at once, one by one, or in pieces."""
    model, tokens = tiny(), prompt(2, 8)
    caches = model.caches(2, 8)
    with torch.no_grad():
        embeddings = model.embed_tokens(tokens).split(pieces, dim=1)
        hidden = torch.cat([model.hidden(piece, caches) for piece in embeddings], dim=1)
        torch.testing.assert_close(model.logits(hidden), model(tokens), rtol=1e-5, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recomputes in (False, True):
        model = tiny().train()
        model.activation_checkpointing = recomputes
        model(prompt()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# ---- generation ------------------------------------------------------------------------------


def greedy_by_hand(model, tokens, count):
    """The obvious way: the whole sentence through the model for every token."""
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_every_extreme_setting_is_arg_max(options):
    model, tokens = tiny(), prompt()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(model.generate(tokens, 10, generator=generator, **options), greedy_by_hand(model, tokens, 10))


def test_a_seed_repeats_and_another_does_not():
    model, tokens = tiny(), prompt()
    a, b, c = (model.generate(tokens, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:, :5], tokens) and a.shape == (2, 17)


def test_only_allowed_ids_are_drawn():
    model, tokens = tiny(), prompt()
    for temperature in (0, 1, 5):
        drawn = model.generate(tokens, 12, temperature, allowed=[3, 4, 7])[:, 5:]
        assert set(drawn.unique().tolist()) <= {3, 4, 7}
    assert torch.equal(model.generate(tokens, 4, 0, allowed=range(20)), model.generate(tokens, 4, 0))


def test_a_row_that_drew_eos_repeats_it_until_all_have():
    model, tokens = tiny(), prompt(4)
    free = model.generate(tokens, 20, temperature=0)[:, 5:]
    eos = int(free[0, 2])  # row 0 draws it third at the latest
    ends = [int((row == eos).nonzero()[0]) if (row == eos).any() else 20 for row in free]
    drawn = model.generate(tokens, 20, temperature=0, eos=eos)[:, 5:]
    assert drawn.shape[1] == min(20, max(ends) + 1)
    for row, own, end in zip(drawn, free, ends, strict=True):
        assert torch.equal(row[: end + 1], own[: min(end + 1, drawn.shape[1])]) and (row[end:] == eos).all()
    alone = model.generate(tokens[:1], 20, temperature=0, eos=eos)
    assert alone.shape[1] == 5 + ends[0] + 1  # nothing left to wait for


@pytest.mark.parametrize(("length", "new"), [(30, 3), (0, 1), (33, 0)])
def test_what_does_not_fit_the_context_is_refused(length, new):
    with pytest.raises(UserError, match=f"{length} prompt tokens . {new} new ones do not fit in 1..32"):
        tiny().generate(prompt(1, length), new)
    assert tiny().generate(prompt(1, 30), 2).shape == (1, 32)  # up to the last place


def frequencies(logits, **options):
    """How often each id is drawn, of 20000."""
    logits = logits.expand(20_000, -1)
    drawn = sample_token(logits, generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn.flatten(), minlength=logits.shape[1]) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),  # p² / Σp²
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.49}, [1, 0, 0, 0]),  # the first alone has that mass
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.25, 0.125, 0.125]),
    ],
)
def test_ids_are_drawn_as_often_as_they_should(options, expected):
    """Logits log(4, 2, 1, 1); the standard error of 20000 draws is below 0.004."""
    found = frequencies(torch.tensor([4.0, 2.0, 1.0, 1.0]).log(), **options)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=0.015)
    assert all(f == 0 for f, e in zip(found, expected, strict=True) if e == 0)
