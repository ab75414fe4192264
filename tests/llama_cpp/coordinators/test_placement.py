"""The placement: read from the engine's own log, and compared with the plan."""

from __future__ import annotations

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.layers.plan import LayerPlan, Shard
from sollol_nb.llama_cpp.coordinators.placement import Placement, read_placement, split_over_devices
from tests.support.layer_plans import shard

MIB = 2**20
ONE, TWO = "127.0.0.1:50052", "127.0.0.1:50053"


def log_of(layer_lines: str) -> str:
    """As llama-server prints it at debug verbosity."""
    return f"""\
0.00.004.366 I cmn  common_param: verbosity = 5 (adjust with the `-lv N` CLI arg)
0.00.008.536 I llama_prepare_model_devices: using device RPC0 ({ONE}) (unknown id) - 24105 MiB free
0.00.008.740 I llama_prepare_model_devices: using device RPC1 ({TWO}) (unknown id) - 24105 MiB free
0.00.008.741 I llama_model_loader: - kv   2: general.name str = layer 9 assigned to nobody
{layer_lines}
0.00.017.264 I load_tensors:   CPU_Mapped model buffer size =     0.31 MiB
0.00.017.264 I load_tensors: RPC0[{ONE}] model buffer size =     2.30 MiB
0.00.017.265 I load_tensors: RPC0[{TWO}] model buffer size =     2.62 MiB
0.00.025.906 I llama_context:        CPU  output buffer size =     0.02 MiB
0.00.026.779 I llama_kv_cache: RPC0[{ONE}] KV buffer size =     0.75 MiB
0.00.027.336 I llama_kv_cache: RPC0[{TWO}] KV buffer size =     0.50 MiB
0.00.032.835 I sched_reserve: RPC0[{ONE}] compute buffer size =     2.43 MiB
0.00.032.864 I sched_reserve:        CPU compute buffer size =     1.15 MiB
0.00.041.077 I srv  llama_server: listening on http://127.0.0.1:53993
"""


def layers(devices: str, suffix: str = ", is_swa = 0") -> str:
    return "\n".join(
        f"0.00.013.{number:03d} D load_tensors: layer {number:3d} assigned to device {device}{suffix}"
        for number, device in enumerate(devices.split())
    )


def plan(*shards: Shard) -> LayerPlan:
    layer_count = sum(shard.layer_count for shard in shards)
    return LayerPlan(strategy="memory_aware", layer_count=layer_count, context_tokens=4096, shards=shards)


PLAN = plan(shard(ONE, 0, 2), shard(TWO, 2, 2, output=True))


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [", is_swa = 0", "", " (some remark)"], ids=["now", "older builds", "other"])
def test_placement_is_read_from_the_log(suffix: str) -> None:
    placement = read_placement(log_of(layers("RPC0 RPC0 RPC1 RPC1 RPC1", suffix)))

    assert [device.name for device in placement.devices] == [ONE, TWO, "CPU"]
    first, second, cpu = placement.devices
    assert (first.units, second.units, cpu.units) == ((0, 1), (2, 3, 4), ())
    assert (first.model_bytes, second.model_bytes) == (round(2.30 * MIB), round(2.62 * MIB))
    assert (first.kv_bytes, second.kv_bytes) == (round(0.75 * MIB), round(0.50 * MIB))
    assert (cpu.model_bytes, cpu.kv_bytes) == (round(0.31 * MIB), 0)
    assert placement.of(TWO) is second
    assert placement.of("127.0.0.1:1") is None


def test_devices_are_matched_by_endpoint_and_not_by_number() -> None:
    swapped = log_of(layers("RPC1 RPC1 RPC0 RPC0 RPC0"))

    assert read_placement(swapped).of(TWO).units == (0, 1)  # type: ignore[union-attr]


def test_devices_of_one_worker_are_put_together() -> None:
    log = log_of(layers("RPC0 RPC1 RPC1")).replace(TWO, ONE)

    device = read_placement(log).of(ONE)

    assert device is not None
    assert device.units == (0, 1, 2)
    assert device.model_bytes == pytest.approx((2.30 + 2.62) * MIB, abs=1)


@pytest.mark.parametrize(
    "log", ["", "garbage\nlayer x assigned to device", "\0" * 100, "layer 1 assigned to device "]
)
def test_log_without_placement_gives_an_empty_placement(log: str) -> None:
    assert read_placement(log) == Placement(())
    assert read_placement(log).differences(PLAN) == ["the engine's log does not say where it placed the layers"]


# --- comparing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "differences"),
    [
        ("RPC0 RPC0 RPC1 RPC1 RPC1", []),
        (
            "RPC0 RPC0 RPC0 RPC1 RPC1",
            [
                f"{ONE}: planned 2 units from unit 0, but the engine placed 3 from unit 0",
                f"{TWO}: planned 3 units from unit 2, but the engine placed 2 from unit 3",
            ],
        ),
        (
            "RPC1 RPC1 RPC1 RPC0 RPC0",
            [
                f"{ONE}: planned 2 units from unit 0, but the engine placed 2 from unit 3",
                f"{TWO}: planned 3 units from unit 2, but the engine placed 3 from unit 0",
            ],
        ),
        (
            "CPU CPU RPC1 RPC1 RPC1",
            [
                f"{ONE}: planned 2 units from unit 0, but the engine placed none",
                "CPU: planned no units, but the engine placed 2",
            ],
        ),
    ],
)
def test_differences_from_the_plan_are_reported(devices: str, differences: list[str]) -> None:
    assert read_placement(log_of(layers(devices))).differences(PLAN) == differences


# --- splitting --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "split"),
    [
        pytest.param({}, "2,3", id="nothing known of the devices"),
        pytest.param({ONE: [5], TWO: [7]}, "2,3", id="one device each"),
        pytest.param({ONE: [5, 5], TWO: [7]}, "1,1,3", id="two equal devices"),
        pytest.param({ONE: [5], TWO: [2, 1]}, "2,2,1", id="by free memory"),
        pytest.param({ONE: [5], TWO: [10, 1, 1]}, "2,3,0,0", id="nothing for a full device"),
        pytest.param({ONE: [5], TWO: [1, 1]}, "2,2,1", id="remainder to the first"),
        pytest.param({ONE: [0, 0], TWO: [0]}, "1,1,3", id="free memory not known"),
        pytest.param({ONE: [5], TWO: [0, 0]}, "2,2,1", id="more units than devices without free memory"),
        pytest.param({ONE: [], TWO: [7]}, "2,3", id="devices not known"),
    ],
)
def test_units_of_a_worker_are_shared_among_its_devices(free: dict[str, list[int]], split: str) -> None:
    assert split_over_devices(PLAN, free) == split


def test_every_unit_is_placed_whatever_the_memory() -> None:
    for free in ([1], [3, 5, 7], [10**12, 1], [0, 9], [0, 0, 0], [1, 1, 1, 1, 1]):
        for units in range(1, 40):
            split = split_over_devices(plan(shard(ONE, 0, units)), {ONE: free})
            assert sum(map(int, split.split(","))) == units
            assert len(split.split(",")) == len(free)


def test_more_devices_than_llama_cpp_supports_are_an_error() -> None:
    with pytest.raises(WorkersUnavailableError, match=r"have 17 devices, but llama\.cpp supports at most 15"):
        split_over_devices(PLAN, {ONE: [1] * 16, TWO: [1]})
