"""What a conversion will do and cost, told from a teacher's config and the headers of its files alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import nn

from zoo.auto import model_class
from zoo.convert.headers import Blueprint, size
from zoo.convert.recipe import Method, Stage, settled
from zoo.convert.select import select_layers
from zoo.convert.student import converted_layers, student_config
from zoo.convert.trainable import count_trained, trained, unties
from zoo.convert.weights import Account, seed_student
from zoo.evaluate.speed import state_bytes
from zoo.loss import LOGITS
from zoo.models.hybrid import HybridConfig
from zoo.train.meter import forward_flops

LENGTHS = (4096, 32768, 131072)
WEIGHT = GRADIENT = 4  # bytes a parameter while training, in float32
MOMENTS = 8  # of Adam
SHORTEST = 64  # tokens of a row that is worth training on


@dataclass
class Part:
    """Some tensors: how many, their parameters, their bytes."""

    tensors: int
    parameters: int
    bytes: int


@dataclass
class StagePlan:
    """A stage's size: tokens and steps, what it trains, its FLOPs, and bytes of memory by what they hold; `streamed`: by what they hold
    where it goes layer by layer, None where it cannot."""

    name: str
    tokens: int
    steps: int
    trained: int
    flops: float
    memory: dict[str, int]
    streamed: dict[str, int] | None = None


@dataclass
class ConversionPlan:
    """What `plan` found.

    Args:
        teacher: facts of it; strip: a letter a layer, A for attention that stays, otherwise what replaces it, as `legend` says.
        weights: what becomes of the teacher's tensors (copied, transformed, dropped), and the student's fresh ones and all.
        dropped: why -> how many.
        state_bytes: tokens -> (teacher's, student's) bytes of one sequence, in the teacher's dtype where a state is not wider.
        flops: of a forward pass over the shortest of those lengths, (teacher's, student's).
        settings: field -> (value, where it is from).
        missing: what the engine lacks; empty: it can be run.
    """

    teacher: dict
    strip: str
    legend: str
    weights: dict[str, Part]
    dropped: dict[str, int]
    state_bytes: dict[int, tuple[int, int]]
    flops: tuple[int, int]
    stages: list[StagePlan]
    settings: dict[str, tuple]
    warnings: list[str]
    missing: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def make_plan(teacher: Blueprint, method: Method, scale: float = 1.0) -> ConversionPlan:
    """The plan of a conversion.

    Raises:
        ValueError: mixer, layers or fields that do not fit the teacher.
    """
    method, model = settled(method, teacher.parameters, scale), teacher.model
    student, account = blank_student(model, layout_config(model, method))
    dtype = next(iter(teacher.tensors.values())).dtype
    both = [(state_bytes(model, n, dtype), state_bytes(student, n, dtype)) for n in LENGTHS]
    names = [layer["mixer"] for layer in student.config.plan]
    replaced = converted_layers(student)
    return ConversionPlan(
        teacher=facts(teacher),
        strip=" ".join("AX"[index in replaced] for index in range(len(names))),
        legend=f"A attention as it was ({len(names) - len(replaced)}), X {describe(method)} ({len(replaced)})",
        weights=weigh(teacher, student, account),
        dropped=dict(Counter(account.dropped.values())),
        state_bytes=dict(zip(LENGTHS, both, strict=True)),
        flops=(forward_flops(model, LENGTHS[0])[0], forward_flops(student, LENGTHS[0])[0]),
        stages=[plan_stage(model, student, stage, account.fresh) for stage in method.stages],
        settings=settings(method),
        warnings=warnings(teacher, method, account, student),
        missing=lacks(method, student),
    )


def layout_config(model: nn.Module, method: Method) -> HybridConfig:
    """The student's config; where the layers that stay are yet to be found, they are spread evenly."""
    count = len(model.config.layer_configs())
    kept = method.kept(count)
    if isinstance(kept, int):
        kept = select_layers("uniform", [0.0] * count, kept, must_keep=method.must_keep, min_gap=method.min_gap)
    return student_config(model.config, method.mixer, kept, method.window, method.sinks, method.mixer_args, method.inherit, method.rope)


def blank_student(teacher: nn.Module, config: HybridConfig) -> tuple[nn.Module, Account]:
    """The student on the meta device, and what becomes of every weight; `teacher` may hold weights, which are not read."""
    with torch.device("meta"):
        source, student = (model_class(c, "causal_lm")(c) for c in (teacher.config, config))
    return student, seed_student(source, student)


def lacks(method: Method, student: nn.Module) -> list[str]:
    """What the engine lacks for this recipe, and stages that could teach this student nothing."""
    found = method.missing()
    replaced = [student.config.layer_configs()[index] for index in converted_layers(student)]
    window = max((getattr(layer, "window", None) or 0 for layer in replaced), default=0)
    window = max(window, method.window or 0)
    for stage in method.stages:
        if stage.length <= window:
            found.append(f"stage {stage.name!r}: rows of {stage.length} tokens never leave the window of {window}; lengthen them")
    return found


# -- what becomes of the weights -----------------------------------------------------------------------------------------


def facts(teacher: Blueprint) -> dict:
    """What a teacher is."""
    config, layer = teacher.model.config, teacher.model.config.layer_configs()[0]
    keys = layer.head_dim or layer.hidden_size // layer.num_heads
    return {
        "layout": teacher.layout, "parameters": teacher.parameters, "bytes": size(teacher.tensors.values()),
        "dtype": str(next(iter(teacher.tensors.values())).dtype).removeprefix("torch."), "tensors": len(teacher.tensors),
        "layers": config.num_hidden_layers, "width": config.hidden_size, "heads": layer.num_heads,
        "kv heads": layer.num_kv_heads or layer.num_heads, "head width": keys, "vocabulary": config.vocab_size,
        "rope theta": layer.rope_theta, "biases of q, k, v": layer.qkv_bias, "norms of q, k": bool(layer.qk_norm),
        "window": layer.window, "tied": config.tie_word_embeddings,
        "keys of its files": str(teacher.report).replace("\n", "; "),
    }  # fmt: skip


def weigh(teacher: Blueprint, student: nn.Module, account: Account) -> dict[str, Part]:
    """What becomes of the teacher's tensors, in its dtype, and what the student has beside them. Tied tensors count once."""
    names, own = dict(teacher.model.named_parameters()), dict(student.named_parameters())
    width = next(iter(teacher.tensors.values())).element_size()

    def part(keys, tensors: dict[str, nn.Parameter]) -> Part:
        chosen = [tensors[key] for key in keys if key in tensors]
        count = sum(t.numel() for t in chosen)
        return Part(len(chosen), count, count * width)

    return {
        "copied": part(account.copied, names),
        "transformed": part(account.seeded, names),
        "dropped": part(account.dropped, names),
        "fresh": part(account.fresh, own),
        "student": part(own, own),
    }


def warnings(teacher: Blueprint, method: Method, account: Account, student: nn.Module) -> list[str]:
    """What should be known before time is spent."""
    layer, replaced = teacher.model.config.layer_configs()[0], converted_layers(student)
    known = {f.name for f in fields(type(student.config.layer_configs()[replaced[0]]))} if replaced else set()
    found = [f"otherwise than the paper: {what}" for what in method.differs]
    found += [f"{count} weights are dropped: {why}" for why, count in Counter(account.dropped.values()).items()]
    if method.window is None and "window" not in known and (early := [index for index in replaced if index < 2]):
        found.append(f"layers {early} lose attention without a window beside them; the first layers suffer most")
    if replaced and method.window is None and layer.rope_theta is not None and "rope_theta" not in known:
        found.append(f"{method.mixer} has no rotary positions, the teacher's queries and keys expect them")
    if teacher.model.config.tie_word_embeddings and any("all" in stage.parts and not unties(student, stage) for stage in method.stages):
        found.append("embedding and head are tied, and are trained tied")
    if method.select not in ("none", "uniform") and isinstance(method.kept(len(student.config.plan)), int):
        found.append("which layers stay is measured when the student is made; until then they are spread evenly")
    return found


def settings(method: Method) -> dict[str, tuple]:
    """Every effective value, and where it is from."""
    found = {f.name: getattr(method, f.name) for f in fields(Method) if f.name not in ("stages", "origin", "needs", "differs")}
    found |= {f"{stage.name}.{f.name}": getattr(stage, f.name) for stage in method.stages for f in fields(Stage) if f.name != "name"}
    return {name: (value, method.origin[name]) for name, value in found.items()}


def describe(method: Method) -> str:
    return method.mixer if method.window is None else f"a window of {method.window} with {method.sinks} sinks beside {method.mixer}"


# -- what it costs -------------------------------------------------------------------------------------------------------


def plan_stage(teacher: nn.Module, student: nn.Module, stage: Stage, fresh: set[str]) -> StagePlan:
    """FLOPs and memory of a stage as `Fit` takes it: both models whole and in float32."""
    parameters, layers = dict(student.named_parameters()), converted_layers(student)
    count, by_layer = count_trained(student, stage, fresh), stage.apart
    forward = 0 if stage.target == "tokens" else forward_flops(teacher, stage.length)[0]
    learned = sum(student.model.layers[index].mixer.flops(stage.length) for index in layers)
    per_row = forward + 3 * (learned if by_layer else forward_flops(student, stage.length)[0])
    row_tokens = stage.batch * stage.length
    inside = (
        [outputs(student.model.layers[index].mixer) for index in layers] if by_layer else [outputs(block) for block in student.model.layers]
    )
    memory = {
        "teacher": WEIGHT * sum(p.numel() for p in teacher.parameters()),
        "student": WEIGHT * (sum(p.numel() for p in parameters.values()) + unties(student, stage) * student.lm_head.weight.numel()),
        "gradients": GRADIENT * count,
        "moments": MOMENTS * count,
        "activations": 4 * row_tokens // stage.accumulate * (max(inside, default=0) if by_layer else sum(inside)),
        "logits": 0 if stage.layerwise else 4 * 4 * max(64 * student.config.vocab_size, LOGITS),
    }
    streamed = None
    if by_layer:
        streamed = streamed_memory(teacher, student, stage, fresh) | {"activations": memory["activations"]}
        # held behind the layers, to measure perplexity: what it needs beyond them
        streamed["head"] = max(0, WEIGHT * teacher.lm_head.weight.numel() - sum(streamed.values()))
    flops = float(stage.steps * stage.batch * per_row)
    return StagePlan(stage.name, stage.steps * row_tokens, stage.steps, count, flops, memory, streamed)


def streamed_memory(teacher: nn.Module, student: nn.Module, stage: Stage, fresh: set[str]) -> dict[str, int]:
    """Bytes of the largest block of either model, and of what is trained in one layer, as `zoo.convert.stream` takes a stage."""
    blocks = [max(sum(p.numel() for p in block.parameters()) for block in model.model.layers) for model in (teacher, student)]
    parameters, counts = dict(student.named_parameters()), Counter()
    for name in trained(student, stage, fresh):
        counts[name.split(".")[2]] += parameters[name].numel()
    most = max(counts.values(), default=0)
    return {"teacher": WEIGHT * blocks[0], "student": WEIGHT * blocks[1], "gradients": GRADIENT * most, "moments": MOMENTS * most}


def must_stream(teacher: nn.Module, method: Method, available: int) -> bool:
    """Whether the first stages fit into these bytes layer by layer only."""
    plans = stage_plans(teacher, method)
    return plans[0].streamed is not None and sum(plans[0].streamed.values()) <= available < sum(plans[0].memory.values())


def stage_plans(teacher: nn.Module, method: Method) -> list[StagePlan]:
    student, account = blank_student(teacher, layout_config(teacher, method))
    return [plan_stage(teacher, student, stage, account.fresh) for stage in method.stages]


def check_memory(teacher: nn.Module, method: Method, available: int, stream: bool = False) -> None:
    """Raise ValueError for the first stage that needs more than these bytes, naming the least change that makes it fit.

    Args: stream: the first stages go layer by layer, where they can.
    """
    student, account = blank_student(teacher, layout_config(teacher, method))
    plans = [plan_stage(teacher, student, stage, account.fresh) for stage in method.stages]
    first = next((index for index, plan in enumerate(plans) if plan.streamed is None), len(plans))

    def need(index: int, stage: Stage) -> int:
        plan = plan_stage(teacher, student, stage, account.fresh)
        return sum((plan.streamed if stream and index < first else plan.memory).values())

    for index, stage in enumerate(method.stages):
        if (whole := need(index, stage)) <= available:
            continue
        settings, least = "", whole
        for less, settings in smaller(stage, method.window or 0):
            if (least := need(index, less)) <= available:
                remedy = f"{settings} would fit"
                break
        else:
            even_so = f"even {settings} needs {gib(least)}" if settings else "it cannot be made smaller"
            remedy = f"{even_so}; take a smaller teacher or a larger machine"
        raise ValueError(f"stage {stage.name!r} needs about {gib(whole)} of memory, and there are {gib(available)}; {remedy}")


def smaller(stage: Stage, window: int) -> Iterator[tuple[Stage, str]]:
    """A stage in ever smaller forms, and what to set for each: more passes, which changes no result, then shorter rows, then fewer
    weights that are trained."""

    def form(**changes) -> tuple[Stage, str]:
        named = {name: value for name, value in changes.items() if value != getattr(stage, name)}
        return replace(stage, **named), " ".join(f"--set {stage.name}.{name}={value}" for name, value in named.items())

    for passes in (n for n in range(2, stage.batch + 1) if stage.batch % n == 0):
        yield form(accumulate=passes)
    length = stage.length
    while length // 2 > max(2 * window, SHORTEST):
        length //= 2
        yield form(accumulate=stage.batch, length=length)
    if stage.train == "all":
        yield form(accumulate=stage.batch, length=length, train="mixer")


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def outputs(module: nn.Module) -> int:
    """Numbers a token leaves behind in a module's linear layers; what lies between them is not counted."""
    return sum(m.out_features + m.in_features for m in module.modules() if isinstance(m, nn.Linear))
