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
