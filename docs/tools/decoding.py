"""The table of ways to decode, from the records of `benchmarks decode_step` on a GPU."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.common import RESULTS
from experiments.arms_table import read_records

RECORD = RESULTS / "decode_step_cuda.jsonl"
TREATMENTS = {"compiled": "step compiled", "tuned": "step compiled, its own products of one row"}


def read() -> list[dict[str, Any]]:
    """Return the records, one a line of the file."""
    return read_records(RECORD, needed=True)


def rows(records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield a line per way: what, ours, peer, ratio, goal; of equal records the last one counts."""
    layers, models = {}, {}
    for record in records:
        if record["part"] == "layer":
            layers[record["tokens"], record["k"]] = record
        elif record["part"] in ("model", "generate") and "tokens_per_s" in record:
            key = record["part"], record["treatment"], record["batch"]
            models.setdefault(key, {})[record["way"]] = record["tokens_per_s"]
    for (tokens, k), record in sorted(layers.items()):
        micro = record["us_per_layer"]
        peers = {name: value for name, value in micro.items() if name.startswith("dense")}
        if not peers:
            continue
        best = min(peers, key=lambda name: peers[name])
        for name in (name for name in micro if name not in peers):
            what = f"decode, one layer, {tokens} at once, k = {k}: {name}"
            ratio = f"{micro[name] / micro[best]:.2f}"
            peer = f"{micro[best]:.3g} us {best}, the fastest"
            yield what, f"{micro[name]:.3g} us", peer, ratio, "<= 1"
    for (part, treatment, batch), rates in models.items():
        if "dense" not in rates or (part == "model" and treatment not in TREATMENTS):
            continue
        how = TREATMENTS[treatment] if part == "model" else f"`generate`, {treatment}"
        many = "" if batch == 1 else f", {batch} sequences at once"
        for name in (name for name in rates if name != "dense"):
            what = f"decode, Qwen3-0.6B, {how}{many}, {name}, tokens/s"
            ratio = f"{rates[name] / rates['dense']:.2f}"
            goal = ("" if part == "generate" else ">= 1.20") if batch == 1 else ">= 1"
            yield what, f"{rates[name]:,.0f}", f"{rates['dense']:,.0f} dense", ratio, goal
