"""A suite for a model that is gated, renamed, missing or of an unknown architecture ends before its weights are downloaded, in plan and in run."""

import re

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import ModelError
from harness.hub_models import fetch_config, require_loadable
from harness.schema import Model
from tests.fake_hub import COMMIT, FakeHub

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
MODELS = {
    "org/good": LLAMA,
    "org/gated": None,
    "org/unknown": {**LLAMA, "model_type": "lama"},
    "org/typed": {**LLAMA, "hidden_size": "64"},
    "org/headless": {**LLAMA, "num_attention_heads": 0, "head_dim": None},
    "org/own-code": {**LLAMA, "model_type": "special", "auto_map": {"AutoModelForCausalLM": "modeling.Special"}},
}
SUITE = """
schema = 1
name = "asked"
[model]
path = "{path}"
revision = "{revision}"
[[variant]]
name = "bf16"
method = "bf16"
[[task]]
name = "mini_math"
[engine]
kind = "hf"
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the libraries take for the real one, with an empty cache."""
    found = FakeHub(MODELS, renamed={"org/old": "org/good"})
    huggingface_hub.set_client_factory(
        lambda: httpx.Client(transport=httpx.MockTransport(lambda request: found.handle(request)), follow_redirects=True)
    )
    monkeypatch.setattr("harness.hub._unknown_host", lambda endpoint: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield found
    huggingface_hub.set_client_factory(default_client_factory)


def model(path: str, revision: str = COMMIT, **more) -> Model:
    return Model(path=path, revision=revision, **more)


def test_a_config_json_is_fetched_once_and_nothing_else(hub):
    require_loadable([model("org/good")])
    asked = [path for path in hub.asked if "org/" in path]
    assert asked and all(path.endswith(("config.json", COMMIT)) for path in asked)
    require_loadable([model("org/good")])
    assert [path for path in hub.asked if "org/" in path] == asked


CASES = [
    ("org/gated", COMMIT, r"is gated; accept its terms on its page on the hub \(org/gated\), and log in with that account"),
    ("org/old", COMMIT, r'is called org/good on the hub now; write path = "org/good", its commits are the same'),
    ("org/missing", COMMIT, r"there is no such model on the hub, or it is private; check the id"),
    ("org/good", "b" * 40, r"the hub has the model, and not this commit; take the revision from the model's page"),
]


@pytest.mark.parametrize(("path", "revision", "message"), CASES)
@pytest.mark.parametrize("command", [["plan", "--gpu", "h100", "--count", "1"], ["run"], ["prepare"]])
def test_a_model_that_cannot_be_had_is_said_before_anything_is_downloaded(hub, tmp_path, command, path, revision, message):
    suite = tmp_path / "asked.toml"
    suite.write_text(SUITE.format(path=path, revision=revision))
    results = [] if command[0] == "plan" else ["--results", str(tmp_path / "results")]
    done = CliRunner().invoke(app, [command[0], str(suite), *command[1:], *results])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and re.search(f"harness: {path}.*{message}", said)
    assert "Nothing was downloaded" in said and not any("safetensors" in each for each in hub.asked)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/unknown", r"model_type 'lama' is not known; allowed are .* nemotron-nas; near: llama"),
        (
            "org/own-code",
            r"model_type 'special' is not known; .* Its repository brings code of its own: .*trust_remote_code = true",
        ),
    ],
)
def test_an_unknown_architecture_is_said_by_run_and_by_plan_before_its_weights_are_downloaded(hub, tmp_path, path, message):
    suite = tmp_path / "asked.toml"
    suite.write_text(SUITE.format(path=path, revision=COMMIT))
    done = CliRunner().invoke(app, ["run", str(suite), "--results", str(tmp_path / "results")])
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and re.search(f"harness: {path} at {COMMIT}: {message}", said)
    assert "weights were not downloaded" in said and not any("safetensors" in each for each in hub.asked)
    done = CliRunner().invoke(app, ["plan", str(suite), "--gpu", "h100", "--count", "1"])
    assert (
        done.exit_code == 2
        and "is not known, so its memory cannot be planned; known: deepseek_v3, llama, mistral" in " ".join(done.output.split())
    )


@pytest.mark.parametrize("path", ["org/typed", "org/headless"])
def test_fields_that_fit_no_model_are_said_before_its_weights_are_downloaded(hub, path):
    with pytest.raises(ModelError, match=rf"{path} at {COMMIT}: its config.json describes no model \(.+\); .* not downloaded"):
        require_loadable([model(path)])


QUANTIZED = """
[quantization]
exclude = {exclude}
calibration = {{ data = "text", samples = 2 }}
[data.text]
source = "builtin"
seq_len = 64
[[variant]]
name = "ptq"
method = "ptq"
"""


@pytest.mark.parametrize(
    ("exclude", "by_run", "by_plan"),
    [
        ('["lm_head", "*.q_porj"]', r'exclude pattern "\*\.q_porj" matches no linear layer .*near names: ', r'"\*\.q_porj" matches nothing .*near'),
        ('["*"]', r"leaves no linear layer to quantize; narrow", r"leaves nothing to quantize; narrow the patterns"),
        ('["lm_head", "*.q_proj"]', r"splits a fused group: .*exclude all of them or none", r"splits .*qkv_proj, .*exclude all of it or nothing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["run", "prepare", "plan"])
def test_an_exception_that_does_not_fit_is_said_before_the_weights_are_downloaded(
    hub, tmp_path, own_cache, command, exclude, by_run, by_plan
):
    suite = tmp_path / "asked.toml"
    suite.write_text(SUITE.format(path="org/good", revision=COMMIT) + QUANTIZED.format(exclude=exclude))
    if command == "plan":  # which asks nobody: the configuration is in the cache since another command was run
        fetch_config(model("org/good"))
        hub.asked.clear()
    results = [] if command == "plan" else ["--results", str(tmp_path / "results")]
    done = CliRunner().invoke(app, [command, str(suite), *results])
    said = " ".join(done.output.split())
    message = (
        rf"{re.escape(str(suite))}: quantization\.exclude: {by_plan}"
        if command == "plan"
        else rf"{re.escape(str(suite))}: quantization of ptq: .*{by_run}"
    )
    assert done.exit_code == 2 and re.search(message, said), said
    assert "Traceback" not in said and not any("safetensors" in each for each in hub.asked)
    assert command != "plan" or hub.asked == []


def test_a_plan_of_a_model_whose_configuration_is_not_here_asks_nobody_for_it(hub, tmp_path, own_cache):
    suite = tmp_path / "asked.toml"
    suite.write_text(SUITE.format(path="org/good", revision=COMMIT) + QUANTIZED.format(exclude='["*"]'))
    done = CliRunner().invoke(app, ["plan", str(suite)])
    assert done.exit_code == 0 and hub.asked == []


def test_code_of_its_own_may_know_what_is_not_known_here_where_the_suite_allows_it(hub):
    require_loadable([model("org/own-code", trust_remote_code=True)])


def test_a_repository_without_a_configuration_is_no_checkpoint(hub, monkeypatch):
    monkeypatch.setattr("harness.hub_models.CONFIG", "settings.json")
    with pytest.raises(ModelError, match=r"org/good at a+: has no settings\.json; a checkpoint in the format of transformers"):
        fetch_config(model("org/good"))


def test_a_hub_that_does_not_answer_is_said_with_what_to_do(hub, monkeypatch):
    def refuse(request):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(hub, "handle", refuse)
    with pytest.raises(
        ModelError, match=r"org/good at a+: its config\.json is neither in the mirror nor to be had from the hub \("
    ):
        fetch_config(model("org/good"))
