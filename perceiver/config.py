"""Configuration: dataclasses, filled from a YAML file and `section.key=value` overrides, checked before anything runs.

A task provides the dataclasses of the sections `model` and `data`; `optim` and `train` are the same for all tasks. The
type of a field is also its rule:

    Annotated[int, "[1, inf)"]     a number in an interval
    Literal["cosine", "constant"]  one of these values
    tuple[float, float]            two numbers; a list in YAML
    int | None                     an integer or null

`build` checks every value that it is given. A `__post_init__` checks several fields together and raises ValueError.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from perceiver.errors import UserError, reading

Count = Annotated[int, "[1, inf)"]
NonNegativeInt = Annotated[int, "[0, inf)"]
Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]
Probability = Annotated[float, "[0, 1]"]
ValFraction = Annotated[float, "(0, 0.5]"]  # fraction of the data, held out for validation
Decay = Annotated[float, "[0, 1)"]


@dataclass
class OptimConfig:
    name: Literal["adamw", "adam", "sgd", "lamb", "muon"] = "adamw"  # adam and sgd add weight decay to the gradient
    lr: Positive = 2e-4  # peak learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # all but sgd
    eps: Positive = 1e-8  # all but sgd
    momentum: Decay = 0.9  # sgd and muon
    muon_lr: Positive = 0.01  # peak learning rate of the matrices in layers, for muon; lr is that of other parameters
    weight_decay: NonNegative = 0.0  # of weights and embeddings, never of biases and norms
    schedule: Literal["cosine", "constant", "constant_cosine", "step"] = "cosine"  # constant_cosine: 2nd half decays
    warmup_steps: NonNegativeInt = 200  # linear warm-up from 0, in every schedule
    decay_steps: Count | None = None  # length of the schedule in steps, including warm-up; null: train.max_steps
    min_lr_fraction: Probability = 0.0  # the final value of a cosine, as a fraction of lr
    milestones: tuple[Annotated[float, "(0, 1)"], ...] = ()  # schedule step: lr / 10 at these fractions of the schedule
    max_grad_norm: Positive | None = 1.0  # gradients are clipped to this norm; null: no clipping

    def __post_init__(self):
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(f"milestones={self.milestones} must be set if schedule is step, and only then")


@dataclass
class TrainConfig:
    out_dir: str | None = None  # the run folder; null: runs/<name of the config file>
    max_steps: Count = 1000  # optimizer steps
    max_hours: Positive | None = None  # since the start of the script; then the run saves a checkpoint and stops
    gradient_accumulation_steps: Count = 1  # micro-batches in an optimizer step on each rank
    seed: Annotated[int, "[0, 1e18]"] = 0  # for initialization, data and dropout
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA if there is a GPU
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 if it is fast on the GPU or CPU
    compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA if there is a compiler, not on a CPU
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each holds the model, or a part of it
    resume: str = "auto"  # auto: from the run's last.pt if it exists; never: start anew; or a path of a checkpoint
    log_every: Count = 10  # steps between log lines
    eval_every: Count = 500  # steps between evaluations on the validation set
    save_every: Count = 500  # steps between checkpoints; evaluations save one too
    eval_only: bool = False  # evaluate the checkpoint that `resume` selects, and stop; it writes nothing
    profile: NonNegativeInt = 0  # write a trace of so many steps to profile.json in the run folder; 0: none
    dry_run: bool = False  # build the model, print the config and the number of parameters, stop


@dataclass
class Config:
    task: str  # a name in perceiver.tasks.TASKS
    model: Any  # the task's ModelConfig
    data: Any  # the task's DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Text(str):
    """The value of an override. `convert` parses it by the type of its field."""


class UnknownKey(UserError):
    """A key that no field has. `from_dict` adds the task to its message."""


def load_config(path: str | Path, overrides: list[str], tasks: dict[str, type]) -> Config:
    """The config in a YAML file, changed by `section.key=value` overrides. Raises UserError for any mistake in them."""
    with reading(f"config {path}"):
        with open(path, encoding="utf-8") as file:
            values = read_yaml(file.read(MAX_CHARACTERS + 1))
    if not isinstance(values, dict):
        raise UserError(f"config {path} must be a mapping of sections, not {type(values).__name__}")
    for override in overrides:
        set_value(values, override)
    config = from_dict(values, tasks)
    if config.train.out_dir is None:
        config.train.out_dir = str(Path("runs") / Path(path).stem)
    return config


MAX_CHARACTERS = 2**17


def read_yaml(text: str) -> Any:
    """The values in a YAML text. It must be short and without aliases: a few can stand for billions of values."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters, too many for a config")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise ValueError("it holds an alias (*name); write the value again instead")
    return yaml.safe_load(text)


def set_value(values: dict, override: str):
    """Puts the value of `section.key=value` into nested dicts."""
    path, _, value = override.partition("=")
    *sections, key = path.split(".")
    if override.startswith("-"):
        raise UserError(f"override {override!r} must not start with dashes: write {override.lstrip('-')}")
    if not key or not value:
        raise UserError(f"override {override!r} must look like section.key=value")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    values[key] = Text(value)


def from_dict(values: dict, tasks: dict[str, type]) -> Config:
    """The config in nested dicts, which come from a YAML file or from `to_dict`. Raises UserError for any mistake."""
    task = str(values.get("task", ""))
    if task not in tasks:
        raise UserError(f"task={task!r} is unknown; {suggestion(task, tasks)}")
    sections = {
        "model": tasks[task].ModelConfig,
        "data": tasks[task].DataConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
    }
    try:
        parts = {name: convert(values.get(name), cls, name) for name, cls in sections.items()}
    except UnknownKey as error:
        raise UserError(f"task {task}: {error}") from None
    for key in values:
        if key not in ("task", *sections):
            owners = [f"{name}.{key}" for name, part in parts.items() if key in vars(part)]
            raise UserError(f"unknown key {key}; {suggestion(key, sections, owners)}")
    return Config(task, **parts)


def build(cls: type, values: Any, prefix="") -> Any:
    """An instance of the dataclass `cls` from a dict. Raises UserError that names the key, with `prefix` before it."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')}={values!r} must be a mapping of keys to values")
    hints = typing.get_type_hints(cls, include_extras=True)
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise UnknownKey(f"unknown key {prefix}{key}; {suggestion(key, hints)}")
        kwargs[key] = convert(value, hints[key], f"{prefix}{key}")
    for member in dataclasses.fields(cls):
        required = member.default is dataclasses.MISSING and member.default_factory is dataclasses.MISSING
        if required and member.name not in kwargs:
            raise UserError(f"{prefix}{member.name} is missing")
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` of a field. Raises UserError if it has another type or breaks the field's rule."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None
        if value in (None, "null"):
            return None
        return convert(value, arguments[0], key)
    if origin is Annotated:
        number = convert(value, arguments[0], key)
        check_interval(number, arguments[1], key)
        return number
    if origin is Literal:
        parsed = parse(value) if isinstance(value, Text) else value
        for choice in arguments:
            if as_text(choice) == as_text(parsed):
                return choice
        raise UserError(f"{key}={value!r} must be one of {', '.join(map(as_text, arguments))}")
    if isinstance(value, Text):
        value = str(value) if hint is str else parse(value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(value) != len(arguments):
            raise UserError(f"{key}={value} must have {len(arguments)} values")
        return tuple(convert(item, rule, key) for item, rule in zip(value, arguments))
    if hint in (int, float) and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            return to_number(value, hint)
    if type(value) is (origin or hint):
        return value
    expected = "list" if origin is tuple else hint.__name__
    advice = "; put it in quotes" if hint is str else ""
    raise UserError(f"{key}={value!r} must be {expected}, not {type(value).__name__}{advice}")


def as_text(choice: Any) -> str:
    """A value of a Literal as one writes it in YAML."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def parse(text: str) -> Any:
    """The value of `text` read as YAML, or `text` itself if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
        return str(text)


def to_number(value: Any, kind: type) -> int | float:
    """`value` as an int or float. It may be text: YAML reads 1e4 as text. Raises ValueError or TypeError otherwise."""
    if type(value) is int:
        return kind(value)
    number = float(value)
    if kind is int and not number.is_integer():
        raise ValueError
    return kind(number)


def check_interval(number: float, interval: str, key: str):
    """Raises UserError unless `number` is in `interval`, for example "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        words = {"[0, inf)": "not be negative", "(0, inf)": "be positive", "[1, inf)": "be at least 1"}
        raise UserError(f"{key}={number} must {words.get(interval, f'be in {interval}')}")


def suggestion(name: str, known: Iterable[str], near: Iterable[str] = ()) -> str:
    """The advice for an unknown name: the first of `near`, or the known name most like it, or all known names."""
    near = [*near, *difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)]
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def to_dict(config: Config) -> dict:
    """Nested dicts. A checkpoint stores them, and `from_dict` reads them."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)
