"""ComplexAdamW against torch.optim.AdamW and a scalar oracle; its noise; its state; parameter groups."""

from __future__ import annotations

import copy
import io
import math
import random

import pytest
import scipy.stats
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stablekern import use_backend
from stablekern._load import native_module
from stablekern.optim import ComplexAdamW, parameter_groups
from stablekern.optim.philox import normal, philox4x32

STEPS = 20


@pytest.fixture(autouse=True, params=["native", "torch", "triton"])
def backend(request, monkeypatch):
    """Every test runs on all implementations of the step."""
    if request.param == "triton":
        if request.node.get_closest_marker("interpreter_is_slow"):
            pytest.skip("thousands of launches or draws, 0.1 ms an operation: left to the other backends")
        round_as_a_gpu(monkeypatch)
    with use_backend(request.param):
        yield request.param


def round_as_a_gpu(monkeypatch):
    """Triton's interpreter cuts bfloat16 off; a GPU rounds to nearest."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def nearest(builder, source, target):
        if source.dtype.scalar.name == "fp32" and target.scalar.name == "bf16":
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view("uint16"), target.scalar)
        return cast(builder, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", nearest)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- an oracle that shares nothing with the package: python integers, floats and complex numbers ---------------------


def philox_oracle(counter, key):
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def to_float32(x):
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float32))


def normal_oracle(j, seed, step, parameter):
    """Normal number j of a stream, by the definition in the docstring."""
    counter = ((j // 4) % 2**32, (j // 4) >> 32, parameter, step % 2**32)
    words = philox_oracle(counter, (seed % 2**32, seed >> 32))
    a, b = words[j % 4 // 2 * 2 : j % 4 // 2 * 2 + 2]
    u = to_float32(to_float32(float(a)) / 2**32 + 2.0**-33)
    radius = math.sqrt(-2 * math.log(u))
    return radius * (math.sin if j % 2 else math.cos)(2 * math.pi * b / 2**32)


def step_oracle(p, m, v, g, t, noise, *, lr, betas, eps, weight_decay, temperature, noise_eps, max_noise_gain):
    """One coupled step of one number, real or complex."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * abs(g) ** 2
    s = math.sqrt(v / (1 - betas[1] ** t)) + eps
    cap = max_noise_gain if v > 0 else min(max_noise_gain, 1)
    gain = min(1 / (math.sqrt(s) + noise_eps), cap)
    p = p - lr * weight_decay * p - lr * (m / (1 - betas[0] ** t)) / s + math.sqrt(2 * temperature * lr) * gain * noise
    return p, m, v


# ---- helpers ---------------------------------------------------------------------------------------------------------


def parameters(shapes, dtype):
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def clone(params, dtype=None):
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def gradients(params, steps=STEPS):
    """Gradients of very different sizes from parameter to parameter."""
    return [[torch.randn_like(p) * 10.0 ** (2 * i - 2) for i, p in enumerate(params)] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        optimizer.step()
    return params


def error(params, exact):
    """The largest error relative to the largest entry of each parameter; NaN if anything is."""
    return max(
        float((p.detach().to(e.dtype) - e.detach()).abs().max() / e.detach().abs().max())
        for p, e in zip(params, exact, strict=True)
    )


class NoHostRead(TorchDispatchMode):
    """Fails on every op that hands a tensor's value to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name and "nonzero" not in name and "is_nonzero" not in name, name
        return func(*args, **(kwargs or {}))


# ---- philox ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert philox4x32(counter, key) == answer
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer
    assert native_module().philox4x32(*counter, *key) == answer  # the C++ that the kernels are made of


def test_normals_are_their_definition(backend):
    """Each within an ulp of the scalar oracle; also at the top of every key and counter word."""
    for start, seed, step, parameter in [(0, 0, 1, 0), (5, 2**64 - 1, 2**32 + 7, 2**32 - 1), (2**35 + 2, 12345, 99, 7)]:
        got = normal(start, 41, seed=seed, step=step, parameter=parameter, dtype=torch.float64)
        want = torch.tensor([normal_oracle(start + j, seed, step, parameter) for j in range(41)], dtype=torch.float64)
        # the oracle's angle is not reduced: 2 pi v has an error of an ulp of 2 pi, 4e-16 absolute in the cosine
        torch.testing.assert_close(got, want, rtol=1e-15, atol=4e-15)
        as_tensor = normal(start, 41, seed=seed, step=torch.tensor(step, dtype=torch.float64), parameter=parameter)
        error = (as_tensor.double() - got).abs() / ulp_of(got.float())
        # Torch rounds once. Float32 code: radius (log 0.9, halved by the root, and its rounding), sine or cosine 0.75,
        # and the product.
        assert error.max() <= (0.5 if backend == "torch" else 0.45 + 0.5 + 0.75 + 0.5 + 0.3)


def ulp_of(x):
    return (torch.nextafter(x.abs(), torch.tensor(torch.inf)) - x.abs()).double()


@pytest.mark.interpreter_is_slow
def test_native_normals_on_a_long_stream(backend):
    """A million of them, where the few that are worst would show."""
    stream = {"seed": 3, "step": 5, "parameter": 2}
    wide = normal(7, 1_000_001, dtype=torch.float64, **stream)
    error = (normal(7, 1_000_001, **stream).double() - wide).abs() / ulp_of(wide.float())
    assert error.max() <= (0.5 if backend == "torch" else 2.5)
    assert (error > 2).double().mean() < 2e-4


# Blocks of the stream with seed 3, step 5, parameter 2 that have an angle within 11 / 2^32 of a turn from a quarter
# turn, on either side, and two with u next to 1.
_CORNERS = (
    *(13650277, 26399588, 29648753, 40148070, 70055408, 70115222, 76181754, 76955195, 78719530, 105141013, 119172076),
    *(102397821, 140518518),
)


def test_native_normals_at_the_corners_of_box_muller(backend):
    """Where a sine, or the logarithm, is small and its relative error would show."""
    stream = {"seed": 3, "step": 5, "parameter": 2}
    for block in _CORNERS:
        wide = normal(4 * block, 4, dtype=torch.float64, **stream)
        error = (normal(4 * block, 4, **stream).double() - wide).abs() / ulp_of(wide.float())
        assert error.max() <= (0.5 if backend == "torch" else 2.5)


def test_a_stream_may_be_cut_anywhere():
    long = normal(2, 70_000, seed=3, step=4, parameter=5)  # longer than one chunk
    assert torch.equal(long[65_000:65_007], normal(65_002, 7, seed=3, step=4, parameter=5))
    whole = normal(0, 1000, seed=3, step=4, parameter=5)
    cuts = [0, 1, 3, 4, 6, 500, 501, 999, 1000]
    pieces = [normal(a, b - a, seed=3, step=4, parameter=5) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(pieces), whole)
    assert normal(7, 0, seed=0, step=0, parameter=0).shape == (0,)


def test_box_muller_at_its_corners():
    """The largest and smallest words: finite, at most 6.77, exact zeros at the quarter turns."""
    from stablekern.optim.philox import _box_muller

    first = torch.tensor([0, 1, 2**31, 2**32 - 1])
    for quarter, expected in enumerate([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)]):
        cosine, sine = _box_muller(first, torch.full((4,), quarter << 30))
        radius = (cosine.square() + sine.square()).sqrt()
        assert radius.isfinite().all() and 6.7 < radius.max() < 6.77
        torch.testing.assert_close(cosine, radius * expected[0], rtol=0, atol=0)
        torch.testing.assert_close(sine, radius * expected[1], rtol=0, atol=0)


@pytest.mark.interpreter_is_slow
def test_noise_statistics():
    """KS against N(0, 1), chi-square of the variance, lag correlations, and independence of streams: 4e5 draws."""
    n = 400_000
    z = normal(0, n, seed=11, step=3, parameter=2, dtype=torch.float64)
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert 1e-3 < scipy.stats.chi2.cdf(float(z.square().sum()), n) < 1 - 1e-3
    for other in (
        z.roll(1),
        z.roll(2),
        z.roll(4),
        normal(0, n, seed=12, step=3, parameter=2, dtype=torch.float64),
        normal(0, n, seed=11, step=4, parameter=2, dtype=torch.float64),
        normal(0, n, seed=11, step=3, parameter=3, dtype=torch.float64),
    ):
        for a, b in ((z, other), (z.square() - 1, other.square() - 1)):
            assert abs(float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())) < 4 / math.sqrt(n)


# ---- equality with torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}, {"eps": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_equals_torch_adamw(dtype, options):
    """Real parameters under either rule, complex ones uncoupled: no further from exact than twice torch's error."""
    start = parameters([(3, 5), (7,), ()], dtype)
    grads = gradients(start)
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    theirs = clone(start)
    run(torch.optim.AdamW(theirs, foreach=False, **options), theirs, grads)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = clone(start, wide)
    run(torch.optim.AdamW(exact, foreach=False, **options), exact, grads)
    for coupled in (False,) if dtype.is_complex else (False, True):
        ours = clone(start)
        run(ComplexAdamW(ours, coupled=coupled, **options), ours, grads)
        # each step rounds the parameter three times: half an ulp each, twice as generous where torch is the oracle
        assert error(ours, exact) <= 2 * error(theirs, exact) + 3 * STEPS * torch.finfo(dtype).eps


def test_coupled_equals_the_oracle_with_noise():
    """Real, complex and paired parameters with every option off its default, per element in plain Python."""
    options = {
        "lr": 0.02,
        "betas": (0.8, 0.95),
        "eps": 1e-3,
        "weight_decay": 0.3,
        "temperature": 0.05,
        "noise_eps": 0.01,
        "max_noise_gain": 2.5,
    }
    real, z, re, im = (
        nn.Parameter(torch.randn(6, dtype=dtype)) for dtype in (torch.float64, torch.complex128, *[torch.float64] * 2)
    )
    optimizer = ComplexAdamW([{"params": [real]}, {"params": [z, re, im]}], seed=2**40 + 9, pairs=[(re, im)], **options)
    grads = [[torch.randn_like(p) * 10.0**-i for i, p in enumerate((real, z, re, im))] for _ in range(5)]
    for step in grads:
        for g in step:
            g[0] = 0.0  # an element without a gradient history
    want = [[*real.tolist()], [*z.tolist()], [complex(a, b) for a, b in zip(re.tolist(), im.tolist(), strict=True)]]
    moments = [[[0.0, 0.0] for _ in range(6)] for _ in range(3)]
    for t, (g_real, g_z, g_re, g_im) in enumerate(grads, 1):
        all_g = [g_real.tolist(), g_z.tolist(), torch.complex(g_re, g_im).tolist()]
        for k in range(3):
            for i in range(6):
                lanes = [normal_oracle(2 * i + part if k else i, 2**40 + 9, t, k) for part in (0, 1)]
                noise = complex(*lanes) if k else lanes[0]
                want[k][i], *moments[k][i] = step_oracle(want[k][i], *moments[k][i], all_g[k][i], t, noise, **options)
    run(optimizer, [real, z, re, im], grads)
    torch.testing.assert_close(real.detach(), torch.tensor(want[0], dtype=torch.float64), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(z.detach(), torch.tensor(want[1], dtype=torch.complex128), rtol=1e-12, atol=1e-13)
    pair = torch.complex(re.detach(), im.detach())
    torch.testing.assert_close(pair, torch.tensor(want[2], dtype=torch.complex128), rtol=1e-12, atol=1e-13)


def test_coupled_rule_is_rotation_equivariant_and_torchs_is_not():
    start = parameters([(40,)], torch.complex128)
    grads = gradients(start)
    phase = torch.polar(torch.tensor(1.0).double(), torch.tensor(0.7).double())
    for coupled, equivariant in ((True, True), (False, False)):
        plain, turned = clone(start), [nn.Parameter(p.detach() * phase) for p in start]
        run(ComplexAdamW(plain, coupled=coupled), plain, grads)
        run(ComplexAdamW(turned, coupled=coupled), turned, [[g * phase for g in step] for step in grads])
        same = torch.allclose(turned[0], plain[0] * phase, rtol=0, atol=1e-13)
        assert same == equivariant


def test_a_pair_is_the_complex_parameter():
    """Same numbers, same noise, one shared second moment; a missing gradient of one half counts as 0."""
    z = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    re, im = nn.Parameter(z.detach().real.clone()), nn.Parameter(z.detach().imag.clone())
    native = ComplexAdamW([z], temperature=1e-3)
    paired = ComplexAdamW([im, re][::-1], temperature=1e-3, pairs=[(re, im)])
    for k in range(6):
        g = torch.randn_like(z)
        if k % 2:
            g = g.real.to(g.dtype)
        z.grad, re.grad, im.grad = g, g.real.clone(), None if k % 2 else g.imag.clone()
        native.step()
        paired.step()
    assert torch.equal(torch.complex(re, im), z)
    assert paired.state[re]["exp_avg_sq"] is paired.state[im]["exp_avg_sq"]
    assert native.state[z]["exp_avg_sq"].dtype == torch.float32
    uncoupled = ComplexAdamW([im, re], coupled=False, pairs=[(re, im)], temperature=1e-3)
    im.grad = None
    before = im.detach().clone()
    uncoupled.step()
    assert torch.equal(im, before) and not uncoupled.state[im]  # two reals: no gradient, no step


def test_uncoupled_noise_is_the_same_draw():
    z = nn.Parameter(torch.zeros(7, dtype=torch.complex64))
    re, im = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(7))
    native = ComplexAdamW([z], temperature=1.0, coupled=False)
    paired = ComplexAdamW([re, im], temperature=1.0, coupled=False, pairs=[(re, im)])
    z.grad, re.grad, im.grad = torch.zeros_like(z), torch.zeros(7), torch.zeros(7)
    native.step()
    paired.step()
    assert torch.equal(torch.complex(re, im), z) and float(z.detach().abs().min()) > 0


@pytest.mark.parametrize("coupled", [True, False])
def test_gradients_that_are_conjugate_views(coupled):
    """Torch conjugates by a flag, which who reads the memory must heed."""
    z, twin = (nn.Parameter(torch.ones(9, dtype=torch.complex64)) for _ in range(2))
    ours, plain = (ComplexAdamW([p], coupled=coupled) for p in (z, twin))
    for g in torch.randn(3, 9, dtype=torch.complex64):
        z.grad, twin.grad = g.conj(), g.conj().resolve_conj()
        assert z.grad.is_conj()
        ours.step()
        plain.step()
    assert torch.equal(z, twin)


def test_autograd_learns_of_a_step():
    """A graph that saved the weights must not silently go backwards through those behind the step."""
    p = nn.Parameter(torch.randn(5))
    optimizer = ComplexAdamW([p])
    late = p.square().sum()
    p.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_knows_nothing_of_torchs_generator_or_the_layout():
    def trained(seed, channels_last=False):
        torch.manual_seed(seed)
        start = torch.zeros(2, 3, 4, 5)
        if channels_last:
            start = start.contiguous(memory_format=torch.channels_last)
        p, q = nn.Parameter(start), nn.Parameter(torch.zeros(9))
        optimizer = ComplexAdamW([p, q], temperature=0.1, seed=5)
        run(optimizer, [p, q], [[torch.ones_like(p), torch.ones_like(q)]] * 3)
        return p.detach(), q.detach()

    state = torch.get_rng_state()
    reference = trained(0)
    assert torch.equal(trained(1)[0], reference[0])
    torch.testing.assert_close(trained(0, channels_last=True)[0], reference[0], rtol=0, atol=0)
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    trained(0)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(state)
    # another id, another stream: q is no prefix of p's noise
    assert not torch.allclose(reference[1], reference[0].flatten()[:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("max_noise_gain", [0.0, 0.3, 1.0, 30.0, math.inf])
def test_noise_gain_is_bounded(dtype, max_noise_gain):
    """kappa of every element, for v = 0 and over 40 decades of v."""
    temperature, lr = 0.5, 1e-3
    p = nn.Parameter(torch.zeros(43, dtype=dtype))
    p.grad = torch.cat((torch.zeros(2), torch.logspace(-20, 18, 39), torch.tensor([1e-30, 1e-28]))).to(dtype)
    quiet, noisy = (
        ComplexAdamW([q], lr=lr, weight_decay=0.0, max_noise_gain=max_noise_gain, temperature=T, seed=1)
        for q, T in ((nn.Parameter(p.detach().clone()), 0.0), (p, temperature))
    )
    quiet.param_groups[0]["params"][0].grad = p.grad
    quiet.step()
    noisy.step()
    drawn = torch.view_as_real(p.detach()) if dtype.is_complex else p.detach()[:, None]
    drift = quiet.param_groups[0]["params"][0].detach()
    drift = torch.view_as_real(drift) if dtype.is_complex else drift[:, None]
    z = normal(0, drawn.numel(), seed=1, step=1, parameter=0).view_as(drawn)
    kappa = ((drawn - drift).double() / (z.double() * math.sqrt(2 * temperature * lr)))[:, 0]
    s = p.grad.abs().double() + 1e-8
    cap = torch.where(noisy.state[p]["exp_avg_sq"] == 0, min(max_noise_gain, 1.0), max_noise_gain).double()
    assert int((noisy.state[p]["exp_avg_sq"] == 0).sum()) == 4
    assert bool((kappa <= cap * (1 + 1e-3)).all())
    # float32: the difference of two numbers of size lr, over noise of size 0.03
    torch.testing.assert_close(kappa, torch.minimum((s.sqrt() + 1e-8).reciprocal(), cap), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_dead_parameter_stays_where_it_is(dtype):
    """Ten steps without a gradient at T = 1e-5: plain SGLD noise, |p| < 10 sqrt(2 T lr) = 0.0015 and not 10."""
    unit = math.sqrt(2 * 1e-5 * 1.2e-3)
    for gain in (1.0, 1e4):
        p = nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = ComplexAdamW([p], lr=1.2e-3, temperature=1e-5, max_noise_gain=gain, weight_decay=0.0)
        run(optimizer, [p], [[torch.zeros_like(p)]] * 10)
        assert float(p.detach().abs().max()) <= 10 * unit
        parts = torch.view_as_real(p.detach()).flatten() if dtype.is_complex else p.detach()
        walk = sum(normal(0, parts.numel(), seed=0, step=t, parameter=0) for t in range(1, 11))
        torch.testing.assert_close(parts, unit * walk, rtol=1e-5, atol=1e-9)


@pytest.mark.interpreter_is_slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_stationary_variance(dtype):
    """k |p|^2 / 2 with v held at 4: p <- (1 - lr k / s) p + sqrt(2 T lr / s) n has variance T/k / (1 - lr k / 2s)."""
    n, k, temperature, lr, v = 6_000, 0.7, 0.3, 0.4, 4.0
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = ComplexAdamW(
        [p], lr=lr, betas=(0.0, 0.5), eps=1e-12, weight_decay=0.0, temperature=temperature, noise_eps=0.0, seed=3
    )
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(2000.0)  # 0.5^2000 = 0: no bias correction
    for _ in range(75):  # (1 - 0.14)^(2 * 75) = 1e-10 of the start is left
        p.grad = k * p.detach()
        optimizer.state[p]["exp_avg_sq"].copy_(2.0 * v - p.grad.abs().square())
        optimizer.step()
    s = math.sqrt(v)
    exact = temperature / k / (1 - lr * k / (2 * s))
    parts = torch.view_as_real(p.detach()).flatten() if dtype.is_complex else p.detach()
    assert 1e-3 < scipy.stats.chi2.cdf(float(parts.square().sum()) / exact, parts.numel()) < 1 - 1e-3
    assert scipy.stats.kstest(parts.numpy() / math.sqrt(exact), "norm").pvalue > 1e-3


def test_temperature_and_lr_as_tensors():
    start = parameters([(4, 3)], torch.complex64)
    grads = gradients(start)
    plain, tensors = clone(start), clone(start)
    run(ComplexAdamW(plain, lr=0.01, temperature=0.1), plain, grads)
    lr, temperature = torch.tensor(0.01, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    run(ComplexAdamW(tensors, lr=lr, temperature=temperature, capturable=True), tensors, grads)
    torch.testing.assert_close(tensors, plain, rtol=1e-6, atol=1e-7)
    frozen = ComplexAdamW(tensors, lr=torch.tensor(0.0), temperature=0.1)  # warm-up from 0: no step, no 0/0
    before = clone(tensors)
    tensors[0].grad[0, 0] = 0
    frozen.step()
    assert torch.equal(tensors[0], before[0])


# ---- state -----------------------------------------------------------------------------------------------------------


def everything():
    """One of each kind of parameter, and an optimizer with noise, pairs and groups."""
    params = [
        nn.Parameter(torch.randn(3, 4)),
        nn.Parameter(torch.randn(5, dtype=torch.complex64)),
        nn.Parameter(torch.randn(4)),
        nn.Parameter(torch.randn(4)),
        nn.Parameter(torch.randn(6).bfloat16()),
        nn.Parameter(torch.randn((), dtype=torch.float64)),
    ]

    def build(values, **options):
        groups = [{"params": values[:1], "lr": 0.05}, {"params": values[1:], "weight_decay": 0.2}]
        return ComplexAdamW(groups, temperature=0.01, seed=77, amsgrad=True, pairs=[(values[2], values[3])], **options)

    return params, build


def test_a_pickle_of_an_older_version_gets_the_options_that_it_lacks():
    p = nn.Parameter(torch.randn(3))
    saved = ComplexAdamW([p], capturable=True).__getstate__()
    for key in ("capturable", "max_noise_gain"):
        del saved["param_groups"][0][key]
    again = ComplexAdamW.__new__(ComplexAdamW)
    again.__setstate__(saved)
    assert again.param_groups[0]["capturable"] is True and again.param_groups[0]["max_noise_gain"] == 1.0


@pytest.mark.parametrize("through_a_file", [False, True])
def test_resume_is_bit_identical(through_a_file):
    params, build = everything()
    grads = gradients(params)
    optimizer = build(params)
    run(optimizer, params, grads[:8])
    middle, saved = clone(params), optimizer.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    resumed = build(middle)
    resumed.param_groups[0]["seed"] = 0  # loading restores the seed, the learning rate and the temperature
    resumed.param_groups[0]["lr"] = 1.0
    resumed.load_state_dict(saved)
    run(optimizer, params, grads[8:])
    run(resumed, middle, grads[8:])
    for a, b in zip(params, middle, strict=True):
        assert torch.equal(a, b)
    assert float(resumed.state[middle[1]]["step"]) == STEPS
    assert resumed.state[middle[4]]["master"].dtype == torch.float32
    fresh = clone(middle)
    other = build(fresh)
    other.load_state_dict(saved)
    for group in other.param_groups:
        group["seed"] = 78
    run(other, fresh, grads[:1])
    assert not torch.equal(fresh[0], run(resumed, middle, grads[:1])[0])


def test_copies_and_pickles_go_on_alike():
    params, build = everything()
    grads = gradients(params)
    optimizer = build(params)
    run(optimizer, params, grads[:3])
    holder = copy.deepcopy({"params": params, "optimizer": optimizer})
    run(optimizer, params, grads[3:])
    run(holder["optimizer"], holder["params"], grads[3:])
    for a, b in zip(params, holder["params"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_state_is_exchanged_with_torch(dtype):
    start = parameters([(3, 5), (7,)], dtype)
    grads = gradients(start)
    ours, theirs = clone(start), clone(start)
    own = ComplexAdamW(ours, coupled=False, lr=0.01)
    foreign = torch.optim.AdamW(theirs, lr=0.01)
    run(own, ours, grads[:5])
    run(foreign, theirs, grads[:5])
    crossed, crossed_back = clone(ours), clone(theirs)
    to_torch, from_torch = torch.optim.AdamW(crossed), ComplexAdamW(crossed_back, coupled=False, seed=4)
    to_torch.load_state_dict(copy.deepcopy(own.state_dict()))
    from_torch.load_state_dict(foreign.state_dict())
    assert from_torch.param_groups[0]["seed"] == 4 and from_torch.param_groups[0]["lr"] == 0.01
    reference = run(own, ours, grads[5:])
    for params, optimizer in ((crossed, to_torch), (crossed_back, from_torch)):
        torch.testing.assert_close(run(optimizer, params, grads[5:]), reference, rtol=1e-5, atol=1e-6)
    # two real second moments are added up into |g|^2
    coupled = ComplexAdamW(crossed_back, coupled=True)
    coupled.load_state_dict(foreign.state_dict())
    v = foreign.state[theirs[0]]["exp_avg_sq"]
    assert torch.equal(coupled.state[crossed_back[0]]["exp_avg_sq"], v.real + v.imag if dtype.is_complex else v)
    assert coupled.state[crossed_back[0]]["exp_avg"].data_ptr() != foreign.state[theirs[0]]["exp_avg"].data_ptr()


def test_moments_kept_as_real_views_are_folded():
    """An optimizer that shares |g|^2 keeps it in both places of (..., 2), and once for the two halves of a pair."""
    z = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    re, im = parameters([(5,), (5,)], torch.float32)
    m, v = torch.randn(3, 4, 2), torch.rand(3, 4)
    shared = torch.rand(5)
    moments = [
        {"step": 7, "exp_avg": m, "exp_avg_sq": v[..., None].expand(3, 4, 2).clone()},
        {"step": 7, "exp_avg": torch.randn(5), "exp_avg_sq": shared},
        {"step": 7, "exp_avg": torch.randn(5), "exp_avg_sq": shared},
    ]
    group = {
        "lr": 2e-3,
        "betas": (0.8, 0.9),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "temperature": 1e-4,
        "params": [0, 1, 2],
    }
    saved = {"state": dict(enumerate(moments)), "param_groups": [group]}
    ours = ComplexAdamW([z, re, im], pairs=[(re, im)])
    ours.load_state_dict(saved)
    assert torch.equal(ours.state[z]["exp_avg"], torch.view_as_complex(m))
    assert torch.equal(ours.state[z]["exp_avg_sq"], v)
    assert torch.equal(ours.state[re]["exp_avg_sq"], shared)
    assert ours.state[im]["exp_avg_sq"] is ours.state[re]["exp_avg_sq"]
    assert ours.param_groups[0]["temperature"] == 1e-4 and float(ours.state[z]["step"]) == 7
    moments[0]["exp_avg_sq"][0, 0, 1] += 1
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"must hold \|g\|\^2 twice: got different entries"):
        ours.load_state_dict(saved)
    torch.testing.assert_close(ours.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_torch_state_of_a_pair_is_folded_and_ours_is_not_shared():
    re, im = parameters([(4,), (4,)], torch.float32)
    foreign = torch.optim.AdamW([re, im])
    run(foreign, [re, im], gradients([re, im], 3))
    ours = ComplexAdamW([re, im], pairs=[(re, im)])
    ours.load_state_dict(foreign.state_dict())
    total = foreign.state[re]["exp_avg_sq"] + foreign.state[im]["exp_avg_sq"]
    assert torch.equal(ours.state[re]["exp_avg_sq"], total)
    assert ours.state[im]["exp_avg_sq"] is ours.state[re]["exp_avg_sq"]
    saved = ours.state_dict()["state"]
    assert saved[0]["exp_avg_sq"].data_ptr() != saved[1]["exp_avg_sq"].data_ptr()
    again = ComplexAdamW([re, im], pairs=[(re, im)])
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.state[im]["exp_avg_sq"], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_through_a_float32_copy(dtype):
    """Steps far below half an ulp add up; what is written from outside is kept."""
    p, q = nn.Parameter(torch.ones(8, dtype=dtype)), nn.Parameter(torch.ones(8))
    low, full = (ComplexAdamW([x], lr=5e-5, weight_decay=0.0, temperature=1e-9) for x in (p, q))
    run(low, [p], [[torch.ones(8)]] * 200)
    run(full, [q], [[torch.ones(8)]] * 200)
    assert torch.equal(p, q.to(dtype)) and float(p.detach().max()) < 1.0
    with torch.no_grad():
        p[:4] = 5.0
    run(low, [p], [[torch.zeros(8)]])
    assert torch.equal(p[:4], torch.full((4,), 5.0, dtype=dtype)) and float(p.detach()[4:].max()) < 1.0


# ---- skipping --------------------------------------------------------------------------------------------------------


def snapshot(optimizer, params):
    states = [value.clone() for p in params for value in optimizer.state[p].values()]
    return [p.detach().clone() for p in params] + states


def test_found_inf_leaves_every_bit_and_reads_nothing():
    params, build = everything()
    grads = gradients(params)
    optimizer = build(params)
    run(optimizer, params, grads[:4])
    before = snapshot(optimizer, params)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    with NoHostRead():
        optimizer.step(found_inf=torch.tensor(1.0))
    optimizer.found_inf = torch.tensor([2.0])  # a sum over devices, as GradScaler makes it
    optimizer.step()
    optimizer.step(found_inf=torch.tensor(0.0))  # either flag is enough
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, params), strict=True))


def test_skipping_equals_not_calling():
    params, build = everything()
    grads = gradients(params)
    flagged = clone(params)
    one, other = build(params), build(flagged)
    for t, step in enumerate(grads):
        run(one, params, [step])
        other.found_inf = torch.tensor(1.0)
        run(other, flagged, [[torch.full_like(p, math.inf) for p in flagged]] * (t % 3))
        other.found_inf = torch.tensor(0.0)
        run(other, flagged, [step])
    for a, b in zip(params, flagged, strict=True):
        assert torch.equal(a, b)


def test_step_reads_nothing():
    params, build = everything()
    optimizer = build(params)
    with NoHostRead():
        run(optimizer, params, gradients(params, 3))
    assert all(p.isfinite().all() for p in params)


def test_grad_scale_divides():
    start = parameters([(4,)], torch.complex64)
    grads = gradients(start)
    plain, scaled = clone(start), clone(start)
    run(ComplexAdamW(plain), plain, grads)
    optimizer = ComplexAdamW(scaled)
    optimizer.grad_scale = torch.tensor(1024.0)
    run(optimizer, scaled, [[1024.0 * g for g in step] for step in grads])
    assert torch.equal(plain[0], scaled[0])


def test_closure_and_scheduler():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = ComplexAdamW([("weight", p)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(30):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0] and optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"lr": -1.0}, ValueError, "`lr`"),
        ({"lr": math.nan}, ValueError, "`lr`"),
        ({"lr": math.inf}, ValueError, "`lr`"),
        ({"lr": "fast"}, TypeError, "`lr`"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "`lr`"),
        ({"lr": torch.ones(2)}, ValueError, "0-d"),
        ({"temperature": -1e-9}, ValueError, "`temperature`"),
        ({"betas": (0.9, 1.0)}, ValueError, r"\[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"\[0, 1\)"),
        ({"betas": 0.9}, ValueError, r"\[0, 1\)"),
        ({"eps": 0.0}, ValueError, "`eps`"),
        ({"weight_decay": -1.0}, ValueError, "`weight_decay`"),
        ({"noise_eps": -1.0}, ValueError, "`noise_eps`"),
        ({"max_noise_gain": math.nan}, ValueError, "`max_noise_gain`"),
        ({"seed": -1}, ValueError, "`seed`"),
        ({"seed": 2**64}, ValueError, "`seed`"),
        ({"seed": 1.5}, TypeError, "`seed`"),
        ({"coupled": "yes"}, ValueError, "`coupled`"),
    ],
)
def test_bad_options(options, kind, text):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(kind, match=rf"stablekern\.optim\.ComplexAdamW: .*{text}"):
        ComplexAdamW([p], **options)
    optimizer = ComplexAdamW([p])
    optimizer.param_groups[0].update(options)  # a scheduler gone wrong
    p.grad = torch.ones(2)
    with pytest.raises(kind, match=text):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2)) and not optimizer.state


def test_bad_parameters_and_pairs():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    wide, z = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="floating point or complex: got torch.int64"):
        ComplexAdamW([nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(ValueError, match="listed twice"):
        ComplexAdamW([a, a])
    with pytest.raises(TypeError, match="order"):
        ComplexAdamW([{"params": {a, b}}])
    for pairs, kind, text in [
        ([(a, wide)], ValueError, "agree in shape"),
        ([(z, z)], ValueError, "must be real"),
        ([(a, a)], ValueError, "no other pair"),
        ([(a, b), (b, c)], ValueError, "no other pair"),
        ([(nn.Parameter(torch.ones(2)), b)], ValueError, "of one group"),
        ([(a, b, c)], TypeError, "two tensors"),
        ([a], TypeError, "two tensors"),
    ]:
        with pytest.raises(kind, match=text):
            ComplexAdamW([a, b, c, wide, z], pairs=pairs)
    with pytest.raises(ValueError, match="of one group"):
        ComplexAdamW([{"params": [a]}, {"params": [b]}], pairs=[(a, b)])
    by_group = ComplexAdamW([{"params": [a]}, {"params": [b, c], "pairs": [(c, b)]}])
    assert by_group.param_groups[1]["pairs"] == ((1, 0),)


@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (lambda group, table: group.update(lr=-1.0), ValueError, "`lr`"),
        (lambda group, table: group.update(temperature=-1.0), ValueError, "`temperature`"),
        (lambda group, table: group.update(betas=(0.9, 1.5)), ValueError, r"\[0, 1\)"),
        (
            lambda group, table: setattr(
                table, "grad", torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2), check_invariants=True)
            ),
            TypeError,
            "must be dense",
        ),
    ],
    ids=["lr", "temperature", "betas", "sparse"],
)
def test_a_fault_in_the_last_group_leaves_the_first_one_alone(spoil, kind, text):
    """In the middle of a training: values, moments and counters of every group stay, bit for bit."""
    p, table = nn.Parameter(torch.randn(3, dtype=torch.complex64)), nn.Parameter(torch.randn(4, 2))
    optimizer = ComplexAdamW([{"params": [p]}, {"params": [table]}], temperature=1e-3, amsgrad=True)
    run(optimizer, [p, table], gradients([p, table], 2))
    before = snapshot(optimizer, [p, table])
    p.grad, table.grad = torch.ones_like(p), torch.ones_like(table)
    spoil(optimizer.param_groups[1], table)
    with pytest.raises(kind, match=text):
        optimizer.step()
    torch.testing.assert_close(snapshot(optimizer, [p, table]), before, rtol=0, atol=0)


def test_a_group_that_is_refused_is_not_added():
    p, q, wide = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    optimizer = ComplexAdamW([p])
    for group, kind in [
        ({"params": [q, whole]}, TypeError),
        ({"params": [q, wide], "pairs": [(q, wide)]}, ValueError),
        ({"params": [q], "betas": (0.9, 1.0)}, ValueError),
        ({"params": [p]}, ValueError),
    ]:
        with pytest.raises(kind):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["params"] == [p]


def test_sparse_gradients_are_refused_before_anything_moves():
    p, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    optimizer = ComplexAdamW([p, table])
    p.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2), check_invariants=True)
    with pytest.raises(TypeError, match="must be dense"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state
    table.grad = None
    for flag in (True, torch.ones(2)):
        with pytest.raises(ValueError, match="`found_inf`"):
            optimizer.step(found_inf=flag)


def test_a_state_that_does_not_fit_changes_nothing():
    params, build = everything()
    optimizer = build(params)
    run(optimizer, params, gradients(params, 2))
    before = copy.deepcopy(optimizer.state_dict())

    def broken(change):
        saved = copy.deepcopy(before)
        change(saved)
        return saved

    lone = ComplexAdamW([nn.Parameter(torch.ones(1))])
    for saved, text in [
        ({"state": {}}, "must have the keys"),
        (None, "`state_dict` must be a dictionary"),
        (broken(lambda s: s["state"][0].update(step="3")), "`step` of parameter 0 must be a number >= 0"),
        (broken(lambda s: s["state"][0].update(step=torch.ones(4))), "`step` of parameter 0 must be a number >= 0"),
        (broken(lambda s: s["state"][0].update(step=-1.0)), "`step` of parameter 0 must be a number >= 0"),
        (broken(lambda s: s["state"][0].update(exp_avg="x")), "`exp_avg` of parameter 0 must be a tensor"),
        (broken(lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].to(torch.complex64))), "must be real"),
        (lone.state_dict(), r"groups of \[1, 5\]"),
        (broken(lambda s: s["state"][0].pop("exp_avg")), "must have the keys"),
        (broken(lambda s: s["state"][0].pop("max_exp_avg_sq")), "must have the keys"),
        (broken(lambda s: s["state"][1].update(exp_avg=torch.ones(6))), "parameter 0 must be"),
        (broken(lambda s: s["state"][1].update(exp_avg=torch.ones(5))), "must be complex"),
        (broken(lambda s: s["param_groups"][1].update(pairs=((2, 1),))), "must have the pairs"),
        (broken(lambda s: s["state"].pop(3)), "both halves"),
        (broken(lambda s: s["param_groups"][0].update(lr=-1.0)), "`lr`"),
    ]:
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(saved)
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)


# ---- sharding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_rank():
    """Make this process rank r of n, without the others: enough for what needs no communication."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def enter(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it keeps the mesh of the rank that this process was before
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        return dist.device_mesh.init_device_mesh("cpu", (size,))

    yield enter
    if dist.is_initialized():
        dist.destroy_process_group()


SHARDED = {
    "real": ([torch.float32], {}),
    "bf16": ([torch.bfloat16], {}),
    "complex": ([torch.complex64], {}),
    "uncoupled": ([torch.complex64], {"coupled": False}),
    "pair": ([torch.float32] * 2, {}),
    "uncoupled pair": ([torch.float32] * 2, {"coupled": False}),
}


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_take_the_same_steps(as_rank, kind, dim, size):
    """Each rank's part of a sharded parameter, bit for bit, noise included; rows that do not divide evenly."""
    from torch.distributed.tensor import DTensor, Shard

    dtypes, options = SHARDED[kind]
    start = [torch.randn(7, 6, 2, dtype=dtype) for dtype in dtypes]
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]

    def optimizer_of(params):
        pairs = [tuple(params)] if len(params) == 2 else None
        return ComplexAdamW(params, temperature=0.1, seed=8, pairs=pairs, **options)

    whole = clone(start)
    run(optimizer_of(whole), whole, grads)
    for rank in range(size):
        mesh = as_rank(rank, size)

        def shard(t, rank=rank):
            chunks = t.detach().chunk(size, dim)  # a last rank may hold nothing
            return chunks[rank].clone() if rank < len(chunks) else t.detach().narrow(dim, 0, 0)

        def part(t, mesh=mesh, shard=shard):
            chunk = shard(t)
            return DTensor.from_local(chunk, mesh, [Shard(dim)], run_check=False, shape=t.shape, stride=t.stride())

        params = [nn.Parameter(part(p)) for p in start]
        optimizer = optimizer_of(params)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = part(g)
            optimizer.step(found_inf=torch.tensor(0.0))
        for p, q in zip(params, whole, strict=True):
            assert torch.equal(p.detach().to_local(), shard(q))


def test_a_sharding_that_noise_cannot_follow_is_refused_before_anything_moves(as_rank):
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    p, mesh = nn.Parameter(torch.ones(3)), as_rank(0, 2)
    strided = DTensor.from_local(torch.ones(2, 3), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    q = nn.Parameter(strided)
    p.grad, q.grad = torch.ones(3), strided.clone()
    optimizer = ComplexAdamW([p, q], temperature=0.1)
    with pytest.raises(ValueError, match="noise needs parameters that are replicated or `Shard`ed"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state


# ---- parameter groups ------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A norm of the user's own, with a mark on the class."""

    _no_weight_decay = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.subnet_norm_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.batch = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.own = Scale()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.A_log = nn.Parameter(torch.ones(4, 2))
        self.A_log._no_weight_decay = True
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))
        self.gate = nn.Parameter(torch.ones(4))
        self.position_bias = nn.Parameter(torch.ones(3, 3))
        self.bag = nn.EmbeddingBag(5, 4)
        self.phase = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_parameter_groups():
    model = Block()
    decayed, exempt = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0.0
    assert set(decayed["names"]) == {
        "embed.weight",
        "bag.weight",
        "subnet_norm_proj.weight",
        "conv.parametrizations.weight.original1",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "phase",
    }
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p for group in (decayed, exempt) for name, p in zip(group["names"], group["params"], strict=True)}
    assert found.keys() == expected.keys() and all(found[name] is expected[name] for name in found)
    assert len(decayed["params"]) + len(exempt["params"]) == len(expected)
    undecayed = parameter_groups(model, 0.1, decay_embeddings=False)[1]["names"]
    assert set(undecayed) - set(exempt["names"]) == {"embed.weight", "bag.weight"}  # one shared with `head`
    for cls in (ComplexAdamW, torch.optim.AdamW):
        assert [g["weight_decay"] for g in cls(parameter_groups(model, 0.1)).param_groups] == [0.1, 0.0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parameter_groups_with_old_weight_norm_and_empty_groups(capsys):
    conv = nn.utils.weight_norm(nn.Conv1d(4, 4, 3))
    assert parameter_groups(conv, 0.1)[0]["names"] == ["weight_v"]
    assert capsys.readouterr() == ("", "")
    decayed, exempt = parameter_groups(nn.LayerNorm(3), 0.1, verbose=True)
    assert capsys.readouterr() == ("", "weight (3,): weight decay 0\nbias (3,): weight decay 0\n")
    assert decayed["params"] == [] and exempt["names"] == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_parameter_groups_misuse():
    with pytest.raises(TypeError, match="must be a torch.nn.Module: got list"):
        parameter_groups([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError, match="`weight_decay`"):
        parameter_groups(nn.Linear(2, 2), -0.1)
    with pytest.raises(ValueError, match="`weight` has no shape yet"):
        parameter_groups(nn.LazyLinear(2), 0.1)


def test_noise_follows_the_position_over_all_groups():
    rng = random.Random(0)
    sizes = [rng.randint(1, 9) for _ in range(5)]
    values = [nn.Parameter(torch.zeros(n)) for n in sizes]
    grouped = [nn.Parameter(torch.zeros(n)) for n in sizes]
    one = ComplexAdamW(values, temperature=1.0)
    two = ComplexAdamW([{"params": grouped[:2]}, {"params": grouped[2:3]}], temperature=1.0)
    two.add_param_group({"params": grouped[3:]})
    run(one, values, [[torch.zeros(n) for n in sizes]])
    run(two, grouped, [[torch.zeros(n) for n in sizes]])
    assert all(torch.equal(a, b) and bool((a != 0).all()) for a, b in zip(values, grouped, strict=True))
