import torch

from thinwire.coding.layout import Layout


def payloads():
    return [
        (torch.randn(3), torch.randint(0, 256, (5,), dtype=torch.uint8)),
        (torch.randn(2, dtype=torch.float64),),
        (torch.randn(7).to(torch.bfloat16), torch.randint(0, 256, (2,), dtype=torch.uint8)),
        (torch.empty(0),),
    ]


def test_round_trip_aligned_and_sized():
    sent = payloads()
    layout = Layout(sent)
    message = layout.pack(sent)
    assert message.dtype == torch.uint8
    assert message.numel() == layout.nbytes
    assert layout.nbytes % 8 == 0
    assert sum(layout.unit_nbytes) + layout.padding == layout.nbytes
    for part in layout.parts:
        assert part.offset % part.dtype.itemsize == 0
    for ours, theirs in zip(sent, layout.unpack(message), strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_messages_of_all_senders_are_views():
    sent = [payloads() for _ in range(3)]
    layout = Layout(sent[0])
    messages = torch.stack([layout.pack(own) for own in sent])
    wide = torch.nn.functional.pad(messages, (8, 16))[:, 8:]  # as where several messages travelled together
    for received in (messages, wide):
        found, columns = layout.unpack_all(received)
        for ours, theirs in zip(sent, found, strict=True):
            flat = [[t for payload in each for t in payload] for each in (ours, theirs)]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*flat, strict=True))
        received.zero_()
        assert not any(column.any() for column in columns)
        assert not found[2][0][0].any()


def test_golden_bytes():
    sent = [
        (torch.tensor([1.0]), torch.tensor([7, 8], dtype=torch.uint8)),
        (torch.tensor([-2.0], dtype=torch.float64),),
    ]
    message = Layout(sent).pack(sent)
    assert bytes(message.numpy()).hex() == "00000000000000c00000803f07080000"


def test_in_place_only_where_allowed_and_adjacent():
    base = torch.randn(10)
    neighbours = [(base[:4],), (base[4:],)]
    layout = Layout(neighbours, alignment=1)
    assert layout.pack(neighbours, in_place=True).data_ptr() == base.data_ptr()
    assert layout.pack(neighbours).data_ptr() != base.data_ptr()
    apart = [(base[4:],), (base[:4],)]
    assert Layout(apart, alignment=1).pack(apart, in_place=True).data_ptr() != base.data_ptr()
