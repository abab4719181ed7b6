"""Which entries of an update stay: the largest, or some at random."""

import torch
from torch import Tensor

from mot_lora.errors import UserError

SAMPLE = 1 << 14  # entries that bracket a selection


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, zero the rest (the trim step of TIES, arXiv 2306.01708).

    Keeps max(1, floor(density * numel)) entries, and all that tie with the smallest of them.

    Errors: UserError for a density outside (0, 1].

    >>> trim(torch.tensor([[3.0, -1.0], [2.0, 0.5]]), 0.5)
    tensor([[3., 0.],
            [2., 0.]])
    """
    check_density(density)
    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return delta
    # |x| > the number before the threshold is |x| >= the threshold
    below = torch.nextafter(kth_largest(delta.abs().flatten(), count), torch.tensor(-1.0).to(delta))
    return torch.nn.functional.hardshrink(delta, below.item())


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a vector, exactly; much faster than a full selection where the vector is long.

    A sample brackets the answer, the entries outside of the bracket are counted, and those within are searched
    (Floyd and Rivest 1975). Where the sample misleads, all are searched.

    >>> kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.)
    """
    n = values.numel()
    if n > SAMPLE:
        sample = values[:: n // SAMPLE | 1].contiguous()
        at, spread = k / n * len(sample), 4 * (k / n * (1 - k / n) * len(sample)) ** 0.5 + 1
        first, last = int(at - spread), int(at + spread)
        high = sample.kthvalue(len(sample) - first).values if at > spread else sample.new_tensor(torch.inf)
        low = sample.kthvalue(len(sample) - last).values if last < len(sample) else sample.new_tensor(-torch.inf)
        above = values > high
        left = k - int(torch.count_nonzero(above))
        within = values[(values >= low).logical_xor_(above)]
        if 0 < left <= within.numel():
            values, k = within, left
    return values.kthvalue(values.numel() - k + 1).values


def drop(delta: Tensor, density: float | Tensor, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and divide what is kept by it (DARE, arXiv 2311.03099).

    The mean over many draws is the delta itself. `density` may differ by entry. Draw with a CPU generator, and a seed
    means the same on every device.

    Errors: UserError for a density outside (0, 1].

    >>> drop(torch.ones(1, 4), 0.5, torch.Generator().manual_seed(0)).unique().tolist()
    [0.0, 2.0]
    """
    if isinstance(density, float | int):
        check_density(density)
        if density == 1:
            return delta
    drawn = torch.rand(delta.shape, generator=generator, device=generator.device).to(delta.device)
    return delta.masked_fill(drawn >= density, 0.0) / density


def rank_densities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Probabilities of being kept that grow with magnitude, row by row (MagPrune of DELLA, arXiv 2406.11617).

    From density - epsilon for a row's smallest entry to density + epsilon for its largest, evenly by rank.

    >>> rank_densities(torch.tensor([[3.0, -1.0, 2.0]]), 0.5, 0.25)
    tensor([[0.7500, 0.2500, 0.5000]])
    """
    ranks = delta.abs().argsort(-1).argsort(-1).to(delta.dtype)
    return density + epsilon * (2 * ranks / max(1, delta.shape[-1] - 1) - 1)


def check_density(density: float) -> None:
    """UserError for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], not {density}")
