"""A damaged configuration is one line that names the file and the key; what is accepted is a model that runs.

Every field of every configuration class is set to what it must not be: another type, 0, -1, a huge number, NaN, a
list, null. In our TOML, by an override; in the published files, by writing the file anew.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import types
import typing

import pytest
import torch
from conftest import GOLDEN, ROOT

import tasks
from clip import CLIP, CLIPConfig
from diffusion import AutoencoderKL, AutoencoderKLConfig, LatentDiffusion, NoiseSchedule, UNet, UNetConfig
from dreamllm import DreamLLM, DreamLLMConfig
from model import LLaMA, LLaMAConfig
from support import settings
from support.settings import UserError
from vqgan import VQGAN, VQGANConfig

DAMAGE = {  # as TOML writes it, and as JSON does
    "text": ('"x"', "x"),
    "number": ("1.5", 1.5),
    "zero": ("0", 0),
    "negative": ("-1", -1),
    "huge": (str(2**40), 2**40),
    "nan": ("nan", math.nan),
    "list": ("[1]", [1]),
    "lists": ("[[]]", [[]]),
    "zeros": ("[0, 0]", [0, 0]),
    "empty": ("[]", []),
    "table": ("{x = 1}", {"x": 1}),
    "truth": ("true", True),
}


def leaves(cls, prefix=""):
    """(dotted key) of every field of a dataclass, those of its sections and of the tables in its lists included."""
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, types.UnionType):
            hint = next(h for h in typing.get_args(hint) if h is not type(None))
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def one_line(error):
    return "\n" not in str(error.value)


# ---- our TOML --------------------------------------------------------------------------------


@torch.no_grad()
def run_model(kind, s):
    """One pass of a freshly built model of these settings."""
    config = {f.name: getattr(s.model, f.name) for f in dataclasses.fields(CONFIGS[kind])}
    config = CONFIGS[kind](**config)
    if kind == "llama":
        return LLaMA(config)(torch.zeros(1, 1, dtype=torch.long))
    if kind == "vqgan":
        return VQGAN(config)(torch.rand(1, config.num_channels, config.resolution, config.resolution))[0]
    if kind == "vae":
        return AutoencoderKL(config)(torch.rand(1, config.in_channels, 16 * config.factor, 16 * config.factor))[0]
    if kind == "clip":
        model, tokens = CLIP(config), torch.zeros(1, 1, dtype=torch.long)
        side = config.vision.image_size
        return model.logits(torch.rand(1, 3, side, side), tokens)
    if kind == "unet":
        side = max(config.sample_size, 2 ** len(config.block_out_channels))
        context = torch.rand(1, 2, config.cross_attention_dim)
        width, count = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        sdxl = (torch.rand(1, width - 6 * count), torch.rand(1, 6)) if count else ()
        return UNet(config)(
            torch.rand(1, config.in_channels, side, side), s.schedule.num_train_timesteps - 1, context, *sdxl
        )
    return torch.zeros(())  # a DreamLLM's parts have configurations of their own


CONFIGS = {"llama": LLaMAConfig, "vqgan": VQGANConfig, "vae": AutoencoderKLConfig, "clip": CLIPConfig}
CONFIGS |= {"unet": UNetConfig, "dreamllm": DreamLLMConfig}
KEYS = [(kind, key) for kind, run in tasks.RUNS.items() for key in leaves(run) if "." in key]


@pytest.mark.parametrize(("kind", "key"), KEYS, ids=[f"{kind}-{key}" for kind, key in KEYS])
def test_a_damaged_section_of_ours_is_one_line_or_a_model_that_runs(kind, key):
    config = str(ROOT / "configs" / f"tiny_{kind}.toml")
    for toml, _ in DAMAGE.values():
        try:
            s, _ = tasks.read_run(config, [f"{key}={toml}"])
        except UserError as error:
            section, _, name = key.rpartition(".")
            assert "\n" not in str(error), toml
            assert name in str(error) or section.rpartition(".")[2] in str(error), (toml, str(error))
            continue
        if key.startswith(("model", "schedule")):
            assert run_model(kind, s).isfinite().all() or "std" in key, toml


WILD = ("1e300", "-1e300", "1e-300", "inf", "nan", "-1.5")


def test_every_number_of_a_run_has_bounds():
    for key, kind in {key: kind for kind, key in KEYS}.items():
        accepted = []
        for value in WILD:
            with contextlib.suppress(UserError):
                tasks.read_run(str(ROOT / "configs" / f"tiny_{kind}.toml"), [f"{key}={value}"])
                accepted.append(value)
        assert accepted in ([], list(WILD)), (kind, key)  # a text may be anything


SOURCES = [
    (kind, key)
    for kind in ("llama", "dreamllm")
    for key in leaves(
        typing.get_args(typing.get_type_hints(typing.get_type_hints(tasks.RUNS[kind])["data"])["sources"])[0]
    )
]


@pytest.mark.parametrize(("kind", "key"), SOURCES)
def test_a_damaged_source_is_one_line_that_names_it(kind, key):
    config = str(ROOT / "configs" / f"tiny_{kind}.toml")
    refused = 0
    for toml, _ in DAMAGE.values():
        try:
            tasks.read_run(config, [f"data.sources=[{{{key} = {toml}}}]"])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and key in str(error), (toml, str(error))
    assert refused >= len(DAMAGE) - 5


# ---- published files -------------------------------------------------------------------------

PUBLISHED = {  # folder: (what opens it, its configuration)
    "llama_hf_lvm": (LLaMA, "config.json"),
    "llama_hf_31": (LLaMA, "config.json"),
    "llama_meta": (LLaMA, "params.json"),
    "vqgan_muse_noattn": (VQGAN, "config.json"),
    "vqgan_maskgit": (VQGAN, "config.json"),
    "clip_hf_quickgelu": (CLIP, "config.json"),
    "sd15_diffusers": (UNet, "unet/config.json"),
    "sdxl_diffusers": (UNet, "unet/config.json"),
    "sd21_diffusers": (AutoencoderKL, "vae/config.json"),
}
PUBLISHED |= {"sd15_diffusers/": (LatentDiffusion, "scheduler/scheduler_config.json")}
PUBLISHED |= {"dreamllm/checkpoint": (DreamLLM, "config.json")}

DREAMLLM_KEYS = ("model_type", "plugins_init_kwargs", "special_tokens2ids_dict", "loss_weight_lm", "hidden_size")


def json_keys(saved, prefix=()):
    for key, value in saved.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from json_keys(value, (*prefix, key))


def written_with(saved, path, value):
    """A copy of a JSON table in which the entry at `path` is `value`."""
    copy = json.loads(json.dumps(saved))
    table = copy
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return copy


@pytest.fixture(scope="module", params=PUBLISHED)
def folder(request, tmp_path_factory):
    """A published folder to damage: (what opens it, the folder, its configuration's file, its content)."""
    loader, name = PUBLISHED[request.param]
    target = tmp_path_factory.mktemp("published") / "folder"
    shutil.copytree(GOLDEN / request.param, target)
    return loader, target, target / name, json.loads((target / name).read_text())


def test_a_damaged_published_configuration_is_one_line_or_a_model(folder):
    loader, path, file, saved = folder
    parts = {"parts": [GOLDEN / "dreamllm" / "components"]} if loader is DreamLLM else {}
    troubles = []
    for damaged in ([], "x", 5, None, {}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(UserError) as error:
            loader.from_pretrained(path, **parts)
        assert one_line(error) and file.name in str(error.value)
    own = saved if loader is not DreamLLM else {key: saved[key] for key in DREAMLLM_KEYS}  # its LLaMA's: see llama_*
    for key in json_keys(own):
        for value in ("x", 1.5, 0, -1, 2**40, math.nan, [1], [], None):
            file.write_text(json.dumps(written_with(saved, key, value)))
            try:
                loader.from_pretrained(path, **parts)
            except UserError as error:
                if "\n" in str(error) or str(path) not in str(error):
                    troubles.append(f"{key} = {value!r}: {error}")
            except Exception as error:
                troubles.append(f"{key} = {value!r}: {type(error).__name__}: {error}")
    file.write_text(json.dumps(saved))
    loader.from_pretrained(path, **parts)
    assert not troubles, "\n".join(troubles)


@pytest.mark.parametrize("cls", [LLaMAConfig, VQGANConfig, CLIPConfig, UNetConfig, AutoencoderKLConfig, NoiseSchedule])
def test_every_number_of_a_shape_has_a_lower_and_an_upper_bound(cls):
    for key in leaves(cls):
        hint = typing.get_type_hints(cls).get(key)
        for value in (-1, 2**40) if hint is int else ((-1,), (2**40,)) if hint == tuple[int, ...] else ():
            with pytest.raises(UserError, match=key):
                settings.build(cls, {key: value}, "model")
