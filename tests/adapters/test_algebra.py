"""Methods that multiply or add structured matrices: C3A, CDVFT, OFT, IA3; their formulas and counts."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import vimtune
from vimtune.adapters.rules.circulant import C3ARule, CDVFTRule, block_circulant
from vimtune.adapters.rules.ia3 import IA3Rule
from vimtune.adapters.rules.oft import OFTRule, invert
from vimtune.testing.methods import close, disturb


def dense_circulant(kernels: torch.Tensor) -> torch.Tensor:
    """M[k, p] = c[(p - k) mod b] in every block, entry by entry."""
    m, n, b = kernels.shape
    matrix = torch.zeros(m * b, n * b, dtype=kernels.dtype)
    for i in range(m):
        for j in range(n):
            for k in range(b):
                for p in range(b):
                    matrix[i * b + k, j * b + p] = kernels[i, j, (p - k) % b]
    return matrix


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (1, 1, 6), (3, 2, 4)])
def test_block_circulant_is_what_its_definition_says(shape):
    kernels = torch.randn(shape, dtype=torch.double, requires_grad=True)
    close(block_circulant(kernels), dense_circulant(kernels), 0)
    assert torch.autograd.gradcheck(block_circulant, kernels)


def test_multiplying_by_a_circulant_matrix_is_the_correlation_that_the_papers_compute_by_fft():
    c, x = torch.randn(7), torch.randn(5, 7)
    by_fft = torch.fft.ifft(torch.fft.fft(c).conj() * torch.fft.fft(x)).real
    close(x @ block_circulant(c[None, None]).T, by_fft)


def test_c3a_is_its_formula():
    weight = torch.randn(8, 12)
    rule = C3ARule(weight, block_size=4)
    close(rule.effective_weight(weight), weight, 0)
    nn.init.normal_(rule.kernels)
    close(rule.effective_weight(weight), weight + dense_circulant(rule.kernels) / 12)


def test_cdvft_is_its_formula():
    weight = torch.randn(8, 12)
    rule = CDVFTRule(weight, block_size=4)
    close(rule.effective_weight(weight), weight, 0)
    assert torch.equal(rule.column_scale, torch.ones(12)) and (rule.kernels != 0).all()
    large = CDVFTRule(torch.empty(3, 40_000), block_size=1)
    assert float(large.kernels.detach().std()) * 200 == pytest.approx(1, abs=0.02)
    for parameter in rule.parameters():
        nn.init.normal_(parameter)
    change = torch.diag(rule.row_scale) @ dense_circulant(rule.kernels) @ torch.diag(rule.column_scale)
    close(rule.effective_weight(weight), weight + change)


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_oft_is_its_formula(size):
    weight = torch.randn(5, 12, dtype=torch.double)
    rule = OFTRule(weight, block_size=4)
    close(rule.effective_weight(weight), weight, 0)
    nn.init.normal_(rule.angles, std=size)
    blocks, eye = [], torch.eye(4, dtype=torch.double)
    for angles in rule.angles:
        upper, entries = torch.zeros(4, 4, dtype=torch.double), iter(angles)
        for i in range(4):
            for j in range(i + 1, 4):
                upper[i, j] = next(entries)
        Q = upper - upper.T
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    R = torch.block_diag(*blocks)
    close(R @ R.T, torch.eye(12, dtype=torch.double))
    close(rule.effective_weight(weight), weight @ R.T)


@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_inverses_and_their_gradients_are_exact(size):
    Q = size * torch.randn(3, 6, 6, dtype=torch.double)
    matrices = (torch.eye(6, dtype=torch.double) - (Q - Q.mT)).requires_grad_()
    expected = torch.linalg.inv(matrices)
    close(invert(matrices), expected, 1e-10)
    weights = torch.randn_like(Q)
    grads = [torch.autograd.grad((x * weights).sum(), matrices)[0] for x in (invert(matrices), expected)]
    close(*grads, 1e-8)


@pytest.mark.parametrize("side", ["output", "input"])
def test_ia3_is_its_formula(side):
    weight = torch.randn(5, 3)
    rule = IA3Rule(weight, side)
    close(rule.effective_weight(weight), weight, 0)
    nn.init.normal_(rule.scale)
    scale = torch.diag(rule.scale)
    close(rule.effective_weight(weight), scale @ weight if side == "output" else weight @ scale)


@pytest.mark.parametrize("method", ["c3a", "cdvft", "oft", "ia3"])
def test_kernels_of_a_convolution_are_rows(method):
    """The last dimension of conv1d has 4 entries, and those of one output are one row."""
    model = timm.create_model("test_vim", num_classes=5, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    options = {"block_size": 4} if method != "ia3" else {}
    plain = model(images)
    vimtune.inject(model, method, targets="conv1d", **options)
    close(model(images), plain)
    expected = disturb(model)(images)
    assert not torch.allclose(expected, plain, atol=1e-3)
    close(vimtune.merge(model)(images), expected)


PEFT = "the oracle for C3A, OFT and IA3 is not installed"


class Wrapped(nn.Module):
    """One linear layer with a name."""

    def __init__(self, bias=True):
        super().__init__()
        self.in_proj = nn.Linear(12, 20, bias=bias)

    def forward(self, x):
        return self.in_proj(x)


def peft_config(peft, method, options):
    """The method as HF peft states it, with the name of its tensor there and the name of ours."""
    if method == "c3a":
        own = {"block_size": options["block_size"]}
        return peft.C3AConfig(target_modules=["in_proj"], **own), "c3a_kernel", "kernels"
    if method == "oft":
        own = {"oft_block_size": options["block_size"], "use_cayley_neumann": False}
        return peft.OFTConfig(r=0, target_modules=["in_proj"], **own), "oft_R", "angles"
    feedforward = ["in_proj"] if options["side"] == "input" else []
    own = {"feedforward_modules": feedforward}
    return peft.IA3Config(target_modules=["in_proj"], **own), "ia3_l", "scale"


@pytest.mark.parametrize(
    ("method", "options", "bias"),
    [
        ("c3a", {"block_size": 4}, True),
        ("oft", {"block_size": 4}, True),
        ("ia3", {"side": "input"}, True),
        ("ia3", {"side": "output"}, False),
    ],
)
def test_equals_hf_peft_on_a_plain_linear(method, options, bias):
    peft = pytest.importorskip("peft", reason=PEFT)
    torch.manual_seed(0)
    base = Wrapped(bias)
    config, theirs_name, ours_name = peft_config(peft, method, options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = vimtune.inject(copy.deepcopy(base), method, targets="in_proj", **options)
    rule = ours.in_proj.adapters["weight"]["default"]
    mine = getattr(rule, ours_name)
    other = getattr(theirs.base_model.model.in_proj, theirs_name)["default"]
    other = getattr(other, "weight", other)
    with torch.no_grad():
        other.copy_(mine.normal_(std=0.3).view_as(other))
    x = torch.randn(5, 12)
    close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    close(mine.grad, other.grad.view_as(mine), 1e-4)
    close(vimtune.merge(ours).in_proj.weight, theirs.merge_and_unload().in_proj.weight)


# Exact trainable counts on Vim-tiny without the head, whose projectors are 768 x 192 and 192 x 384 in each of
# 24 layers.
COUNTS = [
    ("c3a", "both", {}, 24 * (768 * 192 // 192 + 192 * 384 // 192)),
    ("c3a", "in_proj", {"block_size": 64}, 24 * 768 * 192 // 64),
    ("cdvft", "both", {}, 24 * (768 + 768 + 192 + 384 + 192 + 384)),
    ("cdvft", "in_proj[x]", {"block_size": 192}, 24 * (384 * 192 // 192 + 384 + 192)),
    ("oft", "both", {}, 24 * (192 + 384) * 31 // 2),
    ("oft", "out_proj", {"block_size": 4}, 24 * 384 * 3 // 2),
    ("ia3", "both", {}, 24 * (768 + 192)),
    ("ia3", "both", {"side": "input"}, 24 * (192 + 384)),
]


@pytest.mark.parametrize(("method", "targets", "options", "expected"), COUNTS)
def test_exact_trainable_counts(method, targets, options, expected):
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224", num_classes=102, depth=1)
    report = vimtune.summary(vimtune.inject(model, method, targets=targets, **options))
    assert 24 * (report.trainable - report.head) == expected


def test_cdvft_of_a_square_weight_has_three_numbers_per_row():
    model = nn.Sequential(nn.Linear(7, 7))
    assert vimtune.summary(vimtune.inject(model, "cdvft", targets="0")).trainable == 21


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [
        ("c3a", 128, "block_size 128 does not divide 768 and 192 of layers.0.mixer.in_proj.weight; "),
        ("cdvft", 5, "block_size 5 does not divide 768 and 192 .*, 24, 32, 48, 64"),
        ("oft", 5, "block_size 5 does not divide the input width 192 of .*: 1, 2, 3, 4, 6, 8,"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(method, size, message):
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224", depth=1)
    with pytest.raises(ValueError, match=message):
        vimtune.inject(model, method, block_size=size)


def test_rotations_that_would_do_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"no block of 2 to 32 inputs divides the input width 37 of 0\.weight"
    ):
        vimtune.inject(nn.Sequential(nn.Linear(37, 7)), "oft", targets="0")


@pytest.mark.parametrize("method", ["c3a", "cdvft", "oft", "ia3"])
def test_a_vector_is_refused(method):
    with torch.device("meta"):
        model = timm.create_model("test_vim", depth=1)
    with pytest.raises(ValueError, match=f"{method} needs a matrix; layers.0.mixer.D has shape"):
        vimtune.inject(model, method, targets="D")
