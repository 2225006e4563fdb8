"""The CPU as a device, and what only a GPU shows of the streams."""

import resource
import sys

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.devices import CpuDevice, CudaDevice, open_device

from ..support.models import VOCABULARY, tiny


def test_the_device_follows_from_where_the_model_is():
    assert isinstance(open_device(torch.device("cpu")), CpuDevice)
    device = open_device(torch.device("cuda", 1))
    assert isinstance(device, CudaDevice)
    assert device.torch_device == torch.device("cuda", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1,)])
def test_zeros_of_a_cpu(shape, dtype):
    made = CpuDevice().zeros(*shape, dtype=dtype)
    assert made.shape == shape
    assert made.dtype == dtype
    assert not made.any()
    assert made.data_ptr() % 64 == 0 or not made.numel()
    made.fill_(1)
    assert made.sum() == made.numel()


@pytest.mark.skipif(sys.platform == "win32", reason="no resource usage there")
def test_pages_that_are_never_written_to_take_no_memory():
    """State is sized by what may come, and most of it never does."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = CpuDevice().zeros(2**18, 2**10, dtype=torch.float32)  # 1 GiB
    pool[12345].fill_(1.0)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 2**26
    assert pool[12345].sum() == 2**10
    assert pool[54321].sum() == 0


def test_host_memory_that_a_cpu_refuses_is_told_by_the_future(monkeypatch):
    def refuse(*given, **named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="can't allocate"):
        CpuDevice().host_block((4, 4), torch.float32).result()


def test_host_buffers_can_be_written_to_wherever_they_were_made():
    with torch.inference_mode():
        buffer = CpuDevice().host_buffer((4,), torch.int32)
        block = CpuDevice().host_block((4,), torch.int32).result()
    buffer.fill_(1)
    block.fill_(2)
    assert (buffer + block).tolist() == [3] * 4


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3").cuda()


@pytest.fixture(scope="module")
def fast(model):
    return ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=8, page_size=4))


@pytest.fixture(scope="module")
def texts(fast):
    """Completions of the same prompts, whenever it is called."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (3, 41, 17, 9)]
    greedy = ss.SamplingParams(max_new_tokens=40, stop_token_ids=())

    def run():
        return [completion.token_ids for completion in fast.generate_batch(prompts, greedy)]

    run.prompts, run.sampling = prompts, greedy
    return run


@pytest.mark.gpu
def test_parameters_changed_late_on_the_callers_stream_are_seen(model, texts):
    """Steps run on a stream of the engine's own, which waits for what the caller has enqueued."""
    expected = texts()

    def negate():
        torch.cuda._sleep(2 * 10**8)  # cycles: a tenth of a second
        with torch.no_grad():
            model.lm_head.weight.neg_()

    with torch.cuda.stream(torch.cuda.Stream()):
        negate()
        changed = texts()
        negate()
        assert texts() == expected
    assert changed != expected
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_generations_under_different_streams_share_no_state_unordered(fast, texts):
    expected = texts()
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()), fast.stream(texts.prompts, texts.sampling) as stream:
            for _ in range(7):
                next(stream)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert texts() == expected


@pytest.mark.gpu
def test_copies_between_streams_are_ordered_by_events_alone():
    device = open_device(torch.device("cuda", torch.cuda.current_device()))
    first, second = device.stream(), device.stream()
    there = device.zeros(2**20, dtype=torch.int32)
    torch.cuda.synchronize()
    host, back = (device.host_buffer((2**20,), torch.int32) for _ in range(2))
    host.fill_(7)
    first.run(lambda: torch.cuda._sleep(10**8))
    first.copy((there, host))
    event = first.record()
    assert not event.done
    second.wait(event)
    second.copy((back, there))
    second.record().wait()
    assert event.done
    assert back.eq(7).all()
