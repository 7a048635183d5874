"""How many bytes a packed piece of a TIFF unpacks to. libtiff fills in what is missing, and OpenCV loses its words about it.

LZW (TIFF 6.0, section 13) and PackBits (section 9) have no check sum: damage shows in the length, or in codes without entry.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_CLEAR, _END, _FIRST = 256, 257, 258
"""Codes of LZW: the table begins anew, the data ends; and the first entry of the table."""
_ENTRIES = 5119 - _FIRST
"""What libtiff has room for; from the 4096th on there is no code for them."""
_ADDED = np.maximum(np.arange(_ENTRIES) - 1, 0)
"""Entries that the table has when the code of this number is read, from where it began."""
_WIDTHS = 9 + np.searchsorted([511, 1023, 2047], _FIRST + _ADDED, side="right")
"""Bits of that code: it depends on nothing but its number."""
_STARTS = np.concatenate([[0], np.cumsum(_WIDTHS)])
_AT_ONCE = 1 << 20
"""Bytes of Deflate that are unpacked together."""


def deflated(piece: bytes) -> int:
    """Length of what Deflate unpacks. Raises ValueError where its check sum is wrong or its end is missing.

    It is unpacked a little at a time: a small file may hold a thousand times its size, and must not take the memory.
    """
    unpacker, length = zlib.decompressobj(), 0
    try:
        while not unpacker.eof and (unpacked := unpacker.decompress(piece, _AT_ONCE)):
            length += len(unpacked)
            piece = unpacker.unconsumed_tail
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("the end of its Deflate is missing")
    return length


def lzw(piece: bytes) -> int:
    """Length of what LZW unpacks. Raises ValueError for a code that has no entry yet."""
    padded = np.frombuffer(piece + bytes(4), np.uint8).astype(np.uint32)
    length, at_bits = 0, 0
    while True:
        codes = _codes(padded, at_bits, 8 * len(piece))
        ends = np.flatnonzero((codes == _CLEAR) | (codes == _END))
        run = codes[: ends[0]] if len(ends) else codes
        length += _length(run)
        if not len(ends) or codes[ends[0]] == _END:
            return length
        at_bits += int(_STARTS[ends[0] + 1])


def _codes(padded: NDArray[np.uint32], at_bits: int, end_bits: int) -> NDArray[np.int64]:
    """The codes from here on, as if none of them began the table anew."""
    count = int(np.searchsorted(_STARTS, end_bits - at_bits, side="right")) - 1
    starts, widths = at_bits + _STARTS[:count], _WIDTHS[:count]
    first = starts // 8
    four = padded[first] << 24 | padded[first + 1] << 16 | padded[first + 2] << 8 | padded[first + 3]
    return np.asarray((four.astype(np.int64) >> (32 - starts % 8 - widths)) & ((1 << widths) - 1), np.int64)


def _length(codes: NDArray[np.int64]) -> int:
    """Bytes of these codes of one table. A code is a byte, or an earlier code and one byte more."""
    numbers = np.arange(len(codes))
    earlier = codes - _FIRST
    if (earlier >= numbers).any():
        raise ValueError("a code of LZW has no entry yet")
    earlier = np.where(earlier >= 0, earlier, len(codes))
    lengths = np.append(np.ones(len(codes), np.int64), 0)
    earlier = np.append(earlier, len(codes))
    while (earlier[:-1] < len(codes)).any():  # each turn doubles how far back a code has been followed
        lengths = lengths + lengths[earlier]
        earlier = earlier[earlier]
    return int(lengths.sum())


def packed_bits(piece: bytes) -> int:
    """Length of what PackBits unpacks."""
    length = at = 0
    while at < len(piece):
        head = piece[at]
        if head == 128:  # says nothing
            at += 1
        elif head > 128:
            length, at = length + 257 - head, at + 2
        else:
            length, at = length + head + 1, at + head + 2
    return length - max(0, at - len(piece))
