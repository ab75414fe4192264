"""The facts in a model's GGUF header: size, blocks, bytes of each block, and the memory its context needs.

Only headers are read (`header.py`), never the weights, so a model of hundreds of gigabytes takes as long as a
small one. What llama.cpp does with a tensor follows from its name (LLM_TENSOR_INFOS in llama-arch.cpp): `blk.N.`
belongs to block N, a few belong to the input layer, which stays on the coordinator's CPU, the rest to the output
layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import ModelFileError
from sollol_nb.gguf.header import GgufFile, Keys, TensorInfo, check_file, read_header

KV_ELEMENT_BYTES = 2  # K and V are f16 unless llama-server is started with another type
CONTEXT_STEP_TOKENS = 256  # llama.cpp rounds the context up to this
CACHED_ABOVE_BYTES = 10 * 2**20
"""Workers can cache tensors above this size (HASH_THRESHOLD in ggml-rpc.cpp); smaller ones are always sent."""
MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS of llama.cpp
_BLOCK_DIGITS = len(str(MAX_BLOCKS))
_LONGEST_NAME = 64  # GGML_MAX_NAME

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_BLOCK_TENSOR = re.compile(r"(?:enc\.|dec\.)?blk\.([0-9]+)\.")
_EXPERTS_TENSOR = re.compile(r"\.ffn_\w+_exps\.")  # all experts of a block; those used for each token are `_shexp`
_RECURRENT_BUT_EVERY = dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), 4)
"""Of these architectures only every so many blocks have attention (src/models/qwen3next.cpp)."""
_RECURRENT = ("mamba", "rwkv", "arwkv")
_INPUT_TENSORS = ("token_embd.", "token_types.", "position_embd.", "per_layer_token_embd.")
_FIRST_BLOCK_TENSORS = ("token_embd_norm.", "rope_freqs.", "rope_factors_long.", "rope_factors_short.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The header of a GGUF model, reduced to what routing and planning need.

    Attributes:
        path: the file, or the first part of a split model.
        architecture: `general.architecture`, such as "llama".
        parameter_count: sum over the shapes of all tensors.
        file_bytes: size of all parts on disk.
        layer_count: blocks (`<architecture>.block_count`; the output layer is not one of them).
        layer_bytes: weight bytes of each block. Rope tables, a few hundred bytes, count with the first block
            although every device gets a copy.
        output_bytes: weight bytes of the output layer. With tied embeddings this includes the token embedding,
            of which llama.cpp puts a second copy on the device of the output layer.
        context_length: tokens the model was trained for; 0 if not stated.
        embedding_length: width of the residual stream; 0 if not stated.
        feed_forward_width: values per token in the widest feed-forward layer, with mixture-of-experts models
            in all experts used for a token; 0 if not stated.
        vocabulary_size: tokens in the vocabulary (rows of the token embedding); 0 without one.
        layer_kv_bytes_per_token: K and V of each block at f16, bytes per token of context. An upper bound for
            blocks with a sliding window, for multi-head latent attention (newer llama.cpp keeps no V there)
            and for some hybrid models; the state of recurrent blocks, which does not grow with the context, is
            not counted.
        chat_template: in Jinja; "" without one.
        quantization: how most weights are stored, such as "Q4_K_M"; "" if not stated.
        head_widths: values in K and in V of one attention head, (0, 0) without attention.
        layer_read_bytes: weight bytes of each block that are read for one token: of the experts of a mixture only
            those used, in the mean; () if all are read.
        block_weights, output_weights: how many weights all blocks have, and the output layer; 0 if unknown.
        shared_by: query heads that share one head of K and V, in the mean.
        keeps_whole_context: whether all blocks keep K and V of the whole context: not with a sliding window, nor
            with recurrent blocks. llama.cpp cannot go on in the middle of what a slot of others holds.
        cacheable_bytes: of the weights of each unit (the blocks, then the output layer), those that workers can
            keep in their cache; () if none can be.
        cacheable_sizes: the sizes of these tensors in bytes.
    """

    path: Path
    architecture: str
    parameter_count: int
    file_bytes: int
    layer_count: int
    layer_bytes: tuple[int, ...]
    output_bytes: int
    context_length: int
    embedding_length: int
    feed_forward_width: int
    vocabulary_size: int
    layer_kv_bytes_per_token: tuple[int, ...]
    chat_template: str = ""
    quantization: str = ""
    head_widths: tuple[int, int] = (0, 0)
    layer_read_bytes: tuple[int, ...] = ()
    block_weights: int = 0
    output_weights: int = 0
    shared_by: float = 1.0
    keeps_whole_context: bool = True
    cacheable_bytes: tuple[int, ...] = ()
    cacheable_sizes: frozenset[int] = frozenset()

    @property
    def read_bytes(self) -> tuple[int, ...]:
        """Weight bytes that one token reads of each unit: the blocks, then the output layer."""
        return (*(self.layer_read_bytes or self.layer_bytes), self.output_bytes)

    def kv_bytes(self, context_tokens: int) -> tuple[int, ...]:
        """Bytes of the KV cache of each block for a context of `context_tokens` (all slots together)."""
        tokens = kept_context_tokens(context_tokens)
        return tuple(per_token * tokens for per_token in self.layer_kv_bytes_per_token)


def kept_context_tokens(context_tokens: int) -> int:
    """The context that llama.cpp allocates: the requested one, rounded up to `CONTEXT_STEP_TOKENS`."""
    return -(-context_tokens // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS


def read_facts(path: Path | str) -> ModelFacts:
    """Read the header of a GGUF model.

    Args:
        path: the file; for a split model (`name-00001-of-00003.gguf`) any of its parts. The result is cached
            until a part's size or modification time changes.

    Raises:
        ModelFileError: no such file, a folder, not readable, not GGUF, an unsupported version, truncated, damaged,
            a missing part, or not a model with blocks.
    """
    try:
        paths = _part_paths(Path(path).expanduser().absolute())
    except RuntimeError as error:  # "~someone" without a home
        raise ModelFileError(f"cannot read {path}: {error}; check the path") from None
    advice = "check the path" if len(paths) == 1 else f"the model has {len(paths)} parts; download all of them"
    return _facts_of(tuple(check_file(part, advice=advice) for part in paths))


def first_part(path: Path) -> Path:
    """The first part of the split model that a file belongs to, which llama.cpp loads; any other file itself.

    Raises:
        ModelFileError: its name is that of no part, such as 5 of 3.
    """
    return _part_paths(path)[0]


def _part_paths(path: Path) -> list[Path]:
    """The files of the model, in order."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 0 < int(match["number"]) <= count:
        raise ModelFileError(f"{path} cannot be one of {count} parts; correct its name")
    ending = path.name[match.end("number") :]
    return [path.with_name(f"{match['stem']}-{number:05d}{ending}") for number in range(1, count + 1)]


@functools.lru_cache(maxsize=64)
def _facts_of(parts: tuple[GgufFile, ...]) -> ModelFacts:
    headers = [read_header(part) for part in parts]
    stated_parts = _integer(headers[0].keys, "split.count") or 1
    if stated_parts != len(parts):
        raise ModelFileError(
            f"{parts[0].path} is one of {stated_parts} parts by its header, but one of {len(parts)} by its name; "
            "restore the names of the parts (name-00001-of-00003.gguf, ...)"
        )
    return _summarise(parts, headers[0].keys, [tensor for header in headers for tensor in header.tensors])


def _summarise(parts: Sequence[GgufFile], keys: Keys, tensors: Sequence[TensorInfo]) -> ModelFacts:
    path = parts[0].path
    architecture = _text(keys, "general.architecture")
    if architecture is None:
        raise ModelFileError(f"{path} does not state an architecture; it is not a model that llama.cpp can load")
    layer_count = _integer(keys, f"{architecture}.block_count") or 0
    if not 0 < layer_count <= MAX_BLOCKS:
        raise ModelFileError(
            f"{path} ({_shown(architecture)}) states {layer_count} blocks; a model has 1 to {MAX_BLOCKS}: "
            "name the model's own file, not an adapter or a vision projector"
        )
    layer_bytes, unread_bytes = [0] * layer_count, [0.0] * layer_count
    output_bytes = block_weights = output_weights = 0
    cacheable: list[tuple[int, int]] = []  # unit and bytes of each tensor that workers cache
    unused_share = _unused_experts(keys, architecture, layer_count)
    for tensor in tensors:
        block = _BLOCK_TENSOR.match(tensor.name)
        if block is not None:
            if len(block[1]) > _BLOCK_DIGITS or int(block[1]) >= layer_count:
                raise ModelFileError(
                    f"{path} holds {_shown(tensor.name)}, but states {layer_count} blocks; convert the model again"
                )
            layer_bytes[int(block[1])] += tensor.byte_count
            cacheable.append((int(block[1]), tensor.byte_count))
            block_weights += tensor.element_count
            if _EXPERTS_TENSOR.search(tensor.name):
                unread_bytes[int(block[1])] += tensor.byte_count * unused_share[int(block[1])]
        elif tensor.name.startswith(_FIRST_BLOCK_TENSORS):
            layer_bytes[0] += tensor.byte_count
        elif not tensor.name.startswith(_INPUT_TENSORS):
            output_bytes += tensor.byte_count
            output_weights += tensor.element_count
            cacheable.append((layer_count, tensor.byte_count))
    by_name = {tensor.name: tensor for tensor in tensors}
    token_embedding = by_name.get("token_embd.weight")
    if token_embedding is not None and "output.weight" not in by_name:
        output_bytes += token_embedding.byte_count
        output_weights += token_embedding.element_count
        cacheable.append((layer_count, token_embedding.byte_count))
    cacheable = [(unit, size) for unit, size in cacheable if size > CACHED_ABOVE_BYTES]
    cacheable_bytes = [0] * (layer_count + 1)
    for unit, size in cacheable:
        cacheable_bytes[unit] += size
    return ModelFacts(
        path=path,
        architecture=architecture,
        parameter_count=sum(tensor.element_count for tensor in tensors),
        file_bytes=sum(part.file_bytes for part in parts),
        layer_count=layer_count,
        layer_bytes=tuple(layer_bytes),
        output_bytes=output_bytes,
        context_length=_integer(keys, f"{architecture}.context_length") or 0,
        embedding_length=_integer(keys, f"{architecture}.embedding_length") or 0,
        feed_forward_width=_feed_forward_width(keys, architecture, layer_count),
        vocabulary_size=token_embedding.shape[-1] if token_embedding is not None else 0,
        layer_kv_bytes_per_token=_kv_bytes_per_token(keys, architecture, layer_count),
        chat_template=_text(keys, "tokenizer.chat_template") or "",
        quantization=_quantization(keys),
        head_widths=_head_widths(keys, architecture, layer_count),
        layer_read_bytes=tuple(
            held - round(unread) for held, unread in zip(layer_bytes, unread_bytes, strict=True)
        )
        if any(unread_bytes)
        else (),
        block_weights=block_weights,
        output_weights=output_weights,
        shared_by=_shared_by(keys, architecture, layer_count),
        keeps_whole_context=_keeps_whole_context(keys, architecture),
        cacheable_bytes=tuple(cacheable_bytes) if cacheable else (),
        cacheable_sizes=frozenset(size for _, size in cacheable),
    )


def _keeps_whole_context(keys: Keys, architecture: str) -> bool:
    if architecture.startswith(_RECURRENT) or architecture in _RECURRENT_BUT_EVERY:
        return False
    parts = (".ssm.", ".wkv.", ".shortconv.")
    return not any(part in key for key in keys for part in parts) and not any(
        key.endswith(".attention.sliding_window") and value for key, value in keys.items()
    )


def _unused_experts(keys: Keys, architecture: str, layer_count: int) -> list[float]:
    """The share of each block's experts that a token does not use."""
    count = _per_layer(keys, f"{architecture}.expert_count", layer_count, default=0)
    used = _per_layer(keys, f"{architecture}.expert_used_count", layer_count, default=0)
    return [1 - use / all_ if 0 < use <= all_ else 0.0 for use, all_ in zip(used, count, strict=True)]


def _shared_by(keys: Keys, architecture: str, layer_count: int) -> float:
    """Query heads for each head of K and V."""
    heads = _per_layer(keys, f"{architecture}.attention.head_count", layer_count, default=0)
    kv_heads = _per_layer(keys, f"{architecture}.attention.head_count_kv", layer_count, default=None) or heads
    return max(1.0, sum(heads) / sum(kv_heads)) if sum(kv_heads) else 1.0


def _quantization(keys: Keys) -> str:
    from gguf.constants import LlamaFileType  # loads numpy

    try:
        name = LlamaFileType(keys.get("general.file_type", LlamaFileType.GUESSED)).name
    except ValueError:
        return ""
    return "" if name == "GUESSED" else name.removeprefix("MOSTLY_").removeprefix("ALL_")


def model_keys(path: Path) -> Keys:
    """The keys of a model's first file, without lists of texts and the vocabulary.

    Raises:
        ModelFileError: as for `read_facts`.
    """
    return _keys_of(check_file(first_part(path), advice="check the path"))


@functools.lru_cache(maxsize=8)
def _keys_of(file: GgufFile) -> Keys:
    return read_header(file).keys


def _feed_forward_width(keys: Keys, architecture: str, layer_count: int) -> int:
    dense = max(_per_layer(keys, f"{architecture}.feed_forward_length", layer_count, default=0))
    expert = _integer(keys, f"{architecture}.expert_feed_forward_length") or dense
    used = max(_per_layer(keys, f"{architecture}.expert_used_count", layer_count, default=0))
    return max(dense, used * expert)


def _kv_bytes_per_token(keys: Keys, architecture: str, layer_count: int) -> tuple[int, ...]:
    """llama.cpp's n_embd_k_gqa + n_embd_v_gqa of each block (llama-hparams.cpp), at f16."""
    prefix = f"{architecture}.attention"
    heads = _per_layer(keys, f"{prefix}.head_count", layer_count, default=0)
    kv_heads = _per_layer(keys, f"{prefix}.head_count_kv", layer_count, default=None) or heads
    if not any(heads):
        return (0,) * layer_count
    per_token = sum(_head_widths(keys, architecture, layer_count)) * KV_ELEMENT_BYTES
    interval = 1
    if architecture in _RECURRENT_BUT_EVERY:
        interval = _integer(keys, f"{architecture}.full_attention_interval") or _RECURRENT_BUT_EVERY[architecture]
    return tuple(count * per_token if (block + 1) % interval == 0 else 0 for block, count in enumerate(kv_heads))


def _head_widths(keys: Keys, architecture: str, layer_count: int) -> tuple[int, int]:
    """Values in K and in V of one head (llama-hparams.cpp)."""
    prefix = f"{architecture}.attention"
    first_heads = next(filter(None, _per_layer(keys, f"{prefix}.head_count", layer_count, default=0)), 0)
    if not first_heads:
        return 0, 0
    usual = (_integer(keys, f"{architecture}.embedding_length") or 0) // first_heads
    return _integer(keys, f"{prefix}.key_length") or usual, _integer(keys, f"{prefix}.value_length") or usual


def _shown(name: str) -> str:
    """A name from a file, which may have any length and characters, as a part of a line."""
    name = "".join(character if character.isprintable() else "?" for character in name[: _LONGEST_NAME + 1])
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


def _text(keys: Keys, key: str) -> str | None:
    value = keys.get(key)
    return value if isinstance(value, str) and value else None


def _integer(keys: Keys, key: str) -> int | None:
    value = keys.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _per_layer(keys: Keys, key: str, layer_count: int, *, default: int | None) -> list[int]:
    """A number for each block, from a key with one number for all or a list; [] when absent without a default."""
    value = keys.get(key)
    if isinstance(value, list) and len(value) >= layer_count and all(isinstance(n, int) and n >= 0 for n in value):
        return value[:layer_count]
    number = _integer(keys, key)
    if number is None:
        number = default
    return [] if number is None else [number] * layer_count
