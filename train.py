"""Train a model: `torchrun train.py CONFIG [section.key=value ...]`, or `python train.py CONFIG` on one device.

Reads from top to bottom: one config in, one run folder out. What depends on the modality is asked of the task.
"""
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from perceiver import checkpoint, distributed
from perceiver.config import Config, load_config, to_dict, to_yaml
from perceiver.data import TrainKeys, eval_loader, train_loader
from perceiver.distributed import Ranks, StopSignal, add, floats
from perceiver.errors import UserError, run_script
from perceiver.log import RunLog
from perceiver.optim import build_optimizer, learning_rate, scale_and_clip
from perceiver.speed import peak_flops, training_flops
from perceiver.tasks import TASKS


def main(config: Config, ranks: Ranks) -> int:
    """Trains, resumes or (dry_run) only builds; returns the exit code."""
    train, device = config.train, ranks.device
    if config.data.batch_size % (train.accumulate * ranks.world_size):
        raise UserError(f"data.batch_size={config.data.batch_size} is not divisible by "
                        f"train.accumulate={train.accumulate} x {ranks.world_size} processes")
    say = print if ranks.is_main else lambda *_: None

    # The model. Parameters are float32; autocast and TF32 choose how they are multiplied.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(train.seed)
    task = TASKS[config.task](config)
    model = task.build_model().to(device)
    optimizer = build_optimizer(model, config.optim)
    if train.dry_run:
        say(to_yaml(config))
    say(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    if train.dry_run:
        return 0

    # The data and the run folder, in this order: a run that cannot start leaves nothing behind.
    train_set, val_set = ranks.main_first(task.load_data)  # it may download
    if len(val_set) < ranks.world_size:
        raise UserError(f"the validation set has {len(val_set)} examples, fewer than the {ranks.world_size} processes; "
                        "give more data, or raise data.val_fraction")
    folder = Path(train.out_dir)
    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    step, best_loss = checkpoint.resume(config, model, optimizer, ranks, TASKS)
    if step:
        say(f"resumed at step {step}")
    else:
        task.initialise(model)
    keys = TrainKeys(config.data.batch_size, train.accumulate, ranks, step, train.max_steps)
    batches = iter(train_loader(train_set, keys, config.data.num_workers))
    val_batches = eval_loader(val_set, keys.size, ranks, config.data.num_workers)
    log = RunLog(folder, step, to_yaml(config)) if ranks.is_main else None

    # The model as training calls it; evaluation and checkpoints use `model`, whose parameters are the same.
    bf16 = train.precision == "bf16" or (
        train.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    called = ranks.wrap(torch.compile(model) if train.compile else model)
    stop = StopSignal()

    def save(path: Path) -> None:
        if ranks.is_main:
            checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                             "best_loss": best_loss, "config": to_dict(config), **task.state()}, path)

    def evaluate() -> dict[str, float] | None:
        """Metrics on the whole validation set; None if a signal to stop came in between."""
        model.eval()
        totals = {}
        with torch.inference_mode():
            for batch in val_batches:
                batch = to_device(batch, device)
                with autocast:
                    add(totals, task.loss(model, batch))
                if stop.received:
                    break
        model.train()
        return None if ranks.any(stop.received) else task.metrics(floats(ranks.sum(totals)))

    def not_finite(what: str) -> int:
        if ranks.is_main:
            print(f"error: at step {step} the {what}; the last good checkpoint is as it was. Try a lower optim.lr, "
                  "a smaller optim.max_grad_norm or train.precision=float32", file=sys.stderr)
        return 1

    model.train()
    bar = tqdm(total=train.max_steps, initial=step, disable=not ranks.is_main, mininterval=1.0, dynamic_ncols=True)
    peak = peak_flops(device, bf16)  # 0 where it is not known
    flops, flops_by_shape = 0, {}  # of this rank, since it last logged; of a micro-batch
    totals, logged_step, clock = {}, step, time.perf_counter()
    val, stopping = None, False
    while step < train.max_steps and not stopping:
        lr = learning_rate(step, train.max_steps, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Random numbers (dropout) depend on the step, not on those before: to resume needs no generator's state.
        torch.manual_seed(int(np.random.SeedSequence((train.seed, step, ranks.rank)).generate_state(1)[0]))

        sums = {}  # of this step, over its micro-batches: loss, count, ...
        for micro in range(train.accumulate):
            batch = to_device(next(batches), device)
            if peak:
                shapes = tuple(values.shape for values in batch.values())
                if shapes not in flops_by_shape:
                    flops_by_shape[shapes] = training_flops(task, batch)
                flops += flops_by_shape[shapes]
            # Only the last backward exchanges gradients. DDP decides that in the forward.
            distributed.sync_gradients(called, micro == train.accumulate - 1)
            with autocast:
                result = task.loss(called, batch)
            result["loss"].backward()
            add(sums, result)
        sums = ranks.sum(sums)
        # So far gradients are those of the summed loss, averaged over ranks; now of the mean over the global batch.
        grad_norm = scale_and_clip(model.parameters(), ranks.world_size / sums["count"], config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        add(totals, sums)
        bar.update()

        stopping = ranks.any(stop.received)
        final = stopping or step == train.max_steps
        log_now = final or step % train.log_every == 0
        eval_now = not stopping and (final or step % train.eval_every == 0)
        save_now = final or eval_now or step % train.save_every == 0
        if log_now or save_now:  # the only place where the host waits for the GPU
            metrics = task.metrics(floats(totals)) | {"lr": lr, "grad_norm": grad_norm.item()}
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                bar.close()
                return not_finite(f"loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}")
        if log_now:
            seconds, steps = time.perf_counter() - clock, step - logged_step
            examples = steps * config.data.batch_size
            metrics[task.rate] = (totals["count"].item() if task.rate == "tokens_per_s" else examples) / seconds
            if peak:
                metrics["mfu"] = flops / seconds / peak
            bar.set_postfix({name: f"{metrics[name]:.4g}" for name in ("loss", task.rate, "mfu") if name in metrics})
            if log:
                log.metrics(step, "train", metrics)
            totals, flops, logged_step, clock = {}, 0, step, time.perf_counter()
        paused = time.perf_counter()
        improved = False
        if eval_now:
            val = evaluate()
            if val is None:
                stopping = True
            elif not math.isfinite(val["loss"]):
                bar.close()
                return not_finite(f"validation loss is {val['loss']}")
            else:
                improved = val["loss"] < best_loss
                best_loss = min(best_loss, val["loss"])
                if log:
                    bar.clear()
                    print(f"step {step}: {listing(val)}")
                    log.metrics(step, "val", val)
                    log.show(step, task.show(model))
        if save_now:
            save(best if improved else last)
            if improved and ranks.is_main:
                checkpoint.link(best, last)
        clock += time.perf_counter() - paused  # the rate is of training alone
    bar.close()

    if not stopping and val is None:  # a complete run that was started again
        val = evaluate()
    if stopping or val is None:
        say(f"stopped by {stop.name} after step {step}; the same command continues from {last}")
        return 128 + (stop.received or signal.SIGTERM)
    if ranks.is_main:
        print(f"step {step} of {train.max_steps}, the run is complete: {listing(val)}")
        print(*filter(None, (task.summary(val), f"checkpoints in {last.parent}")), sep="\n")
        log.close()
    return 0


def run() -> int:
    config = load_config(sys.argv[1], sys.argv[2:], TASKS)
    try:
        return main(config, distributed.init_ranks(config.train.device))
    finally:
        distributed.close()


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def listing(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__.splitlines()[0], file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    run_script(run)
