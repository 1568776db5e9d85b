"""The recipe of the wind tunnel's models: tokenizer, stages, reinforcement learning, merging; in miniature."""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.tasks import tunnel
from harness.tasks.tunnel import corpus
from recipes.windtunnel import build, make, merge, rl, sample, sft
from recipes.windtunnel.batches import IGNORED, Encoder, padded, parts, response_logits
from recipes.windtunnel.batches import weights as weights_of_tokens
from recipes.windtunnel.build import SHAPES, Shape, build_model, build_tokenizer
from recipes.windtunnel.make import Plan
from recipes.windtunnel.rl import Answers, RewardCollapseError
from recipes.windtunnel.stage import Rate, Stage, digest

KEPT = Path(__file__).parent.parent / "suites" / "windtunnel" / "models"
MINI = Shape(32, 1, 1, 1, 32)
PLAN = Plan(
    base=sft.Settings(Rate(1e-2, 6, 2), size="mini", sequences=6, style=None, validate_every=5, checkpoint_every=2),
    sft=sft.Settings(Rate(1e-2, 2, 1), size="mini", sequences=6),
    rl=rl.Settings(Rate(1e-3, 4, 1), prompts=2, group=3, max_new=6, validate_every=3, checkpoint_every=1),
    lookup=sft.Settings(Rate(1e-3, 2, 1), size="mini", sequences=4, domains=("knowledge",), seed=1),
)


@pytest.fixture(autouse=True)
def in_miniature(monkeypatch):
    monkeypatch.setitem(build.SHAPES, "mini", MINI)
    monkeypatch.setattr(sft, "LOG_EVERY", 2)
    for module in (sft, rl, merge):
        monkeypatch.setattr(module, "task_scores", lambda model, tokenizer: {})
    for module in (sft, rl):
        monkeypatch.setattr(module, "scores", lambda *given, **options: {})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, MINI, 0)


@pytest.fixture
def rewarded(monkeypatch):
    """Every answer is worth something by chance of its tokens, so that groups differ."""
    monkeypatch.setattr(rl, "is_right", lambda tokenizer, response, answer: sum(response) % 2 == 0)


def weights(out, stage):
    return (out / stage / "model.safetensors").read_bytes()


def test_every_size_is_a_multiple_of_64_and_five_small_models_fit_into_twelve_megabytes(tokenizer, tmp_path):
    for name in ("small", "large"):
        shape = SHAPES[name]
        heads = 32 * shape.num_attention_heads, 32 * shape.num_key_value_heads
        assert heads[0] == shape.hidden_size
        assert all(size % 64 == 0 for size in (shape.hidden_size, shape.intermediate_size, *heads))
    build.save(tmp_path, build_model(tokenizer, SHAPES["small"], 0), tokenizer)
    assert 5 * (tmp_path / "model.safetensors").stat().st_size < 12e6


def test_every_text_of_the_wind_tunnel_comes_back_from_its_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for solved in islice(corpus(0), 300):
        for text in (solved.problem.question, solved.solution, f"{build.USER}{solved.problem.question}{build.ASSISTANT}"):
            assert loaded.decode(loaded.encode(text)) == text and loaded.encode(text) == tokenizer.encode(text)
    assert tokenizer.tokenize("Mia has 42.") == ["Mia", " has", " ", "4", "2", "."]
    assert (loaded.bos_token, loaded.eos_token, loaded.padding_side) == (build.BOS, build.EOS, "left")


@pytest.mark.parametrize("text", ["Hello", "What is 7 +8 €", "mia", "a\tb"])
def test_text_of_other_words_has_no_tokens(tokenizer, text):
    with pytest.raises(Exception, match="Missing"):
        tokenizer.encode(text)


def test_training_sees_the_tokens_of_the_chat_template(tokenizer):
    encoder = Encoder(tokenizer)
    for solved in islice(corpus(0), 20):
        asked = {"role": "user", "content": solved.problem.question}
        told = {"role": "assistant", "content": solved.solution}
        example = encoder.example(solved.problem.question, solved.solution)
        whole = tokenizer.apply_chat_template([asked, told], tokenize=False)
        assert list(example.prompt + example.response) == tokenizer.encode(whole, add_special_tokens=False)
        opened = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        assert list(example.prompt) == tokenizer.encode(opened, add_special_tokens=False)
    with pytest.raises(Exception, match="role system: the small reasoner knows user and assistant alone"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_parts_hold_every_example_once_and_labels_the_response_alone(tokenizer):
    encoder = Encoder(tokenizer)
    examples = [encoder.example(each.problem.question, each.solution) for each in islice(corpus(0), 40)]
    found = list(parts(examples))
    assert sorted(id(example) for part in found for example in part) == sorted(map(id, examples)) and len(found) > 1
    for part in found:
        ids, labels = padded(part, encoder.pad_id)
        assert ids.shape[1] <= 1.35 * min(map(len, part)) + 8
        for row, example in enumerate(part):
            kept = labels[row] != IGNORED
            assert tuple(labels[row][kept].tolist()) == example.response and torch.equal(ids[row][kept], labels[row][kept])


def test_a_question_weighs_less_than_its_solution_and_padding_nothing(tokenizer, model):
    encoder = Encoder(tokenizer)
    part = [encoder.example(each.problem.question, each.solution) for each in islice(corpus(0), 3)]
    logits, tokens = response_logits(model, *padded(part, encoder.pad_id, whole=True))
    assert tokens.tolist() == [token for each in part for token in (each.prompt + each.response)[1:]]
    weighed = weights_of_tokens(part, 0.2)
    assert len(weighed) == len(logits) == sum(len(each) - 1 for each in part)
    of_first = [pytest.approx(0.2)] * (len(part[0].prompt) - 1) + [1.0] * len(part[0].response)
    assert weighed[: len(of_first)].tolist() == of_first


def test_questions_are_learnt_after_the_drills_and_recitals_alone(tmp_path, monkeypatch):
    for module in (tunnel, sft):
        monkeypatch.setattr(module, "DRILLS", 12)
        monkeypatch.setattr(module, "RECITALS", 6)

    def made(name, steps, weight):
        settings = replace(PLAN.base, rate=Rate(1e-2, steps, 2), question_weight=weight)
        make.make(tmp_path / name, replace(PLAN, base=settings), ["base"])
        return weights(tmp_path / name, "base")

    assert made("drills", 3, 0.0) == made("drills_too", 3, 0.2)
    assert made("lessons", 4, 0.0) != made("lessons_too", 4, 0.2)


def test_the_likeliest_answers_of_a_batch_are_those_of_each_prompt_alone(tokenizer, model):
    encoder = Encoder(tokenizer)
    prompts = [encoder.prompt(each.problem.question) for each in islice(corpus(0), 7)]
    together = sample.sample(model, prompts, max_new=9, temperature=0, seed=0, eos_id=tokenizer.eos_token_id)
    for prompt, response in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 9 and (len(ids) == len(prompt) or ids[-1] != tokenizer.eos_token_id):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids[len(prompt) :]) == response


def test_sampling_goes_on_with_the_rows_that_have_not_ended(tokenizer, model):
    prompts = [Encoder(tokenizer).prompt("What is 7 +8, left to right?")] * 64
    often = sample.sample(model, prompts, max_new=40, temperature=3.0, seed=0, eos_id=7)
    assert often == sample.sample(model, prompts, max_new=40, temperature=3.0, seed=0, eos_id=7)
    lengths = [len(response) for response in often]
    assert min(lengths) < 40 and max(lengths) == 40
    assert all(response.index(7) == len(response) - 1 for response in often if 7 in response)


def test_an_answer_is_right_if_it_ended_with_the_answer_in_its_last_box(tokenizer):
    def judged(text):
        return sample.is_right(tokenizer, tokenizer.encode(text), "15")

    assert judged("7+8=15\n\\boxed{15}<|end|>") and judged("\\boxed{1}\n\\boxed{15}<|end|>")
    assert not judged("\\boxed{15}") and not judged("\\boxed{5}<|end|>") and not judged("15<|end|>")


def test_the_same_seed_gives_the_same_weights_of_all_stages_and_another_gives_others(tmp_path, rewarded):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    make.make(first, PLAN, list(make.STAGES))
    make.make(again, PLAN, list(make.STAGES))
    make.make(other, replace(PLAN, base=replace(PLAN.base, seed=5)), list(make.STAGES))
    for stage in make.STAGES:
        assert weights(first, stage) == weights(again, stage) != weights(other, stage)
        last = json.loads((first / stage / "log.jsonl").read_text().splitlines()[-1])
        assert last["sha256"] == digest(first / stage / "model.safetensors") and not (first / stage / "checkpoint.pt").exists()
    assert len({weights(first, stage) for stage in make.STAGES}) == 5


@pytest.mark.parametrize("stage", ["base", "rl"])
def test_a_stage_that_was_stopped_goes_on_with_the_same_numbers(tmp_path, rewarded, monkeypatch, stage):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make.make(whole, PLAN, ["base", "sft", "rl"] if stage == "rl" else ["base"])
    if stage == "rl":
        make.make(stopped, PLAN, ["base", "sft"])
    update = Stage.update
    monkeypatch.setattr(Stage, "update", stopping(update, at=3))
    with pytest.raises(KeyboardInterrupt):
        make.make(stopped, PLAN, [stage])
    monkeypatch.setattr(Stage, "update", update)
    assert (stopped / stage / "checkpoint.pt").exists()
    make.make(stopped, PLAN, [stage])
    assert weights(whole, stage) == weights(stopped, stage)
    assert steps(whole / stage) == steps(stopped / stage)


def stopping(update, at):
    def stop(stage, lr):
        if stage.step == at:
            raise KeyboardInterrupt
        return update(stage, lr)

    return stop


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_stages_that_are_done_are_left_alone(tmp_path, rewarded, capsys):
    make.make(tmp_path, PLAN, ["base", "sft", "rl"])
    capsys.readouterr()
    make.make(tmp_path, PLAN, ["base", "sft", "rl"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("stage", "parent"), [("sft", "base"), ("rl", "sft"), ("lookup", "sft"), ("merged", "rl")])
def test_a_stage_whose_parent_was_not_made_is_refused(tmp_path, stage, parent):
    with pytest.raises(
        SystemExit,
        match=rf"^{stage}: begins from the stage {parent}, which .*{parent} does not hold .*: the same command with --stage {parent}, or",
    ):
        make.make(tmp_path, PLAN, [stage])
    assert not (tmp_path / stage).exists()


def test_a_parent_that_is_not_done_or_was_changed_is_refused(tmp_path):
    make.make(tmp_path, PLAN, ["base", "sft"])
    file = tmp_path / "sft" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match=r"^rl: .*model.safetensors has the digest .*, its log says .*: it was changed"):
        make.make(tmp_path, PLAN, ["rl"])
    file.write_bytes(content)
    log = tmp_path / "sft" / "log.jsonl"
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines()[:-1]))
    with pytest.raises(SystemExit, match="^rl: begins from the stage sft, which .* does not hold"):
        make.make(tmp_path, PLAN, ["rl"])


def test_a_folder_with_other_settings_is_refused(tmp_path):
    make.make(tmp_path, PLAN, ["base", "sft"])
    (tmp_path / "sft" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"recipe\.json: this folder holds a stage with other settings"):
        make.make(tmp_path, replace(PLAN, sft=replace(PLAN.sft, seed=9)), ["sft"])


def test_the_merged_model_is_the_mean_of_both(tmp_path, rewarded):
    make.make(tmp_path, PLAN, list(make.STAGES))
    one, other, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / stage, dtype=torch.float32).state_dict()
        for stage in ("rl", "lookup", "merged")
    )
    for name, tensor in merged.items():
        assert torch.equal(tensor, ((one[name] + other[name]) / 2).to(torch.bfloat16).float())


@pytest.mark.parametrize("stage", make.STAGES)
def test_the_models_that_are_kept_are_those_of_the_settings_and_of_their_logs(stage):
    folder = KEPT / stage
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["settings"] == json.loads(json.dumps(asdict(getattr(make.plan("small", 0), stage))))
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["sha256"] == digest(folder / "model.safetensors") and last["bytes"] * 5 < 12e6
    parents = {"sft": "base", "rl": "sft", "lookup": "sft"}
    if stage in parents:
        assert recipe["begins_from_sha256"] == digest(KEPT / parents[stage] / "model.safetensors")
    kept, made = AutoTokenizer.from_pretrained(folder), build_tokenizer()
    assert kept.get_vocab() == made.get_vocab() and kept.chat_template == made.chat_template
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: digest(folder / name) for name in sums} and {"model.safetensors", "tokenizer.json"} < set(sums)


def test_advantages_are_worths_less_their_mean_in_units_of_their_spread():
    assert Answers((), (1.0, 0.0, 0.0, 1.0)).advantages == [1.0, -1.0, -1.0, 1.0]
    assert Answers((), (1.0, 0.0, 0.0, 0.0)).advantages == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    assert Answers((), (1.0, 1.0)).advantages == Answers((), (0.0, 0.0)).advantages == [0.0, 0.0]


def test_what_is_rewarded_becomes_more_frequent(tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "is_right", lambda tokenizer, response, answer: response[0] % 2 == 0)
    make.make(tmp_path, PLAN, ["base", "sft"])
    make.make(tmp_path, replace(PLAN, rl=rl.Settings(Rate(1e-2, 12, 1), prompts=8, group=8, max_new=1)), ["rl"])
    records = [json.loads(line) for line in (tmp_path / "rl" / "log.jsonl").read_text().splitlines()]
    rewards = [record["reward"] for record in records if "reward" in record]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert records[-1]["kl"]["nats_per_token"] > 0 and records[-1]["kl"]["answers"] == 200


def test_a_reward_that_collapses_ends_the_run_without_a_model(tmp_path, monkeypatch):
    judged = iter(range(10**9))
    monkeypatch.setattr(rl, "is_right", lambda tokenizer, response, answer: (n := next(judged)) < 24 and n % 2 == 0)
    make.make(tmp_path, PLAN, ["base", "sft"])
    settings = replace(PLAN.rl, rate=Rate(1e-3, 20, 1), window=2, collapsed=0.6)
    message = (
        r"rl: the reward collapsed at step 5: its mean over the last 2 steps is 0\.250, it was 0\.500 over the 2 until step 2\. "
        r"No model is written\. Lower the learning rate \(now 0\.001\) or take more answers a problem \(now 3\), remove .*rl and"
    )
    with pytest.raises(RewardCollapseError, match=message):
        make.make(tmp_path, replace(PLAN, rl=settings), ["rl"])
    assert not (tmp_path / "rl" / "model.safetensors").exists()
    with pytest.raises(RewardCollapseError, match=message):
        make.make(tmp_path, replace(PLAN, rl=settings), ["rl"])  # nor does it go on as if nothing had been


def test_a_reward_that_never_came_is_a_collapse_and_one_that_wavers_is_none(tmp_path):
    settings = rl.Settings(Rate(1e-3, 20, 1), window=3)
    with pytest.raises(RewardCollapseError, match=r"step 3: .* is 0\.000, it never was more"):
        rl.require_reward([0.0, 0.0, 0.0], settings, tmp_path)
    for rewards in ([0.0, 0.0], [0.5, 0.6, 0.4, 0.3, 0.3], [0.0, 0.0, 0.1]):
        rl.require_reward(rewards, settings, tmp_path)
