"""What every layout holds, shown on its trials without a test written for it.

A property is a function of a trial that raises AssertionError where it does not hold, and returns the largest error it found (0
where bits are compared). A layout whose library is not at hand is proven on what it keeps: a model of ours saved in it and loaded
again has the same bits.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from zoo.auto import from_pretrained
from zoo.evaluate.closeness import error_bound
from zoo.evaluate.subject import by_definition
from zoo.evaluate.trial import PLAIN, SIZES, OwnTrial, Trial, foreign_config, has_oracle
from zoo.foreign import with_defaults
from zoo.keys import Plan
from zoo.layout import Layout, State, find_layout

LENGTHS = (1, 5, 17, 33, 70)
CLOSE = 1e-5  # of the largest value, or of 1: transformers computes recurrences in float32 whatever the dtype, so nothing is more exact
NO_HALF = ("fnet",)  # model types that transformers cannot compute in bfloat16 on every device
NEW = 12  # tokens continued
# what leaves the computation of a trained model as it is; a layout names its own in `forgets`
FORGOTTEN = re.compile(
    r".*(dropout|pdrop|drop_path).*|summary_.*|max_position_embeddings|pretraining_tp|output_router_logits|router_aux_loss_coef"
    r"|router_jitter_noise|is_decoder|(mamba_)?chunk_size|use_mamba_kernels|_name_or_path"
)
PROPERTIES: dict[str, Callable[[Trial], float]] = {}
OWN_PROPERTIES: dict[str, Callable[[OwnTrial], float]] = {}


def of_trials(function: Callable[[Trial], float]) -> Callable[[Trial], float]:
    """Enter a property of trials under its name."""
    PROPERTIES[function.__name__] = function
    return function


def forgotten(layout: Layout, name: str) -> bool:
    """Whether this field of the foreign config need not be read or kept."""
    return name in layout.forgets or FORGOTTEN.fullmatch(name) is not None


def answer(model: nn.Module, **given) -> Tensor:
    """Logits (of a head that marks answers both), or of a model without a head its last hidden states."""
    if model.config.is_encoder_decoder:  # which reads the tokens, and writes them again
        read = {name: given[name] for name in ("input_ids", "attention_mask") if name in given}
        given = given | {f"decoder_{name}": tensor for name, tensor in read.items()}
    out = model(**given, **({"use_cache": False} if model.can_generate() else {}))
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    return out.logits if "logits" in out else out.last_hidden_state


def close(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest error relative to the largest value, or to 1; AssertionError where it is more than CLOSE."""
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, in transformers {list(theirs.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    assert error <= CLOSE, f"{what}: off by {error:.3g} relative to the largest value"
    return error


@of_trials
def loads(trial: Trial) -> float:
    """The saved config leads to this layout, and the weights fit."""
    entry, layout = find_layout(json.loads((trial.folder / "config.json").read_text()))
    assert (entry.name, layout.name) == (trial.entry.name, trial.layout.name), f"it is read by the layout {layout.name!r}"
    assert trial.ours.config.name == entry.name
    return 0.0


class Recorded(dict):
    """A config that notes which of its fields are looked at."""

    def __init__(self, config: dict, seen: set[str]):
        super().__init__(config)
        self.seen = seen

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.seen.add(name)
        return super().get(name, default)

    def pop(self, name, *default):
        self.seen.add(name)
        return super().pop(name, *default)


@of_trials
def options_are_read(trial: Trial) -> float:
    """Every field of the foreign config is looked at in this or another trial, so that none is ignored in silence."""
    seen: set[str] = set()
    configs = [foreign_config(trial.layout, fields) for fields in trial.layout.trials.values()]
    for config in configs:
        trial.layout.config_map(Recorded(with_defaults(config.to_dict(), trial.layout), seen))
    known, shared = {type(config): config.attribute_map for config in configs}, PreTrainedConfig.__dataclass_fields__.keys()
    fields = {aliases.get(n, n) for cls, aliases in known.items() for n in cls.__dataclass_fields__.keys() - shared}
    ignored = {name for name in fields - seen if not forgotten(trial.layout, name)}
    assert not ignored, (
        f"config_map never looks at {sorted(ignored)}; read or refuse them, or name them in `forgets` if they change nothing"
    )
    return 0.0


@of_trials
def accounts_for_every_key(trial: Trial) -> float:
    """Each stored key has its place and each of ours comes from one, whichever way one goes."""
    ours, report = trial.ours, trial.report
    stored = stored_tensors(trial.folder)
    used = {name for names in report.transformed.values() for name in names} | set(report.taken)
    assert used | set(report.dropped) == set(stored), f"not accounted for: {sorted(set(stored) - used - set(report.dropped))}"
    made = set(report.taken.values()) | set(report.transformed) | set(report.fresh)
    tied = set(ours.all_tied_weights_keys) if ours.config.tie_word_embeddings else set()
    assert made == set(ours.state_dict()) - tied, f"from nowhere: {sorted(set(ours.state_dict()) - tied - made)}"
    back = trial.layout.to_foreign(ours.state_dict(), ours)
    assert back.keys() == used, f"written, but not read: {sorted(back.keys() ^ used)}"
    there, _ = trial.layout.to_zoo(back, ours)
    for name, tensor in there.items():
        assert torch.equal(tensor, ours.state_dict()[name]), f"{name} changes on the way there and back"
        assert tensor.is_contiguous(), f"{name} is not contiguous"
    loose = [name for name, tensor in back.items() if not tensor.is_contiguous()]
    assert not loose, f"not contiguous: {loose}"
    return 0.0


@of_trials
@torch.no_grad()
def logits_are_equal(trial: Trial) -> float:
    """Row by row, as transformers mixes the rows of some models up."""
    errors = []
    for length in LENGTHS:
        ids = trial.tokens(2, length)
        theirs = torch.cat([answer(trial.theirs, input_ids=row[None]) for row in ids])
        errors.append(close(answer(trial.ours, input_ids=ids), theirs, f"{length} tokens"))
    return max(errors)


@of_trials
@torch.no_grad()
def padded_rows_are_as_alone(trial: Trial) -> float:
    """Padded on either side, a row is what transformers makes of it alone: not all its models keep padding out."""
    ids, errors = trial.tokens(3, 11), []
    for side, starts, ends in (("left", (4, 0, 9), (11, 11, 11)), ("right", (0, 0, 0), (7, 11, 2))):
        places = torch.arange(11)
        mask = (places >= torch.tensor(starts)[:, None]) & (places < torch.tensor(ends)[:, None])
        given = {"input_ids": ids.masked_fill(~mask, SIZES["pad_token_id"]), "attention_mask": mask.long()}
        result = answer(trial.ours, **given)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            alone = answer(trial.theirs, input_ids=ids[row : row + 1, start:end])[0]
            errors.append(close(result[row, start:end] if result.ndim == 3 else result[row], alone, f"row {row}, padded {side}"))
    return max(errors)


@of_trials
@torch.no_grad()
def greedy_continuations_are_equal(trial: Trial) -> float:
    """Row by row, as not all models of transformers decode a batch."""
    if not trial.theirs.can_generate():
        assert not trial.ours.can_generate() or not trial.ours.config.causal, "ours continues, theirs does not"
        return 0.0
    ids, starts = trial.tokens(2, 11), (4, 0)
    mask = torch.arange(11) >= torch.tensor(starts)[:, None]
    given = {"input_ids": ids.masked_fill(~mask, SIZES["pad_token_id"]), "attention_mask": mask.long()}
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    continued = trial.ours.generate(**given, **options)
    for row, start in enumerate(starts):
        alone = ids[row : row + 1, start:]
        expected = trial.theirs.generate(alone, attention_mask=torch.ones_like(alone), **options)[0]
        written = continued[row, -len(expected) :]
        assert torch.equal(written, expected), f"row {row}: {written[-NEW:].tolist()}, expected {expected[-NEW:].tolist()}"
    return 0.0


@of_trials
def gradients_are_equal(trial: Trial) -> float:
    """Ours, pulled back through the rules, are those transformers gets for the tensors of its checkpoint."""
    theirs, ours = copy.deepcopy(trial.theirs), copy.deepcopy(trial.ours)
    ids = trial.tokens(2, 17)
    weight = None
    for model in (theirs, ours):
        out = answer(model, input_ids=ids)
        if weight is None:
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) / out.numel() ** 0.5
        (out * weight).sum().backward()
    own = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    with torch.no_grad():  # saved in place of the weights, theirs go through what transformers does when it saves
        for tensor in {t.data_ptr(): t for t in theirs.state_dict().values()}.values():
            if tensor.is_floating_point():
                grads = [p.grad for p in theirs.parameters() if p.data_ptr() == tensor.data_ptr()]
                tensor.copy_(grads[0] if grads and grads[0] is not None else torch.zeros_like(tensor))
    theirs.save_pretrained(trial.place / "gradients")
    expected = stored_tensors(trial.place / "gradients")
    leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in stored_tensors(trial.folder).items()}
    made, _ = trial.layout.to_zoo(leaves, ours)
    sum((tensor * own[name]).sum() for name, tensor in made.items() if name in own).backward()
    errors = [0.0]
    scale = max(tensor.abs().max().item() for tensor in expected.values() if tensor.is_floating_point())
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            errors.append(close(leaf.grad / scale, expected[name] / scale, f"the gradient of {name}"))
        elif leaf.is_floating_point():
            assert not expected[name].any(), f"{name} has a gradient there and none here"
    return max(errors)


@of_trials
@torch.no_grad()
def written_back_it_is_what_it_was(trial: Trial) -> float:
    """transformers reads equal bits and computes equal bits, and the config says the same but for what is forgotten."""
    target = trial.place / "back"
    trial.ours.save_pretrained(target, layout=trial.layout.name)
    again, info = type(trial.theirs).from_pretrained(target, output_loading_info=True, **PLAIN)
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    assert not wrong, f"transformers finds {wrong}"
    same_bits(trial.theirs.state_dict(), again.state_dict())
    ids = trial.tokens(2, 33)
    error = close(answer(again, input_ids=ids), answer(trial.theirs, input_ids=ids), "what the same weights compute there")
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (trial.folder, target))
    changed = {name: (value, new.get(name)) for name, value in old.items() if new.get(name) != value and not forgotten(trial.layout, name)}
    assert not changed, f"the config changes (before, after): {changed}"
    return error


@of_trials
def bodies_alone_keep_their_bits(trial: Trial) -> float:
    """Without its head, ours is read by transformers as the body of its model, and by us."""
    body, cls = from_pretrained(trial.folder, task="base"), type(trial.theirs.base_model)
    body.save_pretrained(trial.place / "body", layout=trial.layout.name)
    before, expected = cls.from_pretrained(trial.folder, output_loading_info=True, **PLAIN)
    after, found = cls.from_pretrained(trial.place / "body", output_loading_info=True, **PLAIN)
    absent = expected["missing_keys"]  # of some heads' bodies, such as a pooler
    wrong = found["missing_keys"] ^ absent or found["unexpected_keys"] or found["mismatched_keys"]
    assert not wrong, f"transformers finds {sorted(wrong)} missing, surplus or misshapen"
    same_bits(*({name: tensor for name, tensor in each.state_dict().items() if name not in absent} for each in (before, after)))
    if not absent:
        same_bits(body.state_dict(), from_pretrained(trial.place / "body").state_dict())
    return 0.0


@of_trials
@torch.no_grad()
def what_is_made_here_is_read_there(trial: Trial) -> float:
    """A model of ours with fresh weights, saved in the layout, is the same in transformers."""
    torch.manual_seed(1)
    ours = type(trial.ours)(trial.ours.config).eval()
    ours.save_pretrained(trial.place / "made", layout=trial.layout.name)
    theirs, info = type(trial.theirs).from_pretrained(trial.place / "made", output_loading_info=True, **PLAIN)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), f"transformers finds {info}"
    ids = trial.tokens(2, 17)
    return close(answer(ours, input_ids=ids), answer(theirs, input_ids=ids), "a fresh model")


@of_trials
@torch.no_grad()
def half_precision_stays_half(trial: Trial) -> float:
    """bfloat16 weights keep their bits, and compute what theirs do, by the rule of closeness."""
    half = copy.deepcopy(trial.theirs).bfloat16()
    folder, back = trial.place / "half", trial.place / "half-back"
    half.save_pretrained(folder)
    ours, ids = from_pretrained(folder), trial.tokens(8, 33)
    assert ours.dtype == torch.bfloat16, f"bfloat16 became {ours.dtype}"
    result, plain = answer(ours, input_ids=ids), plain_half(half, ours, ids)
    exact = answer(copy.deepcopy(half).float(), input_ids=ids)
    share = 2 if any(getattr(module, "waits_for_device", False) for module in ours.modules()) else 1
    bound = error_bound(*calmest(plain, exact, share))
    error = torch.sub(*calmest(result, exact, share)).abs().max().item()
    assert error <= bound, f"in bfloat16 off by {error:.3g}, the rule of closeness allows {bound:.3g}"
    ours.save_pretrained(back, layout=trial.layout.name)
    before, after = (type(half).from_pretrained(each, **PLAIN).state_dict() for each in (folder, back))  # which may widen some
    same_bits(before, after)
    return 0.0


def plain_half(half: nn.Module, ours: nn.Module, ids: Tensor) -> Tensor:
    """What transformers makes of them in bfloat16; where it cannot, what our own definition does."""
    if half.config.model_type not in NO_HALF:
        return answer(half, input_ids=ids)
    try:
        answer(half, input_ids=ids)
    except RuntimeError:
        with by_definition():
            return answer(ours, input_ids=ids)
    raise AssertionError(f"transformers does compute {half.config.model_type} in bfloat16; take it from NO_HALF")


def calmest(result: Tensor, exact: Tensor, share: int) -> tuple[Tensor, Tensor]:
    """Both at the tokens with the smallest errors, one of `share`: where experts are chosen, rounding turns the choice for some."""
    errors = (result - exact).abs().amax(-1).flatten()
    kept = errors.topk(errors.numel() // share, largest=False).indices
    return result.flatten(0, -2)[kept], exact.flatten(0, -2)[kept]


def of_own_trials(function: Callable[[OwnTrial], float]) -> Callable[[OwnTrial], float]:
    """Enter a property of layouts without an oracle under its name."""
    OWN_PROPERTIES[function.__name__] = function
    return function


@of_own_trials
@torch.no_grad()
def saved_and_loaded_it_is_what_it_was(trial: OwnTrial) -> float:
    """In float32 and bfloat16: every key accounted for, the same config, the same bits; where a rule is not exact, the same function."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, folder = copy.deepcopy(trial.ours).to(dtype), trial.place / str(dtype)
        ours.save_pretrained(folder, layout=trial.layout.name)
        file = trial.layout.file
        again, report = from_pretrained(folder / file if file.endswith(".pth") else folder, output_loading_info=True)
        assert again.dtype == dtype and not report.fresh, f"{dtype} became {again.dtype}, untrained are {report.fresh}"
        loose = {name for job in Plan(trial.layout, ours).jobs if not job.rule.exact for name in job.own}
        before, after = ({n: t for n, t in model.state_dict().items() if n not in loose} for model in (ours, again))
        same_bits(before, after)
        if loose and dtype == torch.float32:
            ids = torch.randint(3, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
            close(answer(again, input_ids=ids), answer(ours, input_ids=ids), "what was saved and loaded")
        old, new = (model.config.to_dict() | {"_name_or_path": "", "architectures": None, "dtype": None} for model in (ours, again))
        changed = {name: (value, new[name]) for name, value in old.items() if value is not None and new[name] != value}  # None: derived
        assert not changed or layers(ours) == layers(again), f"the config changes (before, after): {changed}"
    return 0.0


def layers(model: nn.Module) -> list[dict]:
    """The plan of a model, however its config says it."""
    return [layer.to_dict() for layer in model.config.layer_configs()]


def stored_tensors(folder: str | Path) -> State:
    """All tensors of a folder's safetensors."""
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bits(before: State, after: State) -> None:
    """Assert equal names, dtypes and values."""
    assert before.keys() == after.keys(), f"keys come or go: {sorted(before.keys() ^ after.keys())}"
    changed = [name for name in before if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])]
    assert not changed, f"{len(changed)} tensors change, such as {changed[0]}"


def properties(layout: Layout) -> dict[str, Callable]:
    """What is to be shown of it."""
    return PROPERTIES if has_oracle(layout) else OWN_PROPERTIES
