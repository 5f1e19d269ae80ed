"""The Triton kernels that take lists of tensors: tables, block boundaries, alignment; against the native ones."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from stablekern import finite_stats, use_backend  # noqa: E402
from stablekern.optim import GradGuard  # noqa: E402
from stablekern.optim._adamw_step import COMPLEX, FIRST, PAIR, REAL, SECOND, adamw_step  # noqa: E402
from stablekern.optim.philox import normal, philox4x32  # noqa: E402
from stablekern.triton_kernels import tensor_lists  # noqa: E402
from stablekern.triton_kernels.philox import words  # noqa: E402

CPU = torch.device("cpu")


def test_columns_are_kept_and_the_oldest_dropped():
    tensor_lists._columns.clear()
    first = tensor_lists.column((3, -1, 2**40), CPU)
    assert first.tolist() == [3, -1, 2**40]
    assert tensor_lists.column([3, -1, 2**40], CPU) is first
    for i in range(tensor_lists._KEPT - 1):
        tensor_lists.column([i], CPU)
    assert tensor_lists.column((3, -1, 2**40), CPU) is first  # used again: now the youngest
    for i in range(tensor_lists._KEPT - 1):
        tensor_lists.column([-2 - i], CPU)
    assert len(tensor_lists._columns) == tensor_lists._KEPT
    assert tensor_lists.column((3, -1, 2**40), CPU) is first
    for i in range(tensor_lists._KEPT):
        tensor_lists.column([i], CPU)
    assert tensor_lists.column((3, -1, 2**40), CPU) is not first


@pytest.mark.parametrize("count", [0, 1, 64, 65, 130])
def test_columns_written_by_launches(count):
    numbers = tuple((-1) ** i * (i << (i % 50)) for i in range(count))
    assert tensor_lists.written_by_launches(numbers, CPU)[:count].tolist() == list(numbers)


def test_blocks_cover_every_tensor_once():
    where = tensor_lists.blocks([5, 0, 4, 9], 4, CPU)
    assert where.count == 6
    assert where.owners.tolist() == [0, 0, 2, 3, 3, 3]
    assert where.starts[:5].tolist() == [0, 2, 2, 3, 6]


@triton.jit
def _words(block_ptr, out_ptr, parameter: tl.int64, step: tl.int64, seed: tl.int64, BLOCK: tl.constexpr):
    block = tl.load(block_ptr + tl.arange(0, BLOCK))
    w0, w1, w2, w3 = words(block, block * 0 + parameter, block * 0 + step, seed)
    at = out_ptr + 4 * tl.arange(0, BLOCK)
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


def test_the_words_are_those_of_the_definition():
    block = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 17, 2**61 - 1, 99, 3])
    for parameter, step, seed in [(0, 1, 0), (2**32 - 1, 2**32 - 1, -1), (7, 99, 0x0123456789ABCDEF)]:
        out = torch.empty(8, 4, dtype=torch.int64)
        _words[(1,)](block, out, parameter, step, seed, BLOCK=8, enable_fp_fusion=True)
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        want = philox4x32((block & 0xFFFFFFFF, block >> 32, parameter, step), key)
        assert torch.equal(out, torch.stack(want, dim=1))


def test_normals_from_any_start():
    stream = {"seed": 2**64 - 3, "step": 2**32 + 7, "parameter": 2**32 - 1}
    for start in (0, 1, 2, 3, 1022, 2**35 + 3):
        with use_backend("torch"):
            exact = normal(start, 2100, dtype=torch.float64, **stream)
        with use_backend("triton"):
            wide, single = (normal(start, 2100, dtype=dtype, **stream) for dtype in (torch.float64, torch.float32))
        ulp = (torch.nextafter(exact.abs(), torch.tensor(math.inf)) - exact.abs()).double()
        assert ((wide - exact).abs() / ulp).max() <= 4
        rounded = exact.float().abs()
        ulp = (torch.nextafter(rounded, torch.tensor(math.inf)) - rounded).double()
        assert ((single.double() - exact).abs() / ulp).max() <= 2.5


def adamw_lists(dtype: torch.dtype, shift: int):
    """Units of every kind, some longer than a block, all in one call; (arguments, what is written)."""
    g = torch.Generator().manual_seed(3)
    kinds, values, grads, averages, squares, steps, offsets = [], [], [], [], [], [], []
    for kind in (REAL, COMPLEX, PAIR, FIRST, SECOND):
        for size in (1, 5, 512, 1024, 2500):
            own = dtype.to_complex() if kind == COMPLEX else dtype
            for _ in range(2 if kind == PAIR else 1):
                values.append(torch.randn(size, dtype=own, generator=g))
                grads.append(torch.randn(size, dtype=own, generator=g))
                averages.append(torch.randn(size, dtype=own, generator=g))
                steps.append(torch.tensor(4.0, dtype=torch.float64))
            squares.append(torch.rand(size, dtype=dtype, generator=g))
            kinds.append(kind)
            offsets.append(shift * (size % 7))
    squares[0].zero_(), grads[0].zero_()  # the gain of an element without a history
    largest = [torch.rand(square.shape, dtype=dtype, generator=g) for square in squares]
    largest[0].zero_()
    scalar = torch.tensor(1e-2, dtype=torch.float64)
    lists = (values, grads, averages, squares, largest, steps, [], [], kinds, list(range(len(kinds))), offsets)
    options = (0.9, 0.99, 1e-8, 0.1, 1e-3, 3.0, True, 0xDEADBEEF, 0xFEEDFACE)
    return (*lists, scalar, scalar, None, scalar * 3, *options), (*values, *averages, *squares, *largest, *steps)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_over_units_of_every_kind_and_size(dtype, shift):
    """As the native kernel takes it; `shift` puts the first element anywhere in a block of the stream."""
    written = []
    for backend in ("native", "triton"):
        arguments, changed = adamw_lists(dtype, shift)
        with use_backend(backend):
            adamw_step(*arguments)
        written.append(changed)
    eps = torch.finfo(dtype).eps
    for native, triton_ in zip(*written, strict=True):
        torch.testing.assert_close(triton_, native, rtol=8 * eps, atol=8 * eps)


def test_a_flag_stops_both_launches():
    arguments, changed = adamw_lists(torch.float32, 0)
    before = [tensor.clone() for tensor in changed]
    arguments = (*arguments[:13], torch.tensor(1.0, dtype=torch.float64), *arguments[14:])
    with use_backend("triton"):
        adamw_step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(changed, before, strict=True))


LISTS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]


def mixed_list(g: torch.Generator) -> list[torch.Tensor]:
    """All dtypes, several sizes around a block of 2048, aligned and not."""
    tensors = []
    for dtype in LISTS:
        whole = torch.randn(9000, dtype=torch.complex64, generator=g).to(dtype if dtype.is_complex else torch.complex64)
        whole = whole if dtype.is_complex else whole.real.contiguous().to(dtype)
        tensors += [whole[at : at + size].clone() if at % 2 == 0 else whole[at : at + size] for at, size in (
            (0, 0), (1, 1), (2, 2048), (3, 2049), (0, 6145),
        )]  # fmt: skip
    return tensors


def test_norms_and_products_of_a_mixed_list():
    for max_norm in (math.inf, 1.0):
        results = []
        for backend in ("native", "triton"):
            params = []
            for value in mixed_list(torch.Generator().manual_seed(1)):
                p = torch.nn.Parameter(torch.zeros_like(value))
                p.grad = value
                params.append(p)
            with use_backend(backend):
                norm = GradGuard(params, max_norm)()
            results.append((norm, [p.grad for p in params]))
        (native_norm, native), (norm, gradients) = results
        torch.testing.assert_close(norm, native_norm, rtol=1e-14, atol=0)
        for got, want in zip(gradients, native, strict=True):
            # the interpreter cuts bfloat16 off where a GPU rounds
            slack = 2.0**-7 if got.dtype == torch.bfloat16 else 2 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, want, rtol=slack, atol=0)


def test_stats_of_a_mixed_list():
    tensors = mixed_list(torch.Generator().manual_seed(2))
    for i, x in enumerate(tensors):
        if i % 3 == 0 and x.numel() > 1:
            x[-1], x[1] = math.nan, math.inf
    tensors += [torch.arange(-5000, 5000, dtype=dtype) for dtype in (torch.int16, torch.int32, torch.int64)]
    tensors += [torch.ones(3000, dtype=torch.bool), torch.full((10,), 200, dtype=torch.uint8)]
    with use_backend("native"):
        want = finite_stats(tensors)
    with use_backend("triton"):
        got = finite_stats(tensors)
    for name in ("nan", "inf", "count"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("min", "max", "mean"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-13, atol=1e-16, equal_nan=True)
