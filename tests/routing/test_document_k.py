"""The standard error of a mean number of experts is one over documents, not over tokens."""

import math

import pytest
import torch

from tiny import make_documents
from tiny_onn.data.packing import Origin, Packer, build_row
from tiny_onn.model.router import Routing
from tiny_onn.routing.document_k import DocumentK

E = 8


def routing(k_T):
    """A routing that gives token t its first k experts."""
    active_TE = torch.arange(E) < k_T[:, None]
    table_TE = torch.zeros(len(k_T), E)
    return Routing(router_logits=table_TE, scores=table_TE, active=active_TE, weights=table_TE)


def by_definition(pairs):
    tokens, experts = (sum(column) for column in zip(*pairs, strict=True))
    mean, number = experts / tokens, len(pairs)
    squares = sum((k - mean * n) ** 2 for n, k in pairs)
    return math.sqrt(number / (number - 1) * squares) / tokens


def test_it_is_that_of_a_ratio_over_documents_that_may_span_rows():
    lengths = (20, 50, 9, 33)
    packer, rows = Packer(32, 0), []
    for number, document in enumerate(make_documents(lengths)):
        packer.add(document, Origin("a", number, 0))
        while (row := packer.pop()) is not None:
            rows.append(row)
    rows.append(packer.finish())
    generator = torch.Generator().manual_seed(0)
    counted = DocumentK()
    sums: dict[int, list[float]] = {}
    for row in rows:
        ks = [torch.randint(1, E, (32,), generator=generator) for _ in range(2)]
        counted.add([routing(k_T) for k_T in ks], row)
        mean_T = (ks[0] + ks[1]) / 2
        bounds = row.cu_seqlens.tolist()
        for origin, start, end in zip(row.origins, bounds, bounds[1:], strict=False):
            mask = row.router_mask[0, start:end]
            pair = sums.setdefault(origin.document, [0, 0.0])
            pair[0] += int(mask.sum())
            pair[1] += float(mean_T[start:end][mask].sum())
    assert len(sums) == len(lengths)
    assert counted.standard_error() == pytest.approx(by_definition(list(sums.values())))


def test_equal_documents_have_no_error_and_different_ones_a_large_one():
    row = build_row(make_documents((16, 16)), row_tokens=40, pad_token_id=0)
    equal, different = DocumentK(), DocumentK()
    equal.add([routing(torch.full((40,), 4))], row)
    different.add([routing(torch.tensor([2] * 16 + [6] * 24))], row)
    assert equal.standard_error() == 0
    # Two documents of 15 counted tokens, with means 2 and 6.
    assert different.standard_error() == pytest.approx(2.0)


def test_one_document_has_no_standard_error():
    row = build_row(make_documents((16,)), row_tokens=20, pad_token_id=0)
    counted = DocumentK()
    assert counted.standard_error() is None
    counted.add([routing(torch.full((20,), 4))], row)
    assert counted.standard_error() is None
