"""How much memory each kind of stage takes: what is there, moment by moment, in bytes on one device. No torch.

A need is the worst of a few *moments*. What is counted follows `qad.distill`, `qad.masters`, `qad.layers`, `qad.losses` and
`harness.stages`; a change there is a change here. On a CPU the figures are held against measured memory (bench/plan_memory.py); those
of GPUs, of several ranks and of Mamba are not verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness import activations
from harness.architecture import Architecture, Attention, Layer
from harness.hardware import BF16, CODE_BYTES, FP8_BYTES, FP32, FP64, FRAGMENTATION, NCCL_BYTES

CHUNK_TOKENS = 128
"""Tokens that have logits at a time in the loss (`qad.losses.CHUNK_TOKENS`; a test holds both together)."""
FORWARD_TOKENS = 2048
"""Tokens of a forward pass without gradient (`harness.batches.FORWARD_TOKENS`; a test holds both together)."""


@dataclass(frozen=True)
class Moment:
    """What a device holds at one moment, in bytes, by what it is."""

    name: str
    items: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def largest(self) -> list[tuple[str, float]]:
        """The items, the largest first."""
        return sorted(((what, n) for what, n in self.items.items() if n), key=lambda item: -item[1])


def worst(moments: list[Moment]) -> Moment:
    """The moment with most memory."""
    return max(moments, key=lambda moment: moment.total)


def with_slack(moment: Moment, *, ranks: int = 1) -> Moment:
    """The same on a GPU: with what torch's allocator and NCCL hold beside tensors."""
    extra = {"allocator": FRAGMENTATION * moment.total} | ({"NCCL": float(NCCL_BYTES)} if ranks > 1 else {})
    return Moment(moment.name, moment.items | extra)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training as memory sees it.

    teacher: None where the loss needs none. quantized: names of the weights with codes; fp8: those of them that are FP8. rows, tokens: of one forward pass, on one rank;
    n_batches: forward passes of a rank in a step. n_loss_tokens: of a forward pass; all of them at most.
    """

    student: Architecture
    teacher: Architecture | None
    quantized: frozenset[str]
    rows: int
    tokens: int
    n_loss_tokens: int | None = None
    n_batches: int = 1
    ranks: int = 1
    train: str = "quantized"
    learned_scales: bool = False
    optimizer: str = "adamw"
    loss: str = "kl"
    activation_checkpointing: bool = False
    is_packed: bool = False
    is_cpu: bool = False
    n_steps: int = 2
    fp8: frozenset[str] = frozenset()
    sizes: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes["quantized"] = sum(w.size for w in self.student.weights if w.name in self.quantized)
        self.sizes["fp8"] = sum(w.size for w in self.student.weights if w.name in self.fp8)
        self.sizes["largest"] = max((w.size for w in self.student.weights if w.name in self.quantized), default=0)
        self.sizes["layer"] = max((layer.size for layer in self.student.layers), default=0)

    @property
    def n_masters(self) -> float:
        """Numbers that the optimizer owns, over all ranks."""
        scales = (self.sizes["quantized"] - self.sizes["fp8"]) / 16 if self.learned_scales or self.train == "scales" else 0
        if self.train == "scales":
            return scales
        return scales + (self.student.size if self.train == "all" else self.sizes["quantized"])

    @property
    def code_bytes(self) -> float:
        """Of the codes and block scales of all quantized weights."""
        return CODE_BYTES * (self.sizes["quantized"] - self.sizes["fp8"]) + FP8_BYTES * self.sizes["fp8"]

    @property
    def n_gradients(self) -> float:
        """Numbers of gradients of live weights; those of scales are made of them."""
        return self.student.size if self.train == "all" else self.sizes["quantized"]

    def moments(self) -> list[Moment]:
        """What one rank holds in an optimizer step."""
        there = self._there()
        found = [*self._set_up(), *(Moment(m.name, there | m.items) for m in self._pass())]
        found.append(Moment("optimizer step", there | self._gradients(1.0) | self._update()))
        return found

    def _there(self) -> dict[str, float]:
        """What stays from step to step."""
        n, student = self.ranks, self.student
        states = 2 if self.optimizer == "adamw" and self.n_steps > 1 else 0
        there = {
            "student": student.size * (FP32 if n > 1 else BF16) / n,
            "teacher": self.teacher.size * BF16 / n if self.teacher is not None else 0.0,
            "codes, now and at the start": 2 * self.code_bytes / n,
            "FP32 masters": FP32 * self.n_masters / n,
            "optimizer state": states * FP32 * self.n_masters / n,
        }
        if n > 1:
            outside = student.outside_size + (self.teacher.outside_size if self.teacher is not None else 0)
            there["embeddings and heads, gathered"] = BF16 * outside
            there["layers, gathered"] = 3 * BF16 * self.sizes["layer"]
        return there

    def _set_up(self) -> list[Moment]:
        """Before step 0 on one rank: the weights before quantization are there until their masters are made."""
        if self.ranks > 1:
            return []
        quantized = self.sizes["quantized"]
        items: dict[str, float] = {
            "student": BF16 * self.student.size,
            "teacher": BF16 * self.teacher.size if self.teacher is not None else 0.0,
            "codes": self.code_bytes,
        }
        if not self.is_cpu:  # where codes and weights before quantization stay on the host until they are needed
            return []
        return [Moment("quantization", items | {"weights before quantization": BF16 * quantized})]

    def _gradients(self, share: float) -> dict[str, float]:
        return {"FP32 gradients": share * FP32 * self.n_gradients / self.ranks}

    def _update(self) -> dict[str, float]:
        """What the optimizer makes for a moment: on a GPU of all parameters at once, else of one after the other."""
        if self.optimizer == "adamw" and not self.is_cpu:
            return {"optimizer, for a moment": FP32 * self.n_masters / self.ranks}
        return {"optimizer, for a moment": 2.0 * FP32 * self.sizes["largest"]}

    def _pass(self) -> list[Moment]:
        """Forward and backward passes of a step: the last one meets the gradients of those before it."""
        tokens = self.rows * self.tokens
        lost = tokens if self.n_loss_tokens is None else self.n_loss_tokens
        h = self.student.width
        mask = {"mask": float(activations.mask_bytes(self.rows, self.tokens)) if self.is_packed else 0.0}
        layers = [self._kept(layer) * tokens for layer in self.student.layers]
        final = (FP32 + BF16) * h * tokens  # the last norm, and what comes of it
        everything = self._between(tokens) + (0.0 if self.activation_checkpointing else sum(layers)) + final
        before = self._gradients(1.0 if self.n_batches > 1 else 0.0)
        states = BF16 * lost * (h + (self.teacher.width if self.teacher is not None else 0))
        found = []
        if self.teacher is not None and self.loss != "ce":
            passing = tokens * (activations.in_forward(self.teacher) + (BF16 * self.tokens if self.is_packed else 0))
            found.append(Moment("teacher's forward pass", before | mask | {"activations": everything + passing + states}))
        chunk = activations.chunk_bytes(self.student, loss=self.loss, tokens=lost, chunk=CHUNK_TOKENS)
        head = {"gradient of the head": 2.0 * FP32 * self.student.vocabulary * h if self.train == "all" else 0.0}
        given = BF16 * h * lost  # the gradient of the hidden states
        found.append(Moment("loss", before | mask | head | {"activations": everything + states + given, "logits": chunk}))
        return found + self._backward(layers, before | mask | head, tokens)

    def _backward(self, layers: list[float], before: dict[str, float], tokens: int) -> list[Moment]:
        """Layer by layer from the last: what is still kept, what is alive for a moment, the gradients so far."""
        found = []
        remaining, kept_of_all = (
            0.0 if self.activation_checkpointing else sum(layers),
            sum(layer.size for layer in self.student.layers),
        )
        done = 0
        between = self._between(tokens)
        for index in range(len(layers) - 1, -1, -1):
            layer = self.student.layers[index]
            done += layer.size
            alive = remaining + between  # what the last norm and the loss kept is gone by now
            alive += layers[index] if self.activation_checkpointing else 0.0
            alive += activations.in_backward(self.student, layer) * tokens
            items = before | {"activations": alive}
            if self.n_batches == 1:
                items |= self._gradients(done / kept_of_all)
            if self.ranks > 1:
                items["gradients of a layer, reduced"] = (BF16 + FP32) * layer.size
            found.append(Moment(f"backward pass, layer {index}", items))
            remaining -= 0.0 if self.activation_checkpointing else layers[index]
            between -= BF16 * self.student.width * tokens if self.activation_checkpointing else 0.0
        return found

    def _kept(self, layer: Layer) -> float:
        return activations.kept(
            self.student,
            layer,
            packed=self.tokens if self.is_packed else 0,
            trains_norms=self.train == "all",
        )

    def _between(self, tokens: int) -> float:
        """With checkpointing, the input of every layer."""
        return BF16 * self.student.width * tokens * len(self.student.layers) if self.activation_checkpointing else 0.0


def of_training_host(training: Training, processes: int) -> float:
    """Host memory of a node with `processes` ranks before they shard: student, its weights before quantization, codes, teacher."""
    teacher = 0 if training.teacher is None else BF16 * training.teacher.size
    return processes * (BF16 * (training.student.size + training.sizes["quantized"]) + training.code_bytes + teacher)


def of_quantization_host(model: Architecture, quantized: frozenset[str], fp8: frozenset[str]) -> float:
    """Host memory of a model while it is quantized: its weights, those of them that are quantized once more, and their codes."""
    sizes = {w.name: w.size for w in model.weights if w.name in quantized}
    eights = sum(size for name, size in sizes.items() if name in fp8)
    total = sum(sizes.values())
    return BF16 * (model.size + total) + CODE_BYTES * (total - eights) + FP8_BYTES * eights


def of_loading(model: Architecture) -> Moment:
    """A BF16 checkpoint is read: its files are mapped, not copied, and each weight in turn is searched for NaN in FP32."""
    largest = max((weight.size for weight in model.weights), default=0)
    return Moment("loading", {"model": float(BF16 * model.size), "the largest weight, examined": (FP32 + 1.0) * largest})


def of_calibration(model: Architecture, *, tokens: int) -> Moment:
    """The BF16 model reads batches."""
    return Moment("forward pass", {"BF16 model": BF16 * model.size, "activations": tokens * activations.in_forward(model)})


def of_export(model: Architecture, *, tokens: int) -> Moment:
    """A quantized checkpoint is loaded back, and its logits are computed as those of the model that it was made of: one of them at a time."""
    logits = BF16 * tokens * model.vocabulary
    items = {"model": float(BF16 * model.size), "logits": float(logits), "activations": tokens * activations.in_forward(model)}
    return Moment("comparison of logits", items)


def of_diagnostics(model: Architecture, *, tokens: int, is_candidate: bool, states_bytes: float = 0.0) -> Moment:
    """Both models read batches; the teacher's last hidden states are kept where they are few."""
    items: dict[str, float] = {"BF16 model": BF16 * model.size}
    items |= {"candidate": BF16 * model.size} if is_candidate else {}
    chunk = activations.chunk_bytes(model, loss="kl", tokens=tokens, chunk=CHUNK_TOKENS)
    items |= {"logits": chunk, "hidden states of the teacher": states_bytes}
    return Moment("forward pass", items | {"activations": tokens * activations.in_forward(model)})


@dataclass(frozen=True, kw_only=True)
class Answering:
    """A batch of the engine in process: `rows` prompts of `prompt` tokens at most, and `new` tokens after each. is_sampled: not greedy."""

    model: Architecture
    rows: int
    prompt: int
    new: int
    is_sampled: bool = False

    def moments(self) -> list[Moment]:
        a_token, a_sequence = activations.cache_bytes(self.model)
        at_prompt = self.rows * (self.prompt * a_token + a_sequence)
        at_end = self.rows * ((self.prompt + self.new) * a_token + a_sequence)
        n_layers = max(1, len(self.model.parts(Attention)))
        scores = self.rows * self.model.vocabulary * (BF16 + 2 * FP32 + (3 * FP64 if self.is_sampled else 0))
        passing = self.rows * self.prompt * activations.in_forward(self.model, is_cached=True)
        mask = float(
            (1 + BF16) * activations.mask_bytes(self.rows, self.prompt)
        )  # of prompts of several lengths, and as numbers
        model = {"model": float(BF16 * self.model.size)}
        return [
            Moment("prompts", model | {"KV cache": at_prompt, "activations": passing, "mask": mask, "scores": scores}),
            # a layer's keys, and then its values, are copied to make room for a token more
            Moment(
                "last token", model | {"KV cache": at_end, "a layer's cache, copied": at_end / n_layers / 2, "scores": scores}
            ),
        ]
