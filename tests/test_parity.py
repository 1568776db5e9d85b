"""Parity without vLLM: the criteria, the verdicts, the record; an engine of ours stands in for vLLM's."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file, save_file

from harness import cli, loading, parity
from harness.drawn import longest_question
from harness.errors import DataError, EngineError, ModelError
from harness.images import Image
from harness.parity import SEQ_LEN, about_pictures, choose_kernels, ulp, verdict
from harness.parity_divergence import reordered, summarize
from harness.processor import load_processor
from qad import divergence
from qad.checkpoint import load_checkpoint, write_checkpoint
from qad.divergence import SequenceDivergence
from qad.quantize import quantize_model
from qad.recipe import Recipe, match
from tests.tiny_vlm import IMAGE_TOKENS


class StandIn:
    """Answers as vLLM's process does, with a model of ours; `distort` changes what its modules and forwards give."""

    def __init__(self, folder, tokenizer, *, distort=lambda x: x, **ignored):
        self.model, self.distort, self.worker, self.folder = load_checkpoint(folder).model, distort, self, folder
        self.kernels, self.protocol = {"linear": "w4a4_emulation", "kv_cache": "bf16"}, {"vllm": "stand-in"}

    @torch.no_grad()
    def ask(self, message):
        groups = parity.fused_groups(self.model)
        if message["do"] == "modules":
            return {"modules": {name: {"kernel": "OurKernel"} for name in groups}}
        if message["do"] == "module_outputs":
            inputs = load_file(message["inputs"])
            outputs = {n: torch.cat([m(inputs[n]) for m in members], dim=-1) for n, members in groups.items()}
            save_file({name: self.distort(y).contiguous() for name, y in outputs.items()}, message["outputs"])
            return {}
        if message["do"] == "served_names":
            return {"names": message["names"]}
        found = {}
        for index, ids in enumerate(message["sequences"]):
            inputs = {"input_ids": torch.tensor([ids]), "use_cache": False}
            if "media" in message:
                inputs |= self.pixels(message["media"][str(index)], ids)
            hidden = self.model.base_model(**inputs).last_hidden_state[0]
            found[str(index)] = self.distort(hidden).contiguous()
        save_file(found, message["path"])
        return {}

    def pixels(self, media, ids):
        processor = load_processor(self.folder)
        images = [Image(Path(path).name, Path(path)) for path in media["images"]]
        assert processor.unexpanded(ids, images) == tuple(media["unexpanded_ids"])
        return processor.model_inputs([images], torch.tensor([ids]))

    def close(self):
        pass


def quantized(folder, original):
    model = load_checkpoint(original).model
    targets = match(model, Recipe())
    quantize_model(model, Recipe(), {group.name: 8.0 for group in targets.groups})
    write_checkpoint(folder, model, targets=targets, companions=original, record={})
    return folder


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    return quantized(tmp_path_factory.mktemp("packed"), tiny_model)


def run(monkeypatch, packed, model, results, *options, distort=lambda x: x) -> int:
    def engine(folder, tokenizer, **options):
        return StandIn(folder, tokenizer, distort=distort)

    monkeypatch.setattr(parity, "VllmEngine", engine)
    arguments = ["parity", packed, "--model", model, "--results", results, "--kernels", "w4a4_emulation", *options]
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_an_engine_with_our_numbers_passes_and_its_record_is_stored(monkeypatch, packed, tiny_model, tmp_path, capsys):
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results") == 0
    (path,) = (tmp_path / "results" / "parity").iterdir()
    record = json.loads(path.read_text())
    assert (record["schema"], record["verdict"], record["native_fp4"]) == (1, "PASS", "not measured")
    assert record["kl"]["difference"] == 0 == record["kl"]["kl"]["between"]["kl"]
    assert record["kl"]["n_tokens"] >= 2000
    assert record["kl"]["kl"]["floor"]["kl"] > 0
    assert all(module["holds"] and module["share_equal"] == 1 for module in record["modules"].values())
    printed = capsys.readouterr().out
    assert "native FP4: not measured" in printed and "note  " not in printed and record["notes"] == []
    floor = [record["kl"][key] for key in ("floor_difference", "floor_stderr")]
    assert f"  ours, reordered     {floor[0]:+.5f} ± {floor[1]:.5f}  (our own model" in printed and floor[0] != 0
    assert "verdict               PASS" in printed
    assert path.name.endswith("-w4a4_emulation.json")


def test_input_scales_that_were_merged_on_reading_are_said_and_recorded(monkeypatch, packed, tiny_model, tmp_path, capsys):
    read = loading.load_model

    def merging(folder, **options):
        return replace(read(folder, **options), merged_inputs=("a.experts.up_proj",) if folder == packed else ())

    monkeypatch.setattr(loading, "load_model", merging)
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results", "--max-sequences", 2) == 3
    note = "a.experts.up_proj: several input scales for the experts of a layer; computed is with the largest"
    assert f"note                  {note}" in capsys.readouterr().out
    (path,) = (tmp_path / "results" / "parity").iterdir()
    assert [each[: len(note)] for each in json.loads(path.read_text())["notes"]] == [note]


def test_the_length_of_chats_about_pictures_follows_from_the_tokens_of_a_picture(tiny_vlm, tmp_path):
    processor = load_processor(tiny_vlm)
    n = longest_question(processor, tmp_path)
    asked = {"eos_ids": {2}, "count": 2}
    (tmp_path / "fits").mkdir(), (tmp_path / "short").mkdir()
    assert n > IMAGE_TOKENS and about_pictures(processor, tmp_path / "fits", seq_len=n + SEQ_LEN, **asked)
    with pytest.raises(DataError, match=r"^--seq-len: no picture fits 32 tokens with a question .* raise it"):
        about_pictures(processor, tmp_path / "short", seq_len=32, **asked)


def test_an_image_text_model_is_compared_on_chats_about_pictures(monkeypatch, tiny_vlm, tmp_path, capsys):
    packed = quantized(tmp_path / "packed", tiny_vlm)
    assert run(monkeypatch, packed, tiny_vlm, tmp_path / "results", "--max-sequences", 4) == 3  # too little text
    (path,) = (tmp_path / "results" / "parity").iterdir()
    record = json.loads(path.read_text())
    assert record["kl"]["difference"] == 0 == record["kl"]["kl"]["between"]["kl"] and record["kl"]["n_sequences"] == 4
    assert len(record["modules"]) == 8 and all(module["holds"] for module in record["modules"].values())
    assert "verdict               INCONCLUSIVE" in capsys.readouterr().out


def test_an_engine_that_is_our_model_in_another_order_differs_by_what_is_printed_beside(
    monkeypatch, packed, tiny_model, tmp_path
):
    class Reordered(StandIn):
        def ask(self, message):
            with reordered(self.model):
                return super().ask(message)

    monkeypatch.setattr(sys.modules[__name__], "StandIn", Reordered)
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results", "--max-sequences", 3) in (1, 3)
    (path,) = (tmp_path / "results" / "parity").iterdir()
    kl = json.loads(path.read_text())["kl"]
    assert kl["difference"] == kl["floor_difference"] != 0 and kl["stderr"] == kl["floor_stderr"]
    assert kl["kl"]["between"] == kl["kl"]["floor"]


def test_too_little_text_is_inconclusive(monkeypatch, packed, tiny_model, tmp_path):
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results", "--max-sequences", 3) == 3


def test_an_engine_with_other_numbers_fails(monkeypatch, packed, tiny_model, tmp_path, capsys):
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results", distort=lambda x: x * 1.02) == 1
    assert "verdict               FAIL" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_quantized_is_an_error(monkeypatch, packed, tiny_model, tmp_path, capsys):
    assert run(monkeypatch, tiny_model, tiny_model, tmp_path / "results") == 2
    assert "its linear layers are bf16; parity compares NVFP4 checkpoints" in capsys.readouterr().err


def test_a_model_that_is_quantized_itself_or_of_another_shape_is_no_teacher(
    monkeypatch, packed, tmp_path, tmp_path_factory, capsys
):
    assert run(monkeypatch, packed, packed, tmp_path / "results") == 2
    assert "--model is the BF16 folder that" in capsys.readouterr().err
    wider = build_tiny_model(tmp_path_factory.mktemp("wider"), hidden=96)
    assert run(monkeypatch, packed, wider, tmp_path / "results") == 2
    assert "have weights of different names or shapes" in capsys.readouterr().err


def test_outputs_that_are_no_numbers_are_an_error_that_names_the_layer(monkeypatch, packed, tiny_model, tmp_path, capsys):
    assert run(monkeypatch, packed, tiny_model, tmp_path / "results", distort=lambda x: x * float("nan")) == 2
    assert "vLLM's output of the layer that holds model.layers.0.self_attn.qkv_proj: " in capsys.readouterr().err
    assert not list((tmp_path / "results").glob("parity/*"))


def test_modules_that_vllm_does_not_quantize_are_named(monkeypatch, packed, tiny_model):
    model = load_checkpoint(packed).model
    engine = StandIn(packed, None)
    real = engine.ask
    lacking = {"model.layers.0.mlp.down_proj"}
    monkeypatch.setattr(
        engine,
        "ask",
        lambda message: {"modules": {k: v for k, v in real(message)["modules"].items() if k not in lacking}},
    )
    with pytest.raises(EngineError, match=r"ours alone: \['model\.layers\.0\.mlp\.down_proj'\]"):
        parity.compare_modules(model, engine, [], is_native=False)


@pytest.mark.parametrize(
    ("ours", "asked", "offered", "expected"),
    [
        ("w4a4_emulation", None, {"native": None, "w4a4_emulation": "K", "w4a16": "K"}, "w4a4_emulation"),
        ("w4a4_emulation", None, {"native": "K", "w4a4_emulation": "K", "w4a16": "K"}, "native"),
        ("w4a16", None, {"native": "K", "w4a4_emulation": "K", "w4a16": "K"}, "w4a16"),
        ("w4a4_emulation", "native", {}, "native"),
    ],
)
def test_native_kernels_are_held_against_ours_where_there_are_any(monkeypatch, tmp_path, ours, asked, offered, expected):
    monkeypatch.setattr(parity, "available_kernels", lambda: {"kernels": offered})
    assert choose_kernels(ours, asked, tmp_path) == expected


@pytest.mark.parametrize(("ours", "asked"), [("w4a4_emulation", "w4a16"), ("w4a16", "native"), ("w4a4_emulation", "fp8")])
def test_kernels_of_another_arithmetic_are_refused(tmp_path, ours, asked):
    with pytest.raises(EngineError, match=f"--kernels {asked}: .* is {ours}, which only"):
        choose_kernels(ours, asked, tmp_path)


def test_a_bf16_checkpoint_has_nothing_to_compare(tmp_path):
    with pytest.raises(ModelError, match="linear layers are bf16"):
        choose_kernels("bf16", None, tmp_path)


def agreement(**changes):
    return {"is_within": True, "is_narrow": True, "n_tokens": 2000} | changes


@pytest.mark.parametrize(
    ("holds", "found", "expected"),
    [
        (True, agreement(), "PASS"),
        (False, agreement(), "FAIL"),
        (True, agreement(is_within=False), "FAIL"),
        (True, agreement(is_narrow=False), "INCONCLUSIVE"),
        (True, agreement(n_tokens=1999), "INCONCLUSIVE"),
        (False, agreement(is_narrow=False), "FAIL"),
    ],
)
def test_the_verdict_follows_from_modules_difference_and_width(holds, found, expected):
    assert verdict({"a": {"holds": True}, "b": {"holds": holds}}, found) == expected


def rows(values):
    return [SequenceDivergence(torch.full((n,), kl), torch.zeros(n), torch.zeros(n)) for kl, n in values]


def test_the_difference_is_paired_over_sequences():
    ours = rows([(0.5, 10), (1.5, 10), (1.0, 10), (1.0, 10)])
    shifted = rows([(0.6, 10), (1.6, 10), (1.1, 10), (1.1, 10)])
    found = summarize({"ours": ours, "vllm": shifted, "between": ours, "floor": ours, "reordered": ours})
    assert found["difference"] == pytest.approx(0.1)
    assert found["stderr"] == pytest.approx(0, abs=1e-7)  # although KL itself varies by a factor of three
    assert not found["is_within"]
    assert found["is_narrow"]
    noisy = rows([(0.3, 10), (1.9, 10), (0.8, 10), (1.2, 10)])
    found = summarize({"ours": ours, "vllm": noisy, "between": ours, "floor": ours, "reordered": ours})
    assert found["is_within"]
    assert not found["is_narrow"]


def test_what_our_own_model_differs_in_another_order_stands_beside_and_excuses_nothing():
    ours = rows([(0.5, 10), (1.5, 10), (1.0, 10), (1.0, 10)])
    shifted, noisier = rows([(0.6, 10), (1.6, 10), (1.1, 10), (1.1, 10)]), rows([(0.7, 10), (1.6, 10), (1.2, 10), (1.1, 10)])
    found = summarize({"ours": ours, "vllm": shifted, "between": ours, "floor": ours, "reordered": noisier})
    assert (found["floor_difference"], found["difference"]) == (pytest.approx(0.15), pytest.approx(0.1))
    assert found["floor_stderr"] == pytest.approx(0.05 / 3**0.5)  # of 0.2, 0.1, 0.2, 0.1
    assert not found["is_within"]  # although our own model differs by more


def test_ulp_is_the_distance_to_the_next_bf16_number():
    x = torch.tensor([1.0, 1.5, 1.9921875, 2.0, 3.0, 1e-3, 448.0, 2.0**-126]).bfloat16()
    following = (x.view(torch.int16) + 1).view(torch.bfloat16)
    assert torch.equal(ulp(x.double()), following.double() - x.double())


def test_another_order_changes_hidden_states_and_is_undone(packed):
    model = load_checkpoint(packed).model
    batch = [parity.batch_of([parity.Sequence(tuple(range(40, 80)), (True,) * 40)])]
    (before,) = divergence.final_hidden(model, batch)
    with reordered(model):
        (within,) = divergence.final_hidden(model, batch)
    (after,) = divergence.final_hidden(model, batch)
    assert not torch.equal(before, within)
    assert torch.equal(before, after)
