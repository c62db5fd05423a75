"""A frozen generator: the same numbers for a seed and a name, on every machine and in every version.

The bits are SHAKE-128 of a text, so any language can make them. The normal variate is AS 241 (Wichura 1988,
PPND16), whose rational functions need only + − × ÷ and √, which IEEE 754 rounds alike everywhere; the logarithm of
its tails is a series of the same operations, because libm's differ in the last bit.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    F64 = npt.NDArray[np.float64]

__all__ = ["normal", "uniform"]

# fmt: off
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
     3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
     1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2, 7.86869131145613259100e-4,
     1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)
# fmt: on
_LN2 = 0.6931471805599453


def uniform(seed: int, name: str, count: int) -> F64:
    """``count`` float64 in (0, 1): the upper 53 bits of each 8 little-endian bytes of SHAKE-128, plus one half."""
    text = f"loraformat/1\n{seed}\n{name}".encode()
    bits = np.frombuffer(hashlib.shake_128(text).digest(8 * count), "<u8") >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, name: str, count: int) -> F64:
    """``count`` standard normal float64: the inverse distribution function of ``uniform``."""
    p = uniform(seed, name, count)
    q = p - 0.5
    r = 0.180625 - q * q
    out = q * _ratio(_CENTRE, r)
    outer = np.abs(q) > 0.425
    root = np.sqrt(-_log(np.minimum(p[outer], 1.0 - p[outer])))
    tail = np.where(root <= 5.0, _ratio(_TAIL, root - 1.6), _ratio(_FAR, root - 5.0))
    out[outer] = np.where(q[outer] < 0, -tail, tail)
    return out


def _ratio(polynomials: tuple[tuple[float, ...], tuple[float, ...]], x: F64) -> F64:
    top, bottom = (np.zeros_like(x), np.zeros_like(x))
    for a, b in zip(*(reversed(p) for p in polynomials), strict=True):
        top, bottom = top * x + a, bottom * x + b
    return top / bottom


def _log(x: F64) -> F64:
    """ln x = e·ln 2 + 2·artanh((m − 1)/(m + 1)), m in [√½, √2): exact operations only; error below 2e-16."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(low, mantissa * 2.0, mantissa), exponent - low
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square, total = z * z, np.zeros_like(z)
    for k in range(25, 0, -2):
        total = total * square + 1.0 / k
    return exponent * _LN2 + 2.0 * z * total
