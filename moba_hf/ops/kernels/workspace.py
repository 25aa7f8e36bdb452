"""Passes over heads and queries that keep temporary tensors within a bound: from shapes alone, no device value."""

import os
from collections.abc import Iterator

_DEFAULT_MB = 1024


def workspace_bytes() -> int:
    """Bytes held at a time for each entry (partials, sorting); MOBA_HF_WORKSPACE_MB sets it, 1024 MiB by default."""
    return int(os.environ.get("MOBA_HF_WORKSPACE_MB", _DEFAULT_MB)) << 20


def head_passes(kv_heads: int, bytes_per_head: int) -> Iterator[range]:
    """Equal ranges of KV heads whose temporaries fit the workspace together; at least one head each."""
    return _ranges(kv_heads, workspace_bytes() // max(1, bytes_per_head))


def token_passes(tokens: int, bytes_per_token: int) -> Iterator[range]:
    """Equal ranges of queries whose temporaries fit the workspace; at least one token each."""
    return _ranges(tokens, workspace_bytes() // max(1, bytes_per_token))


def _ranges(total: int, at_most: int) -> Iterator[range]:
    parts = -(-total // max(1, min(total, at_most))) if total else 0
    size = -(-total // parts) if parts else 1
    return (range(start, min(start + size, total)) for start in range(0, total, size))
