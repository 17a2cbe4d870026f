"""The speed of a recipe's data loader beside the speed of its training step. compare.py prints the table."""
import time
from pathlib import Path
from statistics import median

import torch
from perceiver.config import load_config
from perceiver.data import TrainKeys, train_loader
from perceiver.distributed import Ranks
from perceiver.optim import build_optimizer
from perceiver.tasks import TASKS


def rates(recipe: str, device: torch.device, seconds: float = 5.0) -> dict[str, float]:
    """Examples per second: of the loader alone with the recipe's number of workers, and of the training step alone."""
    config = load_config(Path(__file__).parents[1] / f"configs/{recipe}.yaml", [], TASKS)
    task = TASKS[config.task](config)
    train_set, _ = task.load_data()
    keys = TrainKeys(config.data.batch_size, 1, Ranks(0, 1, device), 0, 10**6)

    torch.manual_seed(0)
    model = task.build_model().to(device).train()
    optimizer = build_optimizer(model, config.optim)
    batch = next(iter(train_loader(train_set, keys, 0)))
    batch = {name: values.to(device) for name, values in batch.items()}
    times = []
    for _ in range(6):
        start = time.perf_counter()
        task.loss(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)

    batches = iter(train_loader(train_set, keys, config.data.num_workers))
    for _ in range(1 + 2 * config.data.num_workers):  # those that the workers have loaded in advance
        next(batches)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += config.data.batch_size
    return {"loader": count / (time.perf_counter() - start), "step": config.data.batch_size / median(times[1:])}
