"""Small GGUF models for tests, written with the official writer; llama.cpp loads the llama ones.

Weights are random (seeded), so answers are nonsense but layouts, sizes and speed are real.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_llama(
    path: Path,
    *,
    blocks: int = 4,
    embedding: int = 64,
    heads: int = 4,
    kv_heads: int | Sequence[int] | None = None,
    feed_forward: int = 128,
    vocabulary: int = 320,
    context: int = 2048,
    tied: bool = False,
    experts: int = 0,
    experts_used: int = 1,
    f32_blocks: Collection[int] = (),
    tensors_per_part: int = 0,
) -> Path:
    """Write a llama model and return the path of its (first) file.

    Matrices are f16, those of `f32_blocks` f32 (so that blocks differ in size), norms f32. With
    `tensors_per_part` the model is split into files beside `path`, named as llama.cpp names them.
    """
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    writer.add_name("Test Llama")
    writer.add_description("random weights for tests")
    writer.add_block_count(blocks)
    writer.add_context_length(context)
    writer.add_embedding_length(embedding)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(list(kv_heads) if isinstance(kv_heads, list | tuple) else (kv_heads or heads))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(embedding // heads)
    writer.add_vocab_size(vocabulary)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(experts_used)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, vocabulary)
    for name, shape, is_f32 in _tensors(
        blocks, embedding, heads, kv_heads, feed_forward, vocabulary, tied, experts, f32_blocks
    ):
        writer.add_tensor(name, _weights(name, shape, is_f32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not tensors_per_part:
        return path
    return min(path.parent.glob(f"{path.stem}-?????-of-?????.gguf"))


def write_heavy(path: Path, *, blocks: int = 12, feed_forward: int = 49152) -> Path:
    """Write a llama model whose weights workers can cache: those of the feed-forward network are over 10 MiB.

    A block has `3 * 256 * feed_forward` bytes of them (37.7 MB by default, so 12 blocks have 453 MB, and are
    written in some seconds), and 0.13 MB of smaller ones.
    """
    if feed_forward * 256 <= 10 * 2**20:
        raise ValueError(f"a matrix of {feed_forward} x 128 f16 values is not over 10 MiB")
    return write_llama(path, blocks=blocks, embedding=128, feed_forward=feed_forward, context=4096)


def write_keys(path: Path, architecture: str, keys: dict[str, Any]) -> Path:
    """Write a GGUF file with these keys (numbers, texts, lists of numbers) and one small tensor per block."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    blocks = keys.get(f"{architecture}.block_count")
    for block in range(blocks if isinstance(blocks, int) else 0):
        writer.add_tensor(f"blk.{block}.attn_norm.weight", np.ones(8, dtype=np.float32))
    return _written(writer, path)


def write_adapter(path: Path, *, embedding: int = 64, blocks: int = 4, architecture: str = "llama") -> Path:
    """Write a LoRA adapter for a model of `write_llama`; it changes what the model says."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    rank = 2
    for block in range(blocks):
        name = f"blk.{block}.attn_output.weight"
        writer.add_tensor(f"{name}.lora_a", _weights(f"{name}.a", (rank, embedding), is_f32=True) * 40)
        writer.add_tensor(f"{name}.lora_b", _weights(f"{name}.b", (embedding, rank), is_f32=True) * 40)
    return _written(writer, path)


def write_projector(path: Path, *, embedding: int = 64) -> Path:
    """Write a small vision projector (a CLIP with an MLP, as LLaVA has) for a model with this embedding width.

    An image is 28 x 28 pixels and becomes 4 tokens.
    """
    width, side, patch, blocks = 32, 28, 14, 2
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "image_size": side,
        "patch_size": patch,
        "embedding_length": width,
        "feed_forward_length": 2 * width,
        "projection_dim": embedding,
        "block_count": blocks,
        "attention.head_count": 2,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    matrices: dict[str, tuple[int, ...]] = {
        "mm.0": (embedding, width),
        "mm.2": (embedding, embedding),
        **{
            f"v.blk.{block}.attn_{part}": (width, width)
            for block in range(blocks)
            for part in ("q", "k", "v", "out")
        },
        **{f"v.blk.{block}.ffn_up": (2 * width, width) for block in range(blocks)},
        **{f"v.blk.{block}.ffn_down": (width, 2 * width) for block in range(blocks)},
    }
    writer.add_tensor("v.patch_embd.weight", _weights("patch", (width, 3, patch, patch), is_f32=True))
    writer.add_tensor("v.position_embd.weight", _weights("position", ((side // patch) ** 2, width), is_f32=True))
    for name, shape in matrices.items():
        writer.add_tensor(f"{name}.weight", _weights(name, shape, is_f32=True))
        writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    for block in range(blocks):
        for name in (f"v.blk.{block}.ln1", f"v.blk.{block}.ln2"):
            writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
            writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))
    return _written(writer, path)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path, missing_bytes: int) -> Path:
    """Remove so many bytes from the end of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing_bytes)
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581w{number}" for number in range(vocabulary - len(tokens))]
    if len(tokens) != vocabulary:
        raise ValueError(f"a vocabulary has at least {len(tokens)} tokens")
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (vocabulary - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(vocabulary)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(
    blocks: int,
    embedding: int,
    heads: int,
    kv_heads: int | Sequence[int] | None,
    feed_forward: int,
    vocabulary: int,
    tied: bool,
    experts: int,
    f32_blocks: Collection[int],
) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, shape (rows first) and whether f32, in the order llama.cpp's converter writes them."""
    counts = [kv_heads or heads] * blocks if not isinstance(kv_heads, list | tuple) else list(kv_heads)
    head_width = embedding // heads
    tensors: list[tuple[str, tuple[int, ...], bool]] = [("token_embd.weight", (vocabulary, embedding), False)]
    for block in range(blocks):
        wide = block in f32_blocks
        kv_width = int(counts[block]) * head_width  # type: ignore[arg-type]
        matrices: dict[str, tuple[int, ...]] = {
            "attn_q": (embedding, embedding),
            "attn_k": (kv_width, embedding),
            "attn_v": (kv_width, embedding),
            "attn_output": (embedding, embedding),
        }
        if experts:
            matrices |= {
                "ffn_gate_inp": (experts, embedding),
                "ffn_gate_exps": (experts, feed_forward, embedding),
                "ffn_up_exps": (experts, feed_forward, embedding),
                "ffn_down_exps": (experts, embedding, feed_forward),
            }
        else:
            matrices |= {
                "ffn_gate": (feed_forward, embedding),
                "ffn_up": (feed_forward, embedding),
                "ffn_down": (embedding, feed_forward),
            }
        tensors += [(f"blk.{block}.attn_norm.weight", (embedding,), True)]
        tensors += [(f"blk.{block}.{name}.weight", shape, wide) for name, shape in matrices.items()]
        tensors += [(f"blk.{block}.ffn_norm.weight", (embedding,), True)]
    tensors += [("output_norm.weight", (embedding,), True)]
    if not tied:
        tensors += [("output.weight", (vocabulary, embedding), False)]
    return tensors


def _weights(name: str, shape: tuple[int, ...], is_f32: bool) -> np.ndarray[Any, Any]:
    kind = np.float32 if is_f32 else np.float16
    if name.endswith("norm.weight"):
        return np.ones(shape, dtype=np.float32)
    random = np.random.default_rng(list(name.encode()))
    return (random.standard_normal(shape, dtype=np.float32) * 0.05).astype(kind)
