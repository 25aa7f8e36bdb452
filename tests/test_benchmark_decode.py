"""The decoding benchmark on a tiny checkpoint: it runs, and the bytes it counts are those that arithmetic gives."""

import json

from checkpoints import load_script, save_checkpoint

LAYERS, HEADS, KV_HEADS, WIDTH, ELEMENT = 3, 4, 2, 8, 4


def test_counted_bytes(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "model")
    where = ["--model", folder, "--gguf-file", "", "--output", str(tmp_path / "out" / "decode.json")]
    load_script("benchmark_decode").main(
        [*where, "--length", "203", "--block-size", "16", "--top-k", "3", "--tokens", "4", "--rounds", "1"]
    )
    assert "| decoding |" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "decode.json").read_text())
    results = {result["contender"]: result for result in record["decode"]}
    token = WIDTH * ELEMENT * LAYERS  # bytes of one head's key
    full = 2 * 203 * KV_HEADS * token
    assert results["sdpa, DynamicCache"]["attention_bytes"] == full
    assert results["sdpa, DynamicCache"]["append_bytes"] == full - 2 * KV_HEADS * token
    sparse = results['moba, decode="moba", MobaCache']
    assert sparse["attention_bytes"] == 2 * 3 * 16 * HEADS * token + 203 // 16 * KV_HEADS * token
    assert sparse["append_bytes"] == 0
    assert all(len(result["tokens_s"]) == 4 for result in results.values())
