"""What is refused of quantised models, and what the error says, on models that need no library to be quantised."""

from types import SimpleNamespace

import pytest
from torch import nn

from sparsespec_compile.errors import ExportError, UnsupportedModelError
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.capture.requirements import check_model

from .families import tiny


class Rounded(nn.Linear):
    """Inputs of 255 values in a dtype of more, as layers trained for 8-bit activations have."""

    def forward(self, x):
        return super().forward((10 * x).round().clamp(-128, 127) / 10)


class RoundedWeight(nn.Linear):
    """Weights of few values, computed in each step."""

    def forward(self, x):
        return nn.functional.linear(x, (100 * self.weight).round() / 100)


class OwnKernel(nn.Linear):
    """A kernel that takes addresses."""

    def forward(self, x):
        return super().forward(x + (self.weight.data_ptr() and x.data_ptr()) * 0)


def model_of(kind, method=None):
    """A tiny Llama whose first gate is of this kind, and that says it was loaded with `method`."""
    model = tiny("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = kind(mlp.gate_proj.in_features, mlp.gate_proj.out_features, bias=False)
    if method is not None:
        model.config.quantization_config = {"quant_method": method}
        model.hf_quantizer = SimpleNamespace()
    return model


def test_activations_that_are_rounded_within_a_wide_dtype():
    with pytest.raises(
        UnsupportedModelError, match=r"rounds activations to whole numbers.*Allowed: .* weights\s+alone"
    ):
        capture(model_of(Rounded))


def test_rounded_weights_are_taken():
    assert len(capture(model_of(RoundedWeight)).sites) == 1


def test_the_method_is_named_with_what_to_do():
    with pytest.raises(UnsupportedModelError, match=r"loaded with bitnet\. Load the checkpoint that it was made from,"):
        capture(model_of(Rounded, "bitnet"))


@pytest.mark.parametrize(
    ("method", "remedy"), [("fp8", r"FineGrainedFP8Config\(dequantize=True\)"), ("eetq", "without quantisation")]
)
def test_code_that_cannot_be_traced_is_blamed_on_the_method(method, remedy):
    with pytest.raises(
        UnsupportedModelError, match=rf"quantised weights \({method}\).*takes addresses.*{remedy}"
    ) as caught:
        capture(model_of(OwnKernel, method))
    assert not isinstance(caught.value, ExportError)


def test_parameters_of_another_library():
    model = model_of(nn.Linear, "quanto")
    model.lm_head.weight = type("QBytes", (nn.Parameter,), {})(model.lm_head.weight.data)
    with pytest.raises(UnsupportedModelError, match=r"a QBytes of torch.float32 \(the model was loaded with quanto\)"):
        check_model(model)
