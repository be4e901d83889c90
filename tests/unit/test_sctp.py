"""SCTP's opening packets, beside scapy's."""

from __future__ import annotations

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkAbort, SCTPChunkInit, SCTPChunkInitAck

from hookline.lab import _sctp


def test_an_init_is_what_scapy_makes_of_it() -> None:
    packet = _sctp.init(33000, 132, 0x80001234)
    read = SCTP(packet)
    assert (read.sport, read.dport, read.tag) == (33000, 132, 0)
    assert read[SCTPChunkInit].init_tag == 0x80001234
    assert read[SCTPChunkInit].n_in_streams == read[SCTPChunkInit].n_out_streams == 1
    again = SCTP(packet)
    again.chksum = None
    assert bytes(again) == packet, "the checksum"


def test_an_init_is_answered() -> None:
    asked = _sctp.read(_sctp.init(33000, 132, 0x80001234))
    assert asked == _sctp.Packet("init", 33000, 132, 0, 0x80001234)
    answer = _sctp.answer(asked, listening=True)
    read = SCTP(answer)
    assert (read.sport, read.dport, read.tag) == (132, 33000, 0x80001234)
    assert read[SCTPChunkInitAck].params[0].cookie == b"hook"
    told = _sctp.read(answer)
    assert told is not None
    assert (told.kind, told.destination, told.verification) == ("init-ack", 33000, 0x80001234)
    refused = _sctp.answer(asked, listening=False)
    assert SCTP(refused).haslayer(SCTPChunkAbort)
    assert _sctp.read(refused) == _sctp.Packet("abort", 132, 33000, 0x80001234, 0)


@pytest.mark.parametrize("at", range(0, 32, 5))
def test_a_damaged_packet_is_none(at: int) -> None:
    packet = bytearray(_sctp.init(33000, 132, 0x80001234))
    packet[at] ^= 1
    assert _sctp.read(bytes(packet)) is None


@pytest.mark.parametrize("length", [0, 11, 12, 15, 31])
def test_a_packet_that_is_cut_off_is_none(length: int) -> None:
    assert _sctp.read(_sctp.init(33000, 132, 0x80001234)[:length]) is None
