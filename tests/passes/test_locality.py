"""The row-locality probe: what mixes tokens outside attention is found and named, what does not is let through."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from transformers.models.llama import modeling_llama

from sparsespec_compile.passes.base import PassContext
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.errors import NotANumberError, RowMixingError
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.proofs.locality import Lockstep, ProveRowLocality, Runs, row_wise
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.passes.rewrites.normalise import Normalise

from .families import DOZEN, telling, tiny


def probe(model):
    return examine(model).matches


def examine(model):
    captured = capture(model)
    layout = KVLayout(tuple(site.layer for site in captured.sites), 16)
    context = PassContext(model, layout, CompileReport("", ""))
    graph_module = captured.graph_module
    Normalise(context)(graph_module)
    graph_pass = ProveRowLocality(context)
    graph_pass(graph_module)
    return graph_pass


@pytest.mark.parametrize("family", telling([*DOZEN, "deepseek_v3"]))
def test_attention_alone_passes(bench, family):
    report = bench(family).compiled.report
    record = next(record for record in report.passes if record.name == "prove row locality")
    assert record.matches == len(report.attention)


@pytest.mark.parametrize("family", telling([*DOZEN, "deepseek_v3"]))
def test_a_row_alone_is_taken(bench, family):
    assert bench(family).compiled.report.takes_single_rows


@pytest.mark.parametrize(
    "change",
    [lambda x: x * x.shape[1], lambda x: x - x.squeeze().mean(1)[None, :, None]],
    ids=["another value", "a dimension less"],
)
def test_what_one_row_alone_would_change_is_found(monkeypatch, change):
    assert not examine(patched(monkeypatch, change)).context.report.takes_single_rows


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("mixtral", torch.bfloat16), ("mixtral", torch.float16), ("olmoe", torch.bfloat16), ("gemma2", torch.float64)],
)
def test_rounding_of_any_type_passes(family, dtype):
    assert probe(tiny(family).to(dtype)) == 2


def test_tokens_that_are_never_read_may_have_no_embedding():
    model = tiny("qwen3", tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[20:] = torch.nan
    assert probe(model) == 2


@pytest.mark.parametrize(
    ("weight", "named"), [("lm_head", r"aten\.linear.*lm_head\.weight, a weight that holds NaN"), ("model.norm", "NaN")]
)
def test_a_weight_that_is_not_a_number_is_named(weight, named):
    model = tiny("qwen3", tie_word_embeddings=False)
    model.get_submodule(weight).weight.data[3] = torch.nan
    with pytest.raises(NotANumberError, match=named) as caught:
        probe(model)
    assert "mixes" not in str(caught.value)


def test_infinities_pass_and_do_not_hide_mixing(monkeypatch):
    """As models have that rule tokens out by a bias of the logits."""
    model = tiny("qwen3", tie_word_embeddings=False)
    model.lm_head.weight.data[5, 0] = torch.inf
    assert probe(model) == 2
    mixing = patched(monkeypatch, lambda x: x + x.mean(1, keepdim=True))
    mixing.lm_head.weight.data[5, 0] = torch.inf
    with pytest.raises(RowMixingError, match="mixes rows"):
        probe(mixing)


def test_experts_of_one_token_pass():
    """With one expert a token, the regrouped rows are as many as the rows, and in another order."""
    assert probe(tiny("mixtral", num_experts_per_tok=1)) == 2


def test_convolutions_are_found():
    with pytest.raises(RowMixingError, match=r"aten\.conv1d.*layers\.0\.conv.*mixes rows"):
        probe(tiny("lfm2"))


def test_positions_counted_by_row_are_found():
    with pytest.raises(RowMixingError, match=r"aten\.arange.*depends on the number of a row"):
        probe(tiny("bart"))


def patched(monkeypatch, change):
    """A Llama whose MLPs' input goes through `change`, `[1, T, hidden]` to the same."""
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, change(x)))
    return tiny("llama")


def token_shift(x):
    return torch.nn.functional.pad(x, (0, 0, 1, -1)) * 0.5 + x * 0.5


def recurrence(x):
    return x + 0.1 * torch.cumsum(x, dim=1)


def own_attention(x):
    scores = x @ x.transpose(1, 2) / x.shape[2]
    rows = torch.arange(x.shape[1])
    return torch.where(rows[:, None] >= rows, scores, -torch.inf).softmax(-1) @ x


def batch_norm(x):
    return x - x.mean(dim=1, keepdim=True)


def scale_of_all_rows(x):
    return x / x.abs().amax()


MIXING = {
    token_shift: "pad",
    recurrence: "cumsum",
    own_attention: "matmul",
    batch_norm: "mean",
    scale_of_all_rows: "amax",
}


@pytest.mark.parametrize("change", MIXING, ids=lambda change: change.__name__)
def test_mixing_of_every_kind_is_found_where_it_happens(monkeypatch, change):
    find(patched(monkeypatch, change), MIXING[change])


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, marks=() if change is token_shift else pytest.mark.slow) for change in MIXING],
    ids=lambda change: change.__name__,
)
def test_mixing_is_found_beside_coarse_rounding(monkeypatch, change):
    find(patched(monkeypatch, change).to(torch.bfloat16), MIXING[change])


def find(model, operation):
    with pytest.raises(RowMixingError, match=rf"= aten\.{operation}\..*layers\.0\.mlp.*mixes rows"):
        probe(model)


@pytest.mark.parametrize("source", ["q", "k", "v"])
def test_mixing_is_found_on_every_way_into_a_site(source):
    model = tiny("llama")
    projection = getattr(model.model.layers[1].self_attn, f"{source}_proj")
    projection.register_forward_hook(lambda module, inputs, output: token_shift(output))
    with pytest.raises(RowMixingError, match="mixes rows"):
        probe(model)


def test_mixing_after_the_last_site_is_found():
    model = tiny("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: token_shift(output))
    with pytest.raises(RowMixingError, match="mixes rows"):
        probe(model)


def test_state_between_calls_is_found():
    model = tiny("llama")

    def remember(module, inputs, output):
        model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq * 1.01)

    model.model.norm.register_forward_hook(remember)
    with pytest.raises(RowMixingError, match=r"copy_.*keeps a result between calls"):
        probe(model)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_the_stand_in_for_attention_shows_all_of_q_k_and_v(changed):
    tensors = [torch.randn(1, heads, 5, 8, dtype=torch.float64) for heads in (6, 2, 2)]
    expected = row_wise(*tensors)
    assert expected.shape == (1, 5, 6, 8)
    tensors[changed][0, 1, 3, 4] += 1
    differs = (row_wise(*tensors) != expected).any(-1)[0]
    assert differs.any(1).tolist() == [False, False, False, True, False]


def test_rounding_does_not_add_up_over_blocks():
    """Ten blocks, each of which moves the common row by half of what is tolerated."""
    rows = 13

    def block(value):
        return value * torch.linspace(1, 1 + 5e-6, rows)[:, None]

    graph = Graph()
    node = graph.placeholder("hidden")
    for _ in range(10):
        node = graph.call_function(block, (node,))
    graph.output(node)
    first, second = torch.randn(2, 1, rows, 8)
    second[0, -1] = first[0, 0]
    Lockstep(GraphModule(nn.Module(), graph), Runs(rows, 0, rows - 1, ((first,), (second,)))).run()
