"""Headers that state what is impossible are refused at once, in one short line, whatever size a file pretends."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from sollol_nb.errors import ModelFileError
from sollol_nb.gguf.facts import read_facts

pytestmark = pytest.mark.timeout(60)  # a loop over what a header promises would take hours
PRETENDED_BYTES = 2**37
NUMBER, TEXT, ARRAY = 4, 8, 9  # types of values
Q4_0 = 2


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return text(name) + struct.pack("<I", TEXT) + text(value)
    return text(name) + struct.pack("<II", NUMBER, value)


def array(name: str, kind: int, count: int) -> bytes:
    """The start of an array."""
    return text(name) + struct.pack("<IIQ", ARRAY, kind, count)


def tensor(name: str | bytes, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


MODEL = (key("general.architecture", "llama"), key("llama.block_count", 2))


def write(path: Path, keys: tuple[bytes, ...], *tensors: bytes, counts: tuple[int, int] | None = None) -> Path:
    """A file with this header and a bit of data; `counts` is what it states of tensors and keys."""
    stated = counts or (len(tensors), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", 3, *stated) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(header + bytes(4096))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as refused:
        read_facts(path)
    message = str(refused.value).removeprefix(str(path))
    assert len(message) < 250
    assert message.isprintable()
    return message


@pytest.mark.parametrize("number", ["2", "99", "9" * 19, "9" * 5000, "9" * 500_000], ids=len)
def test_a_block_with_an_absurd_number(number: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", MODEL, tensor(f"blk.{number}.attn_q.weight"))
    assert f"holds blk.{number[:20]}" in refusal(path)


@pytest.mark.parametrize("count", [0, 513, 2**32 - 1])
def test_an_absurd_number_of_blocks(count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", (MODEL[0], key("llama.block_count", count)), tensor("blk.0.attn_q.weight"))
    assert f"states {count} blocks; a model has 1 to 512" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        ((4,), 2**64 - 16),  # would lie before the data where sums overflow
        ((4,), 2**63),
        ((2**32, 2**32), 0),  # would have no elements where products overflow
        ((2**63, 2), 0),
        ((2**64 - 1,), 0),
    ],
)
def test_a_tensor_of_absurd_size_or_place(shape: tuple[int, ...], offset: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", MODEL, tensor("blk.0.attn_q.weight", shape, offset=offset))
    assert "a tensor has an impossible size or position" in refusal(path)


@pytest.mark.parametrize("offset", [4096, 2**40])
def test_a_tensor_beyond_the_end(offset: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", MODEL, tensor("blk.0.attn_q.weight", offset=offset))
    assert "is truncated: " in refusal(path)


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ((tensor("x", (1,) * 100),), "a tensor has 100 dimensions"),
        ((tensor("x"), tensor("x")), "a tensor occurs twice"),
        ((tensor("x", kind=5),), "update gguf"),
        ((tensor("x", kind=2**31),), "update gguf"),
        ((text("x") + struct.pack("<I", 2**32 - 1),), "a tensor has 4294967295 dimensions"),
        ((struct.pack("<Q", 2**64 - 1),), "its header points "),
    ],
)
def test_an_impossible_tensor(described: tuple[bytes, ...], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(write(tmp_path / "m.gguf", MODEL, *described))


@pytest.mark.parametrize("alignment", [0, 3, 2**31, "32", "32" * 10_000])
def test_an_impossible_alignment(alignment: int | str, tmp_path: Path) -> None:
    keys = (*MODEL, key("general.alignment", alignment))
    assert "its alignment is" in refusal(write(tmp_path / "m.gguf", keys, tensor("blk.0.attn_q.weight")))


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        (b"", (2**16, 2)),
        (b"", (0, 2**16)),
        (b"", (2**17, 2)),
        (array("tokenizer.ggml.tokens", TEXT, 2**40), (0, 3)),
        (array("general.list", 0, 2**36), (0, 3)),
        (array("general.list", 12, 2**64 - 1), (0, 3)),
        (text("general.name") + struct.pack("<IQ", TEXT, 2**39), (0, 3)),
        (text("general.name") + struct.pack("<IQ", TEXT, 10**8), (0, 3)),
    ],
    ids=["tensors", "keys", "too many", "texts", "numbers", "overflowing numbers", "a text", "a long text"],
)
def test_a_huge_file_of_nothing_is_not_searched(more: bytes, counts: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", (*MODEL, more), counts=counts)
    os.truncate(path, PRETENDED_BYTES)  # takes no room on the disk
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("kind", "count", "item_bytes"), [(TEXT, 2**21, 8), (0, 2**12, 1)], ids=["texts", "numbers"]
)
def test_many_lists_cost_no_more_than_one(kind: int, count: int, item_bytes: int, tmp_path: Path) -> None:
    lists = [
        array(f"general.list{number}", kind, count) + bytes(count * item_bytes)  # empty texts, or zeros
        for number in range(2 if kind == TEXT else 300)
    ]
    path = write(tmp_path / "m.gguf", (*MODEL, *lists))
    assert "its lists have" in refusal(path)


def test_a_name_with_control_characters_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", MODEL, tensor("blk.7.\n\x1b[2J" + "x" * 1000))
    assert "holds blk.7.??[2Jxxx" in refusal(path)
    path = write(tmp_path / "n.gguf", (key("general.architecture", "\x1b[2J\n" * 10_000),))
    assert "(?[2J??[2J?" in refusal(path)


def test_sizes_of_quantised_tensors_are_those_of_their_blocks(tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path / "m.gguf", MODEL, tensor("blk.1.attn_q.weight", (64, 2), Q4_0)))
    assert facts.layer_bytes == (0, 64 * 2 // 32 * 18)
    assert facts.parameter_count == 128


def test_a_vocabulary_of_any_language_is_skipped(tmp_path: Path) -> None:
    tokens = array("tokenizer.ggml.tokens", TEXT, 3) + text("é") + text(b"\xff") + text("")
    path = write(tmp_path / "m.gguf", (*MODEL, tokens, key("llama.context_length", 77)))
    assert read_facts(path).context_length == 77
