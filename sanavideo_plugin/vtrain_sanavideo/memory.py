"""What the transformer keeps in memory in training, as `vtrain.testing.memory.block_memory` measured it. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from vtrain.contract import BlockMemory, DType, TokenBytes

Shape = tuple[int, float, int, tuple[int, int, int]]
"""What decides over it, of a transformer's config: width, mlp_ratio, in_channels, patch_size."""
How = tuple[DType, DType, bool]
"""Storage type of the weights, type in which layers compute, whether each latent frame has a level of its own."""


def _memory(block: int, outside: int, checkpointed: int, outside_checkpointed: int) -> BlockMemory:
    return BlockMemory(TokenBytes(block, outside), TokenBytes(checkpointed, outside_checkpointed))


MEASURED: Mapping[Shape, Mapping[How, BlockMemory]] = {
    (2240, 3.0, 16, (1, 2, 2)): {
        ("fp32", "fp32", False): _memory(448268, 27592, 8960, 27592),
        ("fp32", "fp32", True): _memory(519948, 73416, 8960, 127176),
        ("fp32", "bf16", False): _memory(304828, 5188, 8960, 18632),
        ("fp32", "bf16", True): _memory(376508, 32580, 8960, 72904),
        ("bf16", "bf16", False): _memory(251060, 14148, 4480, 14148),
        ("bf16", "bf16", True): _memory(286900, 37060, 4480, 63940),
    },
    (2240, 3.0, 128, (1, 1, 1)): {
        ("fp32", "fp32", False): _memory(448268, 27848, 8960, 27848),
        ("fp32", "fp32", True): _memory(519948, 73672, 8960, 127432),
        ("fp32", "bf16", False): _memory(304828, 5444, 8960, 18888),
        ("fp32", "bf16", True): _memory(376508, 32836, 8960, 73160),
        ("bf16", "bf16", False): _memory(251060, 14404, 4480, 14404),
        ("bf16", "bf16", True): _memory(286900, 37316, 4480, 64196),
    },
    (96, 3.0, 16, (1, 2, 2)): {
        ("fp32", "fp32", False): _memory(19252, 1608, 384, 1608),
        ("fp32", "fp32", True): _memory(22324, 4552, 384, 6856),
        ("fp32", "bf16", False): _memory(13100, 644, 384, 1224),
        ("fp32", "bf16", True): _memory(16172, 2308, 384, 4040),
        ("bf16", "bf16", False): _memory(10788, 1028, 192, 1028),
        ("bf16", "bf16", True): _memory(12324, 2500, 192, 3652),
    },
    (96, 3.0, 128, (1, 1, 1)): {
        ("fp32", "fp32", False): _memory(19252, 1864, 384, 1864),
        ("fp32", "fp32", True): _memory(22324, 4808, 384, 7112),
        ("fp32", "bf16", False): _memory(13100, 900, 384, 1480),
        ("fp32", "bf16", True): _memory(16172, 2564, 384, 4296),
        ("bf16", "bf16", False): _memory(10788, 1284, 192, 1284),
        ("bf16", "bf16", True): _memory(12324, 2756, 192, 3908),
    },
}
"""The 2B model, 480p and 720p, and the tiny ones (tiny.py). Bytes for each token; tests measure all again."""
