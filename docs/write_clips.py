"""Generated clips as files, to try predict.py on: `python docs/write_clips.py 3 clips` writes clips/CLASS/0.mp4 ..."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from perceiver import pictures  # noqa: E402
from perceiver.config import load_config  # noqa: E402
from perceiver.data import write_video  # noqa: E402
from perceiver.errors import run_script  # noqa: E402
from perceiver.tasks import TASKS  # noqa: E402


def main() -> None:
    config = load_config(Path(__file__).parent.parent / "configs/autoencode.yaml", [], TASKS)
    task = TASKS[config.task](config)
    clips = task.load_data()[1]  # those for validation
    for number in range(int(sys.argv[1])):
        clip = clips[number]
        path = Path(sys.argv[2]) / clips.class_names[clip["label"]] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Enlarged, because videos have colours in half of the resolution.
        write_video(path, pictures.enlarged(clip["image"], 224), task.shape.frame_rate, clip["audio"],
                    task.shape.sample_rate)


if __name__ == "__main__":
    run_script(main)
