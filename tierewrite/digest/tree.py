"""The top of BLAKE3's tree: chaining values of equal subtrees -> digests, for many tensors at a time.

A tensor cut over buffers leaves one chaining value for each PIECE; this room joins them. The compression
function runs on NumPy columns, one per parent node, so its cost is counted in tree levels and not in nodes.

Source of every constant: the BLAKE3 specification, sections 2.1 (tree), 2.2 (compression), 2.3 (flags).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
PARENT = 4
ROOT = 8
_BLOCK = 64  # bytes of a parent's message: two chaining values
_ROLLED = [[(i + by) % 4 for i in range(4)] for by in range(4)]


def _rotate(x: Words, bits: int) -> Words:
    rotated: Words = (x >> np.uint32(bits)) | (x << np.uint32(32 - bits))
    return rotated


def _mixed(a: Words, b: Words, c: Words, d: Words, x: Words, y: Words) -> tuple[Words, Words, Words, Words]:
    """The four quarters of a half round at once: rows of the 4 x 4 state and words of the message, each (4, n)."""
    a = a + b + x
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b + y
    d = _rotate(d ^ a, 8)
    c = c + d
    return a, _rotate(b ^ c, 7), c, d


def parents(left: Words, right: Words, root: npt.NDArray[np.bool_]) -> Words:
    """Chaining values of n parent nodes; where `root`, the words of a digest.

    Args:
        left, right: uint32 (n, 8), the children's chaining values.
        root: bool (n,).
    """
    n = len(left)
    message: Words = np.ascontiguousarray(np.concatenate([left, right], axis=1).T)
    start = np.repeat(np.array([*IV, *IV[:4], 0, 0, _BLOCK, PARENT], np.uint32)[:, None], n, axis=1)
    start[15, root] |= np.uint32(ROOT)
    a, b, c, d = start.reshape(4, 4, n)
    for _ in range(7):
        a, b, c, d = _mixed(a, b, c, d, message[0:8:2], message[1:8:2])
        # the diagonals are the columns of rows that are turned by 1, 2 and 3
        b, c, d = b[_ROLLED[1]], c[_ROLLED[2]], d[_ROLLED[3]]
        a, b, c, d = _mixed(a, b, c, d, message[8::2], message[9::2])
        b, c, d = b[_ROLLED[3]], c[_ROLLED[2]], d[_ROLLED[1]]
        message = message[list(PERMUTATION)]
    return np.ascontiguousarray(np.concatenate([a ^ c, b ^ d]).T)


def combine(leaves: Sequence[Words]) -> list[bytes]:
    """Digests of tensors from the chaining values of their subtrees.

    Args:
        leaves: for each tensor uint32 (n, 8), n >= 2, in order: subtrees of one size, a power of two of chunks,
            of which the last may be smaller. (BLAKE3 gives the left child the largest power of two of chunks,
            which is what pairing neighbours and carrying an odd last one up comes to.)

    Returns:
        32 bytes each.
    """
    if any(len(nodes) < 2 for nodes in leaves):
        raise ValueError("a tensor of one subtree has no parent node: its digest is made where its chunks are")
    level = [np.asarray(nodes, dtype=np.uint32) for nodes in leaves]
    while open_ := [i for i, nodes in enumerate(level) if len(nodes) > 1]:
        pairs = [len(level[i]) // 2 for i in open_]
        left = np.concatenate([level[i][0 : 2 * p : 2] for i, p in zip(open_, pairs, strict=True)])
        right = np.concatenate([level[i][1 : 2 * p : 2] for i, p in zip(open_, pairs, strict=True)])
        root = np.repeat([len(level[i]) == 2 for i in open_], pairs)
        joined = np.split(parents(left, right, root), np.cumsum(pairs)[:-1])
        for i, nodes in zip(open_, joined, strict=True):
            level[i] = np.concatenate([nodes, level[i][-1:]]) if len(level[i]) % 2 else nodes
    return [nodes.astype("<u4").tobytes() for nodes in level]
