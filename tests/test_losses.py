"""Losses and their gradients against the definitions in float64."""

import pytest
import torch

from qad import losses
from qad.losses import Objective, chunked_loss, token_divergence

OBJECTIVES = [
    Objective("kl"),
    Objective("kl", temperature=2.5),
    Objective("ce"),
    Objective("mse"),
    Objective("kl_ce", ce_weight=0.3),
    Objective("kl_ce", temperature=0.5, ce_weight=0.75),
]
N_TOKENS = 1000.0


def tensors(n_tokens=45, *, dtype=torch.float32, vocabulary=50, width=16, teacher_width=24):
    """Hidden states, heads and labels, exact in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocabulary, (n_tokens,), generator=generator)
    heads = normal(vocabulary, width) * 0.5, normal(vocabulary, teacher_width) * 0.5
    return normal(n_tokens, width), heads[0], labels, normal(n_tokens, teacher_width), heads[1]


def defined(objective, hidden, head, labels, teacher_hidden, teacher_head):
    """(objective, kl, ce), each a token, as the module's docstring writes them; logits in one piece, the rest in at least FP32."""
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    if student.dtype is torch.bfloat16:
        student, teacher = student.float(), teacher.float()

    def kl_at(temperature):
        log_p, log_q = (torch.log_softmax(z / temperature, dim=1) for z in (student, teacher))
        return (log_q.exp() * (log_q - log_p)).sum(dim=1)

    ce = -torch.log_softmax(student, dim=1)[torch.arange(len(labels)), labels]
    kl = objective.temperature**2 * kl_at(objective.temperature)
    values = {
        "kl": kl,
        "ce": ce,
        "mse": ((student - teacher) ** 2).mean(dim=1),
        "kl_ce": (1 - objective.ce_weight) * kl + objective.ce_weight * ce,
    }
    return values[objective.loss], kl_at(1.0), ce


def plain(objective, hidden, head, *others):
    """Loss, gradients and per-token KL and CE by autograd in the type of the tensors."""
    hidden, head = (x.clone().requires_grad_(True) for x in (hidden, head))
    values, kl, ce = defined(objective, hidden, head, *others)
    loss = values.sum() / N_TOKENS
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, kl.detach(), ce.detach()


def ours(objective, hidden, head, labels, teacher_hidden, teacher_head, *, n_tokens=N_TOKENS, chunk_tokens=16):
    hidden, head = (x.clone().requires_grad_(True) for x in (hidden, head))
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
    loss, sums = chunked_loss(objective, hidden, head, labels, **teacher, n_tokens=n_tokens, chunk_tokens=chunk_tokens)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, sums


def in_float64(values):
    return [x.double() if x.is_floating_point() else x for x in values]


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_tokens", [1, 16, 45, 64])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_loss_sums_and_gradients_equal_the_definition_in_float64(objective, chunk_tokens):
    given = tensors()
    loss, hidden_gradient, head_gradient, sums = ours(objective, *given, chunk_tokens=chunk_tokens)
    expected, expected_hidden, expected_head, kl, ce = plain(objective, *in_float64(given))
    assert loss.dtype is torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(hidden_gradient.double(), expected_hidden, rtol=1e-4, atol=1e-9)
    assert torch.allclose(head_gradient.double(), expected_head, rtol=1e-4, atol=1e-8)
    assert float(sums.objective) == pytest.approx(float(expected) * N_TOKENS, rel=1e-6)
    assert float(sums.kl) == pytest.approx(float(kl.sum()), rel=1e-6)
    assert float(sums.ce) == pytest.approx(float(ce.sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_error_of_a_gradient_is_at_most_twice_that_of_plain_torch(objective, dtype):
    given = tensors(300, dtype=dtype, vocabulary=1000, width=64)
    reference = plain(objective, *in_float64(given))
    torchs, found = plain(objective, *given), ours(objective, *given, chunk_tokens=32)
    for of in (1, 2):
        assert found[of].dtype is dtype
        assert relative_error(found[of], reference[of]) <= 2 * relative_error(torchs[of], reference[of])


def test_the_squared_temperature_keeps_the_size_of_the_gradient():
    """At high temperatures T^2 KL tends to half the variance over the vocabulary of the difference of the logits."""
    given = in_float64(tensors())
    difference = given[0] @ given[1].T - given[3] @ given[4].T
    limit = float(difference.var(dim=1, correction=0).sum() / 2 / N_TOKENS)
    loss, hidden_gradient, _, _ = ours(Objective("kl", temperature=100.0), *tensors())
    assert float(loss) == pytest.approx(limit, rel=0.05)
    _, warm_gradient, _, _ = ours(Objective("kl", temperature=50.0), *tensors())
    assert float(hidden_gradient.norm() / warm_gradient.norm()) == pytest.approx(1, abs=0.05)


def test_token_divergence_equals_the_definitions_and_is_zero_against_itself():
    given = tensors(200)
    hidden, head, labels, teacher_hidden, teacher_head = given
    _, kl, ce = defined(Objective("kl"), *in_float64(given))
    found = token_divergence(hidden, head, teacher_hidden, teacher_head, labels)
    assert torch.allclose(found.kl.double(), kl, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.ce.double(), ce, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.top1.bool(), (hidden @ head.T).argmax(1) == (teacher_hidden @ teacher_head.T).argmax(1))
    assert 0 < float(found.top1.sum()) < len(labels)
    itself = token_divergence(hidden, head, hidden, head, labels)
    assert float(itself.kl.abs().max()) == 0.0
    assert float(itself.top1.min()) == 1.0


def test_a_common_offset_of_all_logits_costs_the_divergence_no_digits():
    hidden, head, labels, teacher_hidden, teacher_head = tensors(teacher_width=16)
    hidden, teacher_hidden = (torch.cat([x, torch.ones(len(x), 1)], dim=1) for x in (hidden, teacher_hidden))
    head, teacher_head = (torch.cat([x, torch.full((len(x), 1), 4096.0)], dim=1) for x in (head, teacher_head))
    found = token_divergence(hidden, head, teacher_hidden, teacher_head, labels)
    log_p, log_q = (torch.log_softmax((h @ w.T).double(), dim=1) for h, w in ((hidden, head), (teacher_hidden, teacher_head)))
    assert torch.allclose(found.kl.double(), (log_q.exp() * (log_q - log_p)).sum(1), rtol=1e-6, atol=2e-6)
    assert torch.allclose(found.ce.double(), -log_p[torch.arange(len(labels)), labels], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sums_of_a_loss_are_those_of_the_diagnostics_bit_for_bit(objective, dtype):
    hidden, head, labels, teacher_hidden, teacher_head = tensors(losses.CHUNK_TOKENS + 37, dtype=dtype)
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
    _, sums = chunked_loss(objective, hidden.requires_grad_(True), head, labels, **teacher, n_tokens=1)
    found = token_divergence(hidden, head, teacher_hidden, teacher_head, labels)
    assert torch.equal(sums.kl, found.kl.double().sum())
    assert torch.equal(sums.ce, found.ce.double().sum())
    assert not any(x.requires_grad for x in (sums.objective, sums.kl, sums.ce))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_micro_batches_with_a_common_number_of_tokens_add_up_to_the_whole(objective):
    hidden, head, labels, teacher_hidden, teacher_head = tensors()
    whole = ours(objective, hidden, head, labels, teacher_hidden, teacher_head)
    parts = [slice(0, 7), slice(7, 7), slice(7, 45)]
    found = [ours(objective, hidden[p], head, labels[p], teacher_hidden[p], teacher_head) for p in parts]
    assert float(sum(f[0] for f in found)) == pytest.approx(float(whole[0]), rel=1e-6)
    assert torch.allclose(torch.cat([f[1] for f in found]), whole[1], rtol=1e-5, atol=1e-9)
    assert torch.allclose(sum(f[2] for f in found), whole[2], rtol=1e-5, atol=1e-8)
    for name in ("objective", "kl", "ce"):
        assert float(sum(getattr(f[3], name) for f in found)) == pytest.approx(float(getattr(whole[3], name)), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_no_tokens_give_a_loss_and_gradients_of_zero(objective):
    hidden, head, _, teacher_hidden, teacher_head = tensors()
    hidden, head = hidden.requires_grad_(True), head.requires_grad_(True)
    chosen = torch.zeros(len(hidden), dtype=torch.bool)
    teacher = {"teacher_hidden": teacher_hidden[chosen], "teacher_head": teacher_head}
    labels = torch.empty(0, dtype=torch.int64)
    loss, sums = chunked_loss(objective, hidden[chosen], head, labels, **teacher, n_tokens=100)
    loss.backward()
    assert float(loss.detach()) == float(sums.objective) == float(sums.kl) == float(sums.ce) == 0.0
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.grad is not None and not head.grad.any()


def test_the_gradient_of_the_loss_is_passed_on_and_backward_can_run_twice():
    given = tensors()
    once = ours(Objective("kl"), *given)
    hidden, head, labels, teacher_hidden, teacher_head = given
    hidden = hidden.requires_grad_(True)
    loss, _ = chunked_loss(
        Objective("kl"), hidden, head, labels, teacher_hidden=teacher_hidden, teacher_head=teacher_head, n_tokens=N_TOKENS
    )
    (3 * loss).backward(retain_graph=True)
    assert torch.allclose(hidden.grad, 3 * once[1], rtol=1e-6, atol=0)
    loss.backward()
    assert torch.allclose(hidden.grad, 4 * once[1], rtol=1e-6, atol=0)


def test_a_frozen_head_gets_no_gradient_and_without_gradients_the_loss_has_none():
    hidden, head, labels, *_ = tensors()
    loss, sums = chunked_loss(Objective("ce"), hidden.requires_grad_(True), head, labels, n_tokens=10)
    loss.backward()
    assert head.grad is None and hidden.grad is not None
    assert sums.kl is None
    with torch.no_grad():
        assert not chunked_loss(Objective("ce"), hidden, head, labels, n_tokens=10)[0].requires_grad
    frozen, _ = chunked_loss(Objective("ce"), hidden.detach(), head.requires_grad_(True), labels, n_tokens=10)
    frozen.backward()
    assert head.grad is not None


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def test_a_tied_embedding_gets_its_part_as_head_and_its_part_as_embedding():
    model, ids = tiny_llama(), torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    def gradient_with(head):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        chunked_loss(Objective("ce"), hidden, head, ids[:, 1:].flatten(), n_tokens=22, chunk_tokens=5)[0].backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    found = gradient_with(embedding)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name
    as_embedding = gradient_with(embedding.detach())["model.embed_tokens.weight"]
    assert as_embedding[:32].any() and not as_embedding[32:].any()
    assert found["model.embed_tokens.weight"][32:].any()


def test_nan_is_left_to_the_caller_who_finds_it_in_the_loss():
    hidden, head, labels, *_ = tensors()
    hidden[3, 0] = float("nan")
    loss, sums = chunked_loss(Objective("ce"), hidden, head, labels, n_tokens=10)
    assert loss.isnan() and sums.ce.isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "jsd"}, "loss: 'jsd' is not known; allowed: kl, ce, mse, kl_ce"),
        ({"loss": "kl", "temperature": 0.0}, "temperature: 0.0 is not a positive number"),
        ({"loss": "kl", "temperature": float("nan")}, "temperature: nan is not a positive number"),
        ({"loss": "ce", "temperature": 2.0}, 'temperature: 2.0 with loss "ce", which has none; use "kl" or "kl_ce"'),
        ({"loss": "mse", "temperature": 2.0}, 'temperature: 2.0 with loss "mse"'),
        ({"loss": "kl_ce"}, 'ce_weight: 0.0 with loss "kl_ce"; give a number between 0 and 1, or use "kl" or "ce"'),
        ({"loss": "kl_ce", "ce_weight": 1.0}, "ce_weight: 1.0"),
        ({"loss": "kl", "ce_weight": 0.5}, 'ce_weight: 0.5 with loss "kl", which has none; use "kl_ce"'),
    ],
)
def test_an_objective_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_every_loss_but_cross_entropy_needs_a_teacher():
    hidden, head, labels, teacher_hidden, _ = tensors()
    assert [objective.needs_teacher for objective in OBJECTIVES] == [True, True, False, True, True, True]
    with pytest.raises(ValueError, match='loss "mse": no teacher_hidden'):
        chunked_loss(Objective("mse"), hidden, head, labels, n_tokens=1)
    with pytest.raises(ValueError, match="one of the two is missing; give both or neither"):
        chunked_loss(Objective("kl"), hidden, head, labels, teacher_hidden=teacher_hidden, n_tokens=1)


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, labels, teacher_hidden, teacher_head = tensors()
    kl, teacher = Objective("kl"), {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
    with pytest.raises(ValueError, match=r"student: hidden states of shape \(45, 16\) .* and 44 labels"):
        chunked_loss(kl, hidden, head, labels[1:], **teacher, n_tokens=1)
    with pytest.raises(ValueError, match=r"teacher: hidden states of shape \(45, 24\) with a head of shape \(50, 16\)"):
        chunked_loss(kl, hidden, head, labels, teacher_hidden=teacher_hidden, teacher_head=head, n_tokens=1)
    with pytest.raises(ValueError, match="the teacher's vocabulary has 49 tokens, the student's 50"):
        token_divergence(hidden, head, teacher_hidden, teacher_head[1:], labels)
    with pytest.raises(ValueError, match="n_tokens: 0; give the number of tokens of the optimizer step"):
        chunked_loss(kl, hidden, head, labels, **teacher, n_tokens=0)


def test_a_head_that_is_a_shard_is_refused():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, head, labels, *_ = tensors()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(head, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="student: hidden states or head are a DTensor; call the loss inside the forward"):
            chunked_loss(Objective("ce"), hidden, sharded, labels, n_tokens=1)
    finally:
        distributed.destroy_process_group()
