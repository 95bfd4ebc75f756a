"""One training loop for every model.

    python train.py --config configs/tiny_vqgan.toml                    seconds, to see that it works
    python train.py --config configs/demo_tokenizer.toml run.dir=out/mine train.steps=200    any key can be overridden
    torchrun --nproc-per-node 8 train.py --config configs/lvm.toml      one process per GPU
    python train.py --config configs/lvm.toml --plan 8                  what each of 8 GPUs would need: runs anywhere

The loop knows nothing of pictures or tokens. A *task* does (tasks.py): it has the model, makes the batches and
computes the loss. The loop does the rest: mixed precision, gradient accumulation, clipping, AdamW, learning rate,
averaged weights, several processes, logging, checkpoints.

    for step:  for phase:  for microbatch:  loss → backward        a GAN has two phases, everything else one
                           clip
               AdamW of every phase → average → log, evaluate → save → sample

How a run starts: (1) resume from its newest complete checkpoint; else (2) from `model.init`, a run or a published
folder; else (3) from scratch. A batch and its random numbers are functions of (seed, its number in the run, row), the
same for every phase of a step, so a checkpoint needs no random state. A resumed run ends with the same bits as an
unbroken one, if it has the same number of processes and of threads (on a CPU: GPU kernels make no such promise); how
many processes there are changes nothing but rounding.

How a run ends: after its last step; or where it is told to (SIGTERM, SIGHUP, Ctrl-C), after the step that it is making,
which is saved first; or by an error, of one line. A step whose loss or gradient is not finite is skipped.
"""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path

import torch

from support import checkpoint, parallel, runs, settings, signals, watch, whole
from support import plan as planning
from support.machine import can_compile, has_bfloat16
from support.pictures import save_grid
from support.resume import load_training, optimizer_tensors
from support.settings import UserError, learning_rate
from support.threads import prefetch
from tasks import RECOMPUTING, TASKS, from_scratch, read_run

# ---- optimization ----------------------------------------------------------------------------


def make_optimizer(module, optim):
    """AdamW over the weights of `module` that are trained; optim: an OptimSettings."""
    trained = [p for p in module.parameters() if p.requires_grad]
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(trained, optim.lr, betas, optim.eps, weight_decay=optim.weight_decay, fused=True)


def gradients(task, phase, module, microbatches, step, autocast):
    """Leaves in a phase's module the mean gradient of the microbatches, clipped → {name: scalar} to log."""
    train, optim = task.config.train, task.config.optim
    prefix = "" if phase == task.main_phase else f"{phase}_"
    values = {}
    for microstep, batch in enumerate(microbatches):
        # several processes average their gradients once a step: with the last microbatch
        with parallel.synchronize(task, module, last=microstep + 1 == train.accumulate):
            with autocast:
                loss, logged = task.loss(phase, module, batch, step, microstep)
            (loss / train.accumulate).backward()
        for name, value in {f"{prefix}loss": loss, **logged}.items():
            values[name] = values.get(name, 0.0) + value.detach().float() / train.accumulate
    norm = torch.nn.utils.clip_grad_norm_(task.modules[phase].parameters(), optim.clip or math.inf)
    values[f"{prefix}grad_norm"] = parallel.whole(norm)
    return values


def descend(optimizers, lr):
    """One step of AdamW in every phase that has gradients, which are dropped."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def all_finite(tensors):
    """Whether all numbers are finite: a tensor, for which the program need not wait. (A norm needs no memory.)"""
    return torch.stack(torch._foreach_norm([t for t in tensors if t.numel()], math.inf)).isfinite().all()


def average(ema, model, decay, step):
    """Moves the averaged weights `ema` (as `held` lists them; empty if none are kept) towards the model's."""
    if ema:
        # early on the average follows quickly, so that it does not remember the random start
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema, held(model), 1 - decay)


def held(model):
    """What this process holds of the weights: a list of tensors that share their memory."""
    return [parallel.local(p.detach()) for p in model.parameters()]


@contextlib.contextmanager
def with_ema_weights(model, ema):
    """Within, the model's weights are the averaged ones (or its own if none are kept)."""
    if not ema:
        yield
        return
    own = [weight.clone() for weight in held(model)]
    torch._foreach_copy_(held(model), ema)
    try:
        yield
    finally:
        torch._foreach_copy_(held(model), own)


# ---- the loop --------------------------------------------------------------------------------


def train(config, explicit_keys, device=None):
    """Runs (or resumes) the training that `config` describes → the run's folder.

    config, explicit_keys: what read_run returns; device: "cpu", "cuda", or None for the best one. A signal that tells
    it to end is a signals.Stopped, an exit; whatever a user can mend is a UserError.
    """
    ranks, run = parallel.start_ranks(device, config.train.parallel), Path(config.run.dir)
    with signals.Stop() as stop, runs.ending(run, ranks.is_main), parallel.together(ranks):
        config = settings.with_dtype(config, has_bfloat16(ranks.device))
        check_rows_divide(config.train.batch_size, ranks.world)

        # -- start: resume, init or scratch --
        resume, state = runs.newest_step(run, config.model.kind, ranks)
        if state["step"] < config.train.steps:
            task, optimizers, ema = begin(config, explicit_keys, ranks, resume)
            announce(task, run, resume, state)
            loop(task, optimizers, ema, state["step"], stop)
        elif ranks.is_main:
            print(runs.already_complete(run, config, explicit_keys, state["step"]))
    return run


def loop(task, optimizers, ema, first, stop):
    """Makes the steps of a run from `first` on, or until `stop`, a signals.Stop, has a signal."""
    config, ranks, run = task.config, task.ranks, Path(task.config.run.dir)
    modules = parallel.distribute(task)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.train.dtype == "bfloat16")
    items = config.train.batch_size * config.train.accumulate * task.items_per_row
    meter = watch.Meter(ranks.device)  # how fast; and the log knows when: log_every, eval_every …
    log = runs.Log(run, config.train, first, task.unit, items, ranks.is_main, meter.measured)
    with contextlib.closing(log):
        stop.waits = True  # from here on, a signal waits for the end of its step
        for step, microbatches in enumerate(batches(task, first, log, meter), first):
            # -- gradients of each phase --
            values, buffers = {}, copies(task)
            for phase, module in modules.items():
                if task.active(phase, step):
                    with meter.counting(phase):
                        values |= gradients(task, phase, module, microbatches, step, autocast)
            # once a step, the process waits here for its device. All ranks then know what one of them knows:
            # that it was told to stop, or that its numbers are not finite
            told_to_stop, skipped = ranks.most(stop.number, ~all_finite(values.values()))

            # -- update: AdamW, then the average. Or all stays as it was --
            lr, done = learning_rate(config.optim, step, config.train.steps), step + 1
            if skipped:
                log.skip(done, why_skipped(task, values, step))  # which ends a run of many
                take_back(task, buffers)
                values = {}
            else:
                descend(optimizers, lr)
                average(ema, task.main, config.train.ema, step)
                task.after_step(step, ema)

            # -- log and evaluate --
            if log.due(done):
                entry = log.entry(done, ranks.mean(values) | {"lr": lr})
                if log.evaluates(done) and not told_to_stop:
                    with log.paused(), autocast, evaluating(task, optimizers, ema, done, stop):
                        entry |= ranks.mean(task.evaluate())
                log.write(entry)

            # -- save, then sample --
            if log.saves(done) or told_to_stop:
                with log.paused():
                    save(done, task, optimizers, ema)
            if told_to_stop:
                ranks.wait()  # for the main process, which writes: torchrun ends all when one of them ends
                raise signals.Stopped(told_to_stop)
            if log.samples(done) and (ranks.is_main or ranks.sharded):
                with log.paused(), autocast, evaluating(task, optimizers, ema, done, stop):
                    show(done, task.sample(), run, log)
            log.advance()


def check_rows_divide(batch_size, world):
    if batch_size % world:
        raise UserError(f"train.batch_size {batch_size} is no multiple of the {world} processes")


def batches(task, first, log, meter):
    """The microbatches of each step from `first` on: a list of them, made by threads a few ahead of their use.

    What the loop waits for them is logged, and train.profile's steps are recorded.
    """
    train = task.config.train
    rows = task.ranks.rows(train.batch_size)
    numbers = range(first * train.accumulate, train.steps * train.accumulate)  # through the whole run
    made = prefetch(lambda number: task.batch(number, rows), numbers, task.config.data.workers)
    steps = iter(lambda: list(itertools.islice(made, train.accumulate)), [])  # until none are left
    profile = train.profile if task.ranks.is_main else ()
    return watch.profiled(log.waiting(steps, meter.is_idle), first, profile, Path(task.config.run.dir))


def begin(config, explicit_keys, ranks, resume):
    """→ (task, {phase: optimizer}, averaged weights): from the checkpoint `resume`, or as the configuration says."""
    torch.manual_seed(config.train.seed)
    with runs.way_out(resume):
        task = TASKS[config.model.kind](config, explicit_keys, ranks, resume)
        if not ranks.planned:
            task.open_data(resume)
        place(task)
        optimizers = {phase: make_optimizer(module, config.optim) for phase, module in task.modules.items()}
        ema = [weight.clone() for weight in held(task.main)] if config.train.ema else []
        if resume:
            load_training(resume, task, optimizers, ema)
    return task, optimizers, ema


def place(task):
    """Puts the task's modules, or this rank's share of them, on its device, ready to train."""
    config, ranks = task.config, task.ranks
    compiled = config.train.compile and can_compile(ranks.device)
    if ranks.sharded:
        for module in task.main.modules() if compiled else ():
            if isinstance(module, task.blocks):  # between blocks lies the waiting for weights
                module.compile()
        parallel.shard(task.main, task.blocks, ranks, config.train.dtype)
    elif compiled:
        task.main.compile()
    for module in task.modules.values():
        module.to(ranks.device).train()
    if not ranks.planned:  # fake weights have no numbers
        task.initialize()


def announce(task, run, resume, state):
    """Prints what is trained from which start, and makes the run's folder: the main process, for all."""
    config, ranks = task.config, task.ranks
    if ranks.is_main:
        # a folder that the model was loaded from decides about its shape
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **vars(task.main.config)))
        count = sum(p.numel() for p in task.main.parameters())
        origin = f"resumed from {resume}" if resume else f"from {task.start}" if task.start else "from scratch"
        place = f"{ranks.world} × {ranks.device} in {config.train.dtype}"
        print(f"{config.model.kind}, {count:,} parameters, {origin}, on {place}; run: {run}")
        before, now = state.get("threads"), torch.get_num_threads()
        if before not in (None, now) and ranks.device.type == "cpu":
            print(f"resuming with {now} threads instead of {before}: other rounding, so not an unbroken run's bits")
        runs.start_run(run, config, state)
    if ranks.sharded:
        parallel.check_shared_disk(run, ranks)


@contextlib.contextmanager
def evaluating(task, optimizers, ema, done, stop):
    """Within: eval mode, no gradients, averaged weights. An error loses no steps: they are saved before it goes on.

    Nor does a signal, which ends it where it stands. Several processes go on to its end: they must stop together.
    """
    task.main.eval()
    try:
        # not inference_mode: what FSDP brings together in it could not train afterwards
        averaged = with_ema_weights(task.main, ema)
        with torch.no_grad(), averaged, parallel.gathered(task.main), stop.anywhere(task.ranks.world == 1):
            yield
    except (Exception, signals.Stopped):
        save(done, task, optimizers, ema)  # or says that the weights are not finite any more
        raise
    finally:
        task.main.train()


def show(step, rows, run, log):
    """Rows of pictures, if there are any, as samples/step_XXXXXXXX.png of the main process."""
    if rows and log.is_main:
        file = run / "samples" / f"step_{step:08d}.png"
        save_grid(rows, file)
        log.picture(step, file)


# ---- steps that are skipped ------------------------------------------------------------------


def copies(task):
    """Of what a forward pass changes: the running means of a batch norm, and whatever else modules buffer."""
    return [buffer.clone() for module in task.modules.values() for buffer in module.buffers()]


def take_back(task, buffers):
    """Puts back what `copies` has kept, and drops the gradients."""
    for module in task.modules.values():
        module.zero_grad(set_to_none=True)
    now = [buffer for module in task.modules.values() for buffer in module.buffers()]
    for buffer, before in zip(now, buffers, strict=True):
        buffer.copy_(before)


def why_skipped(task, values, step):
    """Which numbers of a step are not finite, on which ranks, and of which rows: every rank's text is on all."""
    train, ranks = task.config.train, task.ranks
    rows = ranks.rows(train.batch_size)
    place = f"rank {ranks.rank}, {runs.batches(step, train.accumulate)}, rows {rows.start} to {rows.stop - 1}"
    bad = runs.not_finite(values)
    is_own = any(not math.isfinite(value) for name, value in values.items() if "grad_norm" not in name)
    texts = ranks.gather((is_own, f"{bad} ({place})"))  # the gradient is that of all ranks, the loss a rank's own
    culprits = [text for is_own, text in texts if is_own] or [text for _, text in texts]
    return "; ".join(culprits[:3]) + (f"; and {len(culprits) - 3} more ranks" if len(culprits) > 3 else "")


# ---- a plan ----------------------------------------------------------------------------------


def plan(config, explicit_keys, gpus):
    """What a step would need of each of `gpus` GPUs: a planning.Plan. Nothing is trained, no weights are made."""
    config = from_scratch(settings.with_dtype(config, has_bfloat16=True), explicit_keys)
    check_rows_divide(config.train.batch_size, gpus)
    with planning.pretend(gpus, config.train.parallel) as (ranks, tally):
        return counted_step(config, explicit_keys, ranks, tally)


def counted_step(config, explicit_keys, ranks, tally):
    """What one step of a run without data needs, as `tally` counts it, on ranks that are planned → a planning.Plan."""
    train, last = config.train, config.train.steps - 1
    few = dataclasses.replace(train, compile=False, accumulate=min(train.accumulate, planning.MICROSTEPS))
    task, optimizers, ema = begin(dataclasses.replace(config, train=few), explicit_keys, ranks, None)
    modules = parallel.distribute(task)
    planning.send_gradients(modules)
    for optimizer in optimizers.values():
        planning.make_moments(optimizer)
    batch = task.blank_batch(ranks.rows(train.batch_size))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=train.dtype == "bfloat16")
    tally.start()
    for phase in optimizers:
        gradients(task, phase, modules[phase], tally.microbatches(batch, train.accumulate), last, autocast)
    descend(optimizers, config.optim.lr)
    average(ema, task.main, train.ema, last)
    return planning.Plan.of(optimizers, ema, tally)


# ---- checkpoints -----------------------------------------------------------------------------


def save(step, task, optimizers, ema):
    """Writes the run's checkpoint after `step` steps, unless it is there; see runs.py for the layout."""
    run, ranks = Path(task.config.run.dir), task.ranks
    moments = [parallel.local(moment) for o in optimizers.values() for s in o.state.values() for moment in s.values()]
    weights = [weight for module in task.modules.values() for weight in held(module)]
    for name, tensors in {"weights": weights, "AdamW's moments": moments}.items():
        finite = not tensors or all_finite(tensors)
        if ranks.sharded:
            finite = ranks.mean({"finite": finite})["finite"] == 1
        if not finite:
            raise UserError(f"step {step}: {name} are not finite any more; not saved. Try a lower optim.lr")
    if (run / f"step_{step:08d}").exists() or not (ranks.is_main or ranks.sharded):
        return
    with contextlib.ExitStack() as stack:
        if ranks.is_main:
            folder = stack.enter_context(runs.new_step(run, step, task.config.train.keep))
        else:
            folder = stack.enter_context(checkpoint.shares_only())
        if ranks.sharded:
            folder = ranks.from_main(folder)
        write_step(folder, step, task, optimizers, ema)
        if ranks.sharded:
            ranks.wait()  # the folder gets its name when all have written


def write_step(folder, step, task, optimizers, ema):
    """Fills the folder of a checkpoint; of a sharded run, with this rank's shares."""
    task.model.save_pretrained(folder)
    if ema:
        with with_ema_weights(task.main, ema):
            task.model.save_pretrained(folder / "ema")
    for phase, module in task.modules.items():
        tensors = optimizer_tensors(optimizers[phase], module)
        checkpoint.write_tensors(folder / "training" / f"optimizer.{phase}.safetensors", tensors)
        if phase != task.main_phase:
            checkpoint.write_tensors(folder / "training" / f"{phase}.safetensors", module.state_dict())
    checkpoint.write_tensors(folder / "training" / "state.safetensors", task.state())
    writers = task.ranks if task.ranks.sharded else whole.ALONE
    runs.write_state(folder, step, writers, threads=torch.get_num_threads())


def main():
    parser = settings.Parser(prog="python train.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a TOML file of configs/")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--plan", type=int, metavar="N", help="print what a step would need on N GPUs; train nothing")
    arguments = parser.parse_with_overrides()
    config, explicit_keys = read_run(arguments.config, arguments.overrides)
    if arguments.plan is not None:
        if arguments.plan < 1:
            raise UserError(f"--plan {arguments.plan}: must be a number of GPUs, 1 or more")
        savers = {"parallel": "fsdp"} if TASKS[config.model.kind].blocks else {}
        savers |= {"activation_checkpointing": True} if config.model.kind in RECOMPUTING else {}
        print(planning.report(config, arguments.plan, lambda c, gpus: plan(c, explicit_keys, gpus), savers))
        return
    train(config, explicit_keys, device=arguments.device)


if __name__ == "__main__":
    settings.run_main(main)
