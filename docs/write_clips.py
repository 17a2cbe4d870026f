"""Write generated clips as clips/CLASS/NUMBER.mp4, for predict.py: `python docs/write_clips.py 3 clips` writes 3."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from perceiver import pictures  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.errors import run_script  # noqa: E402
from perceiver.io import output  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402
from perceiver.tasks.video import load_clips, write_video  # noqa: E402


def main() -> None:
    num_clips, folder = int(sys.argv[1]), Path(sys.argv[2])
    recipe = Path(__file__).parent.parent / "configs" / "autoencode.yaml"
    config = load_config(str(recipe), [], TASKS)
    shape = config.model.input
    _, clips, _ = load_clips(config.data, shape)
    for number in range(num_clips):
        clip = clips[number]
        with output(folder / clips.class_names[clip["label"]], f"{number}.mp4") as file:
            frames = pictures.enlarge(clip["image"], 224)  # H.264 halves the resolution of colors
            write_video(file, frames, shape.frame_rate, clip["audio"], shape.sample_rate)


if __name__ == "__main__":
    run_script(main)
