"""Each test names one thing that torch or transformers do not promise, and shows that it still is as relied on."""

import functools
import types
from pathlib import Path

import pytest
import sympy
import torch
import torch._inductor.config
from torch import nn
from torch._inductor.codecache import FxGraphHashDetails
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig

from sparsespec_compile.passes import compat
from sparsespec_compile.passes.errors import VersionError

from .families import tiny

aten = torch.ops.aten

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mode():
    return FakeTensorMode(shape_env=ShapeEnv())


def row_sums(mode):
    """A graph `[n, 8] -> [n]` on a symbolic number of rows, and its input."""
    rows = compat.symbolic_input(mode, "x", (5, 8), (True, False), torch.float32, "cpu")
    graph = Graph()
    source = graph.placeholder("x")
    source.meta["val"] = rows
    total = graph.call_function(aten.sum.dim_IntList, (source, [1]))
    with mode:
        total.meta["val"] = aten.sum.dim_IntList(rows, [1])
    graph.output((total,))
    return GraphModule(nn.Module(), graph), [rows]


def test_a_new_input_has_a_symbol_where_it_is_free_and_a_number_where_not(mode):
    value = compat.symbolic_input(mode, "x", (5, 8), (True, False), torch.float32, "cpu")
    other = compat.symbolic_input(mode, "y", (5, 8), (True, True), torch.float32, "cpu")
    assert isinstance(value.shape[0].node.expr, sympy.Symbol)
    assert value.shape[1] == 8
    assert isinstance(value.shape[1], int)
    assert value.shape[0].node.expr != other.shape[0].node.expr, "equal hints are not the same symbol"


def test_modes_made_without_the_shape_cache_have_none():
    with compat.without_shape_cache():
        mode = FakeTensorMode(shape_env=ShapeEnv())
    assert not mode.cache_enabled
    assert FakeTensorMode(shape_env=ShapeEnv()).cache_enabled, "other users of torch keep theirs"


def test_python_dispatch_keeps_sizes_symbolic(mode):
    value = compat.symbolic_input(mode, "x", (5, 8), (True, False), torch.float32, "cpu")
    with mode, compat.python_dispatch(), torch.no_grad():
        doubled = aten.cat.default([value, value])
    assert doubled.shape[0].node.expr == 2 * value.shape[0].node.expr
    assert compat.conditions(mode.shape_env) == []


def test_what_is_taken_for_granted_about_sizes_is_recorded(mode):
    value = compat.symbolic_input(mode, "x", (5, 8), (True, False), torch.float32, "cpu")
    assert value.shape[0] < 100
    known = len(compat.conditions(mode.shape_env))
    assert known == 1
    assert value.shape[0] * 2 < 150
    (expression,) = compat.conditions(mode.shape_env, known)
    symbol = value.shape[0].node.expr
    assert expression.xreplace({symbol: sympy.Integer(74)}) == sympy.true
    assert expression.xreplace({symbol: sympy.Integer(75)}) == sympy.false


@pytest.mark.parametrize("guard", [types.SimpleNamespace(), types.SimpleNamespace(expr="s0 < 100")])
def test_conditions_in_another_form_are_noticed(guard):
    with pytest.raises(VersionError, match="form that is not known"):
        compat.conditions(types.SimpleNamespace(guards=[guard]))


def test_inductor_compiles_a_graph_on_symbolic_sizes_once_for_all(mode):
    run = compat.compile_graph(*row_sums(mode), tag="")
    for rows in (2, 5, 64):
        (total,) = run(torch.ones(rows, 8))
        assert torch.equal(total, torch.full((rows,), 8.0))


def test_the_tag_is_part_of_the_key_of_compiled_code(mode, monkeypatch):
    graph_module, inputs = row_sums(mode)
    keys = []

    def note(graph_module, inputs, options):
        keys.append(FxGraphHashDetails(graph_module, inputs, {}, []).cache_key_tag)

    monkeypatch.setattr(torch._inductor, "compile", note)
    compat.compile_graph(graph_module, inputs, tag="one")
    compat.compile_graph(graph_module, inputs, tag="two")
    assert keys == ["one", "two"]
    assert torch.compiler.config.cache_key_tag == ""


def test_inductor_knows_the_options_that_it_is_given():
    for name, value in compat._INDUCTOR_OPTIONS.items():
        assert type(getattr(torch._inductor.config, name)) is type(value), name


def test_tritons_folder_is_the_one_that_inductor_sets(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folders = [compat.triton_cache_dir(torch.device("cuda", index)) for index in (0, 1)]
    assert all(folder.startswith(str(tmp_path)) for folder in folders)
    assert compat.triton_cache_dir(torch.device("cuda")) == folders[0] != folders[1]


def test_compiled_code_is_kept_in_inductors_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compat.compile_cache_dir() == str(tmp_path)


def test_a_configuration_keeps_its_implementations_where_they_are_borrowed():
    config = LlamaConfig()
    config._attn_implementation = "eager"
    assert compat.implementations(config)[compat.ATTENTION_SETTING] == "eager"
    setattr(config, compat.ATTENTION_SETTING, "sdpa")
    setattr(config, compat.EXPERTS_SETTING, "grouped_mm")
    assert config._attn_implementation == "sdpa"
    assert config._experts_implementation == "grouped_mm"


def test_a_configuration_without_them_is_noticed():
    with pytest.raises(VersionError, match=r"SimpleNamespace has no attribute _attn_implementation_internal"):
        compat.implementations(types.SimpleNamespace())


def test_a_mask_is_asked_for_with_a_function_of_indices():
    asked = []
    AttentionInterface.register("compat_test", lambda module, q, k, v, mask, **options: (q.transpose(1, 2), None))
    AttentionMaskInterface.register("compat_test", lambda **options: asked.append(options))
    model = tiny("llama")
    model.set_attn_implementation("compat_test")
    model(torch.tensor([[3, 4, 5]]))
    zero = torch.zeros(1, dtype=torch.int64)
    visible = compat.mask_function(asked[0])(zero, zero, torch.tensor([1]), torch.arange(3))
    assert visible.tolist() == [True, True, False]


def test_experts_are_asked_of_what_was_registered_and_say_what_they_hold():
    model = tiny("mixtral")
    expected = model(torch.tensor([[3, 4, 5]])).logits
    met = []

    def experts(module, x, index, weight):
        met.append((x.shape, index.shape, weight.shape))
        assert (module.has_gate, module.has_bias, module.is_transposed) == (True, False, False)
        return compat.grouped_experts(module, x, index, weight)

    compat.register_experts("compat_test", experts)
    setattr(model.config, compat.EXPERTS_SETTING, "compat_test")
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, expected)
    assert met == [((3, 48), (3, 2), (3, 2))] * 2


def test_a_mask_without_such_a_function_is_noticed():
    with pytest.raises(VersionError, match=r"asks for a mask with \['kv_length'\]"):
        compat.mask_function({"kv_length": 3})


def test_implementations_have_functions_that_a_user_can_register(monkeypatch):
    def own(module, query, key, value, attention_mask, **options):
        return query, None

    AttentionInterface.register("tests_own", own)
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = "tests_own"
    functions = compat.implementing_functions(config)
    assert functions[compat.ATTENTION_SETTING] is own
    assert functions[compat.EXPERTS_SETTING] is None or callable(functions[compat.EXPERTS_SETTING])
    config._attn_implementation = "sdpa"
    assert compat.implementing_functions(config)[compat.ATTENTION_SETTING].__module__.startswith("transformers.")


def test_hooks_are_found_where_torch_keeps_them():
    module = nn.Linear(2, 2)
    module.register_forward_hook(print)
    module.register_forward_pre_hook(repr)
    assert compat.forward_hooks(module) == [repr, print]
    handles = [nn.modules.module.register_module_forward_hook(print)]
    handles.append(nn.modules.module.register_module_forward_pre_hook(repr))
    assert compat.global_forward_hooks() == [repr, print]
    for handle in handles:
        handle.remove()
    assert compat.global_forward_hooks() == []


def does_nothing():
    pass


def test_a_compiled_function_knows_what_it_was():
    module = nn.Linear(2, 2)
    for function in (module.forward, tiny("llama").forward, does_nothing):
        assert compat.before_compile(torch.compile(function)) == function
        assert compat.before_compile(function) == function

    @functools.wraps(torch.compile(does_nothing))
    def around():
        pass

    assert compat.before_compile(around) is around


def test_a_function_decorated_with_autocast_is_recognised():
    def function():
        pass

    assert compat.autocast_dtype(torch.autocast("cpu", torch.bfloat16)(function)) is torch.bfloat16
    assert compat.autocast_dtype(torch.autocast("cpu", torch.bfloat16, enabled=False)(function)) is None
    assert compat.autocast_dtype(function) is None


def test_a_tensor_around_others_is_told_by_its_methods():
    class Around(torch.Tensor):
        def __tensor_flatten__(self):
            return ["inner"], None

        @classmethod
        def __tensor_unflatten__(cls, inner, context, size, stride):
            return inner["inner"]

    assert compat.is_traceable_wrapper_subclass(torch.ones(2).as_subclass(Around))
    assert not compat.is_traceable_wrapper_subclass(torch.ones(2))


@pytest.mark.parametrize("folder", ["passes", "sparsespec_compile"])
def test_no_other_file_imports_private_modules(folder):
    """But for the type of an operator, which has no public name."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = [line.split() for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        private = {module for _, module, *_ in lines if any(part.startswith("_") for part in module.split("."))}
        assert path.name == "compat.py" or private <= {"__future__", "torch._ops"}, path
