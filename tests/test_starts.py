"""What begins a new mixer: attention's projections in every mixer of the registry, and what no weight fills."""

import math

import pytest
import torch

import zoo
from zoo import registry
from zoo.convert import convert
from zoo.convert.maps import operators_seen
from zoo.convert.objectives import ask_mixer
from zoo.convert.starts import measure
from zoo.convert.weights import Account, seed_mixer, seed_student

HEADS, GROUPS, WIDTH, HEAD = 4, 2, 32, 8
registry.load_all()
CAUSAL = [name for name in zoo.list_mixers() if registry.get(name).mixer.traits.causal]
# mixers that take nothing of attention, or only its output projection, and why
OTHERWISE = {
    "hyena": "a convolution of one projection", "lfm2": "a convolution of one projection", "griffin": "no queries and keys",
    "min_rnn": "no queries and keys", "s4d": "no queries and keys", "hgrn": "no queries and keys", "rwkv4": "no queries",
    "mlstm": "projections behind its own", "mla": "keys and values of a low rank",
    "zamba2": "a shared block", "mamba": "B and C of what is convolved", "parallel": "branches",
}  # fmt: skip


def make_teacher(**fields):
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=2, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(2))


# -- attention's projections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mixer_takes_the_projections_it_has_a_place_for(name):
    """Whatever is repeated for grouped heads goes to the heads that read it: block i of n to group i // (n / G)."""
    teacher = make_teacher()
    try:
        student = convert(teacher, mixer=name, window=None)
    except ValueError as error:
        assert name in OTHERWISE, f"{name}: {error}"
        return
    assert student(tokens()).logits.isfinite().all()
    mixer, source = student.model.layers[1].mixer, teacher.model.layers[1].mixer
    account = Account()
    seed_mixer(source, mixer, account, "")
    if type(mixer) is type(source):
        return
    if name in OTHERWISE:
        assert all(type(mixer).__name__ in why for why in account.dropped.values())
        return
    taken = {key.removesuffix(".weight") for key in account.seeded}
    roles = mixer.roles()
    for role in ("q_proj", "k_proj", "v_proj"):
        if role not in taken:
            assert type(mixer).__name__ in account.dropped[f"{role}.weight"]
            continue
        place, parts = roles[role]
        for part in parts:
            heads = mixer.get_submodule(place).weight[part].unflatten(0, (-1, HEAD))
            theirs = getattr(source, role).weight.unflatten(0, (-1, HEAD))
            for index, head in enumerate(heads):
                assert torch.equal(head, theirs[index * len(theirs) // len(heads)]), f"head {index} of {role}"
    assert taken >= {"q_proj", "v_proj"} or name in ("based", "hgrn2", "modernbert", "xlstm", "jet_nemotron"), (name, account.dropped)


def test_fused_projections_are_filled_part_by_part():
    teacher = make_teacher()
    mixer = convert(teacher, mixer="mamba2_in_llama", window=None).model.layers[0].mixer
    source, weight = teacher.model.layers[0].mixer, mixer.in_proj.weight
    _, x, B, C, _ = weight.split([WIDTH, GROUPS * HEAD, GROUPS * HEAD, WIDTH, HEADS])
    assert torch.equal(x, source.v_proj.weight) and torch.equal(B, source.k_proj.weight) and torch.equal(C, source.q_proj.weight)
    assert torch.equal(mixer.out_proj.weight, source.out_proj.weight)
    student = convert(teacher, mixer="llamba", window=None)
    x, _, C, _, _ = student.model.layers[0].mixer.in_proj.weight.split([WIDTH, WIDTH, WIDTH, WIDTH, HEADS])
    assert torch.equal(C, source.q_proj.weight)
    assert torch.equal(x.unflatten(0, (HEADS, -1))[[0, 2]], source.v_proj.weight.unflatten(0, (GROUPS, -1)))
    assert "model.layers.0.mixer.in_proj.weight" in seed_student(teacher, student).fresh, "a weight that is filled in part is to be trained"


@pytest.mark.parametrize("name", ["linear_attention", "llamba", "mamba2", "mamba2_in_llama", "linearized", "qrwkv7"])
def test_biases_come_along(name):
    teacher = make_teacher(qkv_bias=True)
    student = convert(teacher, mixer=name, window=None, starts={"gate": "one"} if name in ("llamba", "mamba2") else {})
    account, mixer, source = seed_student(teacher, student), student.model.layers[0].mixer, teacher.model.layers[0].mixer
    assert not account.dropped
    place, (rows,) = mixer.roles()["q_proj"]
    assert torch.equal(mixer.get_submodule(place).bias[rows], source.q_proj.bias)
    if name in ("llamba", "mamba2"):
        gate = mixer.in_proj.bias[mixer.roles()["z"][1][0]]
        assert (torch.nn.functional.silu(gate) - 1).abs().max() < 1e-6


def test_positions_are_kept_or_dropped():
    teacher = make_teacher(rope_theta=500.0)
    assert convert(teacher, mixer="qrwkv7", window=None).model.layers[0].mixer.theta == 500.0
    assert convert(teacher, mixer="qrwkv7", window=None, rope="drop").model.layers[0].mixer.theta is None
    assert convert(teacher, mixer="retnet", window=None).config.layer_configs()[0].rope_inclusive is False
    student = convert(teacher, mixer="qrwkv7", window=None, keep=[1], rope="replaced_only")
    assert student.model.layers[0].mixer.theta == 500.0 and student.model.layers[1].mixer.rope is None
    for mixer, rope, message in (
        ("gla", "replaced_only", "gla, which has no rotary ones"),
        ("retnet", "drop", "retnet cannot be without rotary positions"),
        ("gla", "both", "choose one of keep, drop, replaced_only"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(teacher, mixer=mixer, window=None, rope=rope)
    scaled = make_teacher(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert convert(scaled, mixer="lolcats", window=None).model.layers[0].mixer.rope[2] == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match=r"qrwkv7 has no rope_scaling, the teacher's layers have .*choose rope=drop"):
        convert(scaled, mixer="qrwkv7", window=None)


# -- what no weight fills ------------------------------------------------------------------------------------------------


def facts_of(teacher, index: int = 0):
    hidden = teacher.model(tokens(), use_cache=False, output_hidden_states=True).hidden_states
    return measure(teacher.model.layers[index], hidden[index])


def test_a_layer_is_measured_as_its_attention_says():
    teacher = make_teacher()
    mixer = teacher.model.layers[0].mixer
    with torch.no_grad():
        mixer.q_proj.weight.zero_()  # all that is seen alike
    facts = facts_of(teacher)
    assert facts.distance.tolist() == pytest.approx([23 / 4] * HEADS, rel=1e-5)  # the mean over t of t / 2
    assert facts.entropy.tolist() == pytest.approx([1.0] * HEADS, rel=1e-5)
    assert (facts.read @ facts.constant).mean().item() == pytest.approx(
        0.5, abs=0.3
    )  # nearest to one, though tokens have no common direction
    assert facts.heads.shape == (2, 24, WIDTH)


DECAYING = ["gla", "gated_deltanet", "kda", "jet_nemotron", "mamba2", "mamba2_in_llama", "qrwkv7", "qrwkv6", "rwkv6", "rwkv7"]


@pytest.mark.parametrize(
    ("name", "args"), [(name, {}) for name in DECAYING] + [("linearized", {"decay": kind}) for kind in ("scalar", "channel")]
)
def test_half_is_forgotten_over_the_measured_distance(name, args):
    teacher = make_teacher()
    student = convert(teacher, mixer=name, mixer_args=args, window=None, starts={"decay": "measured"}, rows=tokens())
    mixer, facts, seen = student.model.layers[0].mixer, facts_of(teacher), []
    with torch.no_grad(), operators_seen(lambda op, tensors, options: seen.append(tensors.get("log_decay"))):
        ask_mixer(mixer, facts.read)
    log_decay = next(each for each in seen if each is not None)
    per_head = log_decay.reshape(*log_decay.shape[:2], HEADS, -1)
    expected = -math.log(2) / facts.distance.view(1, 1, HEADS, 1)
    assert (per_head - expected).abs().max() < 1e-4 * expected.abs().max()


def test_gates_begin_closed_open_or_at_random():
    teacher = make_teacher()
    x = facts_of(teacher).read
    for name in ("gla", "retnet", "mamba2", "llamba", "mamba_in_llama"):
        student = convert(teacher, mixer=name, window=None, starts={"gate": "zero"})
        assert not ask_mixer(student.model.layers[0].mixer, x).mixed.any(), name
    opened = convert(teacher, mixer="llamba", window=None, starts={"gate": "one", "skip": "zero"}).model.layers[0].mixer
    gate = torch.nn.functional.silu(x @ opened.in_proj.weight[opened.roles()["z"][1][0]].T + opened.gate_bias)
    assert (gate - 1).abs().max() < 1e-6 and not opened.D.any()
    gates = {
        way: convert(teacher, mixer="gla", window=6, starts={"gate": way}).model.layers[0].mixer.gate
        for way in ("native", "zero", "one", "random")
    }
    assert not gates["native"].any() and not gates["zero"].any() and (gates["one"] == 1).all() and 0.2 < gates["random"].mean() < 0.8


def test_convolutions_pass_their_last_input_on():
    teacher = make_teacher()
    for name in ("gated_deltanet", "llamba", "mamba2"):
        conv = convert(teacher, mixer=name, window=None).model.layers[0].mixer.conv
        assert (conv.weight[:, -1] == 1).all() and not conv.weight[:, :-1].any() and (conv.bias is None or not conv.bias.any())
        assert convert(teacher, mixer=name, window=None, starts={"conv": "native"}).model.layers[0].mixer.conv.weight[:, :-1].any()


def test_heads_and_rates_are_fitted():
    teacher = make_teacher()
    student = convert(teacher, mixer="gated_deltanet", window=None, starts={"values": "measured", "rate": "measured"}, rows=tokens())
    plain = convert(teacher, mixer="gated_deltanet", window=None, starts={"rate": "measured"}, rows=tokens())
    facts = facts_of(teacher)
    target = teacher.model.layers[0].mixer(facts.read)[0]
    mixer = student.model.layers[0].mixer
    scale = mixer.out_proj.weight / plain.model.layers[0].mixer.out_proj.weight
    assert scale.std(0).max() < 1e-4 and scale.min() > 0.099 and scale.max() < 10.1
    rate = (facts.read @ mixer.beta_proj.weight.T).sigmoid().mean((0, 1))
    assert (rate - (0.7 - 0.4 * facts.entropy)).abs().max() < 0.1
    assert target.shape == facts.read.shape


@pytest.mark.parametrize(
    ("mixer", "starts", "message"),
    [
        ("retnet", {"decay": "measured"}, r"init\.decay=measured: RetNetMixer has no decay that could be set"),
        ("linearized", {"decay": "measured"}, r"init\.decay=measured: LinearizedMixer has no decay that could be set"),
        ("gla", {"rate": "measured"}, r"init\.rate=measured: GLAMixer has no beta_proj"),
        ("gla", {"skip": "zero"}, r"init\.skip=zero: GLAMixer has no D"),
        ("gla", {"gate": "one"}, r"the gate of GLAMixer has no bias"),
        ("minimax", {"gate": "zero"}, "do not close the gate of MiniMaxMixer"),
        ("linear_attention", {"gate": "zero"}, "LinearAttentionMixer has no gate_proj"),
    ],
)
def test_starts_that_a_mixer_cannot_take_are_refused(mixer, starts, message):
    with pytest.raises(ValueError, match=message):
        convert(make_teacher(), mixer=mixer, window=None, starts=starts, rows=tokens())
    if "measured" in starts.values():
        with pytest.raises(ValueError, match="needs text to measure it on"):
            convert(make_teacher(), mixer=mixer, window=None, starts=starts)
