"""Configuration: dataclasses, read from YAML, changed by `section.key=value`, checked before anything runs.

A task (tasks.py) brings the dataclasses of its `model` and `data` sections; `optim` and `train` are the same for all.
"""
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from perceiver.errors import UserError


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw, adam, sgd (these two add decay to the gradient) or lamb
    lr: float = 2e-4  # peak learning rate
    betas: tuple[float, ...] = (0.9, 0.999)  # of all but sgd
    eps: float = 1e-8  # of all but sgd
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0  # of matrices (weights, embeddings); never of biases and norms
    schedule: str = "cosine"  # cosine, constant, constant_cosine (the first half constant) or step
    warmup_steps: int = 200  # linear warm-up from 0, whatever the schedule
    decay_steps: int | None = None  # steps, warm-up included, to the end of the schedule; null: train.max_steps
    min_lr_fraction: float = 0.0  # where a cosine ends, as a fraction of lr
    step_at: tuple[float, ...] = ()  # of step: shares of the steps after which lr goes down once more
    step_factor: float = 0.1  # of step: what lr is multiplied by
    max_grad_norm: float | None = 1.0  # gradients are clipped to this norm; null: not at all

    def __post_init__(self):
        for key, choices in (("name", ("adamw", "adam", "sgd", "lamb")),
                             ("schedule", ("cosine", "constant", "constant_cosine", "step"))):
            require(getattr(self, key) in choices, f"{key}={getattr(self, key)!r} must be one of {', '.join(choices)}")
        require(self.lr > 0, f"lr={self.lr} must be positive")
        require(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                f"betas={self.betas} must be two in [0, 1)")
        require(self.eps > 0, f"eps={self.eps} must be positive")
        require(0 <= self.momentum < 1, f"momentum={self.momentum} must be in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        require(self.decay_steps is None or self.decay_steps >= 1, f"decay_steps={self.decay_steps} must be at least 1")
        require(0 <= self.min_lr_fraction <= 1, f"min_lr_fraction={self.min_lr_fraction} must be in [0, 1]")
        require((self.schedule == "step") == bool(self.step_at) and all(0 < at < 1 for at in self.step_at),
                f"step_at={self.step_at} must be numbers in (0, 1) if schedule is step, and else nothing")
        require(0 < self.step_factor < 1, f"step_factor={self.step_factor} must be in (0, 1)")
        require(self.max_grad_norm is None or self.max_grad_norm > 0,
                f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")


@dataclass
class TrainConfig:
    out_dir: str | None = None  # the run's folder; default runs/<config file's stem>
    max_steps: int = 1000  # optimizer steps
    accumulate: int = 1  # micro-batches of one step, one after the other on every rank
    seed: int = 0  # of initialisation, data and dropout
    device: str = "auto"  # auto (CUDA where there is one), cuda or cpu
    precision: str = "auto"  # auto (bf16 on CUDA hardware that has it, else float32), bf16 or float32
    compile: bool = False  # torch.compile the model
    resume: str = "auto"  # auto (from the run's last.pt if there is one), never, or a checkpoint's path
    log_every: int = 10  # steps between two lines of metrics
    eval_every: int = 500  # steps between two evaluations on the validation set
    save_every: int = 500  # steps between two saves of last.pt
    dry_run: bool = False  # build model and optimizer, print config and parameter count, stop

    def __post_init__(self):
        for name in ("max_steps", "accumulate", "log_every", "eval_every", "save_every"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be from 0 to 2^63 - 1")
        require(self.device in ("auto", "cpu", "cuda"), f"device={self.device!r} must be auto, cpu or cuda")
        require(self.precision in ("auto", "bf16", "float32"),
                f"precision={self.precision!r} must be auto, bf16 or float32")


@dataclass
class Config:
    task: str  # a name in tasks.TASKS
    model: Any  # the task's ModelConfig
    data: Any  # the task's DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def require(condition: bool, message: str) -> None:
    """Raises ValueError: `build` puts the section's name before the message, which starts with a key."""
    if not condition:
        raise ValueError(message)


def load_config(path: str, overrides: list[str], tasks: dict[str, type]) -> Config:
    """The config of a YAML file with `section.key=value` overrides; raises UserError at whatever is wrong with it."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold `section:` mappings, not {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        *sections, name = key.split(".")
        if not equals or not name or not value:
            raise UserError(f"override {override!r} must look like section.key=value")
        place = values
        for section in sections:
            place[section] = {} if place.get(section) is None else place[section]
            place = place[section]
            if not isinstance(place, dict):
                raise UserError(f"override {override!r}: {section} is not a section")
        try:
            place[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
            place[name] = value
    config = from_dict(values, tasks)
    if config.train.out_dir is None:
        config.train.out_dir = str(Path("runs") / Path(path).stem)
    return config


def from_dict(values: dict, tasks: dict[str, type]) -> Config:
    """The config of nested dicts, as `dataclasses.asdict` makes them; raises UserError."""
    task = values.get("task")
    if not isinstance(task, str) or task not in tasks:
        raise UserError(f"task={task!r} is unknown{suggestion(str(task), tasks)}; tasks are {', '.join(tasks)}")
    return build(Config, values, types={"model": tasks[task].ModelConfig, "data": tasks[task].DataConfig})


def build(cls: type, values: Any, prefix: str = "", types: dict[str, type] = {}) -> Any:
    """An instance of dataclass `cls`, nested ones included, from a dict; raises UserError naming the key."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')}={values!r} must be a mapping of keys to values")
    hints = typing.get_type_hints(cls) | types
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown key {prefix}{key}{suggestion(str(key), hints)}")
        kwargs[key] = convert(value, hints[key], prefix + key)
    for key in types.keys() - kwargs.keys():
        kwargs[key] = build(types[key], {}, f"{key}.")
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in kwargs
                   and f.default is f.default_factory is dataclasses.MISSING]
        raise UserError(f"{prefix}{missing[0]} is missing") from None


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` of a field, or UserError."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key + ".")
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        return convert(value, hint.__args__[0], key)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, hint.__args__[0], key) for item in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 2e-4 as a string
        except ValueError:
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(hint, type) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        expected = getattr(hint, "__name__", str(hint))
        raise UserError(f"{key}={value!r} must be {expected}, not {type(value).__name__}")
    return value


def suggestion(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def to_dict(config: Config) -> dict:
    """Plain dicts and lists: what a checkpoint holds and `from_dict` reads."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)
