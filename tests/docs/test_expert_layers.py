"""The page's tables of expert layers divide the records' times, and say what is left out."""

from docs.tools import expert_layers

LAYER = {
    "rows": [
        {"tokens": 2048, "k": 4, "rule": "default", "MLP": 2.0, "dense": 3.0, "sparse": 2.5},
        {"tokens": 32_768, "k": 16, "rule": "card", "MLP": 4.0, "MLP compiled": 3.5, "dense": 5.0,
         "grouped": 9.0, "sparse": 3.0, "sparse, rows": 6.0, "MLP, captured": 3.2,
         "MLP compiled, captured": 3.0, "dense, captured": 4.0, "sparse, captured": 2.4},
    ],
    "skipped": [{"tokens": 2048, "k": 16, "rule": "card", "reason": "time budget"}],
}  # fmt: skip
PEERS = {
    "rows": [
        {"peer": peer, "tokens": tokens, "k": 4, "captured": captured, "peer_ms": ms,
         "mlp_ms": 2.0, "ours_ms": ours}
        for peer, tokens, captured, ms, ours in (
            ("sonicmoe", 2048, True, 1.0, 1.5), ("sonicmoe", 2048, False, 5.0, 1.6),
            ("liger", 2048, False, 4.0, 1.8), ("liger", 8192, False, 3.0, 1.8),
        )
    ],
    "skipped": [
        {"peer": "liger", "tokens": tokens, "k": 4, "captured": True, "reason": "it waits"}
        for tokens in (2048, 8192)
    ],
    "settings": {"tuning": {"liger": "4 of 32", "sonicmoe": "one"}},
}  # fmt: skip


def test_without_records_the_page_names_the_commands(tmp_path):
    record = expert_layers.read(tmp_path / "none.json")
    assert record is None
    assert expert_layers.LAYER_COMMAND in expert_layers.layer_section(record, "")
    assert expert_layers.PEERS_COMMAND in expert_layers.peers_section(record, "")


def test_the_fastest_path_stands_beside_mlps_that_are_launched_alike():
    text = expert_layers.layer_section(LAYER, "a GPU")
    assert "Measured on a GPU." in text
    first, second = text.splitlines()[4:6]
    assert first == ("| the model card's | 32,768 | 16 | 2.4 ms (sparse) | 0.75 | 0.80 | <= 0.85 | "
                     "3 ms (sparse) | 0.75 |")  # fmt: skip
    assert second == ("| the default recipe's | 2,048 | 4 |  |  |  |  | 2.5 ms (sparse) | 1.25 |")
    assert text.splitlines()[-1] == "- card (1 of the cells): time budget"


def test_peers_and_ours_are_shares_of_the_mlp_of_their_process():
    captured, launched = expert_layers.peers_section(PEERS, "a GPU").split("\n\n")[1:3]
    head, _, *lines = captured.splitlines()
    assert head == "| of the dense MLP, captured in a CUDA graph | 2,048, k = 4 |"
    assert lines == ["| ours, with surprise | 0.75 |", "| sonicmoe | 0.50 |"]
    assert launched.splitlines()[2:] == [
        "| ours, with surprise | 0.80 to 0.90 | 0.90 |", "| sonicmoe | 2.50 |  |",
        "| liger | 2.00 | 1.50 |",
    ]  # fmt: skip
    text = expert_layers.peers_section(PEERS, "a GPU")
    assert "by timing them: liger: 4 of 32; sonicmoe: one.\n" in text
    tuned = {**PEERS, "settings": {"tuning": "all candidates"}}
    assert "liger, sonicmoe: all candidates.\n" in expert_layers.peers_section(tuned, "a GPU")
    assert "- liger (2 of the cells): it waits\n" in text
