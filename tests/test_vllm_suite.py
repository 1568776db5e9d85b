"""What a suite may say of vLLM, and what that changes in its plan. Nothing here needs vLLM."""

import pytest

from harness import plan, provenance
from harness.errors import SuiteError
from harness.plan import make_plan
from harness.store import Store
from harness.suite import load_suite

ENGINE = '[engine]\nkind = "hf"\nargs = { batch_size = 8 }'
VLLM = '[engine]\nkind = "vllm"\nkernels = "w4a4_emulation"\nargs = { max_num_seqs = 8 }'


def with_engine(tiny_suite, text: str, **changes: str):
    suite = tiny_suite.read_text()
    assert ENGINE in suite
    suite = suite.replace(ENGINE, text)
    for old, new in changes.items():
        assert old in suite
        suite = suite.replace(old, new)
    tiny_suite.write_text(suite)
    return tiny_suite


def keys(path, tmp_path) -> dict[str, str]:
    return {stage.label: stage.key for stage in make_plan(load_suite(path), Store(tmp_path / "cache")).stages}


def test_vllm_with_kernels_is_legal(tiny_suite):
    engine = load_suite(with_engine(tiny_suite, VLLM)).engine
    assert (engine.kind, engine.kernels, engine.args) == ("vllm", "w4a4_emulation", {"max_num_seqs": 8})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            '[engine]\nkind = "vllm"',
            'engine.kernels: missing; kind = "vllm" needs it .* Allowed: native, w4a4_emulation, w4a16',
        ),
        ('[engine]\nkind = "vllm"\nkernels = "w4a8"', "engine.kernels: found 'w4a8'.* Allowed: native, w4a16, w4a4_emulation"),
        ('[engine]\nkind = "hf"\nkernels = "w4a16"', 'engine.kernels: has no effect with kind = "hf"; remove it'),
        (VLLM.replace("max_num_seqs = 8", "max_num_seq = 8"), "max_num_seq: unknown key; did you mean max_num_seqs"),
        (VLLM.replace("max_num_seqs = 8", "batch_size = 8"), "batch_size: unknown key.* Known: data_parallel_size"),
        (VLLM.replace("max_num_seqs = 8", "max_num_seqs = true"), "found True; allowed: a positive integer"),
        (VLLM.replace("max_num_seqs = 8", "gpu_memory_utilization = 1.5"), "found 1.5; allowed: a number above 0, at most 1"),
        (VLLM.replace("max_num_seqs = 8", 'kv_cache_dtype = "int8"'), "found 'int8'; allowed: \"auto\""),
        (VLLM.replace("max_num_seqs = 8", 'mamba_ssm_cache_dtype = "fp8"'), 'found \'fp8\'; allowed: "float32", "float16" or'),
        (
            VLLM.replace("max_num_seqs = 8", "enable_prefix_caching = 1"),
            "enable_prefix_caching: found 1; allowed: true or false",
        ),
        (
            VLLM.replace("max_num_seqs = 8", "data_parallel_size = 0"),
            "data_parallel_size: found 0; allowed: a positive integer",
        ),
        (VLLM.replace("max_num_seqs = 8", "kv_cache_memory_gib = 0"), "found 0; allowed: a positive number, in GiB"),
        (VLLM.replace("max_num_seqs = 8", "enforce_eager = 1"), "found 1; allowed: true or false"),
        (VLLM.replace("max_num_seqs = 8", "enforce_eager = false"), "enforce_eager: found False; the emulated kernels"),
    ],
)
def test_a_wrong_engine_section_is_a_message_with_the_choices(tiny_suite, engine, message):
    with pytest.raises(SuiteError, match=message):
        load_suite(with_engine(tiny_suite, engine))


def test_w4a16_variants_are_not_scored_by_w4a4_kernels(tiny_suite):
    path = with_engine(tiny_suite, VLLM, **{"[quantization]\n": "[quantization]\nactivations = false\n"})
    with pytest.raises(SuiteError, match='"w4a4_emulation", but variant "ptq" is W4A16'):
        load_suite(path)


def test_a_new_vllm_or_gpu_renews_what_vllm_computes_and_nothing_else(tiny_suite, tmp_path, monkeypatch):
    before_hf = keys(tiny_suite, tmp_path)
    with_engine(tiny_suite, VLLM)
    before = keys(tiny_suite, tmp_path)
    scored = {label for label in before if "mini_" in label and not label.startswith("task ")}
    assert {label for label in before if before[label] != before_hf[label]} == scored
    real = provenance.package_versions
    monkeypatch.setattr(plan, "package_versions", lambda names: real(names) | ({"vllm": "9"} if "vllm" in names else {}))
    assert {label for label, key in keys(tiny_suite, tmp_path).items() if key != before[label]} == scored
    monkeypatch.setattr(plan, "package_versions", real)
    monkeypatch.setattr(plan, "vllm_device_kind", lambda: "cuda H200")
    assert {label for label, key in keys(tiny_suite, tmp_path).items() if key != before[label]} == scored


def test_the_choice_of_kernels_is_no_part_of_the_keys_of_bf16(tiny_suite, tmp_path):
    before = keys(with_engine(tiny_suite, VLLM), tmp_path)
    tiny_suite.write_text(tiny_suite.read_text().replace("w4a4_emulation", "native"))
    after = keys(tiny_suite, tmp_path)
    assert {label for label in before if before[label] != after[label]} == {
        label for label in before if "mini_" in label and not label.startswith(("bf16", "task "))
    }


def test_vllm_computes_on_the_gpu_only_with_its_cuda_package(monkeypatch):
    monkeypatch.setattr(provenance, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(provenance, "package_versions", lambda names: dict.fromkeys(names, "0.32.0"))
    assert provenance.vllm_device_kind() == "cuda NVIDIA H200"
    monkeypatch.setattr(provenance, "package_versions", lambda names: dict.fromkeys(names))
    assert provenance.vllm_device_kind() == provenance.device_kind()
