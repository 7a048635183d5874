"""AnoGAN: Schlegl et al., "Unsupervised anomaly detection with generative adversarial networks ...", IPMI 2017.

The generator and critic of `fanogan`, and for each picture a search for the latent that draws it best. The search takes
hundreds of steps back through the networks, so this is for comparison, offline; it gives no graph for the line.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from edge_inspector.training.networks.fanogan import LATENT, Generator, Shrinker

STEPS, WEIGHT = 500, 0.1
"""The paper's 500 backpropagation steps, and its lambda."""
_LEARNING_RATE = 0.05


def scores(g: Generator, d: Shrinker, images: NDArray[np.uint8], *, steps: int = STEPS, seed: int = 1) -> NDArray[np.float32]:
    """A(x) = (1 - lambda) R(x) + lambda D(x) of pictures uint8 [N, S, S, C] at the end of the search (eq. 6).

    R is the sum of |x - G(z)| (eq. 3) and D that of |f(x) - f(G(z))| with critic features f (feature matching, eq. 5),
    both taken as means here, so that sizes compare.
    """
    g.eval().requires_grad_(False)
    d.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(images), 32):
        x = torch.from_numpy(images[start : start + 32]).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = torch.randn(len(x), LATENT, generator=generator).requires_grad_(True)
        optimiser = torch.optim.Adam([z], _LEARNING_RATE)
        features = d.features(x)
        for step in range(steps + 1):
            drawn = g(z)
            residual = (x - drawn).abs().mean((1, 2, 3))
            matching = (features - d.features(drawn)).abs().mean((1, 2, 3))
            loss = (1 - WEIGHT) * residual + WEIGHT * matching
            if step < steps:
                optimiser.zero_grad()
                loss.sum().backward()
                optimiser.step()
        found.append(loss.detach().numpy())
    return np.concatenate(found)
