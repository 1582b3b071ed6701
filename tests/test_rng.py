"""Noise keys: drawn from generators, counted by streams, resumed from checkpoints, without touching the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.common import no_synchronisation
from vidkern import ops
from vidkern.rng import KeyStream, next_key


def test_next_key_is_the_generators_and_advances_it():
    drawn = [next_key(torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert (drawn[0].dtype, drawn[0].shape) == (torch.int64, (2,))
    generator = torch.Generator().manual_seed(5)
    keys = torch.stack([next_key(generator) for _ in range(100)])
    assert torch.equal(keys[0], drawn[0])
    assert len(set(keys.flatten().tolist())) == 200
    assert (keys >= 0).all()
    assert (keys > 2**61).any()


def test_next_key_without_a_generator_obeys_manual_seed():
    torch.manual_seed(3)
    first = next_key()
    torch.manual_seed(3)
    assert torch.equal(first, next_key())
    assert not torch.equal(first, next_key())


def test_next_key_refuses_another_device():
    with pytest.raises(ValueError, match=r"device must be the generator's \(cpu\), got cuda"):
        next_key(torch.Generator(), device="cuda")


@pytest.mark.parametrize("seed", [0, 17, -1, 2**63 - 1, -(2**63)])
def test_a_stream_counts_its_keys(seed):
    stream = KeyStream(seed)
    keys = [stream.next() for _ in range(3)]
    assert [key.tolist() for key in keys] == [[seed, 0], [seed, 1], [seed, 2]]
    noise = [ops.philox_normal((1, 1, 64), key) for key in keys]
    assert not torch.equal(noise[0], noise[1])


def test_a_key_that_was_drawn_does_not_change():
    stream = KeyStream(1)
    key = stream.next()
    stream.next()
    assert key.tolist() == [1, 0]


def test_a_stream_resumes():
    stream = KeyStream(9)
    stream.next()
    state = stream.state_dict()
    rest = [stream.next().tolist() for _ in range(3)]
    other = KeyStream(0)
    other.load_state_dict(state)
    assert [other.next().tolist() for _ in range(3)] == rest
    assert state["key"].tolist() == [9, 1]


def test_bad_seeds_and_states_are_refused():
    with pytest.raises(ValueError, match="seed must fit in a signed 64-bit integer, got 9223372036854775808"):
        KeyStream(2**63)
    with pytest.raises(ValueError, match=r"state\['key'\] must be int64 of shape \(2,\), got torch.float32"):
        KeyStream(0).load_state_dict({"key": torch.zeros(2)})


class Called(TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_drawing_keys_stays_on_the_device():
    stream, generator = KeyStream(2), torch.Generator().manual_seed(1)
    with Called() as called:
        stream.next()
        next_key(generator)
    crossing = {"aten::_local_scalar_dense", "aten::_to_copy", "aten::copy_", "aten::item"}
    assert called.names
    assert not crossing & set(called.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_drawing_keys_does_not_synchronise():
    stream, generator = KeyStream(2, "cuda"), torch.Generator("cuda").manual_seed(1)
    with no_synchronisation():
        assert stream.next().device.type == next_key(generator).device.type == "cuda"
