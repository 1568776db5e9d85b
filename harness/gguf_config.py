"""The configuration that the metadata of a GGUF file give: sizes alone, for planning before the file is converted. Standard library only.

Layout as in ggml's docs/gguf.md, versions 2 and 3, little-endian: a header, keys with values, then names and shapes of tensors, whose bytes are not
read. `gguf.GGUFReader` reads the same, and takes seconds for the tokens that are skipped here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import ModelError

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Keys behind the name of the architecture, and what a config.json calls them."""
_KNOWN = ("llama", "qwen2", "qwen3")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 24
"""Bytes of a text beyond which a file is taken to be damaged."""
_TOKENS = "tokenizer.ggml.tokens"


class _Length(int):
    """Of an array, in the place of its values."""


def gguf_configuration(path: Path) -> dict[str, Any]:
    """Fields of a config.json for the model in the GGUF file at `path`, as far as its sizes depend on them.

    Raises:
        ModelError: no GGUF file, one that ends too early, or a model of an architecture that is not planned from such a file, as are
            experts and layers that differ.
    """
    try:
        with path.open("rb") as file:
            fields, tensors = _read(file)
    except (OSError, OverflowError, struct.error, ValueError, KeyError) as error:
        raise ModelError(f"{path}: cannot be read as GGUF ({error!r}); install or copy it again, or give --config") from None
    architecture = fields.get("general.architecture")
    if architecture not in _KNOWN:
        raise ModelError(
            f"{path}: general.architecture: found {architecture!r}; planned from metadata are {', '.join(_KNOWN)}: run harness prepare on "
            "the suite, which converts it, or give a config.json by --config"
        )
    experts = fields.get(f"{architecture}.expert_count")
    if experts:
        raise ModelError(
            f"{path}: {architecture}.expert_count: found {experts}; of experts no sizes are read; give a config.json by --config"
        )
    found = {name: fields[key] for suffix, name in _SIZES.items() if (key := f"{architecture}.{suffix}") in fields}
    for key in (f"{architecture}.{suffix}" for suffix in _SIZES):
        if isinstance(fields.get(key), _Length):
            raise ModelError(
                f"{path}: {key}: found a list of {fields[key]}; allowed is one number for all layers; give a config.json by --config"
            )
    tokens = fields.get(_TOKENS)
    found.setdefault("vocab_size", None if tokens is None else int(tokens))
    config = {"model_type": architecture, **found, "tie_word_embeddings": "output.weight" not in tensors}
    config["attention_bias"] = architecture == "llama" and "blk.0.attn_q.bias" in tensors
    return config


def _read(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Keys with their values, of arrays their length alone; and the names of all tensors."""
    magic, version, n_tensors, n_fields = _unpack(file, "4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise KeyError(f"begins with {magic!r}, version {version}; allowed is b'GGUF', 2 or 3")
    fields = {}
    for _ in range(n_fields):
        key = _string(file)
        fields[key] = _value(file, _unpack(file, "I")[0])
    tensors = set()
    for _ in range(n_tensors):
        tensors.add(_string(file))
        (n_dimensions,) = _unpack(file, "I")
        _unpack(file, f"{n_dimensions}QIQ")
    return fields, tensors


def _value(file: BinaryIO, kind: int) -> Any:
    """A value; of an array its `_Length`."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _NUMBERS[kind])[0]
    inner, length = _unpack(file, "IQ")
    if inner == _STRING:
        for _ in range(length):
            file.seek(_unpack(file, "Q")[0], 1)
    elif inner == _ARRAY:
        for _ in range(length):
            _value(file, inner)
    else:
        file.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    return _Length(length)


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    if length > _LONGEST:
        raise KeyError(f"a text of {length:,} bytes")
    return str(_unpack(file, f"{length}s")[0], "utf-8")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    """Little-endian without gaps; struct.error at the end of the file."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
