import pytest
import yaml

from perceiver.config import from_dict, load_config, to_dict
from perceiver.errors import UserError
from perceiver.tasks import TASKS


def load(*overrides: str, path="configs/clm.yaml"):
    return load_config(path, list(overrides), TASKS)


def test_overrides_are_converted_to_the_type_of_the_field():
    config = load("optim.lr=2e-4", "optim.betas=[0, 0.5]", "optim.max_grad_norm=null", "train.out_dir=3",
                  "model.output_norm=true", "optim.eps=1")
    assert config.optim.lr == 2e-4 and config.optim.betas == (0.0, 0.5) and config.optim.max_grad_norm is None
    assert config.train.out_dir == "3" and config.model.output_norm is True
    assert isinstance(config.optim.eps, float)
    assert load().train.out_dir == "runs/clm"


def test_a_config_survives_a_checkpoint_and_yaml():
    config = load("optim.betas=[0.5, 0.6]")
    assert from_dict(to_dict(config), TASKS) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), TASKS) == config


@pytest.mark.parametrize("override, words", [
    ("model.num_latent=3", ["model.num_latent", "did you mean num_latents?"]),
    ("trian.seed=3", ["trian", "train"]),
    ("task=causal_ml", ["task='causal_ml'", "did you mean causal_lm?"]),
    ("model.num_latents=9999", ["model.num_latents=9999", "max_seq_len"]),
    ("model.num_heads=7", ["model.num_channels", "num_heads=7"]),
    ("optim.lr=fast", ["optim.lr='fast'", "float"]),
    ("model.num_latents=1.5", ["model.num_latents=1.5", "int"]),
    ("model.output_norm=1", ["model.output_norm=1", "bool"]),
    ("train.max_steps=true", ["train.max_steps=True", "int"]),
    ("optim.betas=[1]", ["optim.betas"]),
    ("optim.name=lion", ["optim.name='lion'", "lamb"]),
    ("optim.schedule=linear", ["optim.schedule='linear'", "constant_cosine"]),
    ("optim.schedule=step", ["optim.step_at=()"]),
    ("optim.step_at=[0.5]", ["optim.step_at=(0.5,)", "schedule"]),
    ("data=5", ["data=5", "mapping"]),
    ("data.batch_size=0", ["data.batch_size=0"]),
    ("data.dataset=wiki", ["data.dataset='wiki'", "wikitext103"]),
    ("train.device=tpu", ["train.device='tpu'", "cuda"]),
    ("data", ["'data'", "section.key=value"]),
])
def test_mistakes_are_named(override, words):
    with pytest.raises(UserError) as error:
        load(override)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["task: [", "- 1", "", "task: causal_lm\nmodel: {heads: 3}", "\0"])
def test_broken_files_are_errors(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        load(path=file)
    with pytest.raises(UserError, match="nowhere.yaml"):
        load(path=tmp_path / "nowhere.yaml")
