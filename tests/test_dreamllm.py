"""DreamLLM: the same numbers as the original code, its files in and out, and what its generator promises.

tests/golden/dreamllm: a tiny model's weights and outputs, made by running the original code.
"""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file

import published.dreamllm
from clip import CLIP, CLIPConfig, TextConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, LossNoise, NoiseSchedule, UNet, UNetConfig
from dreamllm import END, PROJECTORS, DreamLLM, DreamLLMConfig, Projector, merge_texts
from model import LLaMA, LLaMAConfig, rotary_frequencies
from support import checkpoint, settings
from support.settings import UserError
from support.tokenizer import ADDED, Tokenizer

FOLDER = GOLDEN / "dreamllm"
pytest.importorskip("sentencepiece")


@pytest.fixture
def dream():
    """The golden model, fresh: some tests change it."""
    return DreamLLM.from_pretrained(FOLDER / "checkpoint", torch.float32)


@pytest.fixture(scope="module")
def forward():
    return load_file(FOLDER / "forward.safetensors")


def close(ours, golden, tolerance=1e-4):
    assert ours.shape == golden.shape
    assert (ours.double() - golden.double()).abs().max() <= tolerance


def recorded(tensors, prefix=""):
    """The draws of one recorded forward, in the order they were drawn."""
    found = {k.split(".")[1]: (k, v) for k, v in tensors.items() if k.startswith(f"{prefix}draw.")}
    drawn = [found[str(i)][1] for i in range(len(found))]
    offset = [x for x in drawn if x.ndim == 4 and x.shape[-1] == 1]
    grids = [x for x in drawn if x.ndim == 4 and x.shape[-1] > 1]
    t = next(x for x in drawn if x.dtype == torch.int64)
    zeros = torch.zeros_like(grids[0])
    perturbation = grids[2] if len(grids) > 2 else zeros
    return LossNoise(
        grids[0], grids[1], offset[0] if offset else zeros[..., :1, :1], perturbation, t, torch.ones(len(t))
    )


def batch_of(forward):
    """(tokens, labels, images, images_dm in [0, 1]) of the golden batch."""
    return forward["input_ids"], forward["labels"], forward["images"], forward["images_dm"] / 2 + 0.5


# ---- the golden forward ----------------------------------------------------------------------


def test_pictures_and_queries_are_spliced_in(dream, forward):
    tokens, _, images, _ = batch_of(forward)
    close(dream.projector(dream.clip.patch_features(images)), forward["clip_image_embeds"])
    close(dream.embed(tokens, images), forward["inputs_embeds"])


def test_logits_and_conditioning(dream, forward):
    tokens, _, images, _ = batch_of(forward)
    hidden = dream.llama.hidden(dream.embed(tokens, images))
    real = forward["attention_mask"].bool()
    close(hidden[real], forward["hidden_states"][real])
    close(dream.llama.logits(hidden)[real], forward["logits"][real])
    rows, places = dream.span_positions(tokens, "<dream_start>", dream.config.queries)
    close(hidden[rows, places], forward["dream_hidden_states"])
    close(dream.condition(hidden[rows, places]), forward["unet_in_conditioning"])


def test_losses_and_gradients(dream, forward):
    dream.clip.requires_grad_(False)
    dream.diffusion.requires_grad_(False)
    out = dream.train()(*batch_of(forward), recorded(forward))
    close(out["lm_loss"], forward["lm_loss"], 1e-5)
    close(out["vm_loss"], forward["vm_loss"], 1e-5)
    close(out["loss"], forward["loss"])
    out["loss"].backward()
    ours = {
        "model.dream_embedding.dream_queries": dream.dream_queries,
        "stable_diffusion_head.projector.projector.weight": dream.condition.projector.weight,
        "model.clip_vision_embedding.projector.projector.weight": dream.projector.projector.weight,
        "model.clip_vision_embedding.projector.projector.bias": dream.projector.projector.bias,
    }
    ours |= {(k if k.startswith("lm_head") else f"model.{k}"): v for k, v in dream.llama.named_parameters()}
    golden = {k.removeprefix("grad."): v for k, v in forward.items() if k.startswith("grad.")}
    assert len(golden) == 9
    for name, gradient in golden.items():
        close(ours[name].grad, gradient, 1e-4 * gradient.abs().max().item())
    assert all(p.grad is None for p in (*dream.clip.parameters(), *dream.diffusion.parameters()))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("noise_offset_input_perturbation", {"noise_offset": 0.05, "perturbation": 0.1}),
        ("snr_gamma", {"min_snr": 5.0}),
        # not v_prediction_snr: there the original cuts SNR + 1 instead of SNR, unlike the paper (Hang et al. 2023)
    ],
)
def test_options_of_the_picture_loss(dream, forward, variant, options):
    golden = load_file(FOLDER / "forward_variants.safetensors")
    golden = {k.removeprefix(f"{variant}/"): v for k, v in golden.items() if k.startswith(f"{variant}/")}
    dream.config = dataclasses.replace(dream.config, **options)
    out = dream(*batch_of(forward), recorded(golden))
    close(out["vm_loss"], golden["vm_loss"])
    out["loss"].backward()
    gradient = golden["grad.model.dream_embedding.dream_queries"]
    close(dream.dream_queries.grad, gradient, 1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("row", [("comprehension_only", 0), ("creation_only", 1), ("text_only", 3)])
def test_batches_without_pictures_still_reach_every_weight(dream, forward, row):
    """Of several processes, one may have no picture: its gradients are zero, not absent."""
    name, row = row
    golden = load_file(FOLDER / "forward_variants.safetensors")
    golden = {k.removeprefix(f"{name}/"): v for k, v in golden.items() if k.startswith(f"{name}/")}
    length = golden["inputs_embeds"].shape[1]
    tokens, labels, images, images_dm = batch_of(forward)
    images = images[:1] if row == 0 else images[:0]
    images_dm = images_dm[:1] if row == 1 else images_dm[:0]
    draws = recorded(golden) if row == 1 else None
    out = dream(tokens[row : row + 1, :length], labels[row : row + 1, :length], images, images_dm, draws)
    close(out["lm_loss"], golden["lm_loss"])
    close(out["vm_loss"], golden["vm_loss"])
    out["loss"].backward()
    for ours, theirs in (
        (dream.dream_queries, "model.dream_embedding.dream_queries"),
        (dream.condition.projector.weight, "stable_diffusion_head.projector.projector.weight"),
        (dream.projector.projector.weight, "model.clip_vision_embedding.projector.projector.weight"),
    ):
        close(ours.grad, golden[f"grad.{theirs}"], 1e-4 * max(1, golden[f"grad.{theirs}"].abs().max().item()))


def test_a_batch_that_draws_nothing_leaves_the_places_of_the_queries(dream, forward):
    golden = load_file(FOLDER / "forward_variants.safetensors")["interleaved_without_images_dm/inputs_embeds"]
    tokens, _, images, _ = batch_of(forward)
    close(dream.embed(tokens[2:3], images[1:], queries=False), golden)


def test_dropped_conditioning_is_the_one_of_the_empty_prompt(dream, forward):
    """The original puts patch embeddings where the queries belong (a fault): ours trains what drawing then uses."""
    dream.config = dataclasses.replace(dream.config, drop=0.5)
    draws = recorded(forward)._replace(drop=torch.tensor([0.0, 0.9, 0.0]))
    seen = []
    dream.diffusion.unet.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2]))
    dream.train()(*batch_of(forward), draws)
    empty = dream.condition(dream.dream_states([""]))[0]
    close(seen[0][0], empty, 1e-6)
    close(seen[0][2], empty, 1e-6)
    close(seen[0][1], forward["unet_in_conditioning"][1])


def test_a_span_that_does_not_fit_is_named(dream):
    start = dream.tokenizer.special["<im_start>"]
    with pytest.raises(ValueError, match="<im_start> at 1"):
        dream.embed(torch.tensor([[1, start, 5]]), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="0 spans of <im_start> but 1 pictures"):
        dream.embed(torch.tensor([[1, 5]]), torch.zeros(1, 3, 32, 32))


# ---- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["single", "single_uncond", "batch_left"])
def test_text_to_image(dream, case):
    golden = load_file(FOLDER / "text_to_image.safetensors")
    golden = {k.removeprefix(f"{case}/"): v for k, v in golden.items() if k.startswith(f"{case}/")}
    settings = json.loads((FOLDER / "text_to_image.json").read_text())[case]
    prompts = [settings["prompt"]] if isinstance(settings["prompt"], str) else settings["prompt"]
    negative = settings["negative_prompt"]
    close(dream.condition(dream.dream_states(prompts)), golden["conditioning_positive"])
    seen = []
    dream.diffusion.unet.register_forward_hook(lambda module, inputs, output: seen.append(output))
    draws = iter([golden[f"draw.{i}.randn"] for i in range(5)])
    images = dream.text_to_image(prompts, negative, guidance=3.5, steps=4, noise=lambda: next(draws))
    close(torch.stack(seen), golden["unet_out"])
    close(images, golden["image"])


def test_padding_changes_nothing(dream):
    """In the original a shorter prompt beside a longer one gets other conditioning than alone (a fault)."""
    short, long = "A dog.", "An astronaut riding a horse by the river at sunrise."
    close(dream.dream_states([short, long])[:1], dream.dream_states([short]), 1e-5)


def test_a_picture_can_be_part_of_the_prompt(dream):
    picture = Image.new("RGB", (40, 40), "red")
    with_it, without = dream.dream_states([[picture, "A dog."], "A dog."])
    assert (with_it - without).abs().max() > 0.01


# ---- documents -------------------------------------------------------------------------------


def test_greedy_words_are_those_of_the_original(dream):
    """The recorded scores, one token after the other through the caches."""
    golden = load_file(FOLDER / "generate.safetensors")
    prompt, sequence = golden["input_ids"], golden["sequences"]
    caches = dream.llama.caches(1, 64)
    hidden = dream.llama.hidden(dream.embed(prompt, golden["images"]), caches)[:, -1]
    for place in range(prompt.shape[1], sequence.shape[1]):
        scores = dream.llama.logits(hidden)
        close(scores, golden["scores"][:, place - prompt.shape[1]])
        assert scores.argmax() == sequence[0, place]
        hidden = dream.llama.hidden(dream.llama.embed_tokens(sequence[:, place : place + 1]), caches)[:, -1]


def document(dream, prompt="A dog", **options):
    return dream.generate_document(prompt, **({"steps": 2, "seed": 3, "max_new_tokens": 40} | options))


def eager(dream, token, by):
    """Makes the model want `token` more."""
    head = dream.llama.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    head.bias.data[dream.tokenizer.special.get(token, token)] = by
    return dream


def test_a_document_repeats_from_its_seed(dream):
    eager(dream, "<dream_start>", 4)
    first, again, other = (document(dream, seed=seed) for seed in (3, 3, 4))
    assert any(isinstance(piece, Image.Image) for piece in first)
    same = [np.array_equal(a, b) for a, b in zip(map(np.asarray, first), map(np.asarray, again), strict=True)]
    assert all(same)
    assert list(map(str, first)) != list(map(str, other))


def test_pictures_come_only_after_dream_start_and_are_looked_at(dream):
    """Every token that the model reads while it writes, told from the calls of `hidden_states`."""
    eager(dream, "<dream_start>", 4)
    reads, special = [], dream.tokenizer.special
    read = dream.hidden_states

    def spy(ids, pictures=(), caches=None):
        reads.append((ids[0], list(pictures)))
        return read(ids, pictures, caches)

    dream.hidden_states = spy
    pieces = document(dream, max_pictures=2)
    pictures = [piece for piece in pieces if isinstance(piece, Image.Image)]
    assert len(pictures) == 2
    shown = [seen for _, pictures in reads for seen in pictures]
    assert [id(p) for p in shown] == [id(p) for p in pictures]  # each is fed back, in order
    starts = [n for n, (ids, _) in enumerate(reads) if ids[0] == special["<dream_start>"]]
    assert len(starts) == 2
    for ids, seen in reads:
        if seen:
            assert ids[:2] == [special["<dream_end>"], special["<im_start>"]] and ids[-1] == special["<im_end>"]
    frame = {special[name] for name in ("[PAD]", "<image>", "<dream>", "<im_patch>", "<im_end>", "<dream_end>")}
    assert not frame & {ids[0] for ids, seen in reads if len(ids) == 1}  # never drawn by itself


def test_a_document_ends_at_the_end_token(dream):
    """And says that it ended by itself; cut off by its length, it says that."""
    assert merge_texts(dream.stream_document("A dog", 3, max_pictures=0, temperature=0))[1] is False
    eager(dream, 2, 100)
    assert document(dream) == []
    assert merge_texts(dream.stream_document("A dog", 3)) == ([], True)
    assert list(dream.stream_document("A dog", 3)) == [END]


def test_a_document_ends_with_its_context(dream):
    eager(dream, "<dream_start>", 100)
    pieces = document(dream, max_new_tokens=10_000, max_pictures=10_000, steps=1)
    span = dream.config.queries + 2 + dream.patches + 2
    pictures = sum(isinstance(piece, Image.Image) for piece in pieces)
    assert pictures == (512 - len(dream.prompt("A dog")[0])) // span


def test_without_pictures_it_only_writes(dream):
    eager(dream, "<dream_start>", 100)
    pieces = document(dream, max_pictures=0, temperature=0, max_new_tokens=5)
    assert len(pieces) == 1 and isinstance(pieces[0], str)


def test_a_prompt_that_fills_the_context_is_an_error(dream):
    with pytest.raises(UserError, match="fill the context of 512"):
        document(dream, "a b c d e " * 200)


# ---- its parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "places"), [("linear", 16), ("mlp", 16), ("conv", 16), ("downsample", 1)])
def test_every_projector_reaches_the_llama(dream, forward, kind, places):
    config = dataclasses.replace(dream.config, projector=kind)
    model = DreamLLM(dream.llama, dream.clip, dream.diffusion, config, dream.tokenizer)
    assert model.patches == places
    assert model.projector(dream.clip.patch_features(forward["images"])).shape == (3, places, 64)
    assert len(model.dream_states([[Image.new("RGB", (9, 9)), "A dog."]])) == 1


def test_the_parts_that_are_handed_in_stay_as_they_are(dream):
    """A latent diffusion keeps its text encoder, beside the DreamLLM that shares its U-Net."""
    parts = dream.diffusion.unet, dream.diffusion.vae, dream.diffusion.schedule
    text = TextConfig(width=16, layers=1, heads=1, hidden_dim=16, vocab_size=10, context_length=4, eos=None)
    diffusion = LatentDiffusion(*parts, CLIP(CLIPConfig(text=text, vision=None, embed_dim=0)))
    model = DreamLLM(dream.llama, dream.clip, diffusion, dream.config, dream.tokenizer)
    assert len(diffusion.text_encoders) == 1 and len(model.diffusion.text_encoders) == 0
    assert model.diffusion.unet is diffusion.unet
    assert model.state_dict().keys() == dream.state_dict().keys()


def test_the_context_needs_a_projector_without_a_grid():
    """Queries are a row, not a square."""
    for kind, projector in PROJECTORS.items():
        if projector.on_grid:
            with pytest.raises(ValueError, match=f'condition "{kind}" must be one of linear, mlp'):
                DreamLLMConfig(condition=kind)
        else:
            assert DreamLLMConfig(condition=kind).condition == kind


class JoinedPatches(Projector):
    """What somebody adds: 2×2 patches become one."""

    on_grid = True

    def layers(self, i, o, bias):
        return torch.nn.Sequential(torch.nn.PixelUnshuffle(2), torch.nn.Conv2d(4 * i, o, 1, bias=bias))

    def length(self, n):
        return n // 4


def test_a_projector_that_is_added_is_one_row_of_the_table(dream, forward, tmp_path, monkeypatch):
    """It is saved under its own name and read back; a program that lacks it says so."""
    monkeypatch.setitem(PROJECTORS, "joined", JoinedPatches)
    config = dataclasses.replace(dream.config, projector="joined", condition="mlp")
    model = DreamLLM(dream.llama, dream.clip, dream.diffusion, config, dream.tokenizer).eval()
    assert model.projector(dream.clip.patch_features(forward["images"])).shape == (3, model.patches, 64)
    model.save_pretrained(tmp_path)
    plugins = json.loads((tmp_path / "config.json").read_text())["plugins_init_kwargs"]
    written = [(plugin["projector_type"], plugin["projector_depth"]) for plugin in list(plugins.values())[::2]]
    assert written == [("joined", 1), ("mlp", 2)]
    again = DreamLLM.from_pretrained(tmp_path)
    assert torch.equal(again.dream_states(["A dog."]), model.dream_states(["A dog."])) and again.patches == 4
    monkeypatch.delitem(PROJECTORS, "joined")
    with pytest.raises(UserError, match=r'clip_vision_embedding\.projector_type "joined" must be one of linear'):
        DreamLLM.from_pretrained(tmp_path)


def test_a_smaller_grid_rounds_up():
    projector = PROJECTORS["downsample"](8, 4)
    for side in range(1, 18):
        assert projector(torch.zeros(1, side * side, 8)).shape[1] == projector.length(side * side)


def test_a_tokenizer_without_its_tokens_is_refused(dream):
    with pytest.raises(UserError, match="does not know \\[PAD\\], <image>"):
        DreamLLM(dream.llama, dream.clip, dream.diffusion, dream.config, Tokenizer.from_pretrained("bytes"))


def test_a_vocabulary_grows_without_changing_what_is_there():
    llama = LLaMA(LLaMAConfig(vocab_size=258, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_seq_len=8))
    tokens = torch.tensor([[1, 257]])
    before = llama(tokens)
    llama.resize(266)
    close(llama(tokens)[..., :258], before, 1e-6)
    assert llama.config.vocab_size == 266 and llama(torch.tensor([[265]])).shape[-1] == 266
    assert 0.01 < llama.embed_tokens.weight[258:].std() < 0.03


# ---- published files -------------------------------------------------------------------------


def test_saved_and_opened_again(dream, forward, tmp_path):
    """The same numbers, the same keys as in the original's files; and our folder needs nothing beside it."""
    dream.save_pretrained(tmp_path / "saved")
    again = DreamLLM.from_pretrained(tmp_path / "saved")
    inputs = batch_of(forward)
    assert torch.equal(again(*inputs, recorded(forward))["loss"], dream(*inputs, recorded(forward))["loss"])
    assert again.config == dream.config and again.tokenizer.special == dream.tokenizer.special
    for name in ("clip_vision_embedding", "dream_embedding", "stable_diffusion_head"):
        theirs, ours = (
            torch.load(f / f"{name}.bin", weights_only=True) for f in (FOLDER / "checkpoint", tmp_path / "saved")
        )
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    theirs, ours = (load_file(f / "model.safetensors") for f in (FOLDER / "checkpoint", tmp_path / "saved"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # frequencies are computed anew
        close(ours[name], tensor, 1e-7 if name.endswith("inv_freq") else 0)


def test_the_one_file_of_a_sharded_run(dream, tmp_path):
    """Such runs write one pytorch_model.bin with all keys prefixed: the three files may then be absent."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "checkpoint", folder)
    shutil.copytree(FOLDER / "components", tmp_path / "components")
    whole = load_file(folder / "model.safetensors")
    for name, prefix in (
        ("clip_vision_embedding", "model."),
        ("dream_embedding", "model."),
        ("stable_diffusion_head", ""),
    ):
        tensors = torch.load(folder / f"{name}.bin", weights_only=True)
        whole |= {f"{prefix}{name}.{k}": v for k, v in tensors.items()}
        (folder / f"{name}.bin").unlink()
    (folder / "model.safetensors").unlink()
    torch.save(whole, folder / "pytorch_model.bin")
    again = DreamLLM.from_pretrained(folder, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dream.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_half_precision_draws_and_writes(tmp_path, dtype):
    """Also where the language model alone is stored in it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "checkpoint", folder)
    shutil.copytree(FOLDER / "components", tmp_path / "components")
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    checkpoint.write_tensors(folder / "model.safetensors", weights)
    dream = DreamLLM.from_pretrained(folder, dtype)
    assert dream.text_to_image(["A dog."], steps=1).isfinite().all()
    assert document(dream, [Image.new("RGB", (9, 9)), "A dog."], max_new_tokens=4) is not None


def test_the_parts_may_lie_elsewhere_under_their_names_on_the_hub(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["plugins_init_kwargs"]["clip_vision_embedding"]["clip_vision_model_name_or_path"] = "openai/clip-tiny"
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(FOLDER / "components" / "clip_vision", tmp_path / "models" / "clip-tiny")
    shutil.copytree(FOLDER / "components" / "stable_diffusion", tmp_path / "hub" / "components" / "stable_diffusion")
    with pytest.raises(UserError, match="its part openai/clip-tiny has no configuration"):
        DreamLLM.from_pretrained(folder)
    given = [tmp_path / "models", tmp_path / "hub"]
    assert DreamLLM.from_pretrained(folder, parts=given).patches == 16


PLUGIN_FIELDS = [  # plugin, key, a second legal value, ours: None if it is refused
    ("clip_vision_embedding", "projector_type", "mlp", "projector"),
    ("clip_vision_embedding", "projector_depth", 2, None),
    ("clip_vision_embedding", "select_layer", -1, None),
    ("clip_vision_embedding", "use_additional_post_layernorm", True, None),
    ("dream_embedding", "num_dream_queries", 16, "queries"),
    ("stable_diffusion_head", "projector_type", "mlp", "condition"),
    ("stable_diffusion_head", "projector_depth", 2, None),
    ("stable_diffusion_head", "drop_prob", 0.5, "drop"),
    ("stable_diffusion_head", "snr_gamma", 5.0, "min_snr"),
    ("stable_diffusion_head", "noise_offset", 0.5, "noise_offset"),
    ("stable_diffusion_head", "input_perturbation", 0.5, "perturbation"),
    (None, "loss_weight_lm", 2.0, "w_lm"),
    (None, "loss_weight_vm", 2.0, "w_vm"),
    (None, "loss_scale_schedule", "linear", None),
]


def read_config(plugin, key, value):
    saved = json.loads((FOLDER / "checkpoint" / "config.json").read_text())
    table = saved["plugins_init_kwargs"][plugin] if plugin else saved
    table[key] = value
    if key == "projector_type":
        table["projector_depth"] = 2
    depths = {name: projector.depth for name, projector in PROJECTORS.items()}
    fields, _ = published.dreamllm.config_from_hf(saved, "config.json", depths)
    return settings.build(DreamLLMConfig, fields)


@pytest.mark.parametrize(("plugin", "key", "value", "ours"), PLUGIN_FIELDS)
def test_every_field_of_the_config_is_honoured_or_refused_by_name(plugin, key, value, ours):
    if ours:
        assert getattr(read_config(plugin, key, value), ours) == value
    else:
        with pytest.raises(UserError, match=f"config.json: .*{key}"):
            read_config(plugin, key, value)


def test_pictures_of_another_size_than_the_parts_draw_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(FOLDER / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["plugins_init_kwargs"]["stable_diffusion_head"]["resolution"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="resolution is 32, but its U-Net and autoencoder are of 16 pixels"):
        DreamLLM.from_pretrained(folder, parts=[FOLDER])


@pytest.mark.parametrize(("plugin", "key", "ours"), [(p, key, ours) for p, key, _, ours in PLUGIN_FIELDS if ours])
def test_a_wrong_value_is_one_line_that_names_plugin_and_key(plugin, key, ours):
    kind = type(getattr(DreamLLMConfig(), ours))
    for value in (-1, 2**70, float("nan"), "many", [], {}, True, *([0, 2**40, 1.5] if kind is int else [])):
        with pytest.raises(UserError) as error:
            read_config(plugin, key, value)
        message = str(error.value)
        assert message.startswith(f"config.json: {plugin or ''}") and key in message and "\n" not in message


def test_a_field_that_the_publication_lacks_is_saved_and_read_back(dream, tmp_path, monkeypatch):
    fork = dataclasses.make_dataclass("Fork", [("gamma", float, 1.0)], bases=(DreamLLMConfig,), frozen=True)
    monkeypatch.setattr("dreamllm.DreamLLMConfig", fork)
    dream.config = fork(**vars(dream.config), gamma=2.0)
    dream.save_pretrained(tmp_path)
    assert DreamLLM.from_pretrained(tmp_path).config == dream.config


def test_damaged_folders_are_named(tmp_path):
    def damaged(change):
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FOLDER / "checkpoint", folder)
        change(folder)
        with pytest.raises(UserError) as caught:
            DreamLLM.from_pretrained(folder)
        return str(caught.value)

    def edit(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    assert "components/clip_vision" in damaged(lambda folder: None)  # its parts are not beside it
    shutil.copytree(FOLDER / "components", tmp_path / "components")
    assert "dream_embedding.bin: no such file" in damaged(lambda f: (f / "dream_embedding.bin").unlink())
    assert "holds a LLaMA, but a DreamLLM is wanted" in damaged(lambda f: edit(f / "config.json", model_type="llama"))
    assert "clip_vision_embedding: expected a table, got None" in damaged(
        lambda f: edit(f / "config.json", plugins_init_kwargs={})
    )
    ids = {"additional_special_tokens": {"<dream_start>": 388}}
    message = damaged(lambda f: edit(f / "config.json", special_tokens2ids_dict=ids))
    assert "<dream_start> is 388, but 387" in message
    nan = {"dream_queries": torch.full((1, 8, 64), float("nan"))}
    assert "dream_queries holds NaN" in damaged(lambda f: torch.save(nan, f / "dream_embedding.bin"))
    extra = {"dream_queries": torch.zeros(1, 8, 64), "more": torch.zeros(1)}
    assert "more belongs to no part" in damaged(lambda f: torch.save(extra, f / "dream_embedding.bin"))
    wrong = {"dream_queries": torch.zeros(1, 7, 64)}
    assert "dream_queries is (1, 7, 64)" in damaged(lambda f: torch.save(wrong, f / "dream_embedding.bin"))


def test_true_size_keys_and_shapes():
    """DreamLLM-7B (Vicuna-7B, CLIP ViT-L/14, SD 2.1-base, 64 queries) without a byte of weights."""
    lines = (FOLDER / "keys.txt").read_text().splitlines()
    golden, file = {}, None
    for line in lines:
        if line.startswith("["):
            file = golden.setdefault(line.strip("[]"), {})
        elif file is not None and line:
            name, shape, _ = line.split("\t")
            file[name] = tuple(json.loads(shape))
    tokenizer = Tokenizer.from_pretrained("bytes")
    tokenizer.add(ADDED)
    with torch.device("meta"):
        llama = LLaMA(dataclasses.replace(LLaMAConfig.named("vicuna_7b"), vocab_size=32008))
        clip = CLIP(dataclasses.replace(CLIPConfig.named("ViT-L/14"), text=None, embed_dim=0))
        unet, vae = (
            UNet(dataclasses.replace(UNetConfig.named("sd21"), sample_size=64)),
            AutoencoderKL(AutoencoderKLConfig.named("sd")),
        )
        model = DreamLLM(llama, clip, LatentDiffusion(unet, vae, NoiseSchedule()), DreamLLMConfig(), tokenizer)
        files = published.dreamllm.tensors_to_hf(model, rotary_frequencies(llama.config))
        ours = {file: {k: tuple(v.shape) for k, v in tensors.items()} for file, tensors in files.items()}
    assert {file: len(keys) for file, keys in golden.items()} == dict(zip(golden, (323, 393, 1, 935), strict=True))
    assert ours == golden
    assert (model.patches, model.side) == (256, 512)
    assert sum(p.numel() for p in itertools.chain(llama.parameters())) == 6_738_415_616 + 16 * 4096
