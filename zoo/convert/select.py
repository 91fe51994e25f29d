"""Which layers to keep: those whose attention looks furthest back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from zoo import registry
from zoo.convert.student import attention_entry


@torch.no_grad()
def window_sensitivity(teacher: nn.Module, rows: Tensor, *, window: int, sinks: int, label: str | None = None) -> list[float]:
    """How much the teacher's predictions change when one layer alone sees only a window.

    The swap that is probed is the one that conversion makes at its start. Each layer is probed from the hidden states that
    reach it, so a probe costs the layers above it only.

    Args:
        teacher: a zoo transformer language model.
        rows: `[N, T]` token ids; only positions from 2 `window` on are compared (where the window hides something).
        label: of a progress bar; None shows none.

    Returns:
        for each layer the mean Kullback-Leibler divergence, in nats per token.

    Raises:
        ValueError: rows no longer than 2 `window`.
    """
    start = 2 * window
    if rows.shape[1] <= start:
        raise ValueError(f"rows of {rows.shape[1]} tokens are too short to probe a window of {window}; they need more than {start}")
    model, layers = teacher.model, teacher.config.layer_configs()
    out = model(rows, use_cache=False, output_hidden_states=True)
    expected = F.log_softmax(teacher.lm_head(out.last_hidden_state[:, start:]).float(), -1)
    scores = []
    for index, layer in enumerate(tqdm(layers, desc=label, unit="layer", disable=label is None)):
        entry = attention_entry(layer, window=window, sinks=sinks)
        entry.pop("mixer")
        narrow = registry.get(layer.name).mixer(type(layer)(**layer.shared_fields() | entry), index).to(rows.device, teacher.dtype)
        narrow.load_state_dict(model.layers[index].mixer.state_dict(), assign=True)
        kept, model.layers[index].mixer = model.layers[index].mixer, narrow
        try:
            x = out.hidden_states[index]
            for block in model.layers[index:]:
                x = block(x)[0]
        finally:
            model.layers[index].mixer = kept
        predicted = F.log_softmax(teacher.lm_head(model.norm(x[:, start:])).float(), -1)
        scores.append(F.kl_div(predicted, expected, log_target=True, reduction="sum").item() / predicted.shape[:2].numel())
    return scores


def most_sensitive(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest scores, in order of depth."""
    if not 0 <= count <= len(scores):
        raise ValueError(f"cannot keep {count} of {len(scores)} layers")
    return sorted(sorted(range(len(scores)), key=lambda index: -scores[index])[:count])
