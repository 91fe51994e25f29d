"""What a stage trains, by role, and what it only borrows for that: adapters of low rank, a head apart from the embedding."""

import torch
from torch import nn

from zoo.convert.recipe import Stage
from zoo.convert.student import converted_layers
from zoo.train.adapt import PARTS, check_peft, lora_coverage

FEATURES = ("features", "q_features", "k_features")  # what mixers call their feature maps


def trained(student: nn.Module, stage: Stage, fresh: set[str]) -> list[str]:
    """Names of the parameters that a stage trains; a tied one is named once."""
    names = [name for name, _ in student.named_parameters()]
    replaced = tuple(f"model.layers.{index}.mixer." for index in converted_layers(student))
    features = {name for name in names if name.startswith(replaced) and set(name.split(".")) & set(FEATURES)}
    parts = {
        "all": set(names),
        "mixer": {name for name in names if name.startswith(replaced)},
        "new": fresh & set(names),
        "features": features,
        "lora": {name for name in names if ".lora_" in name},
        "attention": {name for name in names if ".mixer." in name and not name.startswith(replaced)},
        "mlp": {name for name in names if ".channel_mixer." in name},
        "norms": {name for name in names if "norm" in name.split(".")[-2] and ".mixer." not in name and ".channel_mixer." not in name},
        "embeddings": {name for name in names if name.startswith(("model.embed", "lm_head."))},
    }
    for part in stage.parts:
        if not parts[part] and part != "lora":
            raise ValueError(f"stage {stage.name!r}: train {part!r} finds no weight in this student; train something else")
    chosen = set().union(*(parts[part] for part in stage.parts))
    if stage.layerwise:  # no loss reaches the others
        within = tuple(f"model.layers.{index}." for index in converted_layers(student)) if stage.apart else "model.layers."
        chosen = {name for name in chosen if name.startswith(within)}
    return [name for name in names if name in chosen]


def adapted(student: nn.Module, stage: Stage) -> list[str]:
    """Names of the linear layers of replaced layers that get an adapter."""
    replaced = tuple(f"model.layers.{index}." for index in converted_layers(student))
    return [name for name in lora_coverage(student, stage.lora_targets or PARTS[:1]).modules if name.startswith(replaced)]


def count_trained(student: nn.Module, stage: Stage, fresh: set[str]) -> int:
    """How many numbers a stage trains, told before adapters are there."""
    parameters = dict(student.named_parameters())
    count = sum(parameters[name].numel() for name in trained(student, stage, fresh))
    if "lora" in stage.parts:
        count += sum(stage.lora_rank * sum(student.get_submodule(name).weight.shape) for name in adapted(student, stage))
    return count + (student.lm_head.weight.numel() if unties(student, stage) else 0)


def unties(student: nn.Module, stage: Stage) -> bool:
    return stage.untie and student.config.tie_word_embeddings and bool({"all", "embeddings"} & set(stage.parts))


class Loan:
    """What a stage adds to a student, until `give_back`."""

    def __init__(self, student: nn.Module, stage: Stage, seed: int = 0):
        self.student, self.untied = student, unties(student, stage)
        self.adapters: list[str] = []
        if self.untied:
            student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
            student.config.tie_word_embeddings = False
        if "lora" in stage.parts:
            self._add_adapters(stage, seed)

    def _add_adapters(self, stage: Stage, seed: int) -> None:
        check_peft()
        from peft import LoraConfig, inject_adapter_in_model

        self.adapters = adapted(self.student, stage)
        flags = {name: p.requires_grad for name, p in self.student.named_parameters()}
        alpha = 2 * stage.lora_rank if stage.lora_alpha is None else stage.lora_alpha
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=stage.lora_rank, lora_alpha=alpha, target_modules=self.adapters), self.student)
        for name, p in self.student.named_parameters():
            p.requires_grad_(flags.get(name.replace(".base_layer.", "."), True))

    def give_back(self) -> None:
        """Merge the adapters into what they adapt, and tie the head to the embedding again: what it learned apart is dropped."""
        for name in self.adapters:
            parent, _, child = name.rpartition(".")
            adapter = self.student.get_submodule(name)
            adapter.merge()
            setattr(self.student.get_submodule(parent), child, adapter.get_base_layer())
        self.adapters = []
        self.student.__dict__.pop("peft_config", None)
        if self.untied:
            self.student.lm_head.weight = self.student.model.embed_tokens.weight
            self.student.config.tie_word_embeddings, self.untied = True, False
