"""Optical flow."""
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from perceiver import pictures
from perceiver.architectures import OpticalFlowConfig
from perceiver.data import FlowDataConfig, load_flow
from perceiver.flow import compute_flow
from perceiver.tasks.base import Task


class OpticalFlow(Task):
    """Perceiver IO on two frames: how far does each pixel of the first one move (Perceiver IO, section 4.2)?

    The loss is the end-point error, the distance in pixels between where a pixel goes and where it is said to go: what
    benchmarks report. Where the flow is not known (KITTI), it does not count.
    """
    ModelConfig = OpticalFlowConfig
    DataConfig = FlowDataConfig

    def load_data(self) -> tuple[Dataset, Dataset]:
        train_set, self.val_set = load_flow(self.config.data, self.config.model.input.frame_shape,
                                            self.config.train.seed)
        return train_set, self.val_set

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        flow, valid = batch["flow"], batch["valid"]  # (B, H, W, 2), (B, H, W); or (B, O', 2), (B, O') at positions
        if "positions" in batch:
            predicted = model(batch["frames"], batch["positions"])
        else:
            predicted = self.predict(model, batch["frames"])
        error = torch.linalg.vector_norm(predicted.float() - flow, dim=-1)
        return {"loss": (error * valid).sum(), "count": valid.sum(),
                "motion": (torch.linalg.vector_norm(flow, dim=-1) * valid).sum()}

    def predict(self, model: nn.Module, frames: Tensor) -> Tensor:
        """Flow (B, H, W, 2) of frames (B, 2, 3, H, W), in tiles if they are not of the size that the model takes."""
        tile = self.config.model.input.frame_shape
        if frames.shape[3:] == tile:
            return model(frames)
        return torch.stack([compute_flow(model, pair, tile) for pair in frames])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """`epe` is the end-point error, `motion` that of saying that nothing moves."""
        return super().metrics(sums) | {"epe": sums["loss"] / sums["count"], "motion": sums["motion"] / sums["count"]}

    def show(self, model: nn.Module) -> dict[str, Tensor]:
        """The first frames of some validation examples, the predicted flow, and the true one."""
        picked = [self.val_set[n * len(self.val_set) // 4] for n in range(min(4, len(self.val_set)))]
        frames, truth = (torch.stack([example[name] for example in picked]) for name in ("frames", "flow"))
        with torch.inference_mode():
            flow = self.predict(model.eval(), frames.to(next(model.parameters()).device)).cpu()
        model.train()
        return {"flow": pictures.flow_rows(frames[:, 0], flow, truth)}

    def summary(self, metrics: dict[str, float]) -> str:
        return (f"validation: an end-point error of {metrics['epe']:.3f} pixels; if nothing moved, it would be "
                f"{metrics['motion']:.3f}")
