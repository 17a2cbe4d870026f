from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import yaml

from perceiver.config import Config, Count, OptimConfig, TrainConfig, build, from_dict, load_config, to_dict, to_yaml
from perceiver.errors import UserError
from perceiver.tasks import TASKS


def load(*overrides: str, path="configs/clm.yaml"):
    return load_config(path, list(overrides), TASKS)


def test_overrides_are_converted_to_the_type_of_the_field():
    config = load("optim.lr=2e-4", "optim.betas=[0, 0.5]", "optim.max_grad_norm=null", "train.out_dir=3",
                  "model.output_norm=true", "optim.eps=1", "train.max_steps=1e4", "train.seed=999999999999999999")
    assert config.optim.lr == 2e-4 and config.optim.betas == (0.0, 0.5) and config.optim.max_grad_norm is None
    assert config.train.out_dir == "3" and config.model.output_norm is True
    assert isinstance(config.optim.eps, float)
    assert config.train.max_steps == 10_000 and isinstance(config.train.max_steps, int)
    assert config.train.seed == 999_999_999_999_999_999  # a float has fewer digits
    assert load().train.out_dir == "runs/clm"


@pytest.mark.parametrize("text", ["010", "12:30", "2024-01-01", "1e4", "true", "[a", "a: b", " x "])
def test_text_stays_as_it_was_typed(text, tmp_path):
    config = load(f"train.out_dir={text}", f"data.path={text}")
    assert config.train.out_dir == config.data.path == text and type(config.data.path) is str
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load(path=file) == config


def test_null_is_none_only_where_that_is_allowed():
    config = load("data.path=null", "train.out_dir=null", "train.resume=null")
    assert config.data.path is None and config.train.out_dir == "runs/clm" and config.train.resume == "null"


def test_a_config_survives_a_checkpoint_and_yaml():
    config = load("optim.betas=[0.5, 0.6]")
    assert from_dict(to_dict(config), TASKS) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), TASKS) == config


@pytest.mark.parametrize("override, words", [
    ("model.num_latent=3", ["task causal_lm", "model.num_latent;", "did you mean num_latents?"]),
    ("trian.seed=3", ["trian", "did you mean train?"]),
    ("lr=0.1", ["unknown key lr", "did you mean optim.lr?"]),
    ("batch_size=3", ["did you mean data.batch_size?"]),
    ("optim.learning_rate=3", ["optim.learning_rate; choose from name, lr, betas"]),
    ("--train.max_steps=2", ["must not start with dashes: write train.max_steps=2"]),
    ("task=causal_ml", ["task='causal_ml'", "did you mean causal_lm?"]),
    ("task=nothing", ["task='nothing'", "choose from", "symbolic_music"]),
    ("task=masked_lm", ["task masked_lm: unknown key model.max_seq_len; choose from", "encoder"]),
    ("model.num_latents=9999", ["model.num_latents=9999", "max_seq_len"]),
    ("optim.lr=fast", ["optim.lr='fast'", "float"]),
    ("optim.lr=0", ["optim.lr=0.0 must be positive"]),
    ("optim.lr=inf", ["optim.lr=inf must be positive"]),
    ("optim.weight_decay=-1", ["optim.weight_decay=-1.0 must not be negative"]),
    ("optim.momentum=1", ["optim.momentum=1.0 must be in [0, 1)"]),
    ("optim.max_grad_norm=0", ["optim.max_grad_norm=0.0 must be positive"]),
    ("train.seed=-1", ["train.seed=-1 must be in [0, 1e18]"]),
    ("model.num_latents=1.5", ["model.num_latents=1.5", "int"]),
    ("model.num_latents=[1]", ["model.num_latents=[1]", "int"]),
    ("model.output_norm=1", ["model.output_norm=1", "bool"]),
    ("train.max_steps=true", ["train.max_steps=True", "int"]),
    ("train.max_steps=0", ["train.max_steps=0 must be at least 1"]),
    ("optim.betas=[1]", ["optim.betas=[1] must have 2 values"]),
    ("optim.betas=[0, 1]", ["optim.betas=1.0 must be in [0, 1)"]),
    ("optim.betas=1", ["optim.betas=1 must be list"]),
    ("optim.name=lion", ["optim.name='lion' must be one of adamw, adam, sgd, lamb, muon"]),
    ("optim.schedule=linear", ["optim.schedule='linear'", "constant_cosine"]),
    ("optim.schedule=step", ["optim.milestones=()"]),
    ("optim.milestones=[0.5]", ["optim.milestones=(0.5,)", "schedule"]),
    ("data=5", ["data=5", "mapping"]),
    ("data.path.x=5", ["data.path.x=5", "path is not a section"]),
    ("data.batch_size=0", ["data.batch_size=0"]),
    ("data.dataset=wiki", ["data.dataset='wiki'", "wikitext103"]),
    ("train.device=tpu", ["train.device='tpu'", "cuda"]),
    ("data", ["'data'", "section.key=value"]),
])
def test_mistakes_are_named(override, words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("task: causal_lm\nmodel: {max_seq_len: 64, num_latents: 8}\ndata: {path: x.txt}\n")
    with pytest.raises(UserError) as error:
        load(override, path=file)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["task: [", "- 1", "", "task: causal_lm\nmodel: {heads: 3}", "\0",
                                  "task: causal_lm\n1: 2", "task: causal_lm\nmodel: {1: 2}", "task: [causal_lm]"])
def test_broken_files_are_errors(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(path=file)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load(path=tmp_path / "nowhere.yaml")


def test_a_number_for_a_text_must_be_quoted(tmp_path):
    """YAML reads 010 as 8, so the text is lost."""
    file = tmp_path / "config.yaml"
    file.write_text("task: causal_lm\ntrain: {out_dir: 010}")
    with pytest.raises(UserError, match="train.out_dir=8 must be str, not int; put it in quotes"):
        load(path=file)
    file.write_text("task: causal_lm\ntrain: {out_dir: '010'}")
    assert load(path=file).train.out_dir == "010"


@dataclass
class Layer:
    width: Annotated[int, "[2, 8)"]
    dropout: Annotated[float, "[0, 1)"] | None = None


@dataclass
class Model:
    layer: Layer
    shape: tuple[Count, Count, Literal["a", "b"]] = (1, 2, "a")
    sizes: tuple[Count, ...] = ()
    depth: Literal[1, 3] = 1
    head: Layer | None = None
    flags: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.depth > self.layer.width:
            raise ValueError(f"depth={self.depth} exceeds layer.width={self.layer.width}")


def test_every_kind_of_field():
    values = {"layer": {"width": "7", "dropout": 0}, "shape": [3, 4.0, "b"], "sizes": [1], "depth": 3, "head": None,
              "flags": {"x": 1}}
    model = build(Model, values)
    assert model == Model(Layer(7, 0.0), (3, 4, "b"), (1,), 3, None, {"x": 1})
    assert isinstance(model.layer.dropout, float) and isinstance(model.shape[1], int)
    assert build(Model, values | {"head": {"width": 2}}).head == Layer(2)


@pytest.mark.parametrize("change, message", [
    ({"layer": {"width": 8}}, "m.layer.width=8 must be in \\[2, 8\\)"),
    ({"layer": {"width": 1}}, "m.layer.width=1 must be in \\[2, 8\\)"),
    ({"layer": {"width": 7.5}}, "m.layer.width=7.5 must be int, not float"),
    ({"layer": {}}, "m.layer.width is missing"),
    ({"layer": {"width": 7, "dropout": float("nan")}}, "m.layer.dropout=nan must be in"),
    ({"layer": 3}, "m.layer=3 must be a mapping"),
    ({"layer": {"width": 2}, "depth": 3}, "m.depth=3 exceeds layer.width=2"),
    ({"shape": [1, 2]}, "m.shape=\\[1, 2\\] must have 3 values"),
    ({"shape": [1, 0, "a"]}, "m.shape=0 must be at least 1"),
    ({"shape": [1, 1, "c"]}, "m.shape='c' must be one of a, b"),
    ({"sizes": [1, 0]}, "m.sizes=0 must be at least 1"),
    ({"sizes": 3}, "m.sizes=3 must be list, not int"),
    ({"depth": 2}, "m.depth=2 must be one of 1, 3"),
    ({"flags": 2}, "m.flags=2 must be dict, not int"),
    ({"head": {"widht": 2}}, "unknown key m.head.widht; did you mean width?"),
])
def test_rules_of_fields(change, message):
    with pytest.raises(UserError, match=message):
        build(Model, {"layer": {"width": 7}} | change, "m.")


def test_sections_have_defaults():
    assert build(TrainConfig, None) == TrainConfig() and build(OptimConfig, {}) == OptimConfig()
    config = Config("causal_lm", model=None, data=None)
    assert config.optim == OptimConfig() and config.train == TrainConfig()
