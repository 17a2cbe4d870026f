"""Train a model: `torchrun train.py CONFIG [section.key=value ...]`, or `python train.py CONFIG` on one device.

The script reads one config and writes one run folder. Everything that depends on the modality (data, loss, metrics,
samples) is in the task.
"""

import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from perceiver import checkpoint, distributed, io
from perceiver.config import Config, to_dict, to_yaml
from perceiver.data import TrainKeys, derive_seed, eval_loader, train_loader
from perceiver.distributed import Ranks, add, to_floats, uses_bf16
from perceiver.errors import UserError, explaining_memory, run_script
from perceiver.faults import RunFolder, StopSignal, explaining_faults
from perceiver.help import read_command
from perceiver.log import RunLog, format_metrics
from perceiver.optim import build_optimizer, learning_rate, scale_and_clip
from perceiver.pretrained import init_weights_from
from perceiver.profile import memory_advice, profiling, uses_compile
from perceiver.speed import SpeedMeter
from perceiver.tasks import TASKS


def train(config: Config, ranks: Ranks) -> int:
    """Trains a model, from the start or from a checkpoint. With train.dry_run it only builds the model.

    Returns the exit code. Raises FloatingPointError if the loss or the gradient is not finite.
    """
    options, device, batch_size = config.train, ranks.device, config.data.batch_size
    micro_batches = options.gradient_accumulation_steps
    distributed.check_batch_size(config, ranks)
    say = io.say if ranks.is_main else lambda *lines: None

    # The model. Parameters are float32. Autocast (bf16) and TF32 lower the precision of matrix products only.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    task = TASKS[config.task](config)
    model = task.build_model()
    if options.dry_run:
        say(to_yaml(config))
    say(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    if options.dry_run:
        return 0

    # The data, the initial weights, the run folder. The folder comes last: a run that cannot start leaves none behind.
    train_set, val_set = distributed.load_data(task, ranks)
    if task.data_note:
        say(task.data_note)
    step, best_loss, must_evaluate = 0, math.inf, False
    folder = Path(options.out_dir)
    run = RunFolder(folder) if ranks.is_main and not options.eval_only else None
    source = checkpoint.resume_source(options)
    owner = ranks.newest(source)  # the rank that reads the checkpoint and sends it to the others
    if owner is None and options.eval_only:
        raise UserError(f"train.eval_only=true: {options.out_dir} has no checkpoint; set train.resume to one")
    if owner is None and ranks.is_main and getattr(config.model, "init_from", None):
        init_weights_from(model, config.model.init_from, config)
    bf16 = uses_bf16(options.precision, device)
    options.compile = uses_compile(options, ranks)
    # Training calls `train_model`. Evaluation and checkpoints use `model`, which has the same parameters.
    train_model = ranks.wrap(model, options, bf16)
    optimizer = build_optimizer(model, config.optim)
    if owner is not None:
        step, best_loss, must_evaluate, note = checkpoint.resume(source, config, model, optimizer, ranks, TASKS, owner)
        say(note)
    saver = checkpoint.Saver(folder, ranks.is_main)
    if run is not None:
        run.open(source)
        log = RunLog(folder, step, to_yaml(config))

    keys = TrainKeys(batch_size, micro_batches, ranks, step, options.max_steps)
    batches = iter(train_loader(train_set, keys, config.data.num_workers))
    val_batches = eval_loader(val_set, keys.size, ranks, config.data.num_workers)
    if bf16:
        say("matrix products in bf16; train.precision=float32 avoids that")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    speed = SpeedMeter(task, device, bf16)
    stop = StopSignal(options.max_hours)
    has_batch_norm = bool(distributed.batch_norms(model))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        with autocast:
            return task.count_loss(model, batch)

    def accumulate() -> dict[str, Tensor] | None:
        """Adds up the gradients of a step. Returns the sums of loss, count, ... over micro-batches and ranks.

        Gives up the step and returns None if a stop signal arrives. With BatchNorm, it only does so before the first
        micro-batch, because each one changes the running statistics.
        """
        sums = {}
        for micro in range(micro_batches):
            if (micro == 0 or not has_batch_norm) and ranks.any(stop.received):
                return None
            batch = speed.fetch(batches)
            # DDP exchanges gradients in the last backward pass only. It decides so in the forward pass.
            distributed.sync_gradients(train_model, micro == micro_batches - 1)
            result = loss(train_model, batch)
            result["loss"].backward()
            add(sums, result)
        return ranks.sum(sums)

    def evaluate() -> dict[str, float] | None:
        """The metrics of the whole validation set. None if a stop signal arrives."""
        totals = {}
        with evaluation_mode(model) as whole_model:
            for batch in val_batches:
                add(totals, loss(whole_model, batch))
                if stop.received:
                    break
        if ranks.any(stop.received):
            return None
        return task.all_metrics(to_floats(ranks.sum(totals)))

    model.train()
    max_steps = step if options.eval_only else options.max_steps
    bar = tqdm(initial=step, total=max_steps, disable=not ranks.is_main, mininterval=1.0, dynamic_ncols=True)
    totals, logged_step, saved_step = {}, step, step  # `totals`: sums since the last log line
    val, stopping = None, False
    while (step < max_steps or must_evaluate) and not stopping:
        # The random numbers of a step do not depend on earlier steps: a checkpoint needs no generator state.
        torch.manual_seed(derive_seed(options.seed, step, ranks.rank))
        sums = {} if must_evaluate else accumulate()  # a stop signal cut off the evaluation after the last step
        stopping = sums is None
        if sums:
            lr = learning_rate(step, options.max_steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # DDP averages the gradients of the summed loss over the ranks. Scale them to the mean of the global batch.
            scale = ranks.world_size / sums["count"]
            grad_norm = scale_and_clip(model.parameters(), scale, config.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            add(totals, sums)
            bar.update()
            speed.end_step()

        final = stopping or step == max_steps
        log_now = step > logged_step and (final or step % options.log_every == 0)
        eval_now = not stopping and (final or must_evaluate or step % options.eval_every == 0)
        save_now = (step > saved_step or must_evaluate) and (final or eval_now or step % options.save_every == 0)
        if step > logged_step and (log_now or save_now):  # in other steps the host does not wait for the GPU
            metrics = task.all_metrics(to_floats(totals)) | {"lr": lr, "grad_norm": grad_norm.item()}
            check_finite(step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        if log_now:
            rates = speed.report((step - logged_step) * batch_size, totals["count"].item())
            bar.set_postfix(loss=metrics["loss"], **rates)
            if ranks.is_main:
                log.metrics(step, "train", metrics | rates | speed.health)
            totals, logged_step = {}, step

        with speed.paused():
            val = None
            if eval_now:
                val = evaluate()
                stopping = must_evaluate = val is None
            improved = val is not None and val["loss"] < best_loss
            if val:
                check_finite(step, validation_loss=val["loss"])
                best_loss = min(best_loss, val["loss"])
            if val and ranks.is_main:
                log.metrics(step, "val", val)
                if not final:
                    say(f"step {step}: {format_metrics(val)}")
            if save_now:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "best_loss": best_loss,
                    "must_evaluate": must_evaluate,
                    "config": to_dict(config),
                    "task": task.state_dict(),
                }
                saver.save(ranks.gather(state), improved)
                saved_step = step
            if val:
                with evaluation_mode(model) as whole_model:
                    if ranks.is_main:
                        log.visuals(step, task.visualize(whole_model))
                ranks.barrier()  # wait for the main rank, however long it takes
    bar.close()
    saver.wait()

    if val is None and not stopping:  # no step to train: the run was already complete
        val = evaluate()
    if val is None:
        say(f"stopped by {stop.name} after step {step}; the same command continues from {saver.last}")
        return 128 + (stop.received or signal.SIGTERM)
    if ranks.is_main:
        say(task.summary(val) or f"validation: {format_metrics(val)}")
    if ranks.is_main and not options.eval_only:
        say(
            f"step {step}, the run is complete",
            f"checkpoints in {saver.last.parent}; best.pt has the lowest validation loss, {best_loss:.4f}",
        )
        log.close()
    return 0


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the whole model, without dropout and gradients. Then returns to training mode. All ranks must enter."""
    with distributed.whole(model) as whole_model:
        whole_model.eval()
        with torch.inference_mode():
            yield whole_model
    model.train()


def check_finite(step: int, **values: float):
    """Raises FloatingPointError if one of `values` is infinite or NaN."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"at step {step} {name} is {value}")


def main() -> int:
    config = read_command(sys.argv[1:], __doc__.splitlines()[0], TASKS)
    if config is None:  # the command asked for help
        return 0
    with distributed.joined(config.train.device) as ranks, explaining_faults(ranks):
        with explaining_memory(memory_advice(config, ranks)), profiling(config.train, ranks):
            return train(config, ranks)


if __name__ == "__main__":
    run_script(main, distributed.report_once)
