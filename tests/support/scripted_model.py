"""A GGUF model that says a written script: each token decides the next one, whatever the prompt was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_END = 2
_FIRST_BYTE = 3
_RECORD = 64  # embedding lengths are multiples of it


def write_scripted(
    path: Path,
    script: Sequence[str | bytes],
    *,
    template: str = CHATML,
    specials: Sequence[str] = (),
    after: Mapping[str, Sequence[str]] | None = None,
    blocks: int = 4,
) -> Path:
    """Write a model that says the pieces of `script` in order and ends; returns its path.

    Args:
        script: texts of 3 characters or more, single bytes, or texts among `specials`. Each special or byte may
            occur once.
        specials: the special tokens of the chat template.
        after: what it says instead after one of the specials, of pieces that occur nowhere else.
    """
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    special_ids = {text: len(tokens) + at for at, text in enumerate(dict.fromkeys(specials))}
    tokens += [text.encode() for text in special_ids]
    types += [gguf.TokenType.CONTROL] * len(special_ids)

    def ids(pieces: Sequence[str | bytes]) -> list[int]:
        said = []
        for piece in pieces:
            if isinstance(piece, bytes):
                said.append(_FIRST_BYTE + piece[0])
            elif piece in special_ids:
                said.append(special_ids[piece])
            else:
                said.append(len(tokens))
                tokens.append(piece.replace(" ", "\u2581").encode())
                types.append(gguf.TokenType.NORMAL)
        return said

    said = ids(script)
    others = {special: ids(pieces) for special, pieces in (after or {}).items()}
    width = -(-len(tokens) // _RECORD) * _RECORD
    following = np.full(len(tokens), said[0])
    for token, next_token in zip(said, [*said[1:], _END], strict=True):
        following[token] = next_token
    for special, other in others.items():
        for token, next_token in zip([special_ids[special], *other], [*other, _END], strict=True):
            following[token] = next_token
    embedding = np.eye(len(tokens), width, dtype=np.float32)
    output = np.zeros((len(tokens), width), np.float32)
    output[following, np.arange(len(tokens))] = 1

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Scripted")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1e9] * (len(tokens) - 259))
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(_END)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    shapes = {
        "attn_q": (32, width),
        "attn_k": (32, width),
        "attn_v": (32, width),
        "attn_output": (width, 32),
        "ffn_gate": (32, width),
        "ffn_up": (32, width),
        "ffn_down": (width, 32),
    }
    for block in range(blocks):
        for name, shape in shapes.items():  # no attention, no feed-forward: only the last token counts
            writer.add_tensor(f"blk.{block}.{name}.weight", np.zeros(shape, np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
