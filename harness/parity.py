"""`harness parity`: does vLLM compute a quantized checkpoint as we do?

Two W4A4 engines never agree token by token: rounding flips amplify noise. So each quantized module is compared on equal
inputs, and the engines by their mean KL to the BF16 model on the same text, paired over sequences. That half is `harness.parity_divergence`.
The KL between the engines is printed beside a floor: that of our own model against itself with another order of accumulation.

A module holds if every output lies within BF16 accumulation error of the float64 product of the same decoded operands,

    |y - y64| <= ulp(y64)/2 + 2 K 2^-24 S,    S = sum_k |x_k w_k| + |bias|,

which any order of FP32 accumulation, rounded to BF16 once, satisfies (K 2^-24 S is the classical bound; the factor 2 covers
kernels that scale partial sums), and if its root mean square error is at most twice ours. Where scales are not powers of two, a
native kernel multiplies what we round to BF16 first: 2^-8 S is allowed on top, and the second condition dropped.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import loading
from harness.batches import batch_of
from harness.builtin import builtin_sequences
from harness.data import SPLITS, Sequence
from harness.drawn import longest_question, write_drawings
from harness.engines.vllm import KERNELS, VllmEngine, available_kernels, takes_images
from harness.errors import EngineError, ModelError
from harness.models import folder_fingerprint
from harness.parity_divergence import MIN_RESPONSE_TOKENS, compare_divergence
from harness.processor import Processor, load_processor
from harness.progress import Reporter
from harness.provenance import provenance
from harness.records import open_results
from harness.schema_data import Drawings
from harness.store import Store, cache_folder, disk_errors, make_folder, write_json
from harness.token_store import StoredSequences, TokenWriter
from qad import divergence
from qad.kernels import fake_quantize
from qad.modules import Fp8Linear, QuantizedLinear, quantized_linears
from qad.recipe import Format, groups_of
from qad.stored_names import stored_layers

SCHEMA = 1
MODULE_TOKENS = 128
"""Tokens of real text whose inputs are recorded for the comparison of modules."""
SEQ_LEN = 192
"""Tokens of a held-out sequence, at most, beside those of a picture."""


def run_parity(
    checkpoint: Path,
    model: Path,
    *,
    kernels: str | None,
    results: Path,
    seq_len: int | None,
    max_sequences: int,
    reporter: Reporter,
) -> tuple[dict[str, Any], Path]:
    """Compare the engines on one checkpoint; returns the record and the file that it is stored in.

    Args:
        checkpoint: a quantized folder.  model: the BF16 folder that it was made from.
        kernels: what vLLM shall compute with; None takes native FP4 where vLLM's table offers it, else the emulation.
        seq_len: tokens of a sequence, at most; None takes SEQ_LEN, of chats about pictures beside a picture and its question.
        max_sequences: where to stop adding text; the verdict is INCONCLUSIVE if the interval is still too wide there.
    Raises:
        EngineError: vLLM cannot serve the checkpoint so.  ModelError: it is not quantized, or not of this model.
    """
    loading.quiet_libraries()
    results = open_results(results)
    ours, teacher = (
        loading.load_model(folder, trust_remote_code=False, device=torch.device("cpu")) for folder in (checkpoint, model)
    )
    if set(teacher.kernels.values()) != {"bf16"}:
        raise ModelError(
            f"{model}: is quantized ({teacher.kernels['linear']}); --model is the BF16 folder that {checkpoint} was made from"
        )
    shapes = [{name: tuple(p.shape) for name, p in loaded.model.named_parameters()} for loaded in (ours, teacher)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"{checkpoint} and {model} have weights of different names or shapes; give the BF16 model that it was made from"
        )
    asked = choose_kernels(ours.kernels["linear"], kernels, checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint)
    if tokenizer.get_vocab() != loading.load_tokenizer(model).get_vocab():
        raise ModelError(f"{checkpoint} and {model} have different vocabularies; give the BF16 model that it was made from")
    eos_ids = loading.eos_ids(checkpoint, tokenizer)
    processor = load_processor(checkpoint) if takes_images(checkpoint) else None
    with tempfile.TemporaryDirectory() as folder:
        if processor is None:
            text = builtin_sequences(tokenizer, seq_len=seq_len or SEQ_LEN, seed=0, eos_ids=eos_ids)["diagnostics"][
                :max_sequences
            ]
        else:
            seq_len = seq_len or SEQ_LEN + longest_question(processor, Path(folder))
            text = about_pictures(processor, Path(folder), seq_len=seq_len, eos_ids=eos_ids, count=max_sequences)
        with reporter.track("vLLM: load the checkpoint (about half a minute)"):
            engine = VllmEngine(checkpoint, tokenizer, eos_ids=eos_ids, kernels=asked, args={"max_num_seqs": 8})
        try:
            with reporter.track("modules on equal inputs"):
                modules = compare_modules(ours.model, engine, text, is_native=asked == "native", processor=processor)
            agreement = compare_divergence(ours.model, teacher.model, engine, text, reporter, processor=processor)
        finally:
            engine.close()
    record = {
        "schema": SCHEMA,
        "checkpoint": checkpoint.name,
        "fingerprint": folder_fingerprint(checkpoint, Store(cache_folder())),
        "kernels": {"vllm": engine.kernels, "ours": ours.kernels},
        "notes": loading.notes_of(ours),
        "vllm": engine.protocol["vllm"],
        "native_fp4": "measured" if asked == "native" else "not measured",
        "modules": modules,
        "kl": agreement,
        "verdict": verdict(modules, agreement),
        "provenance": provenance(),
    }
    path = results / "parity" / f"{record['fingerprint'][:16]}-{asked}.json"
    with disk_errors(f"the record {path}"):
        make_folder(path.parent, "the parity records")
        write_json(path, record)
    return record, path


def choose_kernels(ours: str, asked: str | None, checkpoint: Path) -> str:
    """The kernels to hold ours against; an arithmetic other than the checkpoint's own cannot agree and is refused."""
    if ours not in ("w4a4_emulation", "w4a16"):
        raise ModelError(f"{checkpoint}: its linear layers are {ours}; parity compares NVFP4 checkpoints")
    allowed = ("native", "w4a4_emulation") if ours == "w4a4_emulation" else ("w4a16",)
    if asked is None:
        offered = available_kernels()["kernels"]
        asked = next((name for name in KERNELS if name in allowed and offered[name]), allowed[-1])
    if asked not in allowed:
        raise EngineError(f"--kernels {asked}: {checkpoint} is {ours}, which only {', '.join(allowed)} can agree with")
    return asked


def verdict(modules: dict[str, dict[str, Any]], agreement: dict[str, Any]) -> str:
    """FAIL if a module or the mean KL disagrees; INCONCLUSIVE if the interval is too wide to tell; else PASS."""
    if not all(module["holds"] for module in modules.values()) or not agreement["is_within"]:
        return "FAIL"
    return "PASS" if agreement["is_narrow"] and agreement["n_tokens"] >= MIN_RESPONSE_TOKENS else "INCONCLUSIVE"


@torch.no_grad()
def compare_modules(
    model: Any, engine: Any, text: list[Sequence], *, is_native: bool, processor: Processor | None = None
) -> dict[str, dict[str, Any]]:
    """Each fused group of `model` on inputs recorded from real text: vLLM's module and ours against the float64 product.

    processor: of an image-text model; its modules are listed as vLLM names them.
    """
    groups = fused_groups(model)
    if processor is not None:
        groups = named_as_served(model, engine, groups)
    served = engine.worker.ask({"do": "modules"})["modules"]
    if set(served) != set(groups):
        raise EngineError(
            f"vLLM quantizes other modules than we do; vLLM alone: {sorted(set(served) - set(groups))[:3]}, ours alone: "
            f"{sorted(set(groups) - set(served))[:3]}"
        )
    inputs = record_inputs(model, groups, text, processor)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / f"{name}.safetensors") for name in ("inputs", "outputs")}
        save_file(inputs, paths["inputs"])
        engine.worker.ask({"do": "module_outputs", **paths})
        outputs = load_file(paths["outputs"])
    return {
        name: compare_module(members, inputs[name], outputs[name], is_native=is_native) | {"kernel": served[name]["kernel"]}
        for name, members in groups.items()
    }


@torch.no_grad()
def compare_module(members: list[QuantizedLinear], x: Tensor, served: Tensor, *, is_native: bool) -> dict[str, Any]:
    """Errors of a fused group's served and own output against the float64 product of the decoded operands.

    Args:
        x: (tokens, K) bfloat16, the group's input before quantization.  served: (tokens, N) bfloat16, members side by side.
    Raises:
        EngineError: an output of vLLM is NaN or infinite.
    """
    if not bool(torch.isfinite(served).all()):
        bad = int((~torch.isfinite(served)).sum())
        raise EngineError(
            f"vLLM's output of the layer that holds {members[0].input_quantizer.group.name if members[0].input_quantizer else 'these weights'}: "
            f"{bad} of {served.numel()} values are NaN or infinite on finite inputs"
        )
    ours = torch.cat([member(x) for member in members], dim=-1)
    quantizer = members[0].input_quantizer
    operand = (x if quantizer is None else fake_quantize(x, quantizer.tensor_scale)).double()
    weight = torch.cat([member.weight for member in members]).double()
    bias = torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias for m in members]).double()
    exact = operand @ weight.T + bias
    accumulated = operand.abs() @ weight.abs().T + bias.abs()
    scales = [float(member.tensor_scale) for member in members]
    scales += [] if quantizer is None else [float(quantizer.tensor_scale)]
    is_exact = not is_native or all(math.frexp(scale)[0] == 0.5 for scale in scales)
    slack = 2 * x.shape[-1] * 2.0**-24 + (0.0 if is_exact else 2.0**-8)
    allowed = ulp(exact.abs() + slack * accumulated) / 2 + slack * accumulated
    errors = {"vllm": served.double() - exact, "ours": ours.double() - exact}
    rms = {name: float(error.square().mean().sqrt()) for name, error in errors.items()}
    worst = {name: float((error.abs() / allowed).max()) for name, error in errors.items()}
    holds = worst["vllm"] <= 1 and (not is_exact or rms["vllm"] <= 2 * rms["ours"])
    return {
        "holds": holds,
        "worst_of_allowed": worst,
        "rms_error": rms,
        "rms_output": float(exact.square().mean().sqrt()),
        "share_equal": float((served == ours).double().mean()),
    }


def fused_groups(model: Any) -> dict[str, list[QuantizedLinear]]:
    """The NVFP4 linear layers by the name of the layer that serving engines fuse them into, in its order."""
    quantized = quantized_linears(model)
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    formats: dict[str, Format] = {name: "fp8" if isinstance(m, Fp8Linear) else "nvfp4" for name, m in quantized.items()}
    groups = (group for group in groups_of(formats, linears) if group.format == "nvfp4")
    return {group.name: [quantized[name] for name in group.members] for group in groups}


def named_as_served(model: Any, engine: Any, groups: dict[str, list[QuantizedLinear]]) -> dict[str, list[QuantizedLinear]]:
    """The groups by their names in vLLM, which follow from those in files: transformers renames much of an image-text model."""
    own = {id(module): name for name, module in quantized_linears(model).items()}
    first = {name: own[id(members[0])] for name, members in groups.items()}
    stored = stored_layers(model)
    in_files = [f"{stored[first[name]].rpartition('.')[0]}.{name.rpartition('.')[2]}" for name in groups]
    served = engine.worker.ask({"do": "served_names", "names": in_files})["names"]
    return dict(zip(served, groups.values(), strict=True))


def about_pictures(processor: Processor, folder: Path, *, seq_len: int, eos_ids: set[int], count: int) -> list[Sequence]:
    """Held-out chats about drawn pictures, at most `count`, whose images are kept in `folder`."""
    section = Drawings(source="drawings", pictures=2 * count * 100 // SPLITS["diagnostics"], seq_len=seq_len)
    with TokenWriter(folder) as writer:
        write_drawings("parity", section, writer, processor=processor, eos_ids=eos_ids, length_key="--seq-len")
    return list(StoredSequences(folder, "diagnostics", count))


def record_inputs(
    model: Any, groups: dict[str, list[QuantizedLinear]], text: list[Sequence], processor: Processor | None = None
) -> dict[str, Tensor]:
    """The input (tokens, K) of each group before quantization, in a forward pass over the first tokens of `text`."""
    seen: dict[str, list[Tensor]] = {name: [] for name in groups}
    handles = [
        members[0].register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0].detach()))
        for name, members in groups.items()
    ]
    try:
        for sequence in text:
            for _ in divergence.final_hidden(model, [batch_of([sequence], processor)]):
                pass
            if sum(len(x[0]) for x in next(iter(seen.values()))) >= MODULE_TOKENS:
                break
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat([x[0] for x in found])[:MODULE_TOKENS].contiguous() for name, found in seen.items()}


def ulp(x: Tensor) -> Tensor:
    """The distance of neighbouring BF16 numbers at |x|, float64; that of the smallest normal number below it."""
    exponent = torch.frexp(x.abs().clamp(min=2.0**-126)).exponent
    return torch.ldexp(torch.ones_like(x), exponent - 8)
