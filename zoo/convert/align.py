"""Layer-wise alignment: every new mixer learns to answer as its teacher layer does, from that layer's own input.

The first stage of MOHAWK (arXiv:2408.10189), LoLCATs (arXiv:2410.10254) and RADLADS (arXiv:2505.03005). The layers do not
depend on one another, so a single pass of the teacher trains all of them, and each one's graph is freed at once.
"""

from torch import Tensor, nn

from zoo.convert.fit import Fit
from zoo.convert.recipe import Stage


def align(
    teacher: nn.Module,
    student: nn.Module,
    rows: Tensor,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch: int = 1,
    warmup: float = 0.1,
    seed: int = 0,
    label: str | None = None,
) -> list[list[float]]:
    """Train the replaced mixers of `student`, and nothing else, on the inputs and outputs of the teacher's.

    Args:
        teacher: the zoo transformer the student was converted from.
        rows: `[N, T]` token ids; each step takes `batch` of them, in a new random order after each round.
        learning_rate: the highest, of attention; the other mixers take three times it, gates thirty. AdamW, linear warm-up
            over the share `warmup` of the steps, then a cosine down to a tenth.
        label: of a progress bar with tokens per second, time left and loss; None shows none.

    Returns:
        for every step the loss of each replaced layer, in the order of `converted_layers`: the squared error of the mixer's
        output relative to the power of the teacher's.

    Raises:
        ValueError: nothing to train, or no text.
        FloatingPointError: a loss that is not finite; the layer is named and no weight has been spoilt by that step.
    """
    if steps < 1:
        raise ValueError(f"nothing to align: {steps} steps; there must be at least one")
    length = rows.shape[1]
    stage = Stage(
        "align", "mixer_out", "rel_mse", "mixer", tokens=steps * batch * length, length=length, batch=batch, learning_rate=learning_rate,
        warmup=warmup, paced=True,
    )  # fmt: skip
    return Fit(teacher, student, rows, stage, seed=seed).run(label)
