"""What the compiler relies on in torch and transformers without a promise of theirs, in one place.

Each item is what an upgrade may change first. A test names it and shows that it still does what is relied on
(`tests/passes/test_compat.py`). Where a change could go unnoticed, the item raises VersionError instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any

import sympy
import torch
import torch._dynamo.config as dynamo_config
import torch._inductor
import torch.compiler.config
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._inductor.runtime import cache_dir_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import VersionError

__all__ = ["FakeTensor", "FakeTensorMode", "ShapeEnv", "is_traceable_wrapper_subclass"]

ATTENTION_SETTING = "_attn_implementation_internal"
EXPERTS_SETTING = "_experts_implementation_internal"
"""Where a transformers configuration keeps the implementations that were chosen. The public properties of these
settings check and propagate them, and so would change other configurations."""

_INDUCTOR_OPTIONS = {"combo_kernels": True}
"""On a GPU, independent kernels, such as norm and rotation of queries and of keys, share a launch."""


def symbolic_input(
    mode: FakeTensorMode, name: str, sizes: tuple[int, ...], symbolic: tuple[bool, ...], dtype: torch.dtype, device: str
) -> FakeTensor:
    """A fake tensor for a new graph input: dimension i has the fixed size `sizes[i]`, or a symbol with that hint."""
    kinds = [DimDynamic.DYNAMIC if free else DimDynamic.STATIC for free in symbolic]
    example = torch.empty(sizes, dtype=dtype, device=device)
    return mode.from_tensor(
        example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), source=ConstantSource(name)
    )


def python_dispatch() -> AbstractContextManager[None]:
    """Within it, ops on fake tensors take their Python shape functions, which keep sizes symbolic."""
    return enable_python_dispatcher()


def without_shape_cache() -> AbstractContextManager[None]:
    """Modes of fake tensors that are made within it derive the result of each op anew, on any thread.

    Their cache does not pay for symbolic sizes: to look a result up and to fit it to other symbols takes longer than
    the op's shape function.
    """
    return dynamo_config.patch(fake_tensor_cache_enabled=False)


def conditions(environment: ShapeEnv, start: int = 0) -> list[sympy.Basic]:
    """The relations between symbols that were taken for granted, from the `start`-th on, in order.

    Raises:
        VersionError: torch keeps them in another form. Without them, compiled code would run on sizes that it was not
            made for.
    """
    found = [getattr(guard, "expr", None) for guard in environment.guards[start:]]
    if not all(isinstance(expression, sympy.Basic) for expression in found):
        raise VersionError(
            f"torch {torch.__version__} keeps the conditions of a compilation in a form that is not known here. "
            "Install a torch version that pyproject.toml allows, or choose backend='eager'."
        )
    return [expression for expression in found if expression is not None]


def compile_graph(graph_module: GraphModule, inputs: Sequence[Tensor], tag: str) -> Callable[..., Sequence[Tensor]]:
    """Compiles a graph with TorchInductor, without Dynamo and on the symbolic sizes of `inputs`.

    Args:
        graph_module: tensors in, a tuple of tensors out; it may be changed.
        inputs: fake tensors for its placeholders.
        tag: becomes part of the key under which Inductor keeps compiled code on disk.
    """
    with _cache_key(tag):
        return torch._inductor.compile(graph_module, [*inputs], options=_INDUCTOR_OPTIONS)


@contextmanager
def _cache_key(tag: str) -> Iterator[None]:
    before = torch.compiler.config.cache_key_tag
    torch.compiler.config.cache_key_tag = before + tag
    try:
        yield
    finally:
        torch.compiler.config.cache_key_tag = before


def triton_cache_dir(device: torch.device) -> str:
    """The folder that Inductor sets as TRITON_CACHE_DIR once it compiles a kernel for `device`."""
    return cache_dir_utils.triton_cache_dir(device.index or 0)


def compile_cache_dir() -> str:
    """The folder in which Inductor keeps compiled code; another one with TORCHINDUCTOR_CACHE_DIR."""
    return cache_dir_utils.cache_dir()


def implementations(config: PreTrainedConfig) -> dict[str, str | None]:
    """The attention and experts implementations that a configuration has chosen, by the name of the attribute.

    Raises:
        VersionError: transformers keeps them elsewhere.
    """
    missing = [name for name in (ATTENTION_SETTING, EXPERTS_SETTING) if not hasattr(config, name)]
    if missing:
        raise VersionError(
            f"{type(config).__name__} has no attribute {missing[0]}, where transformers keeps the chosen "
            "implementation. Install a transformers version that pyproject.toml allows."
        )
    return {name: getattr(config, name) for name in (ATTENTION_SETTING, EXPERTS_SETTING)}


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Makes `function(module, hidden_states, top_k_index, top_k_weights)` an experts implementation called `name`."""
    ExpertsInterface.register(name, function)


def grouped_experts(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What transformers computes for a layer of experts by grouped products: all experts, without a loop over them."""
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, x, index, weight)


def experts_of_another_table(module: nn.Module) -> bool:
    """Whether a module looks its experts implementation up in another table than that of ordinary experts.

    transformers' decorator of experts classes sets a `forward` that holds the table.
    """
    forward: Any = type(module).forward
    code = getattr(forward, "__code__", None)
    held = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True)) if code is not None else {}
    return "experts_interface" in held and held["experts_interface"].cell_contents is not ALL_EXPERTS_FUNCTIONS


def mask_function(options: Mapping[str, object]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The function of (batch, head, query, key) indices in the arguments that transformers gives a mask interface.

    Raises:
        VersionError: there is none, so that a mask could not be told from another.
    """
    function = options.get("mask_function")
    if not callable(function):
        raise VersionError(
            f"transformers asks for a mask with {sorted(options)}, without a mask_function. Install a transformers "
            "version that pyproject.toml allows."
        )
    return function


def implementing_functions(config: PreTrainedConfig) -> dict[str, object]:
    """What `implementations` stand for: the function of each name, None where it is written in the model's own file."""
    chosen = implementations(config)
    return {
        ATTENTION_SETTING: ALL_ATTENTION_FUNCTIONS.get(chosen[ATTENTION_SETTING]),
        EXPERTS_SETTING: ALL_EXPERTS_FUNCTIONS.get(chosen[EXPERTS_SETTING]),
    }


def attention_functions(config: PreTrainedConfig, model_file: Mapping[str, Any]) -> tuple[object, object]:
    """The functions that a configuration has chosen for attention and for its masks; None for one that is not there.

    Args:
        config: of a module.
        model_file: the globals of the file that the module's class is written in. Attention that is written out
            ("eager") stands there, and possibly a table of functions of the file's own.
    """
    chosen = (implementations(config)[ATTENTION_SETTING] or "eager").removeprefix("paged|")
    functions = model_file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = functions.get(chosen, model_file.get("eager_attention_forward"))
    return function, ALL_MASK_ATTENTION_FUNCTIONS.get(chosen)


def forward_hooks(module: nn.Module) -> list[object]:
    """The hooks around a module's forward pass, in the order in which they run."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def global_forward_hooks() -> list[object]:
    """The hooks around the forward pass of every module of the process, in the order in which they run."""
    return [*torch_module._global_forward_pre_hooks.values(), *torch_module._global_forward_hooks.values()]


def before_compile(function: Any) -> Any:
    """What `torch.compile` was given to make a function; anything else as it is."""
    while isinstance(function, FunctionType) and str(function.__globals__["__name__"]).startswith("torch._dynamo."):
        function = vars(function)["__wrapped__"]
    return function


def autocast_dtype(function: object) -> torch.dtype | None:
    """The dtype that a function is run in by `torch.autocast(...)` as its decorator; None = in none."""
    if not isinstance(function, FunctionType) or function.__globals__ is not vars(torch.amp.autocast_mode):
        return None
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    modes = [value for value in held if isinstance(value, torch.autocast) and value._enabled]
    return modes[0].fast_dtype if modes else None


_PARALLEL_FILES = frozenset({"transformers.distributed.tensor_parallel", "transformers.integrations.tensor_parallel"})
"""Where transformers writes what it wraps around modules that it has loaded in parts, newer and older versions."""


def remove_parallel_wrappers(model: nn.Module) -> None:
    """Takes away what transformers has put around modules of a model that it has loaded in parts: their exchange.

    Newer versions set a `forward` on the module that holds the one before it, older ones register hooks.
    """
    for module in model.modules():
        forward: Any = vars(module).get("forward")
        while isinstance(forward, FunctionType) and forward.__globals__.get("__name__") in _PARALLEL_FILES:
            held = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
            forward = held["original_forward"].cell_contents
        if "forward" in vars(module):
            del module.forward
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.forward = forward
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if getattr(hook, "__globals__", {}).get("__name__") in _PARALLEL_FILES:
                    del hooks[number]


def loads_by_distributed_config() -> bool:
    """Whether `from_pretrained` is told how to divide a model by `DistributedConfig(tp_size=..., tp_plan=...)`.

    Older versions take `tp_plan=` instead.
    """
    return "tp_size" in inspect.signature(DistributedConfig).parameters
