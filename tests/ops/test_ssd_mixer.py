"""The inside of Mamba-2's mixer against its definition, which the backend "reference" computes."""

import pytest
import torch

from vimtune import ops
from vimtune.ops.eager.ssd import CHUNK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, TOKENS, HEADS, WIDTH, STATES = 2, CHUNK + 9, 4, 6, 5
INNER = HEADS * WIDTH
OPTIONS = ops.SsdMixerOptions(2, 2, 1e-5, 0.0, float("inf"))


def tensors(groups=2, dtype=torch.float64, tokens=TOKENS):
    """The output of in_proj and the weights, by name."""
    generator = torch.Generator().manual_seed(groups)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    channels = INNER + 2 * groups * STATES
    weights = {
        "conv_weight": normal(channels, 4),
        "conv_bias": normal(channels),
        "dt_bias": normal(HEADS),
        "A_log": normal(HEADS),
        "D": normal(HEADS),
        "norm_weight": normal(INNER),
    }
    wide = torch.promote_types(dtype, torch.float32)
    weights = {name: weight.to(wide) for name, weight in weights.items()}
    return {"projected": normal(BATCH, tokens, INNER + channels + HEADS).to(dtype), **weights}


def padding(tokens=TOKENS):
    mask = torch.ones(BATCH, tokens, 1, dtype=torch.bool, device=DEVICE)
    mask[0, :5], mask[1, -7:] = False, False
    return mask


def result(values, options=OPTIONS, mask=None, backend="auto", function=ops.ssd_mixer):
    projected, *weights = values.values()
    return function(projected, ops.SsdWeights(*weights), options, mask, backend)


def results_and_gradients(values, trained=None, **options):
    """The result, and gradients of the tensors that are trained."""
    trained = [*values] if trained is None else trained
    leaves = {name: None if x is None else x.detach().clone() for name, x in values.items()}
    for name in trained:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    out = result(leaves, **options)
    factors = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view(out.shape)
    wanted = [leaves[name] for name in trained if leaves[name] is not None]
    return [out, *torch.autograd.grad((out.double() * factors).sum(), wanted)]


def assert_equal(found, expected, tolerance=1e-9):
    for value, other in zip(found, expected, strict=True):
        assert (value.double() - other.double()).abs().max() <= tolerance * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("mask", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize(
    "options",
    [OPTIONS, OPTIONS._replace(groups=1, norm_groups=1), OPTIONS._replace(lowest=0.1, highest=0.6)],
    ids=["groups", "one group", "limits"],
)
def test_results_and_gradients_are_those_of_the_definition(options, mask):
    values = tensors(options.groups)
    expected = results_and_gradients(values, options=options, mask=mask, backend="reference")
    assert_equal(results_and_gradients(values, options=options, mask=mask, backend="torch"), expected)


def test_without_a_bias_of_the_convolution():
    values = {**tensors(), "conv_bias": None}
    expected = results_and_gradients(values, backend="reference")
    assert_equal(results_and_gradients(values, backend="torch"), expected)


@pytest.mark.parametrize("name", [*tensors()])
def test_a_single_trained_tensor(name):
    values = tensors()
    expected = results_and_gradients(values, trained=[name], backend="reference")
    assert_equal(results_and_gradients(values, trained=[name], backend="torch"), expected)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)]
)
def test_other_dtypes(dtype, tolerance):
    values = tensors(dtype=dtype)
    exact = results_and_gradients(
        {name: value.double() for name, value in values.items()}, backend="reference"
    )
    found = results_and_gradients(values, backend="torch")
    assert found[0].dtype == found[1].dtype == dtype and found[-1].dtype == torch.float32
    assert_equal(found, exact, tolerance)


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    values = {name: value.requires_grad_() for name, value in tensors(dtype=torch.float32).items()}
    kept = []
    mask = padding()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda _: None):
        result(values, mask=mask)
    assert set(kept) <= {value.data_ptr() for value in (*values.values(), mask)}


def test_it_is_one_graph_for_the_compiler():
    values = tensors(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ops.ssd_mixer, fullgraph=True, backend="aot_eager")
    for mask in (None, padding()):
        found = results_and_gradients(values, mask=mask, function=compiled)
        assert_equal(found, results_and_gradients(values, mask=mask), 1e-5)


def test_autocast_leaves_its_sums_alone():
    values = tensors(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results_and_gradients(values)
    assert_equal(found, results_and_gradients(values), 1e-6)


def test_padding_reaches_no_other_token():
    values, mask = tensors(), padding()
    other = {**values, "projected": torch.where(mask, values["projected"], 7.0)}
    first, second = (result(each, mask=mask) for each in (values, other))
    torch.testing.assert_close(first * mask, second * mask)


def test_no_tokens_at_all():
    found, *gradients = results_and_gradients(tensors(tokens=0))
    assert found.shape == result(tensors(tokens=0), backend="reference").shape == (BATCH, 0, INNER)
    assert not any(gradient.any() for gradient in gradients)


def test_tensors_that_do_not_fit_are_named():
    values = tensors()
    with pytest.raises(ValueError, match=r"D is \(3,\), expected \(4,\)"):
        result({**values, "D": values["D"][:3]})
    with pytest.raises(ValueError, match=r"and 3 groups .* do not fit together: H must divide E, G must"):
        result(values, options=OPTIONS._replace(groups=3))
    with pytest.raises(ValueError, match="projected must be"):
        result({**values, "projected": values["projected"][0]})
