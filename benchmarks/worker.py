"""The process of one side of compare.py: `python benchmarks/worker.py SIDE DEVICE PRECISION`.

It reads requests from stdin, one JSON object per line, and prints one JSON object for each: {"do": "unit"} calls the
method `unit` of `Worker`. More items are the arguments of the method.
"""

import gc
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rows import PREFIX, ROWS, TOKENS, make_inputs
from sides import PEERS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Worker:
    def __init__(self, side: str, device: str, precision: str):
        self.side = PEERS[side]()
        self.device = torch.device(device)
        self.bf16 = False
        self.floor_work = None  # FLOPs or bytes
        if side == "ours":
            from perceiver.distributed import find_device, uses_bf16

            if device == "cpu":
                find_device(device)  # it sets up malloc
            self.bf16 = uses_bf16(precision, self.device)

    def build(self, row: str) -> dict:
        """Builds the model and the inputs of a row. All other methods need it."""
        self.row = ROWS[row]
        torch.manual_seed(0)
        options = {"compiled": self.row.compiled} if self.row.kind == "decode" else {}
        with self.device:
            self.model, self.forward = getattr(self.side, self.row.model)(**options)
        self.model.to(self.device).train(self.row.kind in ("train", "start"))
        self.inputs = make_inputs(self.row, self.device)
        self.optimizer = None
        self.drop_gradients = True
        self.bf16 = self.bf16 and self.row.kind != "decode"  # generate.py has an option of its own
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "bf16": self.bf16}

    def logits(self):
        if not self.bf16:  # the device `meta` knows no autocast
            return self.forward(self.inputs)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.forward(self.inputs)

    def backward(self):
        logits = self.logits().float().flatten(0, -2)
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=self.device)).backward()

    def training_step(self):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.optimizer.zero_grad(set_to_none=self.drop_gradients)
        self.backward()
        self.optimizer.step()

    def unit(self) -> dict:
        """Does the work of the row once. The result has its seconds."""
        if self.row.kind in ("train", "start"):
            return {"seconds": timed(self.training_step, self.device)}
        with torch.inference_mode():
            if self.row.kind == "forward":
                return {"seconds": timed(self.logits, self.device)}
            step = self.forward(self.inputs)
            token = self.inputs[:1]
            for _ in range(2):  # our first step moves the first latent; the second one may compile
                token = step(token).argmax(-1)

            def tokens():
                nonlocal token
                for _ in range(TOKENS):
                    token = step(token).argmax(-1)

            return {"seconds": timed(tokens, self.device) / TOKENS}

    def memory(self) -> dict:
        """Bytes that the work of the row needs at its peak, beyond what stays in memory between two units: parameters,
        optimizer state and gradients, which stay allocated here. `decode` includes the prompt and the caches.
        """
        self.drop_gradients = False
        self.unit()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.unit()
            return {"bytes": torch.cuda.max_memory_allocated() - before}
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = resident("VmRSS")
        self.unit()
        return {"bytes": resident("VmHWM") - before}

    # The check

    def outputs(self):
        """The outputs in evaluation mode; of `decode` the logits after the prompt and one cached token."""
        self.model.eval()
        with torch.inference_mode():
            if self.row.kind != "decode":
                return self.forward(self.inputs)
            step = self.forward(self.inputs)
            return torch.cat([step(self.inputs[i : i + 1]) for i in range(2)])

    def save(self, file: str) -> dict:
        """Writes random weights and the outputs of the model that has them."""
        randomize(self.model)
        torch.save({"weights": self.weights(), "outputs": self.outputs()}, file)
        return {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {self.side.rename(key): value for key, value in self.model.state_dict().items()}

    def check(self, file: str) -> dict:
        """The largest difference between our outputs and those in a file, and the standard deviation of the latter."""
        saved = torch.load(file, map_location=self.device)
        self.load(saved["weights"], file)
        theirs = saved["outputs"]
        difference = (self.outputs() - theirs).abs().max()
        return {"difference": difference.item(), "scale": theirs.std().item()}

    def load(self, weights: dict[str, torch.Tensor], file: str) -> None:
        """Gives our model the `weights` of a peer."""
        from perceiver.pretrained import load_weights, rename_key

        if weights.keys() != self.model.state_dict().keys():  # the peer is not another checkout of this project
            weights = {rename_key(key): value for key, value in weights.items()}
            weights.pop("", None)
        load_weights(self.model, weights, file)

    # Training, for same_training.py

    def new_model(self, model: str, options: dict, dtype: str) -> dict:
        """Builds a model of the side with its own initial weights."""
        torch.manual_seed(0)
        self.model, self.forward = getattr(self.side, model)(**options)
        self.side.set_dtype(self.model, getattr(torch, dtype))
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def save_weights(self, file: str) -> dict:
        torch.save(self.weights(), file)
        return {}

    @torch.no_grad()
    def load_weights(self, file: str, disturbance: float) -> dict:
        """Loads a peer's weights. Each is then multiplied by 1 + a random number of this standard deviation."""
        self.load(torch.load(file), file)
        torch.manual_seed(1)
        for p in self.model.parameters():
            p.mul_(1 + disturbance * torch.randn(p.shape, dtype=torch.float64))
        return {}

    def train(self, file: str, optim: dict) -> dict:
        """Trains on the batches in a file. The result has the loss of each batch, before the step on it."""
        make_step = our_step if isinstance(self.side, PEERS["ours"]) else torchs_step
        step = make_step(self.model, **optim)
        batches = torch.load(file)
        self.model.train()
        pairs = zip(batches["input_ids"], batches["labels"])
        return {"losses": [step(self.forward(input_ids), labels) for input_ids, labels in pairs]}

    # The floor

    def floor(self) -> dict:
        """Seconds that no implementation of our algorithm can beat on this machine: the matrix products alone, at the
        speed of large ones, or, to decode, reading all weights, keys and values once.
        """
        if self.row.kind == "decode":
            num_bytes = decode_bytes(sum(p.numel() for p in self.model.parameters()), self.row.prompt)
            return {"seconds": reading_time(num_bytes, self.device)}
        if self.floor_work is None:
            self.floor_work = count_flops(self)
        speed = matmul_speed(self.device, torch.bfloat16 if self.bf16 else torch.float32)
        return {"seconds": self.floor_work / speed, "flops": self.floor_work, "flops_per_second": speed}

    def loader(self, config: str) -> dict:
        from loader import rates

        return rates(config, self.device)


def our_step(model: nn.Module, **optim):
    """A function of logits and labels that makes one training step and returns the loss, with train.py's own parts."""
    from perceiver.config import OptimConfig
    from perceiver.optim import build_optimizer, scale_and_clip

    config = OptimConfig(**optim)
    optimizer = build_optimizer(model, config)

    def step(logits, labels):
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        scale = 1 / (labels != -100).sum().to(loss.dtype)
        scale_and_clip(model.parameters(), scale, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return (loss * scale).item()

    return step


def torchs_step(model: nn.Module, lr: float, weight_decay: float, max_grad_norm: float):
    """The same with torch alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr)

    def step(logits, labels):
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def timed(work, device) -> float:
    """Seconds of one call of `work`."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random weights: activations keep their scale, biases and norms are far from 0 and 1."""
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif "norm" in name and "weight" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=0.3)


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(worker: Worker) -> int:
    """FLOPs of a unit of the worker's row: on the meta device, where attention consists of plain matrix products.

    The zeros that our attention adds to its heads, for the sake of kernels, do not count.
    """
    from perceiver.attention import Attention

    meta = Worker("ours", "meta", "float32")
    name = next(name for name, row in ROWS.items() if row is worker.row)
    meta.build(name)
    widths = lambda self, _: (self.qk_head_channels, self.v_head_channels)  # noqa: E731
    with patch.object(Attention, "head_widths", widths), FlopCounter() as counter:
        if worker.row.kind == "train":
            meta.backward()
        else:
            with torch.no_grad():
                meta.logits()
    return counter.flops


def matmul_speed(device, dtype) -> float:
    """FLOP/s of products of 2048 x 2048 matrices: the best of three by PyTorch and three by our `linear`."""
    from perceiver.attention import linear

    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    products = (torch.mm, linear)
    return 2 * 2048**3 / min(timed(lambda: product(a, a), device) for product in products for _ in range(3))


def decode_bytes(num_parameters: int, prompt: int, batch_size=1, weight_bytes=4, cache_bytes=4) -> int:
    """Bytes that a decoding step reads: the parameters, with one row of the position table, and all keys and values."""
    num_tokens = prompt + TOKENS // 2
    keys = num_tokens + 8 * (num_tokens - PREFIX[prompt])
    return weight_bytes * (num_parameters - (4096 - 1) * 512) + cache_bytes * batch_size * 2 * 512 * keys


def reading_time(num_bytes: int, device) -> float:
    """Seconds to read `num_bytes` of memory once: the best of five passes."""
    memory = torch.ones(num_bytes // 4096, 1024, device=device)  # float32
    return min(timed(lambda: memory.sum(1), device) for _ in range(5))


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
