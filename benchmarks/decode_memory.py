"""Measures the memory of decoding a video.

    python benchmarks/decode_memory.py > benchmarks/results/decode_memory_cpu.md

Each number comes from a process of its own. It is the peak of resident memory during decoding, minus the resident
memory before. The latents, the model, Python and torch are in memory before. Needs Linux.
"""
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from perceiver.model import PerceiverDecoderConfig, PerceiverEncoderConfig  # noqa: E402
from perceiver.tasks.video import MultimodalAutoencoderConfig, VideoInputConfig  # noqa: E402

FRAMES, PIXELS, WIDTH = (4, 8, 16), (200_704, 50_176, 12_544, 3_136), 64


def memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(num_frames: int, num_pixels: int) -> float:
    """Peak memory in MiB of decoding `num_frames` frames of 224 x 224 and their sound, `num_pixels` at a time."""
    video = VideoInputConfig((num_frames, 224, 224, 3), num_image_bands=8, num_audio_samples=1920 * num_frames,
                             num_audio_bands=16, max_resolution=(num_frames, 56, 56))
    model = MultimodalAutoencoderConfig(
        32, WIDTH, PerceiverEncoderConfig(1, num_self_attention_layers_per_block=1),
        PerceiverDecoderConfig(1, num_query_channels=WIDTH), video, WIDTH).build().eval()
    x, latents = torch.zeros(1, 0, model.input_adapter.num_channels), torch.randn(1, 32, WIDTH)
    with torch.inference_mode():
        model.decode(x, latents, {"image": torch.arange(9)})  # the first use of torch allocates some memory
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        outputs = model.decode_in_chunks(x, latents, num_frames * 224 * 224 // num_pixels)
    assert outputs["image"].shape == (1, num_frames, 3, 224, 224)
    return memory("VmHWM") - before - outputs["image"].nbytes / 2**20


def main() -> None:
    print(f"""# Memory of decoding a video

`python benchmarks/decode_memory.py`, torch {torch.__version__}, CPU, float32, {torch.get_num_threads()} thread.

The table gives the peak of resident memory, in MiB, while the model decodes a clip with 224 x 224 pixels per frame, its
sound and its class. It excludes the memory before decoding, and the resulting frames (2.3 MiB for 4, 9.2 MiB for 16).
The model is small (32 latents, queries of {WIDTH + 2} channels), so that 800,000 outputs take seconds. The official
model has queries of 1026 channels.

| pixels at a time | {' | '.join(f'{n} frames' for n in FRAMES)} |
|---|{'---|' * len(FRAMES)}""")
    for num_pixels in PIXELS:
        row = [subprocess.run([sys.executable, __file__, str(num_frames), str(num_pixels)], check=True,
                              capture_output=True, text=True).stdout.strip() for num_frames in FRAMES]
        print(f"| {num_pixels:,} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{measure(*map(int, sys.argv[1:])):.0f}")
    else:
        main()
