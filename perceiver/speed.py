"""How much of the hardware a run uses: model FLOPs utilisation (MFU), as in PaLM (arXiv 2204.02311, appendix B)."""
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from perceiver.tasks import Task

# Dense peak of the vendor's datasheets, FLOP/s: with bf16, and with TF32, what float32 is multiplied in.
PEAKS = {"H200": (989e12, 495e12), "H100": (989e12, 495e12), "A100": (312e12, 156e12), "L40S": (362e12, 183e12),
         "L4": (121e12, 60e12), "A10G": (70e12, 35e12), "RTX 4090": (165e12, 83e12), "RTX 3090": (71e12, 36e12)}


def peak_flops(device: torch.device, bf16: bool) -> float:
    """FLOP/s of one device at its best; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peaks[0 if bf16 else 1] for part, peaks in PEAKS.items() if part in name), 0.0)


def training_flops(task: Task, batch: dict[str, Tensor]) -> int:
    """FLOPs of a batch's forward and its backward, which takes twice the forward's. Recomputed activations don't count.

    Counted on tensors without data, so that nothing is computed and no kernel's own formula is needed.
    """
    with torch.device("meta"):
        model = task.build_model().requires_grad_(False)  # the counter stumbles over views of what has gradients
    batch = {name: values.to("meta") for name, values in batch.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.loss(model, batch)
    return 3 * counter.get_total_flops()
