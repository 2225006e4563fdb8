"""The logits that judge where texts part."""

import copy

import pytest
import torch
from torch import nn

from sparsespec_compile.trial.gaps import in_float32, in_large_batches

from ..support.models import tiny

TEXT = torch.arange(3, 23)


class TestInFloat32:
    @pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
    def test_are_those_of_a_copy_and_the_model_stays_as_it_is(self, family):
        model = tiny(family).to(torch.bfloat16)
        weights = dict(model.named_parameters())
        (got,) = in_float32(model)(TEXT, 0)
        with torch.no_grad():
            (expected,) = in_large_batches(copy.deepcopy(model).float())(TEXT, 0)
            (rounded,) = in_large_batches(model)(TEXT, 0)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(rounded, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert all(parameter is weights[name] for name, parameter in model.named_parameters())

    def test_a_failure_leaves_the_model_as_it_is(self):
        model = tiny("qwen3").to(torch.bfloat16)
        logits = in_float32(model)
        with pytest.raises(IndexError):
            list(logits(torch.tensor([10**6]), 0))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_are_not_had_of_float32_nor_of_a_module_that_takes_the_weights_of_another(self):
        assert in_float32(tiny("qwen3")) is None
        model = tiny("qwen3").to(torch.bfloat16)
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(),))
        assert in_float32(model) is None
        quantised = tiny("qwen3").to(torch.bfloat16)
        quantised.lm_head.weight = nn.Parameter(quantised.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
        assert in_float32(quantised) is None
