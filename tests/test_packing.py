import pytest
import torch

from embedfuse.packing import LengthsUnknown, Packed, end_to_end, pack, pad_right, unpadded

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]])
IDS = torch.arange(12).view(3, 4)


def test_pack_and_pad():
    packed = pack(IDS, MASK)
    assert packed.lengths == (3, 2, 1)
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.tokens, packed.max_seqlen, packed.shape) == (6, 3, (3, 4))
    assert packed.pack(IDS).tolist() == [0, 1, 2, 6, 7, 9]
    states = torch.arange(12.0).view(6, 2) + 1
    padded = packed.pad(states)
    assert padded.shape == (3, 4, 2)
    assert padded[1].tolist() == [[0, 0], [0, 0], [7, 8], [9, 10]]
    assert torch.equal(packed.pack(padded), states)
    assert packed.starts_padded


def test_no_padding_copies_nothing():
    for mask in (None, torch.ones_like(IDS)):
        packed = pack(IDS, mask)
        assert packed.index is None
        assert packed.lengths == (4, 4, 4)
        assert packed.pack(IDS).data_ptr() == IDS.data_ptr()
        assert packed.pad(packed.pack(IDS)).tolist() == IDS.tolist()
        assert not packed.starts_padded


def test_right_padding_starts_with_tokens():
    assert not pack(IDS, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])).starts_padded


def test_split():
    packed = unpadded([4, 3, 9, 1, 1], torch.device("cpu"))
    parts = packed.split(7)
    assert [p.lengths for p in parts] == [(4, 3), (9,), (1, 1)]
    assert [p.cu_seqlens.tolist() for p in parts] == [[0, 4, 7], [0, 9], [0, 1, 2]]
    assert packed.split(18) == [packed]
    assert pack(IDS[:0], None).split(5)[0].lengths == ()


def test_lengths_that_only_the_device_knows():
    packed = Packed(None, torch.tensor([0, 5, 5, 16], dtype=torch.int32), (1, 16), None)
    assert (packed.tokens, packed.max_seqlen, packed.sequences) == (16, 16, 3)
    assert packed.places.tolist() == [*range(5), *range(11)]
    assert packed.sequence.tolist() == [0] * 5 + [2] * 11
    with pytest.raises(LengthsUnknown, match="lengths of the texts"):
        packed.lengths_on_host()
    with pytest.raises(LengthsUnknown, match="lengths of the texts"):
        packed.split(8)


def test_pad_right():
    ids, mask = pad_right(*end_to_end([[3, 4], [5], [6, 7, 8]], torch.device("cpu")), 9)
    assert ids.tolist() == [[3, 4, 9], [5, 9, 9], [6, 7, 8]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert mask.dtype == torch.int64


def test_gradient_reaches_the_tokens_only():
    packed = pack(IDS, MASK)
    states = torch.ones(6, 2, dtype=torch.double, requires_grad=True)
    (packed.pad(states) * torch.arange(24.0).view(3, 4, 2)).sum().backward()
    assert states.grad[:, 0].tolist() == [0, 2, 4, 12, 14, 18]


def test_a_mask_on_the_host_is_read_there():
    """A GPU's would have to be waited for; nothing can be read from the meta device."""
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    packed = pack(torch.zeros(2, 3, dtype=torch.int64, device="meta"), mask)
    assert (packed.lengths, packed.starts_padded) == ((2, 1), True)
    assert {packed.index.device.type, packed.cu_seqlens.device.type} == {"meta"}
    assert pack(torch.zeros(2, 3), mask).index.tolist() == [0, 1, 4]
