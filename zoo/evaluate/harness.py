"""Tasks of lm-eval (the extra `eval`), on any checkpoint that `zoo.generate.load_language_model` reads."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from zoo.generate import position_limit

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(f"tasks of lm-eval need that package ({error}); run: pip install 'seqzoo[eval]'") from error

LENGTH = 2048  # tokens of a prompt at most, where neither a table of positions nor the caller says another


class ZooLM(HFLM):
    """A loaded model as lm-eval wants it.

    Args:
        model: a causal language model of zoo or of transformers, in evaluation mode.
        max_length: of a prompt with its answer; longer ones lose their beginning.
        kwargs: further ones of `HFLM`: batch_size, add_bos_token...
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, **kwargs):
        length = max_length or position_limit(model) or LENGTH
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=length, **kwargs)


def run(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: list[str], *, limit: int | None = None, batch: int = 8,
    include: str | None = None,
) -> list[dict]:  # fmt: skip
    """A row for each task and group: its name and its metrics.

    Args:
        tasks: names that lm-eval knows; most fetch their data from the Hub.
        limit: documents of a task, at most.
        batch: prompts at a time.
        include: a folder with further tasks as YAML files.

    Raises:
        ValueError: a task that lm-eval does not know.
    """
    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` names them")
    model = ZooLM(model, tokenizer, batch_size=batch)
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, limit=limit, task_manager=manager, log_samples=False)
    return [
        {"name": name} | {metric.removesuffix(",none"): float(value) for metric, value in row.items() if isinstance(value, float)}
        for name, row in found["results"].items()
    ]
