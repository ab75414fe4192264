"""From a model's header to its size, its blocks and the memory of its context; errors of bad files."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import ModelFileError
from sollol_nb.gguf.facts import read_facts
from tests.support.gguf_files import cut, write_keys, write_llama

F16, F32 = 2, 4


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model.gguf")


# --- good files --------------------------------------------------------------------


def test_a_dense_model_is_measured_block_by_block(tmp_path: Path) -> None:
    path = write_llama(
        tmp_path / "m.gguf",
        blocks=3,
        embedding=64,
        heads=4,
        kv_heads=2,
        feed_forward=128,
        vocabulary=300,
        f32_blocks={1},
    )
    facts = read_facts(path)
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    norms = 2 * 64
    assert facts.layer_bytes == tuple(matrices * width + norms * F32 for width in (F16, F32, F16))
    assert facts.output_bytes == 300 * 64 * F16 + 64 * F32
    assert facts.parameter_count == 3 * (matrices + norms) + 2 * 300 * 64 + 64
    assert facts.architecture == "llama"
    assert (facts.layer_count, facts.context_length, facts.embedding_length) == (3, 2048, 64)
    assert (facts.feed_forward_width, facts.vocabulary_size) == (128, 300)
    assert facts.file_bytes == path.stat().st_size


def test_tied_embeddings_are_counted_twice_because_the_output_device_gets_a_copy(tmp_path: Path) -> None:
    tied = read_facts(write_llama(tmp_path / "tied.gguf", tied=True))
    untied = read_facts(write_llama(tmp_path / "untied.gguf"))
    assert tied.output_bytes == untied.output_bytes
    assert tied.parameter_count < untied.parameter_count


def test_a_mixture_counts_all_experts_as_weights_and_the_used_ones_as_width(tmp_path: Path) -> None:
    dense = read_facts(write_llama(tmp_path / "dense.gguf", feed_forward=128))
    mixture = read_facts(write_llama(tmp_path / "moe.gguf", feed_forward=128, experts=4, experts_used=2))
    more_experts = 3 * 3 * 64 * 128 * F16
    assert mixture.layer_bytes[0] - dense.layer_bytes[0] == more_experts + 4 * 64 * F16
    unused_experts = 2 * 3 * 64 * 128 * F16
    assert mixture.read_bytes[0] == mixture.layer_bytes[0] - unused_experts, "a token reads the used ones"
    assert dense.read_bytes == (*dense.layer_bytes, dense.output_bytes)
    assert mixture.feed_forward_width == 2 * 128


@pytest.mark.parametrize(
    ("keys", "per_token"),
    [
        pytest.param({"head_count": 4}, (64 + 64) * F16, id="as many kv heads as heads"),
        pytest.param({"head_count": 4, "head_count_kv": 2}, (32 + 32) * F16, id="grouped queries"),
        pytest.param(
            {"head_count": 4, "head_count_kv": 2, "key_length": 48, "value_length": 24},
            2 * (48 + 24) * F16,
            id="own head widths",
        ),
        pytest.param(
            {"head_count": 128, "head_count_kv": 1, "key_length": 576, "value_length": 512},
            (576 + 512) * F16,
            id="latent attention, upper bound",
        ),
        pytest.param({"head_count": 0}, 0, id="no attention"),
        pytest.param({}, 0, id="nothing stated"),
    ],
)
def test_kv_cache_bytes_follow_heads_and_head_widths(tmp_path: Path, keys: dict[str, int], per_token: int) -> None:
    stated = {f"llama.attention.{name}": value for name, value in keys.items()}
    path = write_keys(
        tmp_path / "m.gguf", "llama", {"llama.block_count": 2, "llama.embedding_length": 64} | stated
    )
    assert read_facts(path).layer_kv_bytes_per_token == (per_token, per_token)


def test_recurrent_blocks_have_no_kv_cache(tmp_path: Path) -> None:
    keys = {"block_count": 8, "embedding_length": 256, "attention.head_count": 4, "full_attention_interval": 4}
    path = write_keys(tmp_path / "hybrid.gguf", "qwen3next", {f"qwen3next.{key}": keys[key] for key in keys})
    assert [bool(per_token) for per_token in read_facts(path).layer_kv_bytes_per_token] == [
        (block + 1) % 4 == 0 for block in range(8)
    ]


def test_kv_heads_may_differ_from_block_to_block(tmp_path: Path) -> None:
    facts = read_facts(write_llama(tmp_path / "m.gguf", blocks=3, embedding=64, heads=4, kv_heads=[4, 0, 1]))
    assert facts.layer_kv_bytes_per_token == (4 * 32 * F16, 0, 1 * 32 * F16)


@pytest.mark.parametrize(("asked", "kept"), [(1, 256), (256, 256), (257, 512), (4096, 4096)])
def test_the_context_is_rounded_up_as_the_engine_does(llama: Path, asked: int, kept: int) -> None:
    facts = read_facts(llama)
    assert facts.kv_bytes(asked) == tuple(kept * per_token for per_token in facts.layer_kv_bytes_per_token)


# --- split models -----------------------------------------------------------------------------


def test_a_split_model_is_read_whole_from_any_of_its_parts(tmp_path: Path) -> None:
    whole = read_facts(write_llama(tmp_path / "whole.gguf"))
    write_llama(tmp_path / "m.gguf", tensors_per_part=15)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    facts = read_facts(parts[0])
    assert facts == read_facts(parts[1]) == read_facts(parts[2])
    assert facts.path == parts[0]
    assert (facts.layer_bytes, facts.output_bytes) == (whole.layer_bytes, whole.output_bytes)
    assert facts.parameter_count == whole.parameter_count
    assert facts.file_bytes == sum(part.stat().st_size for part in parts)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "m.gguf", tensors_per_part=15)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelFileError, match=r"m-00002-of-00003\.gguf does not exist; the model has 3 parts"):
        read_facts(first)


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "m.gguf", tensors_per_part=15)
    cut(tmp_path / "m-00003-of-00003.gguf", 100)
    with pytest.raises(ModelFileError, match=r"m-00003-of-00003\.gguf is truncated"):
        read_facts(first)


def test_a_part_with_another_name_is_refused(tmp_path: Path) -> None:
    first = write_llama(tmp_path / "m.gguf", tensors_per_part=15)
    renamed = first.rename(tmp_path / "sha256-0123")
    with pytest.raises(ModelFileError, match="one of 3 parts"):
        read_facts(renamed)


def test_a_part_number_beyond_the_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be"):
        read_facts(tmp_path / "m-00004-of-00003.gguf")


# --- remembering and letting go ---------------------------------------------------------------


def test_facts_are_cached_until_the_file_changes(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", blocks=2)
    first = read_facts(path)
    assert read_facts(str(path)) is first
    write_llama(path, blocks=3)
    assert read_facts(path).layer_count == 3


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not list memory maps")
def test_the_file_is_no_longer_mapped_after_reading_or_failing(tmp_path: Path) -> None:
    good = write_llama(tmp_path / "good.gguf")
    bad = write_llama(tmp_path / "bad.gguf")
    damaged = bytearray(bad.read_bytes())
    damaged[damaged.index(b"general.name") + 12] = 77  # a value type that does not exist
    bad.write_bytes(damaged)
    read_facts(good)
    with pytest.raises(ModelFileError) as failure:
        read_facts(bad)
    mapped = {Path(entry.path).name for entry in psutil.Process().memory_maps()}
    assert not {"good.gguf", "bad.gguf"} & mapped
    assert "cannot be read" in str(failure.value)  # and the exception, still held here, holds no map


def test_importing_the_planner_loads_no_numpy() -> None:
    code = (
        "import sys, sollol_nb.gguf.facts, sollol_nb.models.profiles, sollol_nb.layers.plan\n"
        "print({'numpy', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- bad files ------------------------------------------------------------


def _gguf_start(version: int, *, tensors: int = 0, keys: int = 0, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"PK\x03\x04 a zip", r"not a GGUF file.*b'PK", id="other format"),
        pytest.param(b"GGUF\x03", "truncated", id="five bytes"),
        pytest.param(_gguf_start(1), "version 1,", id="old version"),
        pytest.param(_gguf_start(99), "version 99,", id="future version"),
        pytest.param(_gguf_start(3, order=">"), "big-endian", id="big-endian"),
        pytest.param(_gguf_start(3), "architecture", id="nothing in it"),
        pytest.param(_gguf_start(3, keys=1), "truncated or damaged", id="a key promised, none there"),
        pytest.param(_gguf_start(3, keys=2**60), "impossible", id="countless keys"),
        pytest.param(_gguf_start(3, tensors=2**60), "impossible", id="countless tensors"),
        pytest.param(
            _gguf_start(3, keys=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60),
            "truncated or damaged",
            id="endless list",
        ),
        pytest.param(
            _gguf_start(3, keys=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 5), "array of arrays", id="nested lists"
        ),
    ],
)
def test_a_file_that_is_not_a_model_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as failure:
        read_facts(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("missing_bytes", [1, 100, 40_000])
def test_missing_tensor_data_is_counted(llama: Path, missing_bytes: int) -> None:
    with pytest.raises(ModelFileError, match=f"truncated: {missing_bytes} bytes of"):
        read_facts(cut(llama, missing_bytes))


def test_a_file_that_ends_inside_its_header_is_truncated(llama: Path) -> None:
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        read_facts(cut(llama, llama.stat().st_size - 600))


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("clip", {"clip.projection_dim": 8}, "0 blocks"),
        ("llama", {"llama.block_count": "two"}, "0 blocks"),
        ("llama", {"llama.embedding_length": 8}, "0 blocks"),
    ],
)
def test_a_file_without_blocks_is_not_a_model(
    tmp_path: Path, architecture: str, keys: dict[str, int | str], message: str
) -> None:
    with pytest.raises(ModelFileError, match=message):
        read_facts(write_keys(tmp_path / "m.gguf", architecture, keys))


def test_a_tensor_of_a_block_beyond_the_count_is_refused(llama: Path) -> None:
    content = llama.read_bytes()
    llama.write_bytes(content.replace(b"blk.3.ffn_norm", b"blk.9.ffn_norm"))
    with pytest.raises(ModelFileError, match=r"blk\.9\.ffn_norm.*4 blocks"):
        read_facts(llama)


def test_a_tensor_type_newer_than_the_reader_is_reported(llama: Path) -> None:
    content = bytearray(llama.read_bytes())
    kind_at = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    struct.pack_into("<I", content, kind_at, 250)
    llama.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"250.*update gguf"):
        read_facts(llama)


def test_a_missing_file_and_a_folder_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        read_facts(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="does not exist"):
        read_facts(write_llama(tmp_path / "m.gguf") / "below-a-file.gguf")
    with pytest.raises(ModelFileError, match="is a folder"):
        read_facts(tmp_path)
    with pytest.raises(ModelFileError, match="cannot read"):
        read_facts("a\0b.gguf")
    with pytest.raises(ModelFileError, match="cannot read"):
        read_facts("~nobody-has-this-name/m.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_facts(pipe)


def test_an_unreadable_file_is_named_with_the_fix(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind an administrator, so the refusal itself is put in place of the file's mode.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelFileError, match=r"no permission to read .*model\.gguf.*chmod a\+r"):
        read_facts(llama)


def test_damaged_headers_are_refused_whatever_the_damage(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", blocks=1, vocabulary=260)
    content = path.read_bytes()
    chance = random.Random(7)
    readable = 0
    for number in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(4, 2400)] = chance.choice((0, 1, 8, 9, 127, 255, chance.randrange(256)))
        case = tmp_path / f"case-{number}.gguf"
        case.write_bytes(damaged)
        with contextlib.suppress(ModelFileError):
            read_facts(case)  # the damage may lie where nothing is read
            readable += 1
    assert readable < 250
