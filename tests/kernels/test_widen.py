"""The PTX that widens 8-bit weights, carried out by a few lines of numpy on every weight: exact in both dtypes."""

import re

import numpy as np
import pytest
import torch

quantised = pytest.importorskip(
    "sparsespec_compile.kernels.products.quantised", reason="Triton is published for Linux only"
)

BYTES = np.arange(256, dtype=np.uint32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOGIC = {0xEA: lambda a, b, c: (a & b) | c, 0x6A: lambda a, b, c: (a & b) ^ c}


def halves(register: np.ndarray, dtype: str) -> torch.Tensor:
    """The two numbers of each register, exactly."""
    bits = torch.from_numpy(register.view(np.int16).reshape(-1, 2).copy())
    return bits.view(DTYPES[dtype]).double()


def packed(numbers: torch.Tensor, dtype: str) -> np.ndarray:
    return numbers.to(DTYPES[dtype]).contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1)


def carry_out(code: str, register: np.ndarray, dtype: str) -> np.ndarray:
    """Run PTX on registers; what it reads is $1, what it writes $0."""
    values = {"$1": register}

    def read(name: str) -> np.ndarray:
        if name in values:
            return values[name]
        return np.full_like(register, int(name, 0))

    for line in code.strip("{} ").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not rest or operation == ".reg":
            continue
        target, *names = re.split(r",\s*", rest)
        inputs = [read(name) for name in names]
        kind = operation.split(".")[0]
        if kind == "lop3":
            result = LOGIC[int(names[3], 0)](*inputs[:3])
        elif kind in ("fma", "add", "mul"):
            numbers = [halves(value, dtype) for value in inputs]
            exact = numbers[0] + numbers[1] if kind == "add" else numbers[0] * numbers[1]
            result = packed(exact + numbers[2] if kind == "fma" else exact, dtype)
        else:
            operate = {"mov": lambda a: a, "and": np.bitwise_and, "shr": np.right_shift, "shl": np.left_shift}[kind]
            result = operate(*inputs)
        values[target] = result.astype(np.uint32)
    return values["$0"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("high", [False, True])
def test_every_weight_is_exact_whatever_lies_beside_it(kind: str, dtype: str, high: bool) -> None:
    other = (BYTES * 167 + 91) & 0xFF
    lows, highs = (other, BYTES) if high else (BYTES, other)
    pairs = lows | highs << 8
    register = pairs | np.roll(pairs, 1) << 16
    got = halves(carry_out(quantised.instructions(kind, dtype, high), register, dtype), dtype)
    weights = torch.from_numpy(BYTES.astype(np.uint8)).view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    weights = weights.double()
    expected = torch.stack((weights, weights.roll(1)), 1)
    written = ~expected.isnan()  # fp8's two NaNs are never written
    assert torch.equal(got[written], expected[written])
