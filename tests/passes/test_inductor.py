"""The compiled graph under Inductor: one compilation for all sizes, and the pool never copied.

An op that writes into views of one pool makes a compiler that works on values copy the pool, in the worst case in
every layer. The generated code shows it: then the pool goes somewhere else than into the attention op.
"""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from sparsespec_compile.passes.pipeline import compile_model

from .families import logits, tiny, tokens
from .prefill import prefill_step

OP = "torch.ops.sparsespec.dual_mode_attention.default"


def pool_argument(line):
    """The tensor of which the op's fourth argument is a view, in a line of generated code that calls the op."""
    arguments, depth = [""], 0
    for character in line[line.index(OP) + len(OP) + 1 :]:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return re.search(r"\b(arg\d+_1|buf\d+)\b", arguments[3]).group()


def uses_outside_attention(code):
    """Lines of the generated call that do something with the pool but view it as an argument of the op.

    When the op works on a buffer of the generated code instead of the pool itself, those are the lines that call it.
    """
    lines = [line.strip() for line in code[: code.index("def get_args")].splitlines()]
    calls = [line for line in lines if OP + "(" in line]
    pools = {pool_argument(line) for line in calls}
    mentions = [line for line in lines if any(re.search(rf"\b{pool}\b", line) for pool in pools)]
    passive = re.compile(rf"assert_size_stride\(|{'|'.join(rf'del {pool}' for pool in pools)}|.* = args$")
    copied = [line for line in calls if pool_argument(line).startswith("buf")]
    return copied + [line for line in mentions if line not in calls and not passive.match(line)]


def run_compiled(graph_module, layout, sequences, slots):
    step = prefill_step(layout, sequences, slots)
    with torch.no_grad():
        return graph_module(*step.inputs)[0], step


@pytest.fixture(scope="module")
def compiled():
    model = tiny("qwen3", num_hidden_layers=2)
    return model, compile_model(model, page_size=16)


def test_one_compilation_serves_all_sizes_and_copies_no_pool(compiled):
    model, result = compiled
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    optimized = torch.compile(result.graph_module, dynamic=True, fullgraph=True, backend=counter)
    first, second = tokens(11, seed=1), tokens(37, seed=2)
    (out, step), (code,) = run_and_get_code(run_compiled, optimized, result.layout, [first, second], 3)
    assert torch.allclose(out[11:], logits(model, second), rtol=1e-4, atol=1e-4)
    for sequences, slots in ([second], 4), ([first[:2]], 2), ([second, first, second[:5]], 7):
        out, step = run_compiled(optimized, result.layout, sequences, slots)
        expected, eager_step = run_compiled(result.graph_module, result.layout, sequences, slots)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(step.pool, eager_step.pool, rtol=1e-4, atol=1e-4)
        assert torch.allclose(step.scores, eager_step.scores, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert code.count(OP + "(") == len(result.layout.layers)
    assert uses_outside_attention(code) == []


def test_the_search_for_copies_finds_one(compiled):
    """The same graph with one index_put into the pool, which Inductor can only do on a copy of what follows."""
    _, result = compiled
    graph_module = torch.fx.GraphModule(result.graph_module, result.graph_module.graph)

    def with_copy(*inputs):
        pool = inputs[3].index_put((inputs[2],), inputs[3][:1])
        return graph_module(*inputs[:3], pool, *inputs[4:])

    torch._dynamo.reset()
    optimized = torch.compile(with_copy, dynamic=True)
    _, codes = run_and_get_code(run_compiled, optimized, result.layout, [tokens(9)], 3)
    assert uses_outside_attention(codes[0])
