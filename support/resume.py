"""What only a resumed training needs beside the weights: moments, other phases' networks, counts, averages.

    step_XXXXXXXX/training/optimizer.PHASE.safetensors     {"WEIGHT.exp_avg", "WEIGHT.exp_avg_sq", "WEIGHT.step"}
                           PHASE.safetensors               the network of another phase than the first
                           state.safetensors               what the task counts
                  ema/                                     the averaged weights, in the model's layout

Everything is compared with what the run has before it is used: names, shapes, finiteness.
"""

import torch

from support import checkpoint, parallel


def load_training(folder, task, optimizers, ema):
    """Reads from the checkpoint `folder` everything but the model's weights, which are loaded already.

    A UserError if a file does not fit the weights. (AdamW would read and write beyond a moment of another shape.)
    """
    for phase, module in task.modules.items():
        file = folder / "training" / f"optimizer.{phase}.safetensors"
        load_optimizer(optimizers[phase], module, file, task.may_skip_weights)
        if phase != task.main_phase:
            file = folder / "training" / f"{phase}.safetensors"
            tensors = checkpoint.read_tensors(file)
            checkpoint.check_same(tensors, module.state_dict(), file)
            checkpoint.check_finite(tensors, file)
            module.load_state_dict(tensors)
    file = folder / "training" / "state.safetensors"
    tensors = checkpoint.read_tensors(file)
    checkpoint.check_same(tensors, task.state(), file)
    checkpoint.check_finite(tensors, file)
    task.load_state(tensors)
    if ema and (folder / "ema").is_dir():
        weights = dict(type(task.main).from_pretrained(folder / "ema").named_parameters())  # mapped to the file
        like = dict(task.main.named_parameters())
        checkpoint.check_same(weights, like, folder / "ema")
        torch._foreach_copy_(ema, [parallel.local(parallel.share(weights[name].detach(), like[name])) for name in like])


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a weight


def optimizer_tensors(optimizer, module):
    """The optimizer's state by the names of the weights: {"encoder.conv_in.weight.exp_avg": …}."""
    tensors = {}
    for name, parameter in module.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def load_optimizer(optimizer, module, file, may_skip_weights):
    """Fills the optimizer's state from a file that optimizer_tensors made.

    A phase that has not begun has no moments at all. Otherwise every trained weight has them; with
    may_skip_weights, every one that has had a gradient.
    """
    tensors = checkpoint.read_tensors(file)
    expected = {}
    for name, parameter in module.named_parameters():
        like = {f"{name}.step": torch.zeros(()), f"{name}.exp_avg": parameter, f"{name}.exp_avg_sq": parameter}
        required = tensors and parameter.requires_grad and not may_skip_weights
        if required or not like.keys().isdisjoint(tensors):
            expected |= like
    checkpoint.check_same(tensors, expected, file)
    for name, parameter in module.named_parameters():
        if f"{name}.step" in tensors:
            state = {"step": tensors[f"{name}.step"].to(parameter.device, copy=True)}
            state |= {key: parallel.share(tensors[f"{name}.{key}"], parameter) for key in MOMENTS[1:]}
            for key, value in state.items():
                checkpoint.check_finite({f"{name}.{key}": parallel.local(value)}, file, negative=key == "exp_avg")
            optimizer.state[parameter] = state
