"""Sharing memory with PyTorch, CuPy and JAX on a GPU, in the order of its streams."""

import contextlib
import gc
import os
import weakref
from importlib.util import find_spec

import numpy as np
import pytest

import cycnn
from cycnn.gpu import device as gpu_device
from cycnn.gpu import memory, stream

# what other libraries do to the device is not ours to check
pytestmark = [pytest.mark.gpu, pytest.mark.no_sanitizer]

DTYPES = "float32", "int32", "uint8"
CLOCKS = 200_000_000  # about a tenth of a second


class Torch:
    """What the tests need of a library; their arrays lie on the first GPU."""

    mutable = True
    waits_for_interface = False  # it does not look at the stream in it

    def __init__(self):
        self.module = pytest.importorskip("torch")
        if not self.module.cuda.is_available():
            pytest.skip("PyTorch has no GPU")
        self.from_dlpack = self.module.from_dlpack

    def array(self, values):
        return self.module.from_numpy(values).cuda()

    def from_interface(self, tensor):
        return self.module.as_tensor(tensor, device="cuda")

    def pointer(self, array):
        return array.data_ptr()

    def numpy(self, array):
        return array.cpu().numpy()

    def copy(self, array):
        return array.clone()

    def side_stream(self):
        return self.module.cuda.stream(self.module.cuda.Stream())

    def on_stream(self, address):
        return self.module.cuda.stream(self.module.cuda.ExternalStream(address))

    def sleep(self):
        """Keep the current stream at work."""
        self.module.cuda._sleep(CLOCKS)


class CuPy:
    mutable = waits_for_interface = True

    def __init__(self):
        self.module = pytest.importorskip("cupy")
        self.from_dlpack = self.module.from_dlpack
        self.from_interface = self.module.asarray
        self.array = self.module.asarray
        self.numpy = self.module.asnumpy
        self.spin = self.module.RawKernel(
            'extern "C" __global__ void spin(long long clocks) {'
            "    long long start = clock64();"
            "    while (clock64() - start < clocks) {}"
            "}",
            "spin",
        )

    def pointer(self, array):
        return array.data.ptr

    def copy(self, array):
        return array.copy()

    def side_stream(self):
        return self.module.cuda.Stream(non_blocking=True)

    def on_stream(self, address):
        return self.module.cuda.ExternalStream(address)

    def sleep(self):
        self.spin((1,), (1,), (np.int64(CLOCKS),))


class Jax:
    mutable = waits_for_interface = False

    def __init__(self):
        # before it is imported: else it takes most of the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.module = pytest.importorskip("jax")
        if self.module.default_backend() != "gpu":
            pytest.skip("JAX has no GPU")
        self.array = self.module.numpy.asarray
        self.from_dlpack = self.module.dlpack.from_dlpack
        self.numpy = np.asarray

    def from_interface(self, tensor):
        return self.module.numpy.asarray(tensor)

    def pointer(self, array):
        return array.unsafe_buffer_pointer()

    def copy(self, array):
        return self.module.numpy.array(array, copy=True)


LIBRARIES = {"torch": Torch, "cupy": CuPy, "jax": Jax}


def installed(*names):
    """Those of the libraries; the first, to be reported as missing, if none is."""
    return [name for name in names if find_spec(name)] or names[:1]


@pytest.fixture(params=installed(*LIBRARIES))
def library(request):
    return LIBRARIES[request.param]()


@pytest.fixture(params=installed("torch", "cupy"))
def streams(request):
    """A library in which one can choose the stream."""
    return LIBRARIES[request.param]()


@pytest.fixture
def live():
    """Live buffers at the start; asserts that as many are left at the end."""
    gc.collect()
    before = memory.stats()["live_buffers"]
    yield
    gc.collect()
    assert memory.stats()["live_buffers"] == before


@pytest.fixture
def compute():
    """cycnn's stream."""
    cycnn.synchronize("cuda")
    return gpu_device.get(0).compute


def values(dtype, shape=(64, 1025)):
    return np.random.default_rng(1).integers(0, 100, shape).astype(dtype)


def poison(like):
    """Take the memory that was freed last, and write over it."""
    return [cycnn.empty(like.shape, like.dtype, "cuda").fill_(7) for _ in range(4)]


def at_work(compute):
    """Whether cycnn's stream is busy: if not, a test of order has shown nothing."""
    event = stream.Event(0)
    event.record(compute)
    return not event.query()


# Sharing, and who keeps what alive


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_is_theirs(library, dtype, live):
    array = values(dtype)
    ours = cycnn.Tensor(array, "cuda")
    theirs = library.from_dlpack(ours)
    assert library.pointer(theirs) == ours.ptr
    assert theirs.shape == array.shape
    found = library.numpy(theirs)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    if library.mutable:
        theirs[3:5] = 1
        array[3:5] = 1
        library.numpy(theirs)  # waits for it
        np.testing.assert_array_equal(ours.numpy(), array)
    del ours
    gc.collect()
    filled = poison(array)
    np.testing.assert_array_equal(library.numpy(theirs), array)
    del filled


@pytest.mark.parametrize("dtype", DTYPES)
def test_theirs_is_ours(library, dtype):
    array = values(dtype)
    theirs = library.array(array)
    pointer = library.pointer(theirs)
    ours = cycnn.from_dlpack(theirs)
    assert (ours.ptr, ours.shape, ours.dtype) == (pointer, array.shape, array.dtype)
    assert ours.device == cycnn.device("cuda:0")
    np.testing.assert_array_equal(ours.numpy(), array)
    part = ours[2:9]
    del theirs, ours
    gc.collect()
    filled = [library.array(np.full_like(array, 7)) for _ in range(4)]
    assert all(library.numpy(other).min() == 7 for other in filled)
    # the view alone keeps the memory
    np.testing.assert_array_equal(part.numpy(), array[2:9])


def test_their_array_goes_with_our_tensor(streams):
    theirs = streams.array(values("float32"))
    gone = weakref.ref(theirs)
    ours = cycnn.from_dlpack(theirs)
    back = streams.from_dlpack(ours)
    assert streams.pointer(back) == streams.pointer(theirs)
    del theirs, ours
    np.testing.assert_array_equal(streams.numpy(back), values("float32"))
    del back
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_array_interface(library, dtype, live):
    if not library.mutable:
        pytest.skip("JAX looks for the stream in it among its own, and finds none")
    array = values(dtype)
    ours = cycnn.Tensor(array, "cuda")
    cycnn.synchronize("cuda")
    theirs = library.from_interface(ours)
    np.testing.assert_array_equal(library.numpy(theirs), array)
    assert library.pointer(theirs) == ours.ptr
    del ours
    gc.collect()
    filled = poison(array)
    np.testing.assert_array_equal(library.numpy(theirs), array)
    del filled


def test_what_the_cuda_array_interface_says(compute):
    ours = cycnn.Tensor(values("int32", (3, 4)), "cuda")
    assert ours[1:].__cuda_array_interface__ == {
        "shape": (2, 4),
        "typestr": "<i4",
        "data": (ours.ptr + 16, False),
        "strides": None,
        "version": 3,
        "stream": compute.address,
    }
    assert cycnn.empty((0, 3), device="cuda").__cuda_array_interface__["shape"] == (
        0,
        3,
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)])
def test_empty_arrays(streams, shape, live):
    theirs = streams.from_dlpack(cycnn.empty(shape, device="cuda"))
    assert theirs.shape == shape
    back = cycnn.from_dlpack(streams.array(np.empty(shape, np.float32)))
    assert back.shape == shape and back.numpy().shape == shape


def test_a_scalar_and_a_view(streams, live):
    scalar = cycnn.Tensor(2.5, "cuda")
    assert float(streams.from_dlpack(scalar)) == 2.5
    array = values("float32")
    ours = cycnn.Tensor(array, "cuda")
    theirs = streams.from_dlpack(ours[5:7])
    assert streams.pointer(theirs) == ours.ptr + 5 * array[0].nbytes
    np.testing.assert_array_equal(streams.numpy(theirs), array[5:7])
    part = cycnn.from_dlpack(streams.array(array)[5:7])
    np.testing.assert_array_equal(part.numpy(), array[5:7])


# Order


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
def test_they_see_what_our_stream_has_queued(streams, protocol, compute, live):
    ours = cycnn.zeros((512, 1024), device="cuda").fill_(1)
    with streams.side_stream():
        # so that nothing is loaded or allocated later, which can wait for the device
        streams.sleep()
        streams.numpy(streams.copy(streams.from_dlpack(ours)))
    with streams.on_stream(compute.address):
        streams.sleep()
    ours.fill_(3)
    with streams.side_stream():
        if protocol == "dlpack":
            theirs = streams.from_dlpack(ours)
            assert at_work(compute)
        else:
            if not streams.waits_for_interface:
                cycnn.synchronize("cuda")
            theirs = streams.from_interface(ours)
        assert (streams.numpy(streams.copy(theirs)) == 3).all()


def test_we_see_what_their_stream_has_queued(streams, compute):
    with streams.side_stream():
        theirs = streams.array(np.zeros((512, 1024), np.float32))
        theirs[:] = 1  # the kernel is loaded before it is timed
        streams.sleep()
        theirs[:] = 3
        ours = cycnn.from_dlpack(theirs)
        assert at_work(compute)  # it waits for them
        assert (ours.numpy() == 3).all()


def test_a_round_trip_on_two_streams(streams, compute):
    with streams.side_stream():
        theirs = streams.array(np.zeros((512, 1024), np.float32))
        streams.sleep()
        theirs += 3
        ours = cycnn.from_dlpack(theirs)
        doubled = cycnn.zeros(ours.shape, device="cuda").copy_(ours)
        back = streams.from_dlpack(doubled)
        back *= 2
        assert (streams.numpy(back) == 6).all()


@pytest.mark.parametrize("where", ["default stream", "side stream"])
@pytest.mark.parametrize("version", [None, (1, 0)])
def test_memory_is_not_reused_while_they_still_read(streams, where, version, compute):
    """Though their array is gone, as seen from the host."""
    ours = cycnn.zeros((512, 1024), device="cuda").fill_(3)
    like, source = values("float32", ours.shape), Producer(ours, version)
    side = streams.side_stream() if where == "side stream" else contextlib.nullcontext()
    with side:
        theirs = streams.from_dlpack(source)
        streams.sleep()
        copied = streams.copy(theirs)
        del theirs, ours, source
        filled = poison(like)
        assert (streams.numpy(copied) == 3).all()
    assert all((other.numpy() == 7).all() for other in filled)


class Producer:
    """A tensor that gives capsules up to one version, None for the oldest."""

    def __init__(self, tensor, version):
        self.tensor, self.version = tensor, version
        self.__dlpack_device__ = tensor.__dlpack_device__

    def __dlpack__(self, *, stream=None, max_version=None, **_):
        # who does not ask for a version does not understand its capsules
        version = max_version and self.version
        return self.tensor.__dlpack__(stream=stream, max_version=version)


# What is refused


def test_what_a_tensor_cannot_be_is_refused(streams):
    theirs = streams.array(values("float32", (4, 6)))
    for strided in theirs.T, theirs[:, 1:], theirs[::2]:
        with pytest.raises(TypeError, match="only C-contiguous .* copy it first"):
            cycnn.from_dlpack(strided)
    for dtype in "float64", "int64", "float16":
        with pytest.raises(TypeError, match="expected float32, int32 or uint8"):
            cycnn.from_dlpack(streams.array(np.zeros(3, dtype)))
    # an axis of one element may have any stride
    one = streams.array(values("float32", (6, 4)))[:1]
    assert cycnn.from_dlpack(one.T.T).ptr == streams.pointer(one)


def test_a_stream_and_a_device_that_cannot_be(live):
    ours = cycnn.zeros(3, device="cuda")
    with pytest.raises(BufferError, match="stream 0 is ambiguous"):
        ours.__dlpack__(stream=0)
    for version in None, (1, 0):
        with pytest.raises(BufferError, match="move it with .to"):
            ours.__dlpack__(dl_device=(1, 0), max_version=version)
        # nobody takes it; 1, 2 and -1 are the legacy, the per-thread and no stream
        for handle in None, 1, 2, -1:
            capsule = ours.__dlpack__(stream=handle, max_version=version)
            name = "dltensor_versioned" if version else "dltensor"
            assert f'"{name}"' in repr(capsule)
            del capsule
    copied = ours.__dlpack__(copy=True)
    del copied
    with pytest.raises(BufferError, match="has no stream"):
        ours.to("cpu").__dlpack__(stream=1)


def test_numpy_gets_copies_only():
    array = values("float32")
    ours = cycnn.Tensor(array, "cuda")
    found = np.asarray(ours)
    np.testing.assert_array_equal(found, array)
    with pytest.raises(ValueError, match="cannot be had uncopied"):
        ours.__array__(copy=False)


def test_host_memory_is_shared_on_the_host():
    torch = pytest.importorskip("torch")
    ours = cycnn.Tensor(values("int32", (3, 4)), "cpu")
    theirs = torch.from_dlpack(ours)
    theirs += 1
    np.testing.assert_array_equal(ours.numpy(), values("int32", (3, 4)) + 1)
    back = cycnn.from_dlpack(theirs)
    assert back.device == cycnn.device("cpu") and back.ptr == ours.ptr
    on_gpu = back.to("cuda")
    np.testing.assert_array_equal(torch.from_dlpack(on_gpu).cpu().numpy(), ours.numpy())
