"""Two models' predictions compared in chunks are those from all logits at once."""

import torch
from torch import Tensor

from tiny import normal
from tiny_onn.ops.distillation_loss import Head
from tiny_onn.ops.predictions import compare_predictions

T, D, V = 37, 12, 50


def inputs() -> tuple[Tensor, Tensor, Head, Head, Tensor]:
    """Hidden states and heads of two models, and labels of which some are missing."""
    labels_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(0))
    labels_T[::7] = -100
    s_TD, q_TD = (normal(T, D, seed=seed, dtype=torch.float64) for seed in (1, 2))
    s_VD, q_VD = (normal(V, D, seed=seed, dtype=torch.float64) for seed in (3, 4))
    heads = Head(weight=s_VD), Head(weight=q_VD, scale=0.5, softcap=3.0)
    return s_TD, q_TD, *heads, labels_T


def test_every_value_has_its_definition():
    s_TD, q_TD, s_head, q_head, labels_T = inputs()
    found = compare_predictions(s_TD, q_TD, s_head, q_head, labels_T)
    s_TV = s_head.logits(s_TD).log_softmax(-1)
    q_TV = q_head.logits(q_TD).log_softmax(-1)
    for value_T, p_TV, r_TV in ((found.forward_kl, q_TV, s_TV), (found.reverse_kl, s_TV, q_TV)):
        torch.testing.assert_close(value_T, (p_TV.exp() * (p_TV - r_TV)).sum(-1))
    torch.testing.assert_close(found.entropy, -(s_TV.exp() * s_TV).sum(-1))
    for t in range(T):
        ours, theirs = (set(x[t].topk(5).indices.tolist()) for x in (s_TV, q_TV))
        assert found.top5_overlap[t] == len(ours & theirs) / 5
        label = int(labels_T[t])
        assert found.nll[t] == (0 if label == -100 else -s_TV[t, label])
        assert found.reference_nll[t] == (0 if label == -100 else -q_TV[t, label])
        assert found.correct[t] == (int(s_TV[t].argmax()) == label)
        assert found.agrees[t] == (s_TV[t].argmax() == q_TV[t].argmax())
    torch.testing.assert_close(found.reference_confidence, q_TV.exp().amax(-1))


def test_chunks_change_nothing():
    whole, in_chunks = (
        compare_predictions(*inputs(), chunk_bytes=size) for size in (1 << 20, 4 * V * 5)
    )
    for one, other in zip(whole, in_chunks, strict=True):
        torch.testing.assert_close(one, other)
