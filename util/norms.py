"""Norms that are safe at zero. As in the published code, 1e-8 is added after the root."""

from torch import Tensor

EPS = 1e-8


def l1norm(x: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """scale x / (sum |x| + 1e-8) along `dim`."""
    return x * (scale / (x.abs().sum(dim, keepdim=True) + EPS))


def inverse_l2(x: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """scale / (|x| + 1e-8) along `dim`, which is kept with size 1; 0 for a zero vector."""
    square = (x * x).sum(dim, keepdim=True)
    # At 0 the gradient of the root is infinite (Q21), and the quotient multiplies a gradient by 1e8
    # (Q26): after gradient clipping, the whole step would go into an empty region.
    empty = square == 0
    return (scale / (square.masked_fill(empty, 1).sqrt() + EPS)).masked_fill(empty, 0)


def l2norm(x: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """scale x / (|x| + 1e-8) along `dim`; a zero vector stays zero and passes no gradient."""
    return x * inverse_l2(x, dim, scale)
