"""What `sample.py what` says of whatever people have on disk, and that what opens nowhere is called by its name."""

import argparse
import json
import shutil
import zipfile

import processes
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import sample
from clip import CLIP, CLIPConfig
from model import LLaMA
from support import checkpoint
from support.settings import UserError
from vqgan import VQGAN

OPENS = {  # folder or file in tests/golden: what it is, and what its command is
    "llama_hf_lvm": ("a LLaMA", "4,096 tokens", "continue"),
    "llama_hf_31": ("a LLaMA", "48,448 parameters", "--tokenizer VQGAN"),
    "llama_meta": ("a LLaMA", "float32", "continue"),
    "llama_meta_mp2": ("a LLaMA", "36,000 parameters", "continue"),
    "vqgan_maskgit": ("a VQGAN", "128 codes, 256 pixels a side", "reconstruct"),
    "vqgan_muse_noattn": ("a VQGAN", "float32", "reconstruct"),
    "vqgan_taming": ("a VQGAN", "4,429,427 parameters", "reconstruct"),
    "vqgan_muse_attn/weights.safetensors": ("a VQGAN", "207,459", "reconstruct"),
    "clip_hf_quickgelu": ("a CLIP", "77 tokens", "model.init="),
    "sd15_diffusers/unet": ("a U-Net of latent diffusion", "19,560 parameters", "configs/unet.toml"),
    "sdxl_diffusers/vae": ("an autoencoder of latent diffusion", "float32", "configs/vae.toml"),
    "dreamllm/checkpoint": ("a DreamLLM", "tokenizer.model, 392 tokens", "chat"),
}
REFUSED = {  # the same: what the one line says
    "vqgan_muse_attn": "name one of them: io.safetensors, weights.safetensors",
    "clip_openai_statedict/weights.pt": "which GELU",
    "sd15_diffusers": "no CLIP text tower",
    "sd21_diffusers": "no CLIP text tower",
    "sdxl_diffusers": "no CLIP text tower",
    "sd1_compvis/weights.ckpt": "needs config=",
    "clip_openai_statedict": "name one of them: io.safetensors, weights.pt",
    "llama_meta/io.safetensors": "belongs to consolidated.00.pth",
    "clip_tokenizer": "nothing that opens here",
    "sd_schedulers": "nothing that opens here",
    "dreamllm": "a folder around others; name it: checkpoint",
}


@pytest.mark.parametrize("name", OPENS)
def test_what_opens_is_said_with_its_size_and_command(name, program):
    kind, fact, command = OPENS[name]
    code, stdout, _ = program(sample.main, "what", GOLDEN / name)
    assert code == 0 and f"what       {kind}\n" in stdout and fact in stdout
    assert command in stdout.splitlines()[-1] and str(GOLDEN / name) in stdout.splitlines()[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_open_is_one_line_that_says_why(name, program):
    code, _, stderr = program(sample.main, "what", GOLDEN / name)
    assert code == 2 and REFUSED[name] in stderr.splitlines()[-1]


def test_a_run_is_said_with_its_kind_and_step(tokenizer_run, lvm_run, program):
    stdout = program(sample.main, "what", tokenizer_run)[1]
    assert 'model.kind "vqgan", step_00000' in stdout and "reconstruct" in stdout
    stdout = program(sample.main, "what", lvm_run)[1]
    assert 'model.kind "llama"' in stdout and "averaged weights" in stdout and "sample.py continue" in stdout


# ---- what opens nowhere ------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476839424\n"


def weights(name="model.safetensors", **tensors):
    return lambda folder: save_file({k.replace("__", "."): t for k, t in tensors.items()}, folder / name)


def content(name, data):
    def write(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    return write


def archive(folder):
    with zipfile.ZipFile(folder / "model.bin", "w") as file:
        file.writestr("LVM/config.json", "{}")


def no_index(folder):
    save_file({"x": torch.ones(1)}, folder / "model-00001-of-00003.safetensors")


def two_shards(folder):
    save_file({"x": torch.ones(1)}, folder / "a.safetensors")
    content("model.safetensors.index.json", {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})(folder)


def dead_link(folder):
    (folder / "config.json").symlink_to("../blobs/0123")


LLAMA_CONFIG = content("config.json", (GOLDEN / "llama_hf_lvm" / "config.json").read_bytes())
WRONG = {  # what lies in a folder: what the line calls it
    "nothing": ([], "is empty"),
    "pointer": ([content("model.safetensors", POINTER)], "a Git LFS pointer"),
    "config that is a pointer": ([content("config.json", POINTER)], "a Git LFS pointer"),
    "gguf": ([content("llama-7b.Q4_K_M.gguf", b"GGUF\3\0\0\0")], "a GGUF file"),
    "onnx": ([content("model.onnx", b"\x08\x07")], "an ONNX graph"),
    "tensorflow": ([content("tf_model.h5", b"\x89HDF\r\n")], "TensorFlow weights"),
    "flax": ([content("flax_model.msgpack", b"\xde")], "Flax weights"),
    "web page": ([content("model.safetensors", b"<!DOCTYPE html><html>")], "a web page"),
    "zip": ([archive], "model.bin"),
    "tar": ([content("LVM-7B.tar.gz", b"\x1f\x8b")], "around an archive"),
    "gptq": (
        [content("config.json", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})],
        "gptq",
    ),
    "fp8": ([content("config.json", {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})], "fp8"),
    "old gptq": ([LLAMA_CONFIG, weights(q__qweight=torch.ones(2, dtype=torch.int32))], "a quantised model"),
    "bitsandbytes": ([LLAMA_CONFIG, weights(q__weight__absmax=torch.ones(2))], "a quantised model"),
    "peft": ([content("adapter_config.json", {"base_model_name_or_path": "a/b"})], "a LoRA adapter of a/b"),
    "diffusion lora": ([weights("pytorch_lora_weights.safetensors", unet__lora_A__weight=torch.ones(2))], "name it"),
    "textual inversion": ([weights(emb_params=torch.ones(1, 768))], "a textual inversion"),
    "controlnet": ([content("config.json", {"_class_name": "ControlNetModel"})], "ControlNetModel"),
    "controlnet alone": ([weights(control_model__x=torch.ones(1))], "a ControlNet"),
    "mistral": ([content("config.json", {"model_type": "mixtral"})], "model_type is 'mixtral'"),
    "siglip": ([content("config.json", {"model_type": "siglip"})], "model_type is 'siglip'"),
    "timm tower": ([weights("open_clip_model.safetensors", visual__trunk__x=torch.ones(1))], "vision tower of timm"),
    "sentence-transformers": ([content("modules.json", []), content("0_CLIPModel/config.json", {})], "0_CLIPModel"),
    "no index": ([LLAMA_CONFIG, no_index], "the index of its 3 shards"),
    "half": ([LLAMA_CONFIG, two_shards], "1 of the 2 shards"),
    "dead link": ([dead_link], "a link to a file that is not there"),
    "incomplete": ([content(".cache/huggingface/download/x.incomplete", b"")], "a half-finished download"),
    "crdownload": ([content("model.safetensors.crdownload", b"x")], "a half-finished download"),
    "folder in a folder": ([content("LVM-7B/config.json", {})], "name it: LVM-7B"),
    "deepspeed": ([content("zero_to_fp32.py", b"")], "DeepSpeed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_something_else_is_called_by_its_name(name, tmp_path, program):
    """In `what`, and where a model is meant."""
    makers, says = WRONG[name]
    for make in makers:
        make(tmp_path)
    code, _, stderr = program(sample.main, "what", tmp_path)
    assert code == 2 and stderr.count("\n") == 1 and says in stderr and ";" in stderr
    with pytest.raises(UserError) as error:
        LLaMA.from_pretrained(tmp_path)
    assert says in str(error.value)


def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, program):
    for file, data, says in (
        ("a.gguf", b"GGUF", "a GGUF file"),
        ("b.safetensors", POINTER, "git lfs pull"),
        ("c.ckpt", b"7z\xbc\xaf", "unpack it"),
    ):
        (tmp_path / file).write_bytes(data)
        assert says in program(sample.main, "what", tmp_path / file)[2]
    save_file({"unet.down.lora_up.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    assert "a LoRA adapter (unet.down.lora_up.weight)" in program(sample.main, "what", tmp_path / "lora.safetensors")[2]


# ---- what opens although it is wrapped ---------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {f"_orig_mod.{k}": v for k, v in t.items()},
        lambda t: {f"module._orig_mod.{k}": v for k, v in t.items()},
        lambda t: {k.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): v for k, v in t.items()},
        lambda t: {"model": {"state_dict": {f"module.{k}": v for k, v in t.items()}}, "step": 7},
        lambda t: {"state_dict": {f"model.{k}": v for k, v in t.items()}, "pytorch-lightning_version": "2.4"},
        lambda t: {"module": t, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda t: {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in t.items()},
        lambda t: {"args": argparse.Namespace(lr=0.1), "state_dict": t},
        lambda t: {f"ema_model.{k}": v for k, v in t.items()} | {f"online_model.{k}": 0 * v for k, v in t.items()},
        lambda t: {"model": {k: 0 * v for k, v in t.items()}, "ema": t},
    ],
)
def test_what_training_programs_wrap_around_a_model_is_taken_off(wrap, tmp_path, capsys):
    tensors = load_file(GOLDEN / "llama_hf_lvm" / "model.safetensors")
    shutil.copy(GOLDEN / "llama_hf_lvm" / "config.json", tmp_path)
    wrapped = wrap(tensors)
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    model, expected = LLaMA.from_pretrained(tmp_path), LLaMA.from_pretrained(GOLDEN / "llama_hf_lvm")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    is_choice = "ema" in wrapped or any(name.startswith("online_model") for name in wrapped)
    assert ("averaged weights" in capsys.readouterr().err) == is_choice


def test_a_whole_pickled_module_is_refused_unrun(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.bin")
    with pytest.raises(UserError, match="whole pickled module: save its state_dict"):
        checkpoint.read_tensors(tmp_path / "model.bin")


def test_one_consolidated_file_is_meta_s_layout_and_what_it_asks_for_beyond_is_refused(tmp_path):
    tensors = torch.load(GOLDEN / "llama_meta" / "consolidated.00.pth", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "consolidated.safetensors")
    params = json.loads((GOLDEN / "llama_meta" / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params))
    expected = LLaMA.from_pretrained(GOLDEN / "llama_meta")
    assert torch.equal(LLaMA.from_pretrained(tmp_path).layers[0].self_attn.q_proj.weight,
                       expected.layers[0].self_attn.q_proj.weight)  # fmt: skip
    for key, value in (("sliding_window", 4096), ("moe", {"num_experts": 8})):
        (tmp_path / "params.json").write_text(json.dumps(params | {key: value}))
        with pytest.raises(UserError, match=f"params.json: {key}"):
            LLaMA.from_pretrained(tmp_path)


def test_a_head_of_its_own_counts_although_the_configuration_ties_it(tmp_path, capsys):
    """As transformers 5 reads it; a tied weight that a file holds twice stays one."""
    tensors = load_file(GOLDEN / "llama_hf_lvm" / "model.safetensors")
    config = json.loads((GOLDEN / "llama_hf_lvm" / "config.json").read_text())
    content("config.json", config | {"tie_word_embeddings": True})(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(LLaMA.from_pretrained(tmp_path).lm_head.weight, tensors["lm_head.weight"])
    assert "are not tied" in capsys.readouterr().err
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert LLaMA.from_pretrained(tmp_path).config.tie_embeddings and not capsys.readouterr().err


def test_safetensors_named_bin_open_and_peft_s_prefix_goes_a_pickle_named_safetensors_is_refused(tmp_path):
    tensors = load_file(GOLDEN / "llama_hf_lvm" / "model.safetensors")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    shutil.copy(GOLDEN / "llama_hf_lvm" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "pytorch_model.bin")
    model = LLaMA.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["base_model.model.lm_head.weight"])
    torch.save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is a pickle of torch.*name it \.bin"):
        LLaMA.from_pretrained(tmp_path)


def test_an_adapter_beside_a_model_is_not_left_out_in_silence(tmp_path):
    """transformers adds it to the weights where peft is installed."""
    shutil.copytree(GOLDEN / "llama_hf_lvm", tmp_path / "model")
    content("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "a/b"})(tmp_path / "model")
    with pytest.raises(UserError, match=r"a model with a LoRA adapter beside it; .* move adapter_config\.json away"):
        LLaMA.from_pretrained(tmp_path / "model")


def test_weights_without_a_config_json_are_refused_with_the_way_out(tmp_path):
    shutil.copy(GOLDEN / "llama_hf_lvm" / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"no config\.json beside the weights.*get it too"):
        LLaMA.from_pretrained(tmp_path)


# ---- the hub's cache ---------------------------------------------------------------------------


def test_the_hub_s_cache_opens_where_it_is_unambiguous(tmp_path):
    root = tmp_path / "models--lvm--7b"
    shutil.copytree(GOLDEN / "llama_hf_lvm", root / "snapshots" / "aaa")
    assert checkpoint.weights_folder(root) == checkpoint.weights_folder(tmp_path) == root / "snapshots" / "aaa"
    (root / "snapshots" / "bbb").mkdir()
    with pytest.raises(UserError, match=r"2 snapshots: name one of them.*aaa"):
        LLaMA.from_pretrained(root)
    content("refs/main", b"aaa\n")(root)
    assert LLaMA.from_pretrained(root).config.vocab_size == 212
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").symlink_to(tmp_path)  # as HF_HOME names it
    assert checkpoint.weights_folder(tmp_path / "home").name == "aaa"
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with pytest.raises(UserError, match="2 models: name one of them"):
        checkpoint.weights_folder(tmp_path)
    with pytest.raises(UserError, match="holds no snapshots yet"):
        checkpoint.weights_folder(tmp_path / "models--a--b")


# ---- log folders of training programs -----------------------------------------------------------


def test_taming_s_own_log_folder_opens(tmp_path, program):
    log = tmp_path / "2021-04-03T19-39-50_vqgan"
    for folder in ("checkpoints", "configs"):
        (log / folder).mkdir(parents=True)
    shutil.copy(GOLDEN / "vqgan_taming" / "last.ckpt", log / "checkpoints")
    (log / "checkpoints" / "epoch=000003.ckpt").write_bytes(b"older")
    shutil.copy(GOLDEN / "vqgan_taming" / "model.yaml", log / "configs" / "2021-04-03T19-39-50-project.yaml")
    (log / "configs" / "2021-04-03T19-39-50-lightning.yaml").write_text("lightning: {}")
    expected = VQGAN.from_pretrained(GOLDEN / "vqgan_taming")
    for path in (log, log / "checkpoints" / "last.ckpt"):
        model = VQGAN.from_pretrained(path)
        assert model.config == expected.config
        assert torch.equal(model.quantize.embedding.weight, expected.quantize.embedding.weight)
    assert "a VQGAN" in program(sample.main, "what", log)[1]


def test_open_clip_s_own_log_folder_opens(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    tensors = torch.load(GOLDEN / "clip_openai_statedict" / "weights.pt", weights_only=True)
    for epoch in (2, 10):
        wrapped = {"epoch": epoch, "state_dict": {f"module.{k}": t * (epoch == 10) for k, t in tensors.items()}}
        torch.save(wrapped, tmp_path / "checkpoints" / f"epoch_{epoch}.pt")
    run = "image_mean: [0.5, 0.5, 0.5]\nimage_std: None\n"
    for model, flag, gelu in (
        ("ViT-B-32", "False", "gelu"),
        ("ViT-B-32-quickgelu", "False", "quick_gelu"),
        ("ViT-B-32", "True", "quick_gelu"),
    ):
        text = f"{run}model: {model}\nforce_quick_gelu: {flag}\npretrained: \n"
        (tmp_path / "params.txt").write_text(text)
        for path in (tmp_path, tmp_path / "checkpoints" / "epoch_10.pt"):
            clip = CLIP.from_pretrained(path)
            assert clip.config.vision.activation == clip.config.text.activation == gelu
            assert clip.config.vision.mean == (0.5,) * 3 and clip.visual_projection.weight.any()
    (tmp_path / "params.txt").write_text("model: ViT-B-32\nforce_quick_gelu: False\npretrained: openai\n")
    with pytest.raises(UserError, match="which GELU"):
        CLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base_patch16_siglip_224"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
        ("vision_cfg", "qk_norm", True),
        ("text_cfg", "hf_model_name", "xlm-roberta-base"),
        ("text_cfg", "hf_tokenizer_name", "bert-base-uncased"),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "a_key_of_next_year", 1),
        (None, "multimodal_cfg", {"width": 512}),
        (None, "a_key_of_next_year", 1),
    ],
)
def test_an_open_clip_configuration_of_another_architecture_is_refused_by_its_key(part, key, value, tmp_path):
    tower = {"width": 64, "layers": 1, "patch_size": 8, "image_size": 32, "heads": 1}
    model = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": {k: tower[k] for k in ("width", "layers", "heads")}}
    model["vision_cfg"] = {k: v for k, v in tower.items() if k != "heads"}
    table = model[part] if part else model
    table[key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    save_file({"visual.proj": torch.ones(1, 1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=rf"open_clip_config\.json: model_cfg.*{key}"):
        CLIP.from_pretrained(tmp_path)


def test_train_py_s_own_setting_says_which_gelu(tmp_path):
    file = GOLDEN / "clip_openai_statedict" / "weights.pt"
    shape = CLIPConfig.from_weights(file, "gelu")
    keys = [f"model.embed_dim={shape.embed_dim}", f"model.init={file}", f"run.dir={tmp_path}", "train.steps=1"]
    for tower, table in (("vision", shape.vision), ("text", shape.text)):
        keys += [f"model.{tower}.{k}={getattr(table, k)}" for k in ("width", "layers", "heads", "hidden_dim")]
        keys.append(f"model.{tower}.activation=gelu")
    keys += [f"model.text.vocab_size={shape.text.vocab_size}", f"model.text.context_length={shape.text.context_length}"]
    done = processes.run("train.py", "--config", "configs/tiny_clip.toml", *keys)
    assert "the tokenizer has 514 tokens, model.text.vocab_size is only 100" in done.stderr  # so the weights are open
