"""What a device can do, measured: the constants of the cost model."""

from dataclasses import dataclass, fields

from sparsespec_compile.errors import CeilingsError


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A device.

    The first two bound any program (speed of light); the others describe how near to them kernels come. All must be
    positive, overheads may be 0.

    Args:
        name: of the device, for people.
        read_bytes_per_s: fastest read of memory in order.
        flops_per_s: large matrix products in the model's dtype.
        gather_bytes_per_s: reads of single positions' keys and values, 512 bytes or so at a time.
        attention_flops_per_s: products of queries and keys, few rows of a request padded to a tile.
        gemm_overhead_s: what a projection takes above its bytes and FLOPs, its share of the elementwise kernels and
            the writing of keys and values between the projections included.
        attention_overhead_s: what an attention layer takes above its bytes and FLOPs.
        request_overhead_s: what each request adds to that.
        scoring_overhead_s: what is added where any request verifies drafts, which gives out scores.

    Raises:
        CeilingsError: for a figure that is not a finite positive number.
    """

    name: str
    read_bytes_per_s: float
    flops_per_s: float
    gather_bytes_per_s: float
    attention_flops_per_s: float
    gemm_overhead_s: float
    attention_overhead_s: float
    request_overhead_s: float
    scoring_overhead_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (value == 0 and not field.name.endswith("overhead_s")):
                raise CeilingsError(f"{field.name} must be a finite positive number, got {value!r}.")


H200 = Ceilings(
    name="NVIDIA H200",
    read_bytes_per_s=4.3e12,
    flops_per_s=673e12,
    gather_bytes_per_s=3.8e12,
    attention_flops_per_s=500e12,
    gemm_overhead_s=9.5e-6,
    attention_overhead_s=6e-6,
    request_overhead_s=0.05e-6,
    scoring_overhead_s=20e-6,
)
"""One H200 SXM, bf16, torch 2.11, triton 3.6.

Reads: the fastest attention kernel that had been seen on the card when bars were set, 3 to 5% below the fastest since.
FLOPs: an 8192^3 product. The others are fitted: to a compiled step of Qwen3-8B without attention (4.9, 5.5, 5.8, 6.9,
8.3 ms at 2, 64, 122, 192, 256 rows), and to one of its layers of this project's attention
(benchmarks/results/h200-kernels.json)."""

KNOWN = (H200,)
"""Devices with measured ceilings."""
