"""Shapes of convolution blocks that nobody chose, for the tests of both directions."""

import numpy as np


def draw_block(seed):
    """(batch, image (C, H, W), weight (K, R, S), stride, padding, pool, relu)."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return int(rng.integers(low, high + 1))

    filter_size = draw(1, 5), draw(1, 5)
    stride, padding = (draw(1, 2), draw(1, 2)), (draw(0, 2), draw(0, 2))
    pool = [None, (2, 2), (2, 2), (3, 2)][draw(0, 3)]
    # the first layer has kernels of its own, for up to 4 channels
    image = (draw(1, 4) if draw(0, 1) else draw(1, 80)), draw(12, 20), draw(12, 20)
    weight = draw(1, 80), *filter_size
    return draw(1, 9), image, weight, stride, padding, pool, bool(draw(0, 1))
