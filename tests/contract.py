"""The names of front.json and of `--json` that scripts rely on."""

from __future__ import annotations

RECORD_KEYS = {
    *("name", "id", "hash", "architecture", "params", "bytes", "stored_as", "kv_bytes_per_token", "decode_bytes"),
    *("nats_per_token", "nats_per_byte", "ppl", "ppl_ratio", "per_source"),
    *("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_speedup", "decode_speedup", "measured_on"),
}
"""Of a judged child; a stored one has `schema` besides."""

FRONT_KEYS = RECORD_KEYS | {"test", "usable"}
"""Of a record of a front, at least."""

QUOTED_KEYS = {
    *("nats_per_token", "nats_per_byte", "ppl", "ppl_ratio", "nats_lost", "per_source"),
    *("dataset", "seq_len", "tokens", "bos"),
}
"""Of its `test` and `unseen`."""

MEASURED_ON_KEYS = {"dataset", "split", "seq_len", "tokens", "bos", "workload", "repeats", "host"}
