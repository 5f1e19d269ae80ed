r"""Counter-based normals: the same number for the same (seed, step, parameter, element), wherever it is computed.

Philox4x32-10 turns a 128-bit counter and a 64-bit key into four 32-bit words by ten rounds of

$$ (x_0, x_1, x_2, x_3) \to (\mathrm{hi}(M_1 x_2) \oplus x_1 \oplus k_0,\; \mathrm{lo}(M_1 x_2),\;
   \mathrm{hi}(M_0 x_0) \oplus x_3 \oplus k_1,\; \mathrm{lo}(M_0 x_0)), \qquad k_i \to k_i + W_i, $$

with no state to carry, save or synchronise. A *stream* is one (seed, step, parameter). Its normal number $j$ comes from
word $j \bmod 4$ of the block with

    counter = (low half of j // 4, high half of j // 4, parameter, step mod 2^32),   key = (low, high half of seed);

words 0 and 1, and words 2 and 3, each make two normals by Box-Muller: $\sqrt{-2 \ln u}\,(\cos 2 \pi v, \sin 2 \pi v)$.
The even word $a$ gives $u = \mathrm{fl}(\mathrm{fl}(a)\,2^{-32} + 2^{-33})$, rounded to float32 twice as written, so
that float32 code starts from the same number; it lies in $[2^{-33}, 1]$, so $\ln u$ is finite and no normal exceeds
6.77. The odd word $b$ gives $v = b\,2^{-32}$, split into a quadrant and a rest within an eighth of a turn by integer
arithmetic, so that no cosine loses digits near a quarter turn. All else is float64, rounded once to the dtype asked
for.

Torch has no unsigned 32-bit arithmetic; words are int64 tensors in $[0, 2^{32})$ and products are split in halves of
16 bits, so that nothing overflows and every device computes the same integers.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 3.3 (Philox, its constants and the
known answers that the tests repeat); Box & Muller 1958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._registry import define, launcher

__all__ = ["normal", "philox4x32"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CPU_CHUNK = 1 << 15  # normals at a time on a CPU, so that the words of a chunk stay in the cache: 10 times as fast


def _product(word: Tensor | int, factor: int) -> tuple[Tensor | int, Tensor | int]:
    """High and low 32 bits of `word * factor`, both below 2^32, with no intermediate above 2^49."""
    low = (word & 0xFFFF) * factor
    rest = (word >> 16) * factor + (low >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]
) -> tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]:
    """Philox4x32-10: four random words per counter.

    **Arguments:**

    - `counter`: its four 32-bit words, least significant first, as int64 tensors that broadcast or as integers, each
        in [0, 2^32).
    - `key`: two integers in [0, 2^32).

    **Returns:** four words in [0, 2^32), int64 tensors of the broadcast shape (integers if all of `counter` are).
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(x0, _MULTIPLIERS[0])
        high1, low1 = _product(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 normals from two words, as the module's docstring defines them."""
    uniform = first.to(torch.float32).to(torch.float64).mul_(2.0**-32).add_(2.0**-33)
    radius = uniform.to(torch.float32).to(torch.float64).log_().mul_(-2.0).sqrt_()
    quarter = (second + (1 << 29)) >> 30
    angle = (second - (quarter << 30)).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    cosine, sine = angle.cos(), angle.sin()
    swapped = (quarter & 1) != 0
    cosine, sine = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    cosine = torch.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = torch.where((quarter & 2) != 0, -sine, sine)
    return cosine.mul_(radius), sine.mul_(radius)


def _fake(start, count, seed_low, seed_high, step, parameter, dtype):
    return step.new_empty((count,), dtype=dtype)


_op = define(
    "philox_normal(int start, int count, int seed_low, int seed_high, Tensor step, int parameter, ScalarType dtype)"
    " -> Tensor",
    fake=_fake,
)


def _not_in_half(start, count, seed_low, seed_high, step, parameter, dtype) -> str | None:
    return None if dtype in _check.REAL else f"a dtype other than float32, float64: {dtype}"


@launcher("philox_normal", device="cpu", backend="native", supports=_not_in_half)
def _(*arguments):
    output = _fake(*arguments)
    start, _, *stream, _ = arguments
    _load.native().philox_normal(start, *stream, output)
    return output


@launcher("philox_normal", device="cuda", backend="triton", supports=_not_in_half)
@launcher("philox_normal", device="cpu", backend="triton", supports=_not_in_half)
def _(*arguments):
    from stablekern.triton_kernels.philox import philox_normal

    output = _fake(*arguments)
    start, _, *stream, _ = arguments
    philox_normal(start, *stream, output)
    return output


@launcher("philox_normal", device="cuda", backend="torch")
@launcher("philox_normal", device="cpu", backend="torch")
def _(start, count, seed_low, seed_high, step, parameter, dtype):
    device = step.device
    chunk = _CPU_CHUNK if device.type == "cpu" else count
    pieces = []
    for at in range(start, start + count, max(chunk, 1)):
        stop = min(at + chunk, start + count)
        blocks = torch.arange(at // 4, -(-stop // 4), dtype=torch.int64, device=device)
        words = philox4x32((blocks & _WORD, blocks >> 32, parameter, step & _WORD), (seed_low, seed_high))
        normals = torch.stack((*_box_muller(*words[:2]), *_box_muller(*words[2:])), dim=-1).flatten()  # type: ignore[arg-type]
        pieces.append(normals[at % 4 : at % 4 + stop - at].to(dtype))
    return torch.cat(pieces) if pieces else step.new_empty((0,), dtype=dtype)


def normal(
    start: int,
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    parameter: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # (count,)
    """The normals `start`, ..., `start + count - 1` of the stream (`seed`, `step`, `parameter`).

    Independent N(0, 1) numbers that depend on nothing else: not on `start`, on how a stream is cut into calls, or on
    torch's generators.

    **Arguments:**

    - `start`, `count`: integers >= 0, `start + count` at most 2^63.
    - `seed`: integer in [0, 2^64). Keyword only.
    - `step`: integer, or an integer-valued 0-d tensor on `device`, which is not read by the host. Keyword only.
    - `parameter`: integer in [0, 2^32). Keyword only.
    - `dtype`, `device`: of the result, a floating-point dtype. Keyword only.

    **Returns:** a new tensor of shape (count,).

    **Accuracy:** the words behind the normals are exact on every device. In torch, a float64 evaluation but for the
    last ulp of `log`, `cos` and `sin`, rounded once; float32 normals of the native kernels are within 2 ulp of that
    but for one in 10,000, and within 3.
    """
    epoch = step.to(torch.int64) if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
    return _op(start, count, seed & _WORD, seed >> 32, epoch, parameter, dtype)
