"""The GPU runtime: memory and its lifecycle, streams, the pinned ring, launches."""

import gc
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import cycnn
from cycnn.errors import CudaError, OutOfMemoryError
from cycnn.gpu import device as gpu_device
from cycnn.gpu import launch, memory, pinned, stream

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return gpu_device.get(0)


@pytest.fixture
def live():
    """Live buffers at the start; asserts that as many are left at the end."""
    gc.collect()
    before = memory.stats()["live_buffers"], memory.stats()["live_bytes"]
    yield before
    gc.collect()
    assert (memory.stats()["live_buffers"], memory.stats()["live_bytes"]) == before


def random(*shape):
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def test_device_properties(gpu):
    assert gpu.name and gpu.sm_count > 0 and gpu.max_shared_bytes >= 48 * 1024
    assert gpu.arch == f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    assert gpu_device.get(0) is gpu
    assert cycnn.cuda_available() and cycnn.cuda_unavailable_reason() is None
    assert cycnn.device() == "cuda:0"


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(CudaError, match="numbered from 0"):
        cycnn.device(f"cuda:{gpu_device.count()}")


@pytest.mark.parametrize("shape", [(), (1,), (31, 33), (257, 3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_round_trip(live, shape, dtype):
    array = (np.arange(np.prod(shape, dtype=int)) % 251).astype(dtype).reshape(shape)
    there = cycnn.Tensor(array, "cuda")
    assert there.shape == shape and there.dtype == dtype and there.device == "cuda:0"
    np.testing.assert_array_equal(there.numpy(), array)
    np.testing.assert_array_equal(there.to("cpu").array, array)
    np.testing.assert_array_equal(cycnn.Tensor(there).numpy(), array)


def test_buffers_are_counted_and_freed(live):
    tensor = cycnn.zeros((1000,), device="cuda")
    now = memory.stats()
    assert now["live_buffers"] == live[0] + 1
    assert now["live_bytes"] == live[1] + 4000
    assert not tensor.numpy().any()
    view = tensor[10:20]
    del tensor
    assert memory.stats()["live_buffers"] == live[0] + 1, "the view keeps the memory"
    assert view.numpy().shape == (10,)


def test_a_buffer_in_a_cycle_is_freed(live):
    class Node:
        pass

    node = Node()
    node.tensor, node.self = cycnn.zeros(10, device="cuda"), node
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is None


def test_views_and_copies(live):
    array = random(6, 5)
    tensor = cycnn.Tensor(array, "cuda")
    np.testing.assert_array_equal(tensor[2:4].numpy(), array[2:4])
    np.testing.assert_array_equal(tensor[-1].numpy(), array[-1])
    np.testing.assert_array_equal(tensor.reshape(5, -1).numpy(), array.reshape(5, 6))
    tensor[1:3].copy_(tensor[3:5])
    tensor[0].copy_(np.zeros(5))
    array[1:3], array[0] = array[3:5], 0
    np.testing.assert_array_equal(tensor.numpy(), array)
    on_host = cycnn.zeros((6, 5), device="cpu")
    np.testing.assert_array_equal(on_host.copy_(tensor).array, array)
    with pytest.raises(TypeError, match="no array in host memory"):
        tensor.array


@pytest.mark.no_sanitizer
def test_out_of_memory_is_explained_and_survived(live):
    _, total = memory.info(0)
    with pytest.raises(OutOfMemoryError, match=r"asked for, cycnn holds .* free") as caught:
        cycnn.empty(total, device="cuda")
    assert isinstance(caught.value, MemoryError)
    assert pickle.loads(pickle.dumps(caught.value)).status == caught.value.status
    np.testing.assert_array_equal(cycnn.Tensor([1.0], "cuda").numpy(), [1])


def test_streams_order_work(gpu):
    first, second = stream.Stream(0), stream.Stream(0)
    start, end = stream.Event(0, True), stream.Event(0, True)
    start.record(first)
    second.wait_stream(first)
    end.record(second)
    end.synchronize()
    assert end.query()
    assert end.elapsed(start) >= 0
    assert gpu.compute.__cuda_stream__() == (0, gpu.compute.address)
    borrowed = stream.Stream.borrow(first.address, 0, first)
    borrowed.synchronize()
    borrowed.close()
    first.synchronize()


def test_none_is_not_a_stream():
    with pytest.raises(TypeError):
        stream.Event(0).record(None)


def test_the_ring_hands_out_a_slot_only_when_its_copy_is_done(live):
    ring = pinned.PinnedRing(3, 4096, 0)
    uploads = []
    for step in range(20):
        slot = ring.acquire()
        slot.array[:] = step
        uploads.append(ring.upload(slot, 4096 - step))
    for step, buffer in enumerate(uploads):
        assert buffer.nbytes == 4096 - step
        host = np.empty(buffer.nbytes, np.uint8)
        memory.copy_to_host(host, buffer.ptr, 0)
        assert (host == step).all()
    with pytest.raises(ValueError, match="4096 bytes"):
        ring.upload(ring.acquire(), 5000)
    with pytest.raises(ValueError, match="at least 2"):
        pinned.PinnedRing(1, 10, 0)
    del uploads, buffer


def test_launch_checks_its_arguments(gpu, live):
    add = launch.Kernel("elementwise", "add", "PPPq")
    x = cycnn.Tensor(random(100), "cuda")
    out = cycnn.empty(100, device="cuda")
    with pytest.raises(TypeError, match="takes 4 arguments"):
        add(gpu.compute, 1, 128, out, x, x)
    with pytest.raises(TypeError, match="argument 3"):
        add(gpu.compute, 1, 128, out, x, x, 1.5)
    with pytest.raises(TypeError, match="argument 1"):
        add(gpu.compute, 1, 128, out, x.numpy(), x, 100)
    with pytest.raises(TypeError, match="argument 1"):
        add(gpu.compute, 1, 128, out, cycnn.zeros(100, device="cpu"), x, 100)
    with pytest.raises(TypeError):
        add(None, 1, 128, out, x, x, 100)
    with pytest.raises(ValueError, match="letters"):
        launch.Kernel("elementwise", "add", "PPd")


@pytest.mark.no_sanitizer
def test_a_refused_launch_names_the_kernel(gpu):
    add = launch.Kernel("elementwise", "add", "PPPq")
    with pytest.raises(CudaError, match="launch of add"):
        add(gpu.compute, 1, 4096, None, None, None, 0)
    with pytest.raises(CudaError, match="no_such_kernel"):
        launch.Kernel("elementwise", "no_such_kernel", "")(gpu.compute, 1, 1)
    np.testing.assert_array_equal(cycnn.Tensor([1.0], "cuda").numpy(), [1])


def test_other_threads_may_use_the_device(live):
    results, array = [], random(33)

    def work():
        tensor = cycnn.Tensor(array, "cuda")
        ops = cycnn.ops.for_device(tensor.device)
        out = cycnn.empty(33, device="cuda")
        ops.add(tensor, tensor, out)
        results.append(out.numpy())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, array + array)


@pytest.mark.no_sanitizer
def test_cupy_torch_and_cycnn_share_memory(live):
    torch = pytest.importorskip("torch")
    array = random(4, 6)
    ours = cycnn.Tensor(array, "cuda")
    theirs = torch.from_dlpack(ours)
    assert theirs.data_ptr() == ours.ptr
    theirs *= 2
    torch.cuda.synchronize()
    np.testing.assert_array_equal(ours.numpy(), 2 * array)
    back = cycnn.from_dlpack(theirs)
    assert back.ptr == ours.ptr
    with pytest.raises(TypeError, match="contiguous"):
        cycnn.from_dlpack(theirs.T)
    seen = torch.as_tensor(ours, device="cuda")
    assert seen.data_ptr() == ours.ptr
    del ours
    np.testing.assert_array_equal(theirs.cpu().numpy(), 2 * array)
    del theirs, back, seen


# What a parent may have done: each of them initialises CUDA.
PARENTS = {
    "used a GPU": "cycnn.zeros(4, device='cuda').numpy()",
    "asked for one": "assert cycnn.cuda_available()",
    "counted them": "from cycnn.gpu import device; device.count()",
    "used one and shut down": "cycnn.zeros(4, device='cuda'); cycnn.shutdown()",
}


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("parent", PARENTS)
def test_a_forked_child_is_told(gpu, parent):
    code = f"""
import os, sys
import cycnn
{PARENTS[parent]}
child = os.fork()
if child == 0:
    try:
        cycnn.zeros(4, device="cuda")
    except cycnn.CudaError as error:
        os._exit(0 if "spawn" in str(error) else 1)
    os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.no_sanitizer
def test_a_forked_child_frees_nothing_of_its_parent(gpu):
    """Buffers, streams, events, pinned memory and a graph: the parent still has them."""
    code = """
import gc, os, sys
import numpy as np
import cycnn
from cycnn.gpu import graph, memory, pinned, stream
x = cycnn.Tensor(np.arange(1000.0), "cuda")
recorded = graph.Graph(0)
ops = cycnn.ops.for_device(x.device)
recorded.rehearse(lambda: ops.relu_forward(x))
y = recorded.record(lambda: ops.relu_forward(x))
kept = [x, recorded, y, stream.Stream(0), stream.Event(0), pinned.PinnedRing(2, 64, 0)]
child = os.fork()
if child == 0:
    del x, recorded, y
    kept.clear()
    gc.collect()
    os._exit(0 if memory.stats()["live_buffers"] == 0 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
recorded.launch()
assert (y.numpy() == np.arange(1000)).all()
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.no_sanitizer
def test_a_child_forked_before_the_first_use_may_use_the_gpu(gpu):
    code = """
import os, sys
import cycnn
from cycnn.gpu import device  # its hook runs in the child
child = os.fork()
if child == 0:
    os._exit(0 if cycnn.zeros(4, device="cuda").numpy().tolist() == [0] * 4 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("reset", [False, True])
def test_shutdown_and_a_fresh_start(reset):
    code = f"""
import numpy as np
import cycnn
kept = cycnn.zeros(1000, device="cuda")
kept.fill_(3)
cycnn.shutdown({reset})
again = cycnn.zeros(10, device="cuda")
again.fill_(2)
assert again.numpy().tolist() == [2] * 10
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
