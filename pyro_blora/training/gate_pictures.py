"""Log heatmaps of the gates to experiment trackers that take images."""

import numpy as np
from accelerate import Accelerator

from ..bops import expected_bits, expected_rank
from ..posterior.draws import marginals
from ..program import BayesianLoRA

_PIXELS = 16  # a side of a cell


def gate_maps(program: BayesianLoRA) -> dict[str, np.ndarray]:
    """E[bits] on a scale of doublings, (1, 16 L, 16 T, 3), and E[rank], (1, 16 L, 16, 3), uint8: dark is closed.

    One row per projection, in model order, and one column per tensor, in the layout's order; grey where there is none.
    """
    layout, (z, g) = program.layout, marginals(program)
    bits = expected_bits(layout, z).cpu().numpy()  # (L, T)
    least, most = np.log2(layout.ladder[0]), np.log2(layout.ladder[-1])
    ranks = (expected_rank(g).cpu().numpy()[:, None] - 1) / max(1, layout.rank - 1)
    return {
        "gates/expected_bits": _picture((np.log2(bits) - least) / (most - least), program.z_mask.cpu().numpy()),
        "gates/expected_rank": _picture(ranks, program.g_mask.cpu().numpy()[:, None]),
    }


def _picture(shares: np.ndarray, exists: np.ndarray) -> np.ndarray:
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.clip(shares, 0.0, 1.0))[..., :3]
    colours[~exists] = 0.5
    cells = np.kron(colours, np.ones((_PIXELS, _PIXELS, 1)))
    return (255 * cells).round().astype(np.uint8)[None]


def track_gate_maps(accelerator: Accelerator, program: BayesianLoRA, step: int) -> None:
    """Send the pictures to every tracker that takes any."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(gate_maps(program), step=step, **layout)
