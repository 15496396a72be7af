"""Matrix products of a GPU: every form of a matrix by every way, against its dequantized reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, DTYPES, HAS_GPU
from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.dequantize import dequantize, rows_to_fp8
from pagetide.ops.gpu.matmul import ROWS, GpuProduct, on_device
from pagetide.ops.weights import DenseWeight, Fp8Weight, QuantizedWeight, Weight, quantize, quantize_fp8

few = settings(max_examples=60 if HAS_GPU else 25)


class Only(Choices):
    """Takes the way of this name wherever it is possible, and remembers which it took."""

    def __init__(self, name: str):
        super().__init__()
        self._name, self.taken = name, set[str]()

    def fastest(self, key, ways, unmeasured, make_x):
        assert unmeasured in ways
        found = self._name if self._name in ways else "library"
        self.taken.add(found)
        return ways[found]


def grouped(values: torch.Tensor, group: int, bits: int) -> QuantizedWeight:
    """Codes as checkpoints have them, in groups larger than those of our own."""
    outputs, inputs = values.shape
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, device=values.device)
    scales = (torch.rand(outputs, inputs // group, device=values.device) / 2**bits).bfloat16().float()
    minima = -128 * scales if bits == 8 else (-scales * 7).bfloat16().float()
    return QuantizedWeight(codes, scales, minima, bits, values.dtype)


def in_blocks(values: torch.Tensor, group: int) -> Fp8Weight:
    rows = quantize_fp8(values.reshape(-1, group))
    return Fp8Weight(rows.values.view(values.shape), rows.scales.view(len(values), -1), values.dtype)


FORMS = {
    "dense": DenseWeight,
    "8 bits": lambda values: quantize(values, 8),
    "4 bits": lambda values: quantize(values, 4),
    "8 bits in the largest groups": lambda values: grouped(values, math.gcd(128, values.shape[1]), 8),
    "4 bits in the largest groups": lambda values: grouped(values, math.gcd(128, values.shape[1]), 4),
    "FP8": quantize_fp8,
    "FP8 in blocks": lambda values: in_blocks(values, math.gcd(128, values.shape[1])),
}
WAYS = ("library", "streaming", "rounding")


@few
@given(
    st.sampled_from(list(FORMS)),
    st.sampled_from(WAYS),
    st.sampled_from([1, 50, 64, 130]),
    st.sampled_from([16, 32, 48, 64, 96, 128, 384, 2048]),
    st.sampled_from([0, 1, 3, 16, 17, 40, 70]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_products(form, way, outputs, inputs, rows, dtype, has_bias, is_wide):
    torch.manual_seed(rows + inputs)
    weight: Weight = FORMS[form]((torch.randn(outputs, inputs) * inputs**-0.5).to(DEVICE, dtype))
    bias = torch.randn(outputs).to(DEVICE, dtype) if has_bias else None
    x = torch.randn(rows, inputs).to(DEVICE, dtype)
    product = GpuProduct(Only(way), weight, bias, dtype, torch.float32 if is_wide else None)
    expected = x.float() @ weight.dense().float().T + (0 if bias is None else bias.float())
    for _ in range(2):
        found = product(x)
        assert not product._arrivals.any(), "the interpreter's programs, one after the other, need no count"
        assert found.dtype is (torch.float32 if is_wide else dtype)
        assert (found.float() - expected).norm() <= {torch.float32: 1e-5}.get(dtype, 0.01) * expected.norm()


@few
@given(
    st.sampled_from([form for form in FORMS if form != "dense"]),
    st.sampled_from([16, 48, 64, 128, 1152]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 69), max_size=9),
)
def test_matrices_are_written_out_as_they_are(form, inputs, dtype, rows):
    torch.manual_seed(inputs)
    weight = FORMS[form](torch.randn(70, inputs).to(DEVICE, dtype))
    there, _ = on_device(weight)
    expected = weight.dense()
    assert torch.equal(dequantize(there, dtype), expected)
    if rows:
        chosen = torch.tensor(rows, device=DEVICE)
        assert torch.equal(dequantize(there, dtype, chosen), expected[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_as_fp8(dtype):
    torch.manual_seed(0)
    x = (torch.randn(5, 3000) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None]).to(DEVICE, dtype)
    x[4, 7] = torch.nan
    values, scales = rows_to_fp8(x)
    back = values.float() * scales
    assert back[4].isnan().any() and not back[3].any()
    assert ((back - x.float())[:3].abs() <= x.float()[:3].abs() / 16 + scales[:3] / 500).all()
    assert (values[:3].float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_fp8_by_fp8(has_bias):
    torch.manual_seed(0)
    weight = quantize_fp8(torch.randn(48, 96).to(DEVICE, torch.bfloat16))
    bias = torch.randn(48).to(DEVICE, torch.bfloat16) if has_bias else None
    product = GpuProduct(Only("rounding"), weight, bias, torch.bfloat16)
    # The interpreter has no bfloat16.
    x = torch.randn(7, 96).to(DEVICE, torch.bfloat16 if HAS_GPU else torch.float32)
    expected = x.float() @ weight.dense().float().T + (0 if bias is None else bias.float())
    found = product(x)
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).norm() < 0.06 * expected.norm()


def test_sizes_that_no_kernel_takes_are_dense():
    weight = QuantizedWeight(
        torch.randint(0, 16, (5, 24), dtype=torch.uint8),
        torch.ones(5, 3),
        -torch.ones(5, 3),
        4,
        torch.float32,
    )
    taken = Only("streaming")
    product = GpuProduct(taken, weight, None, torch.float32)
    x = torch.randn(3, 24)
    torch.testing.assert_close(product(x), x @ weight.dense().T)
    assert taken.taken == {"library"}


def test_codes_take_no_more_memory_than_their_bits():
    values = torch.randn(64, 256).to(DEVICE)
    for form, size in (("4 bits", 0.5), ("8 bits", 1), ("FP8", 1), ("4 bits in the largest groups", 0.5)):
        there, can_stream = on_device(FORMS[form](values))
        assert can_stream and there.values.nbytes == size * values.numel(), form


class Clock:
    """Takes what the named way is said to take."""

    def __init__(self, **times: float):
        self._times, self.asked = times, 0

    def ways(self) -> dict[str, object]:
        def way(name):
            def call(x):
                self.last = name
                return x * (2 if name == "wrong" else 1)

            return call

        return {name: way(name) for name in self._times}

    def __call__(self, call) -> float:
        call()
        self.asked += 1
        return self._times[self.last]


def test_the_fastest_way_is_taken_and_kept(tmp_path, caplog):
    file, clock = tmp_path / "new" / "products.json", Clock(library=3.0, slow=4.0, fast=2.0)
    ways = clock.ways()
    found = Choices(file, clock).fastest("one", ways, "library", lambda: torch.ones(2))
    assert found is ways["fast"] and clock.asked == 3
    again = Choices(file, clock)
    assert again.fastest("one", ways, "library", lambda: torch.ones(2)) is ways["fast"] and clock.asked == 3
    again.fastest("two", ways, "library", lambda: torch.ones(2))
    assert clock.asked == 6
    file.write_text('{"one": "gone"}')
    Choices(file, clock).fastest("one", ways, "library", lambda: torch.ones(2))
    assert clock.asked == 9
    for text in ("[", "[]"):
        file.write_text(text)
        assert Choices(file, clock).fastest("one", ways, "library", lambda: torch.ones(2)) is ways["fast"]
    assert not caplog.records


def test_a_way_that_is_wrong_or_fails_is_not_taken(caplog):
    clock = Clock(library=3.0, wrong=1.0)

    def fails(x):
        raise RuntimeError("out of resource")

    ways = {**clock.ways(), "fails": fails}
    found = Choices(None, clock).fastest("one", ways, "wrong", lambda: torch.ones(2))
    assert found is ways["library"] and clock.asked == 1
    assert (
        "wrong is not taken, since it is 1.41 of 1.41 off" in caplog.text and "out of resource" in caplog.text
    )
    with pytest.raises(RuntimeError, match="out of resource"):
        Choices(None, clock).fastest("two", {"fails": fails, **clock.ways()}, "wrong", lambda: torch.ones(2))


def test_a_matrix_of_zeros_is_measured_too(caplog):
    clock = Clock(library=3.0, fast=1.0)
    ways = clock.ways()
    assert Choices(None, clock).fastest("one", ways, "library", lambda: torch.zeros(2)) is ways["fast"]
    assert not caplog.records


def test_heads_never_write_themselves_out_for_many_rows():
    class Slow(Choices):
        def fastest(self, key, ways, unmeasured, make_x):
            assert int(key.split()[0]) <= 256
            return ways["library"]

    weight = quantize(torch.randn(40, 64).to(DEVICE), 8)
    head = GpuProduct(Slow(), weight, None, torch.float32, torch.float16)
    x = torch.randn(600, 64).to(DEVICE)
    torch.testing.assert_close(head(x), (x @ weight.dense().T).half(), atol=0.02, rtol=0.01)
    assert head._ways[-1] == head.by_streaming


def test_what_is_measured_without_a_place_is_used_all_the_same(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    clock = Clock(library=3.0, fast=1.0)
    choices, ways = Choices(tmp_path / "file" / "x.json", clock), clock.ways()
    for key in ("one", "two"):
        assert choices.fastest(key, ways, "library", lambda: torch.ones(2)) is ways["fast"]
    assert caplog.text.count("what was measured is not kept") == 1


def test_each_number_of_rows_has_a_way_of_its_own():
    class Named(Choices):
        def fastest(self, key, ways, unmeasured, make_x):
            rows = int(key.split()[0])
            assert make_x().shape == (rows, 16)
            return lambda x: torch.tensor(rows)

    product = GpuProduct(Named(), DenseWeight(torch.randn(4, 16)), None, torch.float32)
    given = (1, 16, 17, 256, 257, 1024, 5000)
    assert [int(product(torch.randn(n, 16))) for n in given] == [16, 16, 32, 256, 1024, 1024, 1024]
    assert ROWS[-1] == 1024
