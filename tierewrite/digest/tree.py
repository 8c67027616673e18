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
# columns, then diagonals, of the 4 x 4 state
_QUARTERS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip


def _rotate(x: Words, bits: int) -> Words:
    rotated: Words = (x >> np.uint32(bits)) | (x << np.uint32(32 - bits))
    return rotated


def parents(left: Words, right: Words, root: npt.NDArray[np.bool_]) -> Words:
    """Chaining values of n parent nodes; where `root`, the words of a digest.

    Args:
        left, right: uint32 (n, 8), the children's chaining values.
        root: bool (n,).
    """
    n = len(left)
    message = [np.ascontiguousarray(column) for column in np.concatenate([left, right], axis=1).T]
    flags = np.where(root, np.uint32(PARENT | ROOT), np.uint32(PARENT)).astype(np.uint32)
    state = [np.full(n, word, np.uint32) for word in (*IV, *IV[:4], 0, 0, _BLOCK)] + [flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(_QUARTERS):
            state[a] = state[a] + state[b] + message[2 * i]
            state[d] = _rotate(state[d] ^ state[a], 16)
            state[c] = state[c] + state[d]
            state[b] = _rotate(state[b] ^ state[c], 12)
            state[a] = state[a] + state[b] + message[2 * i + 1]
            state[d] = _rotate(state[d] ^ state[a], 8)
            state[c] = state[c] + state[d]
            state[b] = _rotate(state[b] ^ state[c], 7)
        message = [message[i] for i in PERMUTATION]
    return np.stack([state[i] ^ state[i + 8] for i in range(8)], axis=1)


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
