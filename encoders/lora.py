"""Weight differences as low-rank factors."""

from __future__ import annotations

import torch


def factor(difference: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-rank approximation of a weight difference with the least squared error, as up and down factors.

    The singular vectors of the shorter side come from its Gram matrix, which is many times faster than a full
    decomposition of the long matrices of convolutions; the other factor is the projection onto them.

    Args:
        difference: (out, in) or a kernel (out, in, h, w).
        rank: rank of the factors, at most; never more than the matrix can have.

    Returns:
        Up (out, rank) and down (rank, in), for kernels (out, rank, 1, 1) and (rank, in, h, w).
    """
    matrix = difference.flatten(1).double()
    rank = min(rank, *matrix.shape)
    if matrix.shape[0] <= matrix.shape[1]:
        up = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -rank:]
        down = up.mT @ matrix
    else:
        basis = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:]
        up, down = matrix @ basis, basis.mT
    if difference.ndim == 4:
        up, down = up[..., None, None], down.unflatten(1, difference.shape[1:])
    return up.float().contiguous(), down.float().contiguous()
