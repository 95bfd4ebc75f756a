"""What vqgan.py promises: three published architectures to the last tensor, and losses that say what they claim."""

import dataclasses
import json
import math
import shutil

import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from einops import rearrange
from safetensors.torch import load_file
from torch import nn

import published.vqgan
import vqgan
from support import checkpoint, settings
from support.settings import UserError
from vqgan import VQGAN, Discriminator, VQGANConfig, VQGANLoss, VQGANLossConfig

TINY = VQGANConfig(
    resolution=8, hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=6,
    num_embeddings=16, quantized_embed_dim=4,
)  # fmt: skip
LAYOUTS = {
    "muse": (VQGANConfig(), 146_244_675, 277),
    "maskgit": (
        VQGANConfig(
            layout="maskgit", channel_mult=(1, 1, 2, 2, 4), z_channels=256, quantized_embed_dim=256, num_embeddings=1024
        ),
        54_515_587,
        168,
    ),
    "taming": (
        VQGANConfig(
            layout="taming", channel_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), no_attn_mid_block=False,
            z_channels=256, quantized_embed_dim=256, num_embeddings=1024,
        ),
        72_141_699,
        343,
    ),
}  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=2, side=8, seed=0):
    return torch.rand(count, 3, side, side, generator=seeded(seed))


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = VQGAN(VQGANConfig(**vars(TINY) | changes))
    nn.init.normal_(model.quantize.embedding.weight)  # far apart, so that many are used
    return model


GOLDEN_FILES = {
    "muse without attention": "vqgan_muse_noattn/pytorch_model.bin",
    "muse": "vqgan_muse_attn/weights.safetensors",
    "maskgit": "vqgan_maskgit/pytorch_model.bin",
    "taming": "vqgan_taming/last.ckpt",
}


@pytest.fixture(scope="module", params=GOLDEN_FILES)
def golden(request):
    """(model, what the reference implementation made of the same weights, pixels in [0, 1])."""
    file = GOLDEN / GOLDEN_FILES[request.param]
    io = load_file(file.parent / "io.safetensors")
    if request.param == "taming":  # its pixels are in [-1, 1]
        io |= {name: (io[name] + 1) / 2 for name in ("input_pixels", "recon", "decoded_from_codes")}
    return VQGAN.from_pretrained(file), io


# ---- as published ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_published_number_of_weights(layout):
    config, parameters, tensors = LAYOUTS[layout]
    with torch.device("meta"):
        model = VQGAN(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    assert config.factor == 16 and model.grid(256) == (16, 16)


@torch.no_grad()
def test_latents_and_codes_are_the_references(golden):
    model, io = golden
    assert (model.latents(io["input_pixels"]) - io["latents"]).abs().max() <= 1e-4
    assert torch.equal(model.encode(io["input_pixels"]).flatten(1), io["codes"])


@torch.no_grad()
def test_pictures_are_the_references(golden):
    """From pixels and from given codes; the reference does not clamp."""
    model, io = golden
    reconstruction, _, _ = model(io["input_pixels"])
    assert (reconstruction - io["recon"]).abs().max() <= 1e-4
    codes = rearrange(io["input_codes"], "b (h w) -> b h w", h=math.isqrt(io["input_codes"].shape[1]))
    vectors = model.quantize.lookup(codes)
    assert (model.pixels(vectors) - io["decoded_from_codes"]).abs().max() <= 1e-4
    decoded = model.decode(codes)
    assert (decoded - io["decoded_from_codes"].clamp(0, 1)).abs().max() <= 1e-4


@torch.no_grad()
def test_the_codebook_loss_has_the_references_value(golden):
    """β sits on the other term there (a known slip), which the forward value does not show."""
    model, io = golden
    vectors, _, losses = model.quantize(io["latents"])
    assert (vectors - io["quantized"]).abs().max() <= 1e-4
    torch.testing.assert_close(losses["codebook"] + losses["commitment"], io["codebook_loss"][0], rtol=1e-4, atol=0)


def test_saving_and_loading_changes_no_bit(golden, tmp_path, request):
    """In both files we write; the keys are the published ones, without taming's `loss.*`."""
    model, _ = golden
    model.save_pretrained(tmp_path)
    published = checkpoint.read_tensors(GOLDEN / GOLDEN_FILES[request.node.callspec.params["golden"]])
    published = {name: tensor for name, tensor in published.items() if not name.startswith("loss.")}
    for file in ("model.safetensors", "pytorch_model.bin"):
        saved = checkpoint.read_tensors(tmp_path / file)
        assert saved.keys() == published.keys()
        assert all(torch.equal(saved[name], published[name]) for name in published)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_our_config_says_all_that_the_published_one_says(tmp_path):
    folder = GOLDEN / "vqgan_muse_noattn"
    VQGAN.from_pretrained(folder).save_pretrained(tmp_path)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert {key: ours.get(key) for key in theirs} == theirs


def test_training_one_weight_of_a_loaded_model_moves_no_other():
    """The golden files keep many weights as overlapping windows of one storage."""
    model = VQGAN.from_pretrained(GOLDEN / "vqgan_muse_noattn")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.decoder.conv_in.weight.add_(1)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["decoder.conv_in.weight"]


@pytest.mark.parametrize("change", [{"_class_name": "VQVAE"}, {"hidden_channels": 48}, {"num_embeddings": 99}])
def test_a_folder_that_contradicts_itself_is_one_line(tmp_path, change):
    tiny().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | change))
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        VQGAN.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def read_config(name, change, tmp_path):
    """The configuration of a golden folder with `change` in it → a VQGANConfig."""
    folder = tmp_path / name
    if not folder.exists():
        shutil.copytree(GOLDEN / name, folder)
    if name == "vqgan_taming":
        saved = checkpoint.read_yaml(GOLDEN / name / "model.yaml")
        params = saved["model"]["params"]
        shared = change.keys() & {"n_embed", "embed_dim", "remap", "sane_index_shape"}
        params |= {key: change[key] for key in shared}
        params["ddconfig"] |= {key: change[key] for key in change.keys() - shared}
        (folder / "model.yaml").write_text(json.dumps(saved))  # JSON is YAML
    else:
        saved = json.loads((GOLDEN / name / "config.json").read_text()) | change
        saved = {key: value for key, value in saved.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(saved))
    fields, _, _ = published.vqgan.read(folder)
    return settings.build(VQGANConfig, fields)


HONOURED = {  # a second legal value of each published field that our models can follow
    "resolution": 512, "num_channels": 1, "hidden_channels": 64, "channel_mult": [1, 2], "num_res_blocks": 3,
    "attn_resolutions": [8], "z_channels": 16, "num_embeddings": 64, "quantized_embed_dim": 16,
    "commitment_cost": 1.0,
}  # fmt: skip
REFUSED = {
    "dropout": 0.1, "resample_with_conv": False, "decoder_res_blocks": 3, "extra_mid_res_blocks": 1,
    "decoder_hidden_channels": 64, "decoder_channel_mult": [1, 2], "spectral_norm": True,
}  # fmt: skip
TAMING_REFUSED = {
    "double_z": True, "dropout": 0.1, "resamp_with_conv": False, "give_pre_end": True, "out_ch": 6,
    "attn_type": "none", "use_linear_attn": True, "tanh_out": True, "remap": "used.npy", "spectral_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["vqgan_muse_noattn", "vqgan_maskgit"])
def test_every_field_of_a_published_config_is_honoured_or_refused_by_name(tmp_path, name):
    honoured = HONOURED | ({"no_attn_mid_block": False} if "muse" in name else {})
    for key, value in honoured.items():
        found = getattr(read_config(name, {key: value}, tmp_path), key)
        assert found == (tuple(value) if isinstance(value, list) else value), key
    for key, value in REFUSED.items():
        with pytest.raises(UserError, match=f"config.json: .*{key}"):
            read_config(name, {key: value}, tmp_path)


def test_every_field_of_tamings_config_is_honoured_or_refused_by_name(tmp_path):
    names = published.vqgan.TAMING_NAMES
    for ours, theirs in names.items():
        value = HONOURED[ours]
        both = {"in_channels": 1, "out_ch": 1} if theirs == "in_channels" else {theirs: value}
        found = getattr(read_config("vqgan_taming", both, tmp_path), ours)
        assert found == (tuple(value) if isinstance(value, list) else value), theirs
    for key, value in TAMING_REFUSED.items():
        with pytest.raises(UserError, match=f"model.yaml: .*{key}"):
            read_config("vqgan_taming", {key: value}, tmp_path)
    read_config("vqgan_taming", {"sane_index_shape": True}, tmp_path)  # only shapes what their encode returns


WRONG = [0, -1, 2**40, float("nan"), float("inf"), None, "many", [], [[]], ["x"], [0], [2**40], {}, True, 1.5]


@pytest.mark.parametrize("name", ["vqgan_muse_noattn", "vqgan_maskgit", "vqgan_taming"])
def test_a_wrong_value_is_one_line_that_names_file_and_key(tmp_path, name):
    names = published.vqgan.TAMING_NAMES if "taming" in name else dict(zip(HONOURED, HONOURED, strict=True))
    file = "model.yaml" if "taming" in name else "config.json"
    for ours, key in names.items():
        right = {"attn_resolutions": ([],), "commitment_cost": (0, 1.5, 2**40)}.get(ours, ())
        for value in WRONG:
            if any(value == fine and type(value) is type(fine) for fine in right):
                continue
            with pytest.raises(UserError) as error:
                read_config(name, {key: value, "out_ch": value} if key == "in_channels" else {key: value}, tmp_path)
            message = str(error.value)
            assert f"{file}: " in message and key in message and "\n" not in message, (key, value, message)


def test_a_field_that_is_left_out_has_the_published_default(tmp_path):
    everything = dict.fromkeys(HONOURED, "absent") | {"no_attn_mid_block": "absent"}
    config = read_config("vqgan_muse_noattn", everything, tmp_path)
    assert (config.channel_mult, config.attn_resolutions, config.num_embeddings) == ((1, 1, 2, 2, 4), (16,), 1024)
    assert not config.no_attn_mid_block and config.z_channels == 256


def test_another_kind_of_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="llama_hf_lvm: holds a LLaMA, but a VQGAN is wanted"):
        VQGAN.from_pretrained(GOLDEN / "llama_hf_lvm")
    taming = tmp_path / "taming"
    shutil.copytree(GOLDEN / "vqgan_taming", taming)
    yaml = (taming / "model.yaml").read_text()
    (taming / "model.yaml").write_text(yaml.replace("models.vqgan.VQModel", "models.vqgan.GumbelVQ"))
    with pytest.raises(UserError, match=r"model\.yaml: target is a GumbelVQ"):
        VQGAN.from_pretrained(taming)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_openmuse_cannot_do_is_not_written_under_its_name(tmp_path, layout):
    model = tiny(layout=layout, fold=2, z_channels=4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["_class_name"], saved["layout"], saved["fold"]) == ("PicturebookVQGAN", layout, 2)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again.encode(images()), model.encode(images()))
    assert checkpoint.what_is(tmp_path) == "a VQGAN"
    tiny(layout=layout, z_channels=4).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == published.vqgan.CLASS_NAMES[layout] and "layout" not in saved


def test_a_run_from_before_that_name_still_opens(tmp_path):
    """It has fold = 2 under openMUSE's name."""
    model = tiny(fold=2)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved.pop("layout")
    (tmp_path / "config.json").write_text(json.dumps(saved | {"_class_name": "VQGANModel"}))
    assert VQGAN.from_pretrained(tmp_path).config == model.config


def test_a_field_that_a_fork_adds_is_saved_and_read_back(tmp_path, monkeypatch):
    fork = dataclasses.make_dataclass("Fork", [("gamma", float, 1.0)], bases=(VQGANConfig,), frozen=True)
    monkeypatch.setattr(vqgan, "VQGANConfig", fork)
    for gamma, name in ((2.0, "PicturebookVQGAN"), (1.0, "VQGANModel")):
        VQGAN(fork(**vars(TINY), gamma=gamma)).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == name
        assert VQGAN.from_pretrained(tmp_path).config.gamma == gamma


def test_maskgits_middle_has_as_many_blocks_as_a_level():
    for blocks in (1, 2, 3):
        model = tiny(layout="maskgit", z_channels=4, num_res_blocks=blocks)
        assert len(model.encoder.mid) == len(model.decoder.mid) == len(model.encoder.down[0].block) == blocks


# ---- codes -----------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_gives_the_codes_that_forward_uses():
    model = tiny()
    codes = model.encode(images())
    reconstruction, used, _ = model(images())
    assert torch.equal(codes, used) and codes.shape == (2, 4, 4) and len(codes.unique()) > 3
    torch.testing.assert_close(model.decode(codes), reconstruction.clamp(0, 1))


@pytest.mark.parametrize("z_channels", [4, 6])
def test_a_code_is_the_nearest_entry(z_channels):
    quantize = tiny(z_channels=z_channels).quantize
    z = torch.randn(2, 4, 3, 3, generator=seeded())
    _, codes, _ = quantize(z)
    points = z.permute(0, 2, 3, 1).reshape(-1, 1, 4)  # (B·h·w, 1, D)
    nearest = (points - quantize.embedding.weight).square().sum(-1).argmin(1)
    assert torch.equal(codes.flatten(), nearest)


def test_pictures_of_other_sizes_work_if_they_are_whole_codes():
    model = tiny()
    assert model.encode(torch.rand(1, 3, 6, 10)).shape == (1, 3, 5)  # 2 pixels a code
    with pytest.raises(UserError, match="7×8 has no whole number of codes: its sides must be multiples of 2"):
        model.encode(torch.rand(1, 3, 8, 7))


def test_folding_trades_resolution_for_channels():
    """fold 2: before the first convolution 2×2 pixels become 12 channels, after the last one the reverse."""
    model = tiny(fold=2)
    assert model.encoder.conv_in.weight.shape[1] == model.decoder.conv_out.weight.shape[0] == 12
    assert model.config.factor == 4 and model.grid(8) == (2, 2)
    reconstruction, codes, _ = model(images())
    assert codes.shape == (2, 2, 2) and reconstruction.shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="multiples of 4"):
        model.encode(images(side=10))
    with pytest.raises(ValueError, match="resolution 10 must be a multiple of 4"):
        VQGANConfig(**vars(TINY) | {"fold": 2, "resolution": 10})


def test_openmuse_skips_a_lone_attention_and_taming_does_not():
    """With one block a level, openMUSE keeps the encoder's attention weights but never applies them."""
    for layout, attends in (("muse", False), ("taming", True)):
        level = tiny(layout=layout, attn_resolutions=(8,)).encoder.down[0]
        x = torch.randn(1, 32, 8, 8, generator=seeded())
        alone = level.block[0](x)
        assert len(level.attn) == 1 and torch.equal(level(x), alone) != attends


def test_only_taming_works_in_minus_one_to_one():
    model = tiny(layout="taming")
    pixels = model.decoder(model.post_quant_conv(torch.ones(1, 4, 4, 4)))
    assert torch.equal(model.pixels(torch.ones(1, 4, 4, 4)), (pixels + 1) / 2)
    assert torch.equal(model.latents(images()), model.quant_conv(model.encoder(2 * images() - 1)))


# ---- the quantizer's gradients ---------------------------------------------------------------


def test_gradients_pass_the_quantizer_as_though_it_were_not_there():
    quantize = tiny().quantize
    z = torch.randn(2, 4, 3, 3, generator=seeded(), requires_grad=True)
    vectors, codes, _ = quantize(z)
    torch.testing.assert_close(vectors, quantize.lookup(codes))  # forward: the entries
    upstream = torch.randn(vectors.shape, generator=seeded(1))
    vectors.backward(upstream)
    assert torch.equal(z.grad, upstream)  # backward: straight through
    assert quantize.embedding.weight.grad is None


def test_beta_multiplies_the_commitment_only():
    """The codebook term moves entries and not z, the commitment term z and not entries; β scales the second."""
    gradients = {}
    for beta in (0.25, 1.0):
        quantize = tiny(commitment_cost=beta).quantize
        z = torch.randn(2, 4, 3, 3, generator=seeded(), requires_grad=True)
        _, _, losses = quantize(z)
        for name in ("codebook", "commitment"):
            inputs = (z, quantize.embedding.weight)
            gradients[name, beta] = torch.autograd.grad(losses[name], inputs, allow_unused=True)
    assert gradients["codebook", 0.25][0] is None and gradients["commitment", 0.25][1] is None
    assert torch.equal(gradients["codebook", 0.25][1], gradients["codebook", 1.0][1])
    torch.testing.assert_close(4 * gradients["commitment", 0.25][0], gradients["commitment", 1.0][0])


def test_dead_entries_move_onto_vectors_of_the_batch():
    z = torch.randn(2, 4, 2, 2, generator=seeded())
    vectors = {tuple(v.tolist()) for v in z.permute(0, 2, 3, 1).reshape(-1, 4)}
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 5, 11]] = True
    weights = []
    for _ in range(2):
        quantize = tiny().quantize
        before = quantize.embedding.weight.detach().clone()
        quantize.revive_dead_codes(dead, z, seeded(3))
        weights.append(quantize.embedding.weight.detach())
    assert torch.equal(weights[0][~dead], before[~dead])
    moved = {tuple(v.tolist()) for v in weights[0][dead]}
    assert len(moved) == 3 and moved <= vectors
    assert torch.equal(*weights)  # the generator alone decides
    quantize.revive_dead_codes(torch.ones(16, dtype=torch.bool), z, seeded())
    assert (quantize.embedding.weight[8:] == before[8:])[~dead[8:]].all()  # 8 vectors cannot serve 16


def test_usage_counts_entries_and_how_evenly_they_are_used():
    one = torch.zeros(64)
    one[7] = 500
    assert vqgan.usage(torch.full((64,), 3)) == pytest.approx((1, 64), rel=1e-5)
    assert vqgan.usage(one) == pytest.approx((1 / 64, 1), rel=1e-5)
    assert vqgan.usage(torch.tensor([2, 2, 0, 0])) == pytest.approx((0.5, 2), rel=1e-5)


# ---- losses ----------------------------------------------------------------------------------


def test_entropy_loss_wants_sure_samples_and_a_diverse_batch():
    """Mean entropy per sample minus entropy of the mean: 0 where all agree, -log 2 where two differ for sure."""
    far = 100.0
    differ = torch.tensor([[0, far], [far, 0]])
    agree = torch.tensor([[0, far], [0, far]])
    unsure = torch.zeros(2, 2)
    for distances, expected in ((differ, -math.log(2)), (agree, 0), (unsure, 0)):
        assert vqgan.entropy_loss(distances).item() == pytest.approx(expected, abs=1e-6)
    # p = (0.8, 0.2) and (0.2, 0.8): H(0.8) - log 2
    mixed = -0.01 * torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()
    expected = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) - math.log(2)
    assert vqgan.entropy_loss(mixed).item() == pytest.approx(expected, abs=1e-6)


def test_entropy_loss_is_computed_where_it_is_asked_for():
    quantize = tiny().quantize
    z = torch.randn(2, 4, 2, 2, generator=seeded())
    assert set(quantize(z)[2]) == {"codebook", "commitment"}
    quantize.with_entropy = True
    assert quantize(z)[2]["entropy"] == vqgan.entropy_loss(quantize.distances(z))


def test_hinge_loss_stops_at_the_margin():
    """0.5 · (mean relu(1 - real) + mean relu(1 + fake)): (0 + 0.5) / 2 and (1 + 0) / 2."""
    assert vqgan.hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([0.0, -3.0])) == 0.5 * (0.25 + 0.5)


def test_the_adaptive_weight_balances_two_pulls():
    weight = torch.ones(2, requires_grad=True)
    nll, g = 3 * weight[0] + 4 * weight[1], 2 * weight[0]  # gradients of length 5 and 2
    assert vqgan.adaptive_weight(nll, g, weight).item() == pytest.approx(5 / (2 + 1e-4))
    assert vqgan.adaptive_weight(nll, 0 * g, weight) == 1e4  # never more
    assert not vqgan.adaptive_weight(nll, g, weight).requires_grad


def test_the_discriminator_scores_patches():
    """taming's: 64, 128, 256 with stride 2, then 512 and 1 with stride 1; norms after the inner three."""
    discriminator = Discriminator()
    convolutions = [m for m in discriminator if isinstance(m, nn.Conv2d)]
    shapes = [(m.in_channels, m.out_channels, m.stride[0], m.kernel_size[0]) for m in convolutions]
    assert shapes == [(3, 64, 2, 4), (64, 128, 2, 4), (128, 256, 2, 4), (256, 512, 1, 4), (512, 1, 1, 4)]
    assert [m.bias is not None for m in convolutions] == [True, False, False, False, True]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator) == 3
    assert discriminator(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_the_generator_listens_only_after_the_warm_up():
    """Before disc_start + disc_warmup the total is reconstruction and codebook alone; then λ · gan · g is added."""
    config = VQGANLossConfig(l1=0.5, l2=2, gan=0.8, disc_start=3, disc_warmup=2)
    judge, model, discriminator = VQGANLoss(config), tiny(), Discriminator()
    x = images(2, 32)
    reconstruction, _, losses = model(x)
    difference = 2 * (x - reconstruction)  # in [-1, 1]
    quiet = 0.5 * difference.abs().mean() + 2 * difference.square().mean() + losses["codebook"] + losses["commitment"]
    for step in (0, 3, 4):
        total, values = judge.generator_loss(model, x, reconstruction, losses, discriminator, step)
        torch.testing.assert_close(total, quiet)
        assert "g" not in values
    total, values = judge.generator_loss(model, x, reconstruction, losses, discriminator, 5)
    assert values["g"] != 0 and values["lambda"] > 0
    torch.testing.assert_close(total, quiet + values["lambda"] * 0.8 * values["g"])


def test_without_adaptive_the_weight_is_one():
    judge, model, discriminator = VQGANLoss(VQGANLossConfig(gan=0.1, adaptive=False)), tiny(), Discriminator()
    x = images(2, 32)
    reconstruction, _, losses = model(x)
    total, values = judge.generator_loss(model, x, reconstruction, losses, discriminator, 0)
    expected = values["nll"] + losses["codebook"] + losses["commitment"] + 0.1 * values["g"]
    torch.testing.assert_close(total, expected)


def test_the_discriminator_learns_from_pictures_not_through_them():
    """Its loss reaches its own weights, never the reconstruction."""
    judge, discriminator = VQGANLoss(VQGANLossConfig(gan=1)), Discriminator()
    reconstruction = images(2, 32, seed=1).requires_grad_()
    loss, values = judge.discriminator_loss(images(2, 32), reconstruction, discriminator)
    loss.backward()
    assert reconstruction.grad is None and all(p.grad is not None for p in discriminator.parameters())
    assert loss == values["disc"]


# ---- LPIPS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptual_files(tmp_path_factory):
    """Random weights of VGG16's and LPIPS's shapes, under their files' names."""
    folder = tmp_path_factory.mktemp("lpips")
    widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512}
    vgg, i = {}, 3
    for index, o in (widths | {28: 512}).items():
        vgg[f"features.{index}.weight"] = torch.randn(o, i, 3, 3, generator=seeded(index)) * (2 / (9 * i)) ** 0.5
        vgg[f"features.{index}.bias"] = torch.zeros(o)
        i = o
    vgg["classifier.0.weight"] = torch.zeros(2, 2)  # the rest of VGG16 is there too
    heads = {f"lin{n}.model.1.weight": torch.rand(1, o, 1, 1) for n, o in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(heads, folder / "heads.pth")
    return str(folder / "vgg16.pth"), str(folder / "heads.pth")


def test_perceptual_distance_is_zero_for_equal_pictures_only(perceptual_files):
    lpips = vqgan.LPIPS(*perceptual_files)
    x, y = 2 * images(1, 32) - 1, 2 * images(1, 32, seed=1) - 1
    assert lpips(x, x) == 0 and lpips(x, y) > 0
    assert 0 < lpips(x, 0.9 * x + 0.1 * y) < lpips(x, y)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_perceptual_distance_is_the_sum_over_five_layers(perceptual_files):
    """The same in torchvision's terms: layers 3, 8, 15, 22, 29 of VGG16's `features` are relu1_2 … relu5_3."""
    lpips = vqgan.LPIPS(*perceptual_files)
    weights, heads = (torch.load(file) for file in perceptual_files)
    x, y = 2 * images(1, 32) - 1, 2 * images(1, 32, seed=1) - 1
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    h, total = (torch.cat((x, y)) - shift) / scale, 0
    for index in range(30):
        if f"features.{index}.weight" in weights:
            h = F.conv2d(h, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1)
        elif f"features.{index - 1}.weight" in weights:
            h = h.relu()
        else:
            h = F.max_pool2d(h, 2)
        if index in (3, 8, 15, 22, 29):
            unit = F.normalize(h, dim=1)
            head = heads[f"lin{(3, 8, 15, 22, 29).index(index)}.model.1.weight"][0]
            total += ((unit[:1] - unit[1:]).square() * head).sum(1).mean()
    torch.testing.assert_close(lpips(x, y), total, rtol=1e-4, atol=0)


def test_perceptual_loss_is_part_of_the_reconstruction_loss(perceptual_files):
    vgg, heads = perceptual_files
    judge = VQGANLoss(VQGANLossConfig(l1=0, perceptual=0.5, vgg=vgg, lpips=heads))
    x, y = images(1, 32), images(1, 32, seed=1)
    zero = {"codebook": torch.zeros(()), "commitment": torch.zeros(())}
    total, _ = judge.generator_loss(tiny(), x, y, zero, None, 0)
    torch.testing.assert_close(total, 0.5 * judge.perceptual(2 * x - 1, 2 * y - 1))


def test_files_that_are_not_lpips_are_named(perceptual_files, tmp_path):
    vgg, heads = perceptual_files
    for files, expected in (((heads, heads), f"{heads}: features.0"), ((vgg, vgg), f"{vgg}: lin0.model.1.weight")):
        with pytest.raises(UserError) as error:
            vqgan.LPIPS(*files)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)


# ---- two processes ---------------------------------------------------------------------------

BATCH = torch.randn(4, 3, 5, 5, generator=seeded(5))
UPSTREAM = torch.randn(4, 3, 5, 5, generator=seeded(6))
DISTANCES = torch.rand(6, 8, generator=seeded(7)) / 20


def normalise(x, upstream):
    """One training step of a SyncedBatchNorm: output, gradients, and what it remembers."""
    norm = vqgan.SyncedBatchNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(upstream.to(out.dtype))
    state = {name: t.clone() for name, t in norm.state_dict().items()}
    return {"out": out.detach(), "grad": x.grad, "weight_grad": norm.weight.grad, **state}


def one_of_two(rank, folder):
    """What each of the two processes does with its half."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    found = normalise(BATCH[half], UPSTREAM[half])
    distances = DISTANCES[3 * rank : 3 * rank + 3].clone().requires_grad_()
    found["entropy"] = vqgan.entropy_loss(distances)
    found["entropy"].backward()
    found["entropy_grad"] = distances.grad
    weight = torch.ones(2, requires_grad=True)
    scale = (1.0, 3.0)[rank]  # gradients that differ: their mean has length 2
    found["lambda"] = vqgan.adaptive_weight(scale * weight[0], weight[1] * 4, weight)
    checkpoint.write_tensors(f"{folder}/rank{rank}.safetensors", found)
    half_precision = normalise(BATCH[half].bfloat16(), UPSTREAM[half])
    checkpoint.write_tensors(f"{folder}/rank{rank}.bfloat16.safetensors", half_precision)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    processes.spawn(one_of_two, folder)
    return folder


def results(folder, suffix=""):
    return [load_file(folder / f"rank{rank}{suffix}.safetensors") for rank in range(2)]


def test_batch_norm_over_two_processes_is_that_of_the_joint_batch(two_processes):
    """Values, gradients and running statistics; a weight's gradient is the sum of both processes'."""
    a, b = results(two_processes)
    joint = normalise(BATCH, UPSTREAM)
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat((a[name], b[name])), joint[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a["weight_grad"] + b["weight_grad"], joint["weight_grad"], rtol=1e-5, atol=1e-6)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(a[name], joint[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(a[name], b[name])


def test_batch_norm_over_two_processes_works_in_bfloat16(two_processes):
    """As it is under autocast; bfloat16 keeps 8 bits, so 1 % of values around 3."""
    a, b = results(two_processes, ".bfloat16")
    joint = normalise(BATCH, UPSTREAM)
    torch.testing.assert_close(torch.cat((a["out"], b["out"])).float(), joint["out"], rtol=0.02, atol=0.05)


def test_losses_of_two_processes_average_to_that_of_the_joint_batch(two_processes):
    a, b = results(two_processes)
    distances = DISTANCES.clone().requires_grad_()
    joint = vqgan.entropy_loss(distances)
    joint.backward()
    torch.testing.assert_close((a["entropy"] + b["entropy"]) / 2, joint.detach())
    gradient = torch.cat((a["entropy_grad"], b["entropy_grad"])) / 2
    torch.testing.assert_close(gradient, distances.grad, rtol=1e-4, atol=1e-6)
    assert a["lambda"] == b["lambda"] == pytest.approx(2 / (4 + 1e-4))
