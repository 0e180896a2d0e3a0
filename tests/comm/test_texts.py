"""Texts between ranks: bytes of a bounded length, read without trust."""

import json
import math
import re
import struct
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import thinwire
from thinwire import ThinwireError
from thinwire.comm import texts
from thinwire.comm.link_speed import measure
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.texts import FIRST, HEAD, LIMIT, MAGIC, exchange


def spoken(said):
    """What each of as many threads hears when they say this."""
    world = len(said)
    rows, heard, barrier = [b""] * world, [None] * world, threading.Barrier(world, timeout=30)

    def speak(rank):
        def gather(mine):
            rows[rank] = mine
            barrier.wait()
            got = [*rows]
            barrier.wait()
            return got

        heard[rank] = exchange(said[rank], gather)

    threads = [threading.Thread(target=speak, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_texts_of_any_length_arrive(monkeypatch):
    monkeypatch.setattr(texts, "CHUNK", 50)
    room = FIRST - HEAD.size
    for said in (
        ["", "a"], ["a" * room, "b" * (room + 1)], ["é" * 100, "", "ß" * 99 + "x"], ["x" * 1000, "y" * 50, "z" * 157],
        ["\0\n\t", "日本" * 60],
    ):  # fmt: skip
        assert spoken(said) == [said] * len(said)
    assert spoken(["a\udc80b"])[0] == ["a\\udc80b"], "a path that is no UTF-8"


def head(length, magic=MAGIC):
    return struct.pack("<4sq", magic, length)


HOSTILE = {
    "huge": (head(2**62), "rank 1 has a text of 4,611,686,018,427,387,904 bytes for the others; the limit is 16,7"),
    "one too many": (head(LIMIT + 1), "the limit is"),
    "negative": (head(-1), f"rank 1 sent {head(-1).hex()} where a text begins with"),
    "no head": (b"\x80\x04\x95" + b"x" * 20, "rank 1 sent 800495"),  # a pickle
    "no UTF-8": (head(3) + b"\xff\xfe\x80", "rank 1 said something that is no text"),
    "half a character": (head(1) + "é".encode()[:1], "rank 1 said something that is no text"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_an_error_that_names_the_rank(what):
    row, message = HOSTILE[what]
    with pytest.raises(ThinwireError, match=message):
        exchange("hello", lambda mine: [mine, row.ljust(len(mine), b"\0")])


def test_a_long_text_of_ones_own_is_an_error_on_all(monkeypatch):
    monkeypatch.setattr(texts, "LIMIT", 200)
    said = []

    def gather(mine):
        said.append(mine)
        return [mine]

    with pytest.raises(ThinwireError, match="rank 0 has a text of 201 bytes for the others; the limit is 200"):
        exchange("x" * 201, gather)
    assert len(said) == 1, "the others have heard of the length"


def _hostile(rank):
    group = ProcessGroup(dist.group.WORLD, 30.0)
    found = []
    for row, message in HOSTILE.values():
        if rank:  # says it past what would say it well
            group._gather_bytes(row.ljust(FIRST, b"\0"), 30.0)
            continue
        with pytest.raises(ThinwireError, match=message):
            group.exchange_text("hello")
        found.append(message)
    for said in ("[" * 100_000, '["x"]', "[-1.0]", '{"a": 1}', "7", "9" * 5000, "[1e999]", ""):
        heard = group.exchange_text(said if rank else "[1.0]")
        with pytest.raises(ThinwireError, match="rank 1 said something that is no list of roots"):
            texts.heard(heard, lambda text: [math.isqrt(int(x)) for x in json.loads(text)], "list of roots")
    assert group.exchange_text(f"é{rank}") == ["é0", "é1"], "the group lives on"
    return found


def test_hostile_texts_between_processes(world2):
    honest, hostile = world2.run(_hostile)
    assert len(honest) == len(HOSTILE)
    assert not hostile


def _lies(rank, times, link):
    """Rank 1 lies about what it measured, and rank 0 about the link that it found."""
    group = ProcessGroup(dist.group.WORLD, 30.0)
    said = iter([times, link])
    honest = group.exchange_text
    if (rank == 1) == (link is None):
        group.exchange_text = lambda text: honest(next(said) or text)
    try:
        return str(measure(group, 30.0))
    except ThinwireError as error:
        return str(error)


@pytest.mark.parametrize(
    ("times", "link"),
    [
        ("[1, 2, 3]", None),
        ("[0, 1, 1, 1]", None),
        ('{"a": "b"}', None),
        (None, "[-1, 0]"),
        (None, "[NaN, 0]"),
        (None, "7"),
    ],
)
def test_a_link_that_nobody_can_have_is_an_error_on_all(world2, times, link):
    a, b = world2.run(_lies, times, link)
    what = "rank 1 said something that is no list of times" if times else "rank 0 said something that is no link"
    assert what in a
    assert a == b


def test_nothing_between_ranks_is_a_pickle():
    source = Path(thinwire.__file__).parent
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"_object(_list)?\(|^\s*(import|from) (pickle|dill|marshal|shelve)\b", text, re.M), path
