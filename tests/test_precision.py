"""Which arithmetic is chosen where, and that switches are put back."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ccdist import precision
from ccdist.precision import exact_float32, float32_products, lower_precision, multiplies_bfloat16_fast, resolve

CPU = torch.device("cpu")
BACKENDS: Any = torch.backends
GPU_SWITCHES = {
    "matmul": BACKENDS.cuda.matmul,
    "convolutions": BACKENDS.cudnn.conv,
    "recurrent layers": BACKENDS.cudnn.rnn,
}
CPU_SWITCHES = {"matmul of the cpu": BACKENDS.mkldnn.matmul, "convolutions of the cpu": BACKENDS.mkldnn.conv}


def switches() -> dict[str, str]:
    return {name: switch.fp32_precision for name, switch in (GPU_SWITCHES | CPU_SWITCHES).items()}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = switches()
    yield
    assert switches() == before


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_auto_is_bfloat16_where_a_cpu_has_units_for_it(unit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"avx512_f": True, "avx512_bf16": False} | ({} if unit is None else {unit: True})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert multiplies_bfloat16_fast(CPU) == (unit is not None)
    assert resolve("auto", CPU) == ("float32" if unit is None else "bfloat16")


@pytest.mark.parametrize("units", [True, False])
def test_auto_on_a_gpu_does_not_count_emulation(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return units or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve("auto", torch.device("cuda")) == ("bfloat16" if units else "float32")
    assert asked == [False]


def test_other_devices_are_not_guessed() -> None:
    assert resolve("auto", torch.device("meta")) == "float32"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_precision_by_name_is_that_one(wanted: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16_fast", lambda device: fast)
    assert resolve(wanted, CPU) == wanted


def test_float32_is_the_precision_of_the_weights() -> None:
    """None and not torch.float32: tests train in float64."""
    assert lower_precision("float32") is None
    assert lower_precision("bfloat16") is torch.bfloat16


@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_the_switches_are_set_and_put_back(wanted: Any) -> None:
    before = switches()
    with float32_products(wanted):
        assert {name: switches()[name] for name in GPU_SWITCHES} == dict.fromkeys(GPU_SWITCHES, wanted)
        assert {name: switches()[name] for name in CPU_SWITCHES} == dict.fromkeys(CPU_SWITCHES, "ieee")
    assert switches() == before


def test_the_switches_are_put_back_after_an_error() -> None:
    before = switches()
    with pytest.raises(KeyError), float32_products("tf32"):
        raise KeyError
    assert switches() == before


def test_a_certificate_inside_a_training_is_exact_and_leaves_its_switches() -> None:
    with float32_products("tf32"):
        inside = switches()
        with exact_float32():
            assert set(switches().values()) == {"ieee"}
        assert switches() == inside


def test_exact_products_keep_what_tf32_rounds_away(device: torch.device) -> None:
    """1 + 2^-12 needs 13 bits of mantissa; TF32 has 10, so on a GPU it would give 1."""
    x = torch.full((64, 64), 1 + 2**-12, device=device)
    with exact_float32():
        assert float((x @ torch.eye(64, device=device)).amin()) == 1 + 2**-12
