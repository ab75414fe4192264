"""Write the trained weights as a GGUF file of the llama architecture, matrices in F16 and norms in F32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
from tokenizer import END_OF_TEXT, IM_END, SPECIAL_TOKENS, Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from model import ModelShape, Weights

# ChatML, in its most common spelling: engines recognise it by its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_BLOCK_MATRICES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_BLOCK_NORMS = {"attention_norm": "attn_norm", "feed_forward_norm": "ffn_norm"}


def write_gguf(path: Path, shape: ModelShape, weights: Weights, tokenizer: Tokenizer) -> None:
    """Write `path`. GGUF matrices are (out, in), so the (in, out) matrices of training are transposed."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_facts(writer, shape)
    _add_tokenizer(writer, tokenizer)

    def add(name: str, values: np.ndarray, kind: type[np.floating]) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values).astype(kind))

    arrays = {name: np.asarray(values) for name, values in weights.items()}
    add("token_embd", arrays["embedding"], np.float16)
    for layer in range(shape.layer_count):
        for name, tensor in _BLOCK_NORMS.items():
            add(f"blk.{layer}.{tensor}", arrays[name][layer], np.float32)
        for name, tensor in _BLOCK_MATRICES.items():
            add(f"blk.{layer}.{tensor}", arrays[name][layer].T, np.float16)
    add("output_norm", arrays["output_norm"], np.float32)
    add("output", arrays["output"].T, np.float16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_facts(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("sollol_nb demo")
    writer.add_author("The sollol_nb authors")
    writer.add_license("MIT")
    writer.add_description(
        "A tiny demo model that only answers questions about model sharding and sollol_nb. Not a general model."
    )
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layer_count)
    writer.add_feed_forward_length(shape.feed_forward_size)
    writer.add_head_count(shape.head_count)
    writer.add_head_count_kv(shape.head_count)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    control = {tokenizer.special(token) for token in SPECIAL_TOKENS}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token_id in control else gguf.TokenType.NORMAL
            for token_id in range(len(tokenizer.tokens))
        ]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.special(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.special(IM_END))
    writer.add_pad_token_id(tokenizer.special(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
