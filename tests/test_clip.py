"""What clip.py promises: the references' numbers, every published layout of them, its tokenizer, its losses."""

import dataclasses
import importlib.util
import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import clip
from clip import CLIP, CLIPConfig, TextConfig, VisionConfig, contrastive_loss, sigmoid_loss
from published import clip as published
from support import checkpoint, pickles, settings, tokenizer
from support.settings import UserError
from support.tokenizer import CLIPTokenizer

# Heads 64 wide, as shapes imply, so that the same weights open with and without a config
TINY = CLIPConfig(
    24,
    VisionConfig(width=128, layers=3, heads=2, hidden_dim=160, patch_size=8, image_size=16),
    TextConfig(width=64, layers=2, heads=1, hidden_dim=96, vocab_size=514, context_length=12),
)


def lively(model, seed=0):
    """The same model with all its weights random, biases and norms too, and large enough to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "logit" not in name:
                weight.add_(0.15 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return lively(CLIP(dataclasses.replace(TINY, **changes)), seed)


def inputs(config=TINY, pictures=3, texts=4, seed=1):
    """Normalised pictures, and texts that end in the largest id at different places, padded behind it."""
    g = torch.Generator().manual_seed(seed)
    side, c = config.vision.image_size, config.text
    tokens = torch.randint(0, c.vocab_size - 2, (texts, c.context_length), generator=g)
    for row, tokens_of_row in enumerate(tokens):
        tokens_of_row[4 + row] = c.vocab_size - 1
        tokens_of_row[5 + row :] = 0
    return torch.randn(pictures, 3, side, side, generator=g), tokens


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_near(a, b, tolerance=1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the original implementations' numbers ---------------------------------------------------


@pytest.fixture(scope="module", params=["clip_hf_quickgelu", "clip_openai_statedict"])
def golden(request):
    """(model, what the reference implementation made of the same weights)."""
    folder = GOLDEN / request.param
    if "openai" in request.param:
        file = folder / "weights.pt"
        model = CLIP.from_pretrained(file, config=CLIPConfig.from_weights(file, activation="quick_gelu"))
    else:
        model = CLIP.from_pretrained(folder)
    return model, load_file(folder / "io.safetensors")


@torch.no_grad()
def test_features_and_logits_are_the_references(golden):
    model, io = golden
    assert_near(model.encode_image(io["image"], normalize=False), io["image_features"])
    assert_near(model.encode_text(io["text"], normalize=False), io["text_features"])
    assert_near(model.logits(io["image"], io["text"]), io["logits_per_image"])
    assert_near(model.logits(io["image"], io["text"]).T, io["logits_per_text"])


@torch.no_grad()
def test_hidden_states_are_the_references(golden):
    model, io = golden
    assert_near(model.patch_features(io["image"]), io["penultimate_patch_tokens"])
    assert_near(model.vision_model.hidden(io["image"]), io["last_hidden_with_cls"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ViT-B/32", 151_277_313),
        ("ViT-B/16", 149_620_737),
        ("ViT-L/14", 427_616_513),
        ("ViT-L/14-336", 427_944_193),
        ("ViT-H/14", 986_109_441),
        ("ViT-bigG/14", 2_539_567_105),
    ],
)
def test_a_named_size_has_the_published_keys_shapes_and_number_of_parameters(name, parameters):
    transformers = pytest.importorskip("transformers")
    config = CLIPConfig.named(name)
    saved = published.config_to_hf(config)
    with torch.device("meta"):
        model, theirs = CLIP(config), transformers.CLIPModel(transformers.CLIPConfig(**saved))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {k: t.shape for k, t in model.state_dict().items()} == {
        k: t.shape for k, t in theirs.state_dict().items() if not k.endswith("position_ids")
    }


def test_names_tell_openais_gelu_from_laions():
    assert CLIPConfig.named("ViT-L/14").text.activation == "quick_gelu"
    assert CLIPConfig.named("ViT-L/14", activation="gelu").vision.activation == "gelu"
    assert CLIPConfig.named("ViT-H/14").vision.activation == "gelu"
    with pytest.raises(UserError, match=r"ViT-L/15.*ViT-L/14"):
        CLIPConfig.named("ViT-L/15")


# ---- transformers, on random weights ---------------------------------------------------------

SHRUNK = {  # published configurations, narrower
    "openai_l14": dataclasses.replace(TINY),
    "laion_h14": CLIPConfig(
        40,
        VisionConfig(width=80, layers=3, heads=4, hidden_dim=320, patch_size=7, image_size=28, activation="gelu"),
        TextConfig(width=64, layers=3, heads=4, hidden_dim=256, vocab_size=90, context_length=9, activation="gelu"),
    ),
    "an_end_token_of_its_own": dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, eos=509)),
}


def reference(config, seed=0):
    """transformers' CLIPModel of the same shape, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return lively(transformers.CLIPModel(transformers.CLIPConfig(**published.config_to_hf(config))), seed)


@pytest.mark.parametrize("name", SHRUNK)
def test_outputs_and_gradients_are_transformers(name, tmp_path):
    config = SHRUNK[name]
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.config == config
    images, tokens = inputs(config)
    if config.text.eos is not None:
        tokens[:, 3] = config.text.eos  # before the largest id
    out = theirs(input_ids=tokens, pixel_values=images, output_hidden_states=True)
    logits = ours.logits(images, tokens)
    assert_near(logits, out.logits_per_image)
    assert_near(ours.encode_image(images), out.image_embeds)
    assert_near(ours.encode_text(tokens), out.text_embeds)
    states = out.vision_model_output.hidden_states
    assert_near(ours.patch_features(images), states[-2][:, 1:])
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    for result in (logits, out.logits_per_image):
        (result * upstream).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(g.abs().max() for g in expected.values())
    for name, parameter in ours.named_parameters():
        if name.endswith("k_proj.bias"):  # cannot change a softmax: its gradient is rounding alone
            continue
        limit = 1e-4 * expected[name].abs().max() + 1e-7 * largest
        assert (parameter.grad - expected[name]).abs().max() <= limit, name


@torch.no_grad()
def test_transformers_opens_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(logit_bias=False)
    model.tokenizer = CLIPTokenizer.of_bytes()
    model.save_pretrained(tmp_path)
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    images, tokens = inputs()
    out = theirs.eval()(input_ids=tokens, pixel_values=images)
    assert_near(out.logits_per_image, model.logits(images, tokens))
    texts = ["a cat", "Straße, 3 × 🍎!"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert torch.equal(ids, model.tokenize(texts))


@torch.no_grad()
def test_one_tower_opens_and_is_opened(tmp_path):
    """The four kinds of single towers that transformers saves, and back."""
    transformers = pytest.importorskip("transformers")
    images, tokens = inputs()
    saved = published.config_to_hf(TINY)
    text = transformers.CLIPTextConfig(**saved["text_config"])
    vision = transformers.CLIPVisionConfig(**saved["vision_config"])
    for kind, config in (
        ("CLIPTextModel", text),
        ("CLIPTextModelWithProjection", text),
        ("CLIPVisionModel", vision),
        ("CLIPVisionModelWithProjection", vision),
    ):
        torch.manual_seed(0)
        theirs = lively(getattr(transformers, kind)(config))
        theirs.save_pretrained(tmp_path / kind)
        ours = CLIP.from_pretrained(tmp_path / kind)
        assert ours.config.embed_dim == (24 if "Projection" in kind else 0)
        ours.save_pretrained(tmp_path / "ours")
        again, info = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [kind]
        for reference in (theirs, again.eval()):
            if "Text" in kind:
                out = reference(input_ids=tokens, output_hidden_states=True)
                assert_near(ours.hidden(tokens), out.last_hidden_state)
                assert_near(ours.hidden(tokens, layer=-2, final_norm=False), out.hidden_states[-2])
                assert_near(ours.pooled(tokens), out.text_embeds if "Projection" in kind else out.pooler_output)
            else:
                out = reference(pixel_values=images, output_hidden_states=True)
                assert_near(ours.patch_features(images), out.hidden_states[-2][:, 1:])
                expected = out.image_embeds if "Projection" in kind else out.pooler_output
                assert_near(ours.encode_image(images, normalize=False), expected)


def test_saving_and_loading_changes_no_bit(tmp_path):
    for changes in ({}, {"logit_bias": True}, {"text": None}, {"vision": None, "embed_dim": 0}):
        model = tiny(**changes).bfloat16()
        model.save_pretrained(tmp_path)
        again = CLIP.from_pretrained(tmp_path)
        assert again.config == model.config and same(weights(again), weights(model))
        assert again.state_dict().popitem()[1].dtype == torch.bfloat16


def test_position_numbers_and_old_double_configs_are_understood(tmp_path):
    """Files from before 2023 number their positions, and write each tower's config twice."""
    model = tiny()
    model.save_pretrained(tmp_path)
    numbered = weights(model) | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file(numbered, tmp_path / "model.safetensors")
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["text_config_dict"] = {"hidden_size": saved["text_config"].pop("hidden_size")}
    saved["vision_config_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == TINY and same(weights(again), weights(model))


# ---- OpenAI's and open_clip's files ----------------------------------------------------------


def openai_names(tensors):
    """The same weights as OpenAI and open_clip write them: q, k, v in one, projections the other way round."""
    pairs = {
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding": "token_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
        "visual_projection.weight": "visual.proj",
        "text_projection.weight": "text_projection",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        elif name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T.contiguous()
        for ours, theirs in pairs.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def script(tensors):
    """A TorchScript program whose modules hold `tensors` by their dotted names, as OpenAI's archives do."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return torch.jit.script(root)


def test_our_test_names_are_the_published_ones():
    stored = torch.load(GOLDEN / "clip_openai_statedict" / "weights.pt", weights_only=True)
    model = CLIP(CLIPConfig.from_weights(GOLDEN / "clip_openai_statedict" / "weights.pt", activation="quick_gelu"))
    assert {k: t.shape for k, t in openai_names(weights(model)).items()} == {k: t.shape for k, t in stored.items()}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_openai_archive_is_read_without_running_it(tmp_path):
    """Matrices in float16, the rest in float32, as published; the sum is a model in float32."""
    model = tiny()
    stored = {k: t.half() if t.ndim > 1 and "embed" not in k else t for k, t in openai_names(weights(model)).items()}
    extra = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(12), "vocab_size": torch.tensor(514)}
    script(stored | extra).save(tmp_path / "tiny.pt")
    assert pickles.is_torchscript(tmp_path / "tiny.pt")
    again = CLIP.from_pretrained(tmp_path / "tiny.pt")
    assert again.config == TINY  # an archive is OpenAI's, and OpenAI's activation is known
    expected = published.from_openai_names({name: t.float() for name, t in stored.items()})
    assert same(weights(again), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_damaged_archive_is_refused(tmp_path):
    script({"visual.proj": torch.ones(3)}).save(tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.pt"):
        CLIP.from_pretrained(tmp_path / "cut.pt")
    at = whole.index(b"data.pkl") + 80  # inside the first file of the archive
    (tmp_path / "broken.pt").write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
    with pytest.raises(UserError, match=r"broken\.pt: not a plain file of tensors"):
        CLIP.from_pretrained(tmp_path / "broken.pt")


class Evil:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_that_an_archive_pickles_is_run(tmp_path):
    for number, content in enumerate((Evil(tmp_path / "made"), {"visual": Evil(tmp_path / "made")}, 5)):
        file = tmp_path / f"{number}.pt"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("evil/constants.pkl", b"")
            archive.writestr("evil/data.pkl", pickle.dumps(content))
        assert pickles.is_torchscript(file) and str(file) in refusal(CLIP.from_pretrained, file)
    assert not (tmp_path / "made").exists()


def test_a_state_dict_without_config_asks_which_gelu(tmp_path):
    model = tiny()
    file = tmp_path / "open_clip_pytorch_model.bin"
    training = {"epoch": 3, "state_dict": {f"module.{k}": t for k, t in openai_names(weights(model)).items()}}
    for content in (openai_names(weights(model)), training):
        torch.save(content, file)
        with pytest.raises(UserError, match=r'which GELU.*activation="quick_gelu".*"gelu"'):
            CLIP.from_pretrained(file)
        config = CLIPConfig.from_weights(file, activation="gelu")
        assert config.text == dataclasses.replace(TINY.text, activation="gelu")
        again = CLIP.from_pretrained(file, config=config)
        assert same(weights(again), weights(model))


def test_an_open_clip_folder_tells_heads_gelu_and_colours(tmp_path):
    config = SHRUNK["laion_h14"]
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, mean=(0.5,) * 3, std=(0.5,) * 3))
    model = lively(CLIP(config))
    torch.save(openai_names(weights(model)), tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 28, "layers": 3, "width": 80, "head_width": 20, "patch_size": 7}
    text = {"context_length": 9, "vocab_size": 90, "width": 64, "heads": 4, "layers": 3}
    saved = {"model_cfg": {"embed_dim": 40, "vision_cfg": vision, "text_cfg": text}}
    saved["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(saved))
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == config and same(weights(again), weights(model))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"])
def test_our_sizes_are_open_clips(name):
    saved = {"model_cfg": json.loads((open_clip_folder() / "model_configs" / f"{name}.json").read_text())}
    ours = CLIPConfig.named(name.replace("-", "/").replace("/", "-", 1).replace("14/336", "14-336"), activation="gelu")
    assert settings.build(CLIPConfig, published.config_from_open_clip(saved)) == ours


# ---- text towers of Stable Diffusion ---------------------------------------------------------


def tower(width, layers, embed_dim, activation, seed):
    text = TextConfig(width, layers, width // 64, 4 * width, 514, 12, activation)
    return lively(CLIP(CLIPConfig(embed_dim, None, text)), seed)


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def test_text_towers_in_single_file_checkpoints(tmp_path):
    """SD 1 under Hugging Face's names, SD 2 under open_clip's and one layer too many, SDXL with one of each."""
    first, second = tower(64, 2, 0, "quick_gelu", 0), tower(128, 3, 32, "gelu", 1)
    open_clip = openai_names(weights(second)) | {"logit_scale": torch.tensor(4.6)}
    unet = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    files = {
        "sd1": under("cond_stage_model.transformer.", weights(first)),
        "sd2": under("cond_stage_model.model.", open_clip),
        "sdxl": under("conditioner.embedders.0.transformer.", weights(first))
        | under("conditioner.embedders.1.model.", open_clip),
    }
    for name, tensors in files.items():
        save_file({k: t.contiguous() for k, t in (tensors | unet).items()}, tmp_path / f"{name}.safetensors")
    CLIPTokenizer.of_bytes().save_pretrained(tmp_path / "words", 12)
    sd1, sd2, sdxl = (clip.text_encoders(tmp_path / f"{name}.safetensors", tmp_path / "words") for name in files)

    tokens = sd1[0].tokenize(["a dog"])
    assert tokens[0, 7:].tolist() == [513] * 5  # padded with the end token
    assert_near(sd1[0].hidden(tokens), first.hidden(tokens), 1e-6)

    tokens = sd2[0].tokenize(["a dog"])
    assert tokens[0, 7:].tolist() == [0] * 5
    assert sd2[0].config.text.layers == 2  # so that its last layer is the published one but last
    assert_near(sd2[0].hidden(tokens), second.hidden(tokens, layer=-2), 1e-6)

    assert same(weights(sdxl[0]), weights(first)) and same(weights(sdxl[1]), weights(second))
    assert_near(sdxl[1].pooled(tokens), second.pooled(tokens), 1e-6)
    assert [e.tokenizer.pad for e in sdxl] == [513, 0]

    save_file(unet, tmp_path / "without.safetensors")
    with pytest.raises(UserError, match=r"without\.safetensors: holds no CLIP text tower"):
        clip.text_encoders(tmp_path / "without.safetensors")


def test_text_towers_in_a_folder_find_their_own_tokenizers(tmp_path):
    for name, pad in (("", 513), ("_2", 0)):
        tower(64, 1, 24, "gelu", 0).save_pretrained(tmp_path / f"text_encoder{name}")
        words = CLIPTokenizer.of_bytes()
        words.pad = pad
        words.save_pretrained(tmp_path / f"tokenizer{name}", 12)
    assert [encoder.tokenize(["x"])[0, -1].item() for encoder in clip.text_encoders(tmp_path)] == [513, 0]
    with pytest.raises(UserError, match="no CLIP text tower"):
        clip.text_encoders(tmp_path / "tokenizer")


# ---- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (16, 16), (7, 20), (33, 100)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_preprocess_is_transformers(size, mode):
    transformers = pytest.importorskip("transformers")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()  # a palette's transparency is what a PNG keeps of it
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    image = Image.open(file)
    assert image.mode == mode
    processor = transformers.models.clip.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    expected = torch.as_tensor(np.stack(processor([image])["pixel_values"]))
    assert_near(clip.preprocess([image], 16), expected, 1e-5)


def test_a_saved_model_keeps_its_colours(tmp_path):
    model = tiny(vision=dataclasses.replace(TINY.vision, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)))
    model.save_pretrained(tmp_path)
    white = CLIP.from_pretrained(tmp_path).preprocess([Image.new("RGB", (20, 30), "white")])
    assert white.shape == (1, 3, 16, 16)
    assert white[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]


# ---- texts -----------------------------------------------------------------------------------


def open_clip_folder():
    """Where pip put open-clip-torch, which carries OpenAI's vocabulary; it need not import here."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("pip install --no-deps open-clip-torch: its files are needed, not its code")
    return Path(package.submodule_search_locations[0])


@pytest.fixture(scope="module")
def openai_tokenizer():
    return CLIPTokenizer.from_pretrained(open_clip_folder())


@pytest.fixture(scope="module")
def awkward():
    return json.loads((GOLDEN / "clip_tokenizer" / "tokens.json").read_text())["cases"]


def test_forty_awkward_texts_become_openais_tokens(openai_tokenizer, awkward):
    pytest.importorskip("ftfy")
    assert len(awkward) == 40
    for case in awkward:
        assert openai_tokenizer.encode(case["text"]) == case["encode"], case["text"]
        assert openai_tokenizer.decode(case["encode"]) == case["decode"]
        padded = case["tokenize77"] + [0] * (77 - len(case["tokenize77"]))
        assert openai_tokenizer.tokenize([case["text"]])[0].tolist() == padded


def test_the_vocabularys_three_files_say_the_same(openai_tokenizer, awkward, tmp_path):
    transformers = pytest.importorskip("transformers")
    openai_tokenizer.save_pretrained(tmp_path / "pair", 77)
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "pair").save_pretrained(tmp_path / "one")
    pair, one = CLIPTokenizer.from_pretrained(tmp_path / "pair"), CLIPTokenizer.from_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "merges.txt").exists()
    texts = [case["text"] for case in awkward]
    assert pair.pad == one.pad == 0
    for other in (pair, one):
        assert torch.equal(other.tokenize(texts), openai_tokenizer.tokenize(texts))


def test_ids_need_not_be_in_the_merges_order():
    """As in files that put the special tokens first."""
    by_rank = CLIPTokenizer(vocabulary_of([("a", "b</w>")]), [("a", "b</w>")], pad=0)
    shifted = CLIPTokenizer({t: i + 2 for t, i in by_rank.vocabulary.items()}, by_rank.merges, pad=0)
    assert by_rank.encode("ab b") == [512, by_rank.vocabulary["b</w>"]]
    assert shifted.encode("ab b") == [514, by_rank.vocabulary["b</w>"] + 2]
    assert shifted.decode(shifted.encode("AB  b")) == "ab b "


def vocabulary_of(merges):
    tokens = [*tokenizer.clip_tokens([]), *(a + b for a, b in merges), tokenizer.CLIP_START, tokenizer.CLIP_END]
    return {token: i for i, token in enumerate(tokens)}


def test_bytes_are_tokens_enough_for_a_small_clip():
    tokens = CLIPTokenizer.of_bytes().tokenize(["Hi é"], context_length=8)
    words = CLIPTokenizer.of_bytes()
    assert [words.tokens[i] for i in tokens[0].tolist()] == [
        tokenizer.CLIP_START,
        "h",
        "i</w>",
        "Ã",
        "©</w>",
        *[tokenizer.CLIP_END] * 3,
    ]
    assert words.decode(tokens[0, 1:5].tolist()) == "hi é "
    assert tokens.max() == 513  # the end token is the largest id: there the text is read off


def test_a_long_text_loses_its_end_but_not_the_end_token():
    words = CLIPTokenizer.of_bytes()
    short, long = words.tokenize(["ab", "abcdefgh"], context_length=6).tolist()
    assert short == [512, *words.encode("ab"), 513, 513, 513]
    assert long == [512, *words.encode("abcdefgh")[:4], 513]


def test_without_ftfy_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "ftfy", None)
    tokenizer.note_that_ftfy_is_missing.cache_clear()
    CLIPTokenizer.of_bytes().tokenize(["plain", "schön", "größer"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(tmp_path):
    CLIPTokenizer.of_bytes().save_pretrained(tmp_path, 12)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="vocabulary lacks 'ab'"):
        CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(UserError, match=r"vocab\.json: not a CLIP tokenizer"):
        CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(UserError, match=r"special_tokens_map\.json: expected a table"):
        CLIPTokenizer.from_pretrained(tmp_path)
    vocabulary = CLIPTokenizer.of_bytes().vocabulary
    for wrong in (-1, 2**40, 1.5, "7", None):
        with pytest.raises(UserError, match="CLIP's vocabulary gives 'a' the id"):
            CLIPTokenizer(vocabulary | {"a": wrong}, [], pad=513)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bpe_simple_vocab_16e6.txt.gz", b"no gzip"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {}, "merges": [5]}, "added_tokens": []}'),
        ("tokenizer.json", b'{"model": {"vocab": 5, "merges": []}, "added_tokens": []}'),
    ],
)
def test_a_file_that_is_no_clip_tokenizer_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert f"{name}: not a CLIP tokenizer" in refusal(CLIPTokenizer.from_pretrained, tmp_path)


# ---- losses ----------------------------------------------------------------------------------


def features(rows=4, dim=6, seed=3):
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, dim, generator=g), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (5.0, -2.0))
    return image, text, scale, bias


def test_the_contrastive_loss_is_its_formula():
    image, text, scale, _ = features()
    logits = (scale * image @ text.T).detach()
    by_row = [-math.log(logits[i].softmax(0)[i]) for i in range(4)]
    by_column = [-math.log(logits[:, i].softmax(0)[i]) for i in range(4)]
    assert contrastive_loss(image, text, scale).item() == pytest.approx((sum(by_row) + sum(by_column)) / 8, rel=1e-5)


def test_the_sigmoid_loss_is_its_formula():
    image, text, scale, bias = features()
    total = 0
    for i in range(4):
        for j in range(4):
            logit = (scale * image[i] @ text[j] + bias).item()
            total -= math.log(1 / (1 + math.exp(-logit if i == j else logit)))
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(total / 4, rel=1e-5)


def test_losses_are_computed_in_float32_under_autocast():
    image, text, scale, bias = features()
    expected = contrastive_loss(image, text, 20 * scale), sigmoid_loss(image, text, 20 * scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(image, text, 20 * scale), sigmoid_loss(image, text, 20 * scale, bias)
    assert found == expected


def gradients(rows, wrap=lambda model: model):
    """Both losses of a tiny SigLIP on some rows of a batch of four, and the gradients of their sum."""
    model = tiny(logit_bias=True)
    images, tokens = inputs(pictures=4)
    wrapped = wrap(model)
    image, text, scale, bias = wrapped(images[rows], tokens[rows])
    losses = contrastive_loss(image, text, scale), sigmoid_loss(image, text, scale, bias)
    sum(losses).backward()
    values = {"contrastive": losses[0].detach(), "sigmoid": losses[1].detach()}
    return values | {name: p.grad for name, p in model.named_parameters()}


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = gradients(slice(2 * rank, 2 * rank + 2), nn.parallel.DistributedDataParallel)
    checkpoint.write_tensors(f"{folder}/rank{rank}.safetensors", found)
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path):
    processes.spawn(one_of_two, tmp_path)
    a, b = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    whole = gradients(slice(0, 4))
    for name in ("contrastive", "sigmoid"):
        torch.testing.assert_close((a.pop(name) + b.pop(name)) / 2, whole.pop(name))
    largest = max(g.abs().max() for g in whole.values())
    for name, expected in whole.items():
        assert torch.equal(a[name], b[name])
        assert (a[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7 * largest, name


def test_a_tiny_clip_learns_which_text_belongs_to_which_picture():
    torch.manual_seed(0)
    model = CLIP(TINY)
    images, tokens = inputs(pictures=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        image, text, scale, _ = model(images, tokens)
        loss = contrastive_loss(image, text, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 < math.log(4)
    assert model.logits(images, tokens).argmax(1).tolist() == [0, 1, 2, 3]


# ---- mistakes --------------------------------------------------------------------------------


def put(saved, keys, value):
    """saved[a][b] = value for keys "a.b"; without keys, the value alone."""
    if not keys:
        return value
    *path, last = keys.split(".")
    table = saved
    for key in path:
        table = table[key]
    table[last] = value
    return saved


def refusal(open_it, *arguments):
    with pytest.raises(UserError) as error:
        open_it(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        ("", [], "config.json: expected a table"),
        ("model_type", 5, "config.json: model_type is 5"),
        ("projection_dim", -1, "config.json: projection_dim -1 must be at least 0"),
        ("projection_dim", 0, "config.json: projection_dim 0 leaves the two towers without a common space"),
        ("vision_config", [], "config.json: vision_config: expected a table"),
        ("text_config_dict", 5, "config.json: text_config_dict: expected a table"),
        ("vision_config.hidden_size", 128.5, "vision_config: hidden_size: expected a whole number"),
        ("vision_config.hidden_size", 2**40, "vision_config: hidden_size 1099511627776 must be at most"),
        ("vision_config.num_hidden_layers", "3", "vision_config: num_hidden_layers: expected a whole number"),
        ("vision_config.num_hidden_layers", -1, "vision_config: num_hidden_layers -1 must be at least 1"),
        ("vision_config.num_attention_heads", 0, "vision_config: num_attention_heads 0 must be at least 1"),
        ("vision_config.num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size 128"),
        ("vision_config.patch_size", 0, "vision_config: patch_size 0 must be at least 1"),
        ("vision_config.num_channels", 4, "vision_config: num_channels is 4; only 3 is supported"),
        ("vision_config.hidden_act", "relu", 'vision_config: hidden_act "relu" must be one of quick_gelu, gelu'),
        ("text_config.layer_norm_eps", math.nan, "text_config: layer_norm_eps: nan is no number to compute with"),
        ("text_config.eos_token_id", [5], "text_config: eos_token_id: expected a whole number, got [5]"),
        ("text_config.eos_token_id", "5", "text_config: eos_token_id: expected a whole number"),
        ("text_config.eos_token_id", 514, "text_config: eos_token_id 514 must be an id below vocab_size 514"),
        ("text_config.max_position_embeddings", True, "max_position_embeddings: expected a whole number, got True"),
    ],
)
def test_a_damaged_config_is_one_line_with_file_and_key(keys, value, says, tmp_path):
    tiny().save_pretrained(tmp_path)
    saved = put(json.loads((tmp_path / "config.json").read_text()), keys, value)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert says in refusal(CLIP.from_pretrained, tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        ("", 5, "preprocessor_config.json: expected a table"),
        ("image_mean", [0.5], "preprocessor_config.json: image_mean (0.5,) must be three numbers"),
        ("image_mean", "x", "preprocessor_config.json: image_mean: expected a list"),
        ("image_std", [0.5, 0, 0.5], "preprocessor_config.json: image_std (0.5, 0.0, 0.5) must be greater than 0"),
        ("image_std", [0.5, None, 0.5], "preprocessor_config.json: image_std[1]: expected a number"),
        ("do_normalize", False, "preprocessor_config.json: do_normalize is False; only True is supported"),
        ("resample", 2, "preprocessor_config.json: resample is 2; only 3 is supported"),
        ("rescale_factor", 1, "preprocessor_config.json: rescale_factor is 1; only"),
        ("size", {"height": 16, "width": 16}, "preprocessor_config.json: size is {'height': 16, 'width': 16}; only"),
        ("crop_size", 224, "preprocessor_config.json: crop_size is 224; only the image_size of the tower, 16,"),
    ],
)
def test_another_preprocessing_than_ours_is_refused(keys, value, says, tmp_path):
    """What it does to a picture changes every feature: it is done, or refused by name."""
    tiny().save_pretrained(tmp_path)
    saved = put(json.loads((tmp_path / "preprocessor_config.json").read_text()), keys, value)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    assert says in refusal(CLIP.from_pretrained, tmp_path)


def test_what_image_processors_of_transformers_write_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    model.save_pretrained(tmp_path)
    colours = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    processor = transformers.models.clip.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, **colours)
    processor.save_pretrained(tmp_path)
    assert CLIP.from_pretrained(tmp_path).config.vision.std == (0.25,) * 3
    oldest = {"crop_size": 16, "size": 16, "feature_extractor_type": "CLIPFeatureExtractor"} | colours
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(oldest))
    assert CLIP.from_pretrained(tmp_path).config.vision.mean == (0.5,) * 3


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 3, "width": 128, "mlp_ratio": 1.25, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 514, "width": 64, "heads": 1, "layers": 2, "mlp_ratio": 1.5},
    },
    "preprocess_cfg": {"size": [16, 16], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"},
}


def test_an_open_clip_config_is_read_in_full():
    assert settings.build(CLIPConfig, published.config_from_open_clip(OPEN_CLIP)) == TINY


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        ("", [], "open_clip_config.json: expected a table"),
        ("model_cfg", None, "open_clip_config.json: model_cfg is missing"),
        ("model_cfg", 5, "open_clip_config.json: model_cfg: expected a table"),
        ("model_cfg.vision_cfg", [], "model_cfg: vision_cfg: expected a table"),
        ("model_cfg.embed_dim", "24", "model_cfg: embed_dim: expected a whole number"),
        ("model_cfg.quick_gelu", 1, "model_cfg: quick_gelu: expected true or false"),
        ("model_cfg.vision_cfg.layers", [3, 4], "vision_cfg: layers: expected a whole number"),
        ("model_cfg.vision_cfg.width", "128", "vision_cfg: width: expected a whole number"),
        ("model_cfg.vision_cfg.head_width", 0, "vision_cfg: head_width 0 must be at least 1"),
        ("model_cfg.vision_cfg.head_width", 40, "vision_cfg: width / head_width = 3 does not divide width 128"),
        ("model_cfg.vision_cfg.mlp_ratio", 0, "vision_cfg: mlp_ratio · width = 0 must be at least 1"),
        ("model_cfg.vision_cfg.mlp_ratio", math.inf, "vision_cfg: mlp_ratio: inf is no number to compute with"),
        ("model_cfg.vision_cfg.pool_type", "avg", "vision_cfg: pool_type is 'avg'; only 'tok' is supported"),
        ("model_cfg.text_cfg.heads", None, "text_cfg: heads is missing"),
        ("model_cfg.text_cfg.no_causal_mask", True, "text_cfg: no_causal_mask is True; only False is supported"),
        ("preprocess_cfg.std", [1, 1, 0], "preprocess_cfg: std (1.0, 1.0, 0.0) must be greater than 0"),
        ("preprocess_cfg.interpolation", "bilinear", "interpolation is 'bilinear'; only 'bicubic' is supported"),
        ("preprocess_cfg.size", 32, "preprocess_cfg: size is 32; only the image_size of the tower, 16"),
    ],
)
def test_a_damaged_open_clip_config_is_one_line(keys, value, says):
    saved = put(json.loads(json.dumps(OPEN_CLIP)), keys, value)
    build = lambda: settings.build(CLIPConfig, published.config_from_open_clip(saved))  # noqa: E731
    assert says in refusal(build)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.vision.heads=0", "[model.vision] heads 0 must be at least 1"),
        ("model.vision.std=[1, 0, 1]", "[model.vision] std (1.0, 0.0, 1.0) must be greater than 0"),
        ("model.vision.mean=[]", "[model.vision] mean () must be three numbers"),
        ("model.text.layers=100000", "[model.text] layers 100000 must be at most 1000"),
        ("model.text.eos=514", "[model.text] eos 514 must be an id below vocab_size 514"),
    ],
)
def test_a_run_that_cannot_be_is_one_line(override, says):
    values = settings.read(ROOT / "configs" / "tiny_clip.toml", [override])["model"]
    assert values.pop("kind") == "clip"
    assert says in refusal(settings.build, CLIPConfig, values, "model")


def test_another_models_tokenizer_is_named():
    model = tiny(text=dataclasses.replace(TINY.text, vocab_size=500))
    model.tokenizer = CLIPTokenizer.of_bytes()
    assert "it has the id 513, this CLIP has only 500 tokens" in refusal(model.tokenize, ["a"])


def test_another_models_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refusal(CLIP.from_pretrained, tmp_path).endswith(
        "holds a LLaMA, but a CLIP or a CLIP text tower or a CLIP vision tower is wanted"
    )


def test_weights_without_a_config_that_are_no_clips_are_one_line(tmp_path):
    shapes = weights(tiny())
    for name, tensor, says in (
        ("vision_model.embeddings.patch_embedding.weight", torch.ones(3), "is (3,), expected 4 dimensions"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", torch.ones(7, 100), "is 100 wide, which does not tell"),
        ("vision_model.embeddings.position_embedding.weight", torch.ones(0, 128), "image_size 0 must be at least 1"),
    ):
        save_file(shapes | {name: tensor}, tmp_path / "weights.safetensors")
        assert says in refusal(CLIPConfig.from_weights, tmp_path / "weights.safetensors", "gelu")


def test_mistakes_are_named_in_one_line(tmp_path):
    model = tiny()
    with pytest.raises(UserError, match=r"\(3, 16, 16\), not \(3, 24, 24\)"):
        model.encode_image(torch.zeros(1, 3, 24, 24))
    with pytest.raises(UserError, match="13 tokens do not fit in 12"):
        model.encode_text(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(UserError, match=r"without a tokenizer.*vocab\.json"):
        model.tokenize(["a"])
    model.save_pretrained(tmp_path)
    save_file({k: t for k, t in weights(model).items() if "fc1.bias" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"fc1\.bias is missing \(5 in all\)"):
        CLIP.from_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: holds no CLIP"):
        CLIP.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UserError, match="model_type is 'siglip'"):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="heads 5 does not divide width 128"):
        dataclasses.replace(TINY.vision, heads=5)
    with pytest.raises(ValueError, match='"relu" must be one of quick_gelu, gelu'):
        dataclasses.replace(TINY.text, activation="relu")
