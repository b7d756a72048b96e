"""Methods that add tokens, states and terms around the calls of a model, against what their papers say.

The references are dense and slow: one scan after the other, written down from the formulas alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_scan import dense_scan
from method_cases import disturb
from timm.models import create_feature_extractor
from torch import Tensor

import vimtune
from vimtune.adapters import active_adapter, adapter_parameters, check_gradients, unmerge
from vimtune.methods import resolve_options
from vimtune.testing import methods as checks
from vimtune.testing.methods import build_test_inputs, build_test_model, close
from vimtune.training.optim import build_optimizer

# Trained numbers without the head, of Vim-tiny and Vim-small: those of the papers.
COUNTS = [
    ("prompt", {"num_tokens": 8}, 1_536, 3_072),
    ("affix", {"num_tokens": 3}, 55_296, 110_592),
    ("additional_scan", {"num_states": 6}, 331_776, 663_552),
    ("state_offset", {"kind": "h"}, 294_912, 589_824),
    ("state_offset", {"kind": "y"}, 9_216, 18_432),
    ("state_offset", {"h_rank": 4}, 24 * 2 * (384 + 16) * 4, 24 * 2 * (768 + 16) * 4),
    ("svp", {"width": 64, "group_size": 8}, 712_320, 24 * (130 * 384 + 64) + 3 * 386 * 384),
    ("memba", {"chunks": 4}, 0, 0),
]


@pytest.mark.parametrize(("method", "options", "tiny", "small"), COUNTS)
def test_published_counts(method, options, tiny, small):
    for size, expected in (("tiny", tiny), ("small", small)):
        with torch.device("meta"):
            plain = timm.create_model(f"vim_{size}_patch16_224", num_classes=102)
        report = vimtune.summary(vimtune.inject(plain, method, **options))
        assert report.trainable - report.head == expected


def test_published_sizes_are_the_defaults():
    for method, options in [(method, options) for method, options, _, _ in COUNTS[:4]]:
        defaults = resolve_options(method, {})[method]
        assert options.items() <= defaults.items()


# What the form of a method may change; the other checks run for the default forms of all methods.
FORMS = [
    ("prompt", {"hidden": 3}),
    ("affix", {"hidden": 3}),
    ("state_offset", {"kind": "y"}),
    ("state_offset", {"h_rank": 2}),
]
FORM_CHECKS = [
    checks.check_every_entry,
    checks.check_files,
    checks.check_autocast,
    checks.check_half_precision,
    checks.check_tracing,
    checks.check_copies,
    checks.check_several_adapters,
]


@pytest.mark.parametrize(("method", "options"), FORMS)
def test_other_forms_of_the_methods(method, options):
    for check in FORM_CHECKS:
        check(checks.MethodCase(method, options))


# --- a Vim, written down


def mix(mixer, xz: Tensor) -> Tensor:
    """Both directions of a plain mixer."""
    return (dense_scan(xz, mixer) + dense_scan(xz.flip(1), mixer, "_b").flip(1)) / 2


def run(model, tokens: Tensor, mixing=mix, before=None) -> Tensor:
    """Tokens through the blocks: `before` changes what a block sees, `mixing` is the inside of its mixer."""
    for index, block in enumerate(model.layers):
        tokens = tokens if before is None else before(index, tokens)
        mixer = block.mixer
        xz = mixer.in_proj(block.norm(tokens))
        tokens = tokens + mixer.out_proj(mixing(mixer, xz))
    return tokens


def logits(model, tokens: Tensor, cls_position: int) -> Tensor:
    return model.head(model.norm_f(tokens)[:, cls_position])


@pytest.fixture
def plain():
    return build_test_model().eval()


@pytest.fixture
def adapted():
    """A function that gives the test model under a method, its tensors off their start."""

    def adapt(method: str, **options):
        torch.manual_seed(1)
        return disturb(vimtune.inject(build_test_model(), method, **options)).eval()

    return adapt


def rules_at(model, name: str) -> list:
    """The rules at calls of this name, in the order of the layers."""
    found = [path for path, _ in model.named_modules() if path.endswith(f"{name}.default")]
    return [model.get_submodule(path) for path in found]


def rules_by_mixer(model, twin) -> dict:
    """The rules around the scans of a model, by the mixers of its twin."""
    return {block.mixer: rule for block, rule in zip(twin.layers, rules_at(model, "scan()"), strict=True)}


@pytest.fixture
def head_of():
    """The plain model with the head that an adapted one has."""

    def build(model):
        twin = build_test_model().eval()
        twin.head.load_state_dict({"weight": model.head.weight, "bias": model.head.bias})
        return twin

    return build


(images,) = build_test_inputs()


def test_the_reference_is_a_vim(plain):
    close(logits(plain, run(plain, plain._embed(images)), plain.cls_position), plain(images))


# --- prompt


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
@pytest.mark.parametrize("hidden", [0, 3])
def test_prompt(adapted, head_of, num_tokens, hidden):
    model = adapted("prompt", num_tokens=num_tokens, hidden=hidden)
    (rule,) = rules_at(model, "encode()")
    if hidden:
        down, up = rule.table.hidden.down, rule.table.up
        P = torch.tanh(rule.table.hidden.tokens @ down.weight.T + down.bias) @ up.weight.T + up.bias
    else:
        P = rule.table.tokens
    twin = head_of(model)
    x = twin._embed(images)
    m = -(-num_tokens // 2)
    x = torch.cat([P[:m].expand(3, -1, -1), x, P[m:].expand(3, -1, -1)], 1)
    close(model(images), logits(twin, run(twin, x), twin.cls_position + m))


def test_pooling_and_maps_leave_prompts_out(adapted):
    model = adapted("prompt", num_tokens=3)
    tokens, (first, last) = model.forward_intermediates(images, output_fmt="NLC")
    assert first.shape == last.shape == (3, 16, 16)
    model.global_pool = "avg"
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    close(model.forward_head(tokens, pre_logits=True), patches.mean(1))


# --- affix


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 7])
def test_affix(adapted, head_of, num_tokens, hidden):
    """Row 0 is the first to enter either scan, and what the tokens make is dropped."""
    model = adapted("affix", num_tokens=num_tokens, hidden=hidden)
    rules = rules_at(model, "scan()")
    if hidden:
        assert rules[0].table.hidden is rules[1].table.hidden
    twin = head_of(model)
    by_mixer = rules_by_mixer(model, twin)

    def mixing(mixer, xz):
        table = by_mixer[mixer].table()  # (n, 2 E): those of the forward direction first
        width = table.shape[1] // 2
        outputs = []
        for suffix, tokens, own in (("", table[:, :width], xz), ("_b", table[:, width:], xz.flip(1))):
            gate = torch.randn_like(tokens)  # whatever it is
            affix = torch.cat([tokens, gate], 1).expand(len(xz), -1, -1)
            outputs.append(dense_scan(torch.cat([affix, own], 1), mixer, suffix)[:, num_tokens:])
        return (outputs[0] + outputs[1].flip(1)) / 2

    expected = logits(twin, run(twin, twin._embed(images), mixing), twin.cls_position)
    close(model(images), expected)


def test_the_mlp_is_that_of_the_paper(plain):
    """Trained numbers for n = 3 and h: tokens and one half of the MLP for all, outputs for each layer."""
    model = vimtune.inject(plain, "affix", hidden=5)
    E = 32
    report = vimtune.summary(model)
    assert report.trainable - report.head == 3 * E + (E + 1) * 5 + 2 * (5 + 1) * 2 * E
    names = [item.name for item in adapter_parameters(model) if "hidden" in item.name]
    assert len(names) == 3 and all(name.startswith("layers.0.") for name in names)


@pytest.mark.parametrize("method", ["prompt", "affix", "affix+prompt"])
def test_the_table_is_all_that_a_trained_adapter_needs(adapted, method, tmp_path):
    model = adapted(method, hidden=64)
    expected = model(images)
    vimtune.save_adapter(model, tmp_path / "whole.safetensors")
    assert vimtune.adapters.simplify(model) is model
    close(model(images), expected, 0)
    vimtune.save_adapter(model, tmp_path / "table.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "table")]
    assert sizes[1] < sizes[0] / 2
    other = build_test_model()
    info = vimtune.load_adapter(other, tmp_path / "table.safetensors")
    assert all(own["hidden"] == 0 for own in info.options.values())
    close(other.eval()(images), expected, 0)
    assert [item.name for item in adapter_parameters(model)] == [
        item.name for item in adapter_parameters(other)
    ]
    loss_of(model).backward()  # It can be trained on.
    check_gradients(model)


# --- additional-scan


def test_additional_scan(adapted, head_of):
    model = adapted("additional_scan", num_states=3)
    twin = timm.create_model("test_vim", num_classes=5, depth=2, d_state=19).eval()
    state = head_of(model).state_dict()
    for index, block in enumerate(model.layers):
        for A_name, name in (("A_log", "x_proj"), ("A_b_log", "x_proj_b")):
            prefix = f"layers.{index}.mixer."
            A = block.mixer.adapters[A_name]["default"]
            rows = getattr(block.mixer, name).adapters["weight"]["default"]
            state[prefix + A_name] = torch.cat([state[prefix + A_name], A.A_log], 1)
            W = state[f"{prefix}{name}.weight"]
            state[f"{prefix}{name}.weight"] = torch.cat([W[:1], W[1:17], rows.B, W[17:], rows.C])
    twin.load_state_dict(state)
    expected = logits(twin, run(twin, twin._embed(images)), twin.cls_position)
    close(twin(images), expected)
    close(model(images), expected)


def test_new_states_start_as_copies_that_nobody_reads_and_do_not_decay(plain):
    model = vimtune.inject(plain, "additional_scan", num_states=2)
    mixer = model.layers[0].mixer
    for A in (mixer.A_log, mixer.A_b_log):
        assert torch.equal(A[:, 16:], A[:, :1].expand(-1, 2))
    for layer in (mixer.x_proj, mixer.x_proj_b):
        B, C = layer.weight[17:19], layer.weight[35:]
        assert B.abs().min() > 0 and not C.any() and len(C) == 2
    decays = {item.name.rpartition(".")[2]: item.weight_decay for item in adapter_parameters(model)}
    assert decays["A_log"] == 0 and decays["B"] == decays["C"] == 1


def test_more_states_merge_into_a_model_that_can_be_created_so(plain):
    model = disturb(vimtune.inject(build_test_model(), "additional_scan", num_states=3)).eval()
    expected = model(images)
    assert vimtune.summary(model).total == vimtune.summary(plain).total + 2 * 2 * 3 * 3 * 32
    vimtune.merge(model, reversible=True)
    assert model.creation["kwargs"]["d_state"] == model.options["d_state"] == 19
    assert model.layers[0].mixer.x_proj.out_features == 1 + 2 * 19
    twin = timm.create_model("test_vim", **model.creation["kwargs"]).eval()
    twin.load_state_dict(model.state_dict())
    close(twin(images), expected)
    unmerge(model)
    assert model.options["d_state"] == 16 and model.layers[0].mixer.x_proj.out_features == 1 + 2 * 16
    close(model(images), expected, 0)


def test_some_layers_alone_get_more_states_but_do_not_merge(plain):
    model = disturb(vimtune.inject(plain, "additional_scan", num_states=2, layers=[1])).eval()
    before = model(images)
    with pytest.raises(ValueError, match=r"acts on 4 of 8 parameters, .* nothing was merged"):
        vimtune.merge(model)
    close(model(images), before, 0)


# --- state-offset


@pytest.mark.parametrize("h_rank", [None, 2])
def test_state_offset_of_kind_h(adapted, head_of, h_rank):
    model = adapted("state_offset", h_rank=h_rank)
    twin = head_of(model)
    rules = rules_by_mixer(model, twin)

    def mixing(mixer, xz):
        h = [own.up @ own.down if h_rank else own.full for own in rules[mixer].offsets]
        return (dense_scan(xz, mixer, "", h[0]) + dense_scan(xz.flip(1), mixer, "_b", h[1]).flip(1)) / 2

    close(model(images), logits(twin, run(twin, twin._embed(images), mixing), twin.cls_position))


def test_state_offset_of_kind_y(adapted, head_of):
    """The two directions of the formula have one gate, so y' for both and y' / 2 + y' / 2 are the same."""
    model = adapted("state_offset", kind="y")
    twin = head_of(model)
    rules = rules_by_mixer(model, twin)

    def mixing(mixer, xz):
        y = rules[mixer].offset
        gate = F.silu(xz.chunk(2, -1)[1])
        forward = dense_scan(xz, mixer) + y * gate
        reverse = dense_scan(xz.flip(1), mixer, "_b") + y * gate.flip(1)
        return (forward + reverse.flip(1)) / 2

    close(model(images), logits(twin, run(twin, twin._embed(images), mixing), twin.cls_position))


def test_state_offset_acts_on_the_weights_that_others_adapt(adapted, head_of):
    """C is read through LoRA's x_proj, and through the states of additional-scan."""
    model = adapted("lora+additional_scan+state_offset", targets={"lora": "x_proj[C]"}, rank=2, num_states=2)
    rules = rules_by_mixer(model, model)

    def mixing(mixer, xz):
        h = [own.full for own in rules[mixer].offsets]
        assert h[0].shape == h[1].shape == (32, 18)
        return (dense_scan(xz, mixer, "", h[0]) + dense_scan(xz.flip(1), mixer, "_b", h[1]).flip(1)) / 2

    close(model(images), logits(model, run(model, model._embed(images), mixing), model.cls_position))


@pytest.mark.parametrize("kind", ["h", "y"])
def test_state_offset_is_under_the_gate_and_behind_the_tokens_of_others(adapted, kind):
    for before in ("affix", "memba", "memba+affix"):
        with pytest.raises(ValueError, match=r"'state_offset' computes a part of .* name it before"):
            vimtune.inject(build_test_model(), f"{before}+state_offset", kind=kind)
    model = adapted("state_offset+affix", kind=kind, num_tokens=2)
    rules = rules_by_mixer(model, model)

    def mixing(mixer, xz):
        offset, affix = rules[mixer].rules
        gated = []
        for number, (suffix, own) in enumerate((("", xz), ("_b", xz.flip(1)))):
            tokens = F.pad(affix.tokens()[number], (0, 32)).expand(len(xz), -1, -1)
            own = torch.cat([tokens, own], 1)
            y = dense_scan(own, mixer, suffix, offset.offsets[number].full if kind == "h" else None)
            if kind == "y":
                y = y + offset.offset * F.silu(own.chunk(2, -1)[1])
            gated.append(y[:, 2:])
        return (gated[0] + gated[1].flip(1)) / 2

    close(model(images), logits(model, run(model, model._embed(images), mixing), model.cls_position))


# --- selective visual prompting


@pytest.mark.parametrize("prompts", [0, 3, 4])
def test_svp(adapted, head_of, prompts):
    """Beside prompt tuning, too, the class token gets no prompt."""
    model = adapted("prompt+svp", num_tokens=prompts) if prompts else adapted("svp", group_size=1)
    twin = head_of(model)
    rules = [rule.prompter for rule in rules_at(model, "update()")]
    assert (rules[0].shared is rules[1].shared) == (prompts > 0)  # by default two layers are one group
    x = twin._embed(images)
    m = -(-prompts // 2)
    if prompts:
        P = rules_at(model, "encode()")[0].table.tokens.expand(3, -1, -1)
        x = torch.cat([P[:, :m], x, P[:, m:]], 1)
    cls = twin.cls_position + m

    def before(index, x):
        rule = rules[index]
        down, up = rule.own.layers
        (linear,) = rule.shared.layers
        G = F.silu((x @ down.weight.T + down.bias) @ up.weight.T + up.bias)
        shared = F.silu(x @ linear.weight.T + linear.bias)
        changed = x + rule.own.scale * G + rule.shared.scale * shared
        return torch.cat([changed[:, :cls], x[:, cls : cls + 1], changed[:, cls + 1 :]], 1)

    close(model(images), logits(twin, run(twin, x, before=before), cls))


# --- Memba


def test_more_chunks_than_tokens_are_refused(adapted):
    with pytest.raises(ValueError, match="chunks = 18 of 17 tokens: no chunk would have a token"):
        adapted("memba", chunks=18)(images)


def membranes_of(z: Tensor, before: Tensor | None, chunks: int) -> tuple[Tensor, Tensor]:
    """The membranes of gates (B, L, E), token by token, and their mean over the chunks: token t goes on from
    token t - c, for chunks of c tokens, and the first chunk from `before`."""
    c = z.shape[1] // chunks
    u: list[Tensor] = []
    for t in range(z.shape[1]):
        start = torch.zeros_like(z[:, 0])
        if t < chunks * c:
            start = u[t - c] if t >= c else start if before is None else before[:, t]
        v = 0.8 * start + z[:, t]
        u.append(torch.where(v > 0.3, 0.0, v))
    membranes = torch.stack(u, 1)
    return membranes, membranes[:, : chunks * c].unflatten(1, (chunks, c)).mean(1)


@pytest.mark.parametrize("chunks", [1, 3, 4, 17])
def test_memba(adapted, head_of, chunks):
    model = adapted("lora+memba", targets={"lora": "in_proj"}, rank=2, chunks=chunks, tau=0.8, threshold=0.3)
    handed = None

    def mixing(mixer, xz):
        nonlocal handed
        x, z = xz.chunk(2, -1)
        membranes, handed = membranes_of(z, handed, chunks)
        return mix(mixer, torch.cat([x, membranes], -1))

    expected = logits(model, run(model, model._embed(images), mixing), model.cls_position)
    assert not torch.allclose(expected, logits(model, run(model, model._embed(images)), model.cls_position))
    close(model(images), expected)


@pytest.mark.parametrize("spec", ["affix+memba", "memba+affix"])
def test_beside_affix_the_order_says_which_tokens_have_membranes(adapted, spec):
    model = adapted(spec, num_tokens=2, chunks=4, tau=0.8, threshold=0.3)
    rules, handed = rules_by_mixer(model, model), None

    def mixing(mixer, xz):
        nonlocal handed
        (affix,) = (rule for rule in rules[mixer].rules if hasattr(rule, "table"))
        x, z = xz.chunk(2, -1)
        forward, reverse = affix.tokens().unsqueeze(1).expand(-1, len(x), -1, -1)
        none = torch.zeros_like(forward)
        if spec == "affix+memba":
            gates, handed = membranes_of(z, handed, 4)
            gates = torch.cat([none, gates, none], 1)
        else:
            gates, handed = membranes_of(torch.cat([none, z, none], 1), handed, 4)
        whole = torch.cat([torch.cat([forward, x, reverse.flip(1)], 1), gates], -1)
        return mix(mixer, whole)[:, 2:-2]

    close(model(images), logits(model, run(model, model._embed(images), mixing), model.cls_position))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "svp",
            {"targets": "scan()"},
            r"acts at update\(\) of the blocks of a Vim, not at layers.0.mixer.scan",
        ),
        ("memba", {"targets": "in_proj()"}, r"in_proj\(\) is not the scan of a mixer"),
        ("state_offset", {"kind": "y", "h_rank": 2}, 'h_rank = 2 is for kind "h"'),
        ("state_offset", {"targets": "out_proj()"}, r"out_proj\(\) is not the scan of a mixer"),
        ("prompt", {"targets": "scan()"}, r"adds tokens to the call encode\(\) of a model, not to layers.0"),
        ("prompt", {"layers": [0]}, "layers"),
        ("affix", {"targets": "out_proj()"}, r"out_proj\(\) is not the scan of a mixer"),
        ("additional_scan", {"targets": "A_log"}, "x_proj and A_log of a direction together"),
        ("additional_scan", {"targets": "D"}, "x_proj and A_log of a direction together"),
        ("additional_scan", {"num_states": {"A_log": 2}}, "num_states of additional_scan is given for"),
    ],
)
def test_refusals(plain, method, options, message):
    with pytest.raises(ValueError, match=message):
        vimtune.inject(plain, method, **options)


# --- all together

FOUR = "additional_scan+lora+affix+prompt"
OPTIONS = {FOUR: {"rank": 2, "num_states": 2, "targets": {"lora": "x_proj[B],in_proj[x]"}}}


def loss_of(model) -> Tensor:
    return F.cross_entropy(model(images), torch.tensor([0, 1, 2]))


def test_four_methods_train_together(tmp_path: Path):
    """They train, are saved, loaded and resumed, and the states of one are what the rows of another mean."""
    model = vimtune.inject(build_test_model(), FOUR, **OPTIONS[FOUR])
    assert model.layers[0].mixer.A_log.shape[1] == 18
    assert active_adapter(model).sites["lora"][1] == "layers.0.mixer.x_proj.weight[B]"
    rule = model.layers[0].mixer.x_proj.adapters["weight"]["default"]
    assert rule.rows == (None, (1, 19))  # the grown rows
    optimizer = build_optimizer(adapter_parameters(model), lr=1e-2)
    first = float(loss_of(model).detach())
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        check_gradients(model)
        optimizer.step()
    assert loss_of(model) < 0.7 * first
    vimtune.save_adapter(model, tmp_path / "four.safetensors")
    other = build_test_model()
    vimtune.load_adapter(other, tmp_path / "four.safetensors")
    close(other.eval()(images), model.eval()(images), 0)
    with pytest.raises(ValueError, match=r"has a PromptRule at encode\(\), which no weight"):
        vimtune.merge(model)


@pytest.mark.parametrize("method", ["affix", "prompt", "memba", "svp", "state_offset", FOUR])
def test_calls_in_every_way_through_the_model(adapted, method):
    """features_only, forward_intermediates, tracing, export and other backends see the rules, too."""
    options = OPTIONS.get(method, {})
    model = adapted(method, **options)
    tokens, (last,) = model.forward_intermediates(images, indices=1, output_fmt="NLC")
    close(tokens, model.forward_features(images))
    assert last.shape == (3, 16, 16)
    sizes = {"num_classes": 5, "depth": 2, "backend": "torch"}
    features = timm.create_model("test_vim", **sizes, features_only=True, out_indices=(1,))
    vimtune.inject(features, method, **options)
    own = features.model.state_dict()
    features.model.load_state_dict({name: x for name, x in model.state_dict().items() if name in own})
    taken = features.eval()(images)[-1]
    close(taken.flatten(2).transpose(1, 2), last)
    traced = create_feature_extractor(model, {"head": "logits"})  # timm's way to trace with torch.fx
    close(traced(images)["logits"], model(images))
    program = torch.export.export(model, (images,))
    close(program.module()(images), model(images))
    for backend in ("cpu", "reference"):
        for block in model.layers:
            block.mixer.backend = backend
        close(model(images), program.module()(images), 1e-4)
