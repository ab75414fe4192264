"""The small generated models with which workers are measured: random weights, in the cache folder.

Four differ in one thing each, so that their differences separate what a token costs: `NARROW` (one block of next
to no weights: what the engine spends for a token), `DEEP` (the same with 16 more blocks: for a block), `WIDE`
(ten blocks with 72 MB in Q4_K: for its bytes), and `LIGHT` (about as many bytes in Q8_0, which are half as many
weights).

Of 72 MB, since a model that a processor's caches hold is up to three times as fast for its bytes (measured with
22 MB and 87 MB on a server's processor), and no larger, so that it crosses a 1 Gb/s network in 0.6 s. In Q4_K,
since most published models are. How long a byte of another type takes depends on whether the processor waits for
its memory (then all take as long) or computes (then a byte takes as long as the weights in it): `LIGHT` shows
where in between a worker is. Measured on one core of a server, relative to Q4_K: Q8_0 and Q6_K 0.7, F16 0.54,
Q5_K 0.93, Q4_1 0.92, Q4_0 0.96, F32 0.36; from `LIGHT` follow 0.7, 0.79, 0.51, 0.87, 0.93, 1.0 and 0.42. IQ types
take more work for a weight: up to 2. For a token of a prompt, a byte takes 0.9 in Q5_K and Q6_K, 1.0 in Q8_0, 0.5
in F16, 2 in Q4_0 and 3.6 in Q4_1.

Source of the layouts: `block_q4_K` and `block_q8_0` in llama.cpp's ggml-common.h. Q4_K: for 256 weights two half
floats (a scale and a minimum), 12 bytes of 6-bit scales and minima, and 128 bytes of 4-bit weights. Q8_0: for 32
weights a half float (the scale) and 32 bytes. Any bits are valid but for the floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from sollol_nb.errors import EngineError
from sollol_nb.settings import config

if TYPE_CHECKING:
    import gguf
    import numpy as np

VERSION = 1
"""Part of the files' names: models of another version are other models."""
VOCABULARY = 320
CONTEXT_TOKENS = 512
HEAD_WIDTH = 64
Q4_K_WEIGHTS, Q4_K_BYTES = 256, 144
Q4_K_FLOATS = (1e-4, 7.5e-4)  # a weight is scale * 6 bits * 4 bits - minimum * 6 bits; the mean of 4 bits is 7.5
Q8_0_WEIGHTS, Q8_0_BYTES = 32, 34
Q8_0_FLOATS = (1e-4,)
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class CalibrationModel:
    """One of the models.

    Attributes:
        name: part of its file's name.
        blocks: how many it has.
        width: of the residual stream.
        feed_forward: width of the feed-forward layers.
        kind: of its matrices: `F16`, `Q4_K` or `Q8_0`.
    """

    name: str
    blocks: int
    width: int
    feed_forward: int
    kind: str

    def path(self) -> Path:
        """Its file in the cache folder, which is written first if it is not there. Blocks for about two seconds
        then.

        Raises:
            EngineError: it cannot be written.
        """
        folder = config.cache_dir() / "calibration"
        path = folder / f"{self.name}-{VERSION}.gguf"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
                if not path.is_file():
                    new = path.with_suffix(".new")
                    _write(self, new)
                    new.replace(path)
        except (OSError, filelock.Timeout) as error:
            raise EngineError(
                f"cannot write the model for calibrations {path} ({error}); free some space"
            ) from error
        return path


NARROW = CalibrationModel("narrow", 1, 64, 128, "F16")
DEEP = CalibrationModel("deep", 17, 64, 128, "F16")
WIDE = CalibrationModel("wide", 10, 1024, 2816, "Q4_K")
LIGHT = CalibrationModel("light", 5, 1024, 2816, "Q8_0")
ALL = (NARROW, DEEP, WIDE, LIGHT)


def _write(model: CalibrationModel, path: Path) -> None:
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    heads = model.width // HEAD_WIDTH
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("calibration")
    writer.add_description("random weights that measure speed")
    writer.add_block_count(model.blocks)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_vocab_size(VOCABULARY)
    _add_vocabulary(writer)

    def add(name: str, rows: int, columns: int) -> None:
        if model.kind == "F16":
            weights = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
            writer.add_tensor(f"{name}.weight", weights.astype(np.float16))
        elif model.kind == "Q8_0":
            matrix = _blocks(random, rows, columns, Q8_0_WEIGHTS, Q8_0_BYTES, Q8_0_FLOATS)
            writer.add_tensor(f"{name}.weight", matrix, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            matrix = _blocks(random, rows, columns, Q4_K_WEIGHTS, Q4_K_BYTES, Q4_K_FLOATS)
            writer.add_tensor(f"{name}.weight", matrix, raw_dtype=gguf.GGMLQuantizationType.Q4_K)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(model.width, dtype=np.float32))

    add("token_embd", VOCABULARY, model.width)
    for block in range(model.blocks):
        add_norm(f"blk.{block}.attn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{part}", model.width, model.width)
        add_norm(f"blk.{block}.ffn_norm")
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{part}", model.feed_forward, model.width)
        add(f"blk.{block}.ffn_down", model.width, model.feed_forward)
    add_norm("output_norm")
    add("output", VOCABULARY, model.width)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    import gguf

    special = ["<unk>", "<s>", "</s>"]
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    others = [f"\u2581w{number}" for number in range(VOCABULARY - len(special) - len(of_bytes))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(of_bytes) + [gguf.TokenType.NORMAL] * len(others)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *of_bytes, *others])
    writer.add_token_scores([-float(number) for number in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _blocks(
    random: np.random.Generator,
    rows: int,
    columns: int,
    weights: int,
    byte_count: int,
    floats: Sequence[float],
) -> np.ndarray[Any, Any]:
    """A quantized matrix of random weights around zero; each row as bytes.

    Args:
        weights, byte_count: of one block of the type.
        floats: half floats with which each block begins.
    """
    import numpy as np

    count = rows * columns // weights
    blocks = np.frombuffer(bytearray(random.bytes(count * byte_count)), dtype=np.uint8).reshape(count, byte_count)
    first = np.array(floats, dtype=np.float16)
    blocks[:, : first.nbytes] = np.frombuffer(first.tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, -1)
