"""Tensors that are made on simulated devices or moved to them."""

import pytest
import torch
from ranks_with_devices import in_rank
from torch import nn

X = torch.arange(6.0).reshape(2, 3)

FACTORIES = {
    "arange": lambda **k: torch.arange(4, **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0], **k),
    "asarray": lambda **k: torch.asarray([1.0], **k),
    "bartlett_window": lambda **k: torch.bartlett_window(4, **k),
    "blackman_window": lambda **k: torch.blackman_window(4, **k),
    "empty": lambda **k: torch.empty(2, **k),
    "empty_like": lambda **k: torch.empty_like(X, **k),
    "empty_permuted": lambda **k: torch.empty_permuted((2, 3), (1, 0), **k),
    "empty_strided": lambda **k: torch.empty_strided((2, 3), (3, 1), **k),
    "eye": lambda **k: torch.eye(2, **k),
    "fftfreq": lambda **k: torch.fft.fftfreq(4, **k),
    "full": lambda **k: torch.full((2,), 1.0, **k),
    "full_like": lambda **k: torch.full_like(X, 1.0, **k),
    "hamming_window": lambda **k: torch.hamming_window(4, **k),
    "hann_window": lambda **k: torch.hann_window(4, **k),
    "kaiser_window": lambda **k: torch.kaiser_window(4, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 3, **k),
    "logspace": lambda **k: torch.logspace(0, 1, 3, **k),
    "nested_tensor": lambda **k: torch.nested.nested_tensor([X], layout=torch.jagged, **k),
    "new_empty": lambda **k: X.new_empty(2, **k),
    "new_empty_strided": lambda **k: X.new_empty_strided((2,), (1,), **k),
    "new_full": lambda **k: X.new_full((2,), 1.0, **k),
    "new_ones": lambda **k: X.new_ones(2, **k),
    "new_tensor": lambda **k: X.new_tensor([1.0], **k),
    "new_zeros": lambda **k: X.new_zeros(2, **k),
    "normal": lambda **k: torch.normal(0.0, 1.0, (2,), **k),
    "ones": lambda **k: torch.ones(2, **k),
    "ones_like": lambda **k: torch.ones_like(X, **k),
    "rand": lambda **k: torch.rand(2, **k),
    "rand_like": lambda **k: torch.rand_like(X, **k),
    "randint": lambda **k: torch.randint(0, 2, (2,), **k),
    "randint_like": lambda **k: torch.randint_like(X, 2, **k),
    "randn": lambda **k: torch.randn(2, **k),
    "randn_like": lambda **k: torch.randn_like(X, **k),
    "randperm": lambda **k: torch.randperm(2, **k),
    "rfftfreq": lambda **k: torch.fft.rfftfreq(4, **k),
    "scalar_tensor": lambda **k: torch.scalar_tensor(1.0, **k),
    "signal.windows": lambda **k: torch.signal.windows.hann(4, **k),
    "sparse_coo_tensor": lambda **k: torch.sparse_coo_tensor([[0]], [1.0], (2,), **k),
    "sparse_csr_tensor": lambda **k: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), **k),
    "tensor": lambda **k: torch.tensor([1.0], **k),
    "tril_indices": lambda **k: torch.tril_indices(2, 2, **k),
    "triu_indices": lambda **k: torch.triu_indices(2, 2, **k),
    "zeros": lambda **k: torch.zeros(2, **k),
    "zeros_like": lambda **k: torch.zeros_like(X, **k),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", FACTORIES)
def test_factories_take_every_spelling_of_a_cuda_device(name):
    make = FACTORIES[name]

    def ask():
        devices = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1), 1]
        return [make(device=device).device.type for device in devices]

    assert in_rank(ask) == ["cpu"] * 5


def test_every_constructor_that_torch_knows_is_among_them():
    from torch.utils._device import _device_constructors

    missing = {function.__name__.removeprefix("fft_") for function in _device_constructors()} - FACTORIES.keys()
    assert missing == {
        "empty_quantized",  # quantised tensors
        "range",  # deprecated
        "sparse_bsc_tensor",
        "sparse_bsr_tensor",
        "sparse_compressed_tensor",
        "sparse_csc_tensor",
    }


def test_other_devices_are_left_alone():
    def ask():
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.empty(2).to("meta").is_meta
        assert torch.empty(2, device="cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="Invalid device string"):
            torch.empty(2, device="cuda:x")
        with pytest.raises(RuntimeError):
            torch.empty(2, device=-1)
        with pytest.raises(TypeError):
            torch.zeros(2, device=True)

    in_rank(ask)


@pytest.mark.parametrize(
    "target",
    ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1), 0, 1],
    ids=str,
)
def test_moving_to_a_device_returns_what_moving_to_the_cpu_returns(target):
    def ask():
        x = torch.arange(6.0).reshape(2, 3)
        assert x.to(target) is x
        assert x.to(device=target) is x
        assert x.to(target, torch.float32, non_blocking=True) is x
        assert x.to(target, dtype=torch.float32) is x
        assert x.to(x.to(target)) is x
        copied = x.to(target, copy=True)
        assert copied is not x
        assert copied.data_ptr() != x.data_ptr()
        assert x.to(target, torch.bfloat16).dtype is torch.bfloat16
        assert x.to(device=target, dtype=torch.int32).dtype is torch.int32
        image = torch.ones(1, 2, 3, 3)
        assert image.to(target, memory_format=torch.channels_last).stride() == (18, 1, 6, 2)
        if not isinstance(target, int):
            assert x.cuda(target) is x
        assert x.cuda(non_blocking=True) is x
        assert x.cuda(memory_format=torch.preserve_format) is x
        assert not x.is_cuda
        assert x.get_device() == -1
        with pytest.raises(ValueError, match="Expected a cuda device"):
            x.cuda("cpu")

    in_rank(ask)


def test_modules_move_and_keep_their_parameters():
    def ask():
        module = nn.BatchNorm1d(3)
        weight, mean = module.weight, module.running_mean
        for target in ("cuda", 1, torch.device("cuda:1")):
            assert module.to(target) is module
        module.to(device=0)
        assert module.cuda().cuda(1) is module
        assert module.weight is weight
        assert module.running_mean is mean
        assert module.to("cuda", torch.float64).weight.dtype is torch.float64
        with torch.device("meta"):
            module = nn.Linear(2, 2)
        assert module.to_empty(device="cuda").weight.device.type == "cpu"
        assert nn.utils.rnn.pack_sequence([torch.ones(2)]).cuda().data.device.type == "cpu"

    in_rank(ask)


def test_storages_move():
    def ask():
        storage = torch.ones(2).untyped_storage()
        assert storage.cuda() is storage
        assert storage.cuda(1) is storage
        assert storage.to(device="cuda") is storage

    in_rank(ask)


def test_types_of_cuda_make_cpu_tensors():
    def ask():
        made = torch.cuda.FloatTensor([1.5])
        assert made.type() == "torch.FloatTensor"
        assert not isinstance(made, torch.cuda.FloatTensor)
        assert torch.ones(1).type("torch.cuda.HalfTensor").dtype is torch.half
        assert torch.ones(1).type(torch.cuda.LongTensor).dtype is torch.long
        assert torch.ones(1).type(torch.int32).dtype is torch.int32

    in_rank(ask)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_pinning_copies_and_is_seen_through_views():
    def ask():
        x = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
        assert not x.is_pinned()
        pinned = x.pin_memory()
        assert pinned.is_pinned()
        assert pinned[1:].is_pinned()
        assert pinned.untyped_storage().is_pinned()
        assert pinned.stride() == x.stride()
        assert pinned.data_ptr() != x.data_ptr()
        assert pinned.pin_memory() is pinned
        assert pinned.requires_grad
        assert not x.is_pinned()
        assert not pinned.clone().is_pinned()
        assert torch.zeros(2, pin_memory=True).is_pinned()
        assert not torch.zeros(2, pin_memory=False).is_pinned()
        assert torch.empty_like(pinned, pin_memory=True).is_pinned()
        assert not torch.sparse_coo_tensor([[0]], [1.0], (2,)).is_pinned()
        with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
            torch.zeros(2, device="cuda", pin_memory=True)

    in_rank(ask)


def test_the_default_device_may_be_a_cuda_device():
    def ask():
        with torch.device("cuda:1"):
            assert torch.ones(2).device.type == "cpu"
            assert nn.Linear(2, 2).weight.device.type == "cpu"
        torch.set_default_device("cuda")
        assert torch.ones(2).device == torch.get_default_device() == torch.device("cpu")
        torch.set_default_device(None)

    in_rank(ask)


def test_subclasses_of_tensor_still_see_the_call():
    class Loud(torch.Tensor):
        seen = ()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen = (*cls.seen, func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    def ask():
        x = torch.ones(2).as_subclass(Loud)
        assert type(x.to("cuda")) is Loud
        assert type(x.cuda()) is Loud
        assert type(x.new_zeros(2, device="cuda")) is Loud

    in_rank(ask)
    assert Loud.seen == ("to", "to", "new_zeros")
