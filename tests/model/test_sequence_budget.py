"""A budget that follows each sequence: causal, the same decoded as read at once, near its goal."""

from itertools import pairwise

import pytest
import torch

from tiny import make_dense, make_ids, make_rows, make_student
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION, packed_kwargs
from tiny_onn.model.backbone import generation_attention, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.sequence_budget import PRIOR_TOKENS, Counts, Sequences
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import fill_threshold_tables, set_budget

LENGTHS = [40, 64, 30, 50, 33] * 12
E, TARGET = 8, 4.0


@pytest.fixture
def student():
    """A student whose gates choose by token, its table filled."""
    made = make_student(make_dense())
    with torch.no_grad():
        for bank in made.banks():
            bank.router.weight.mul_(30)
    fill_threshold_tables(made, make_rows(LENGTHS, 64, seed=1)[:30])
    made.backbone.set_attn_implementation(generation_attention(made.backbone))
    set_budget(made.eval(), TARGET)
    return made


@torch.no_grad()
def activity(student, call):
    """The active experts of every layer, (L, T, E), in a call."""
    with recorded_routings(student.banks()) as routings:
        output = call()
    return torch.stack([routing.active for routing in routings]), output


def definition(scores_TE, table_E, target, prior=PRIOR_TOKENS):
    """Thresholds of one sequence, token by token; the first token does not count."""
    found, tokens, active = [], 0, torch.zeros(len(table_E))
    for token, scores_E in enumerate(scores_TE):
        means = (prior * torch.arange(1, len(table_E) + 1) + active) / (prior + tokens)
        for j in range(len(table_E) - 1):
            if means[j] < target <= means[j + 1] or j == len(table_E) - 2:
                share = ((target - means[j]) / (means[j + 1] - means[j])).clamp(0, 1)
                found.append(table_E[j] + share * (table_E[j + 1] - table_E[j]))
                break
        if token:
            tokens += 1
            active += torch.tensor([float((scores_E > tau).sum()) for tau in table_E])
    return torch.stack(found)[:, None]


def test_thresholds_are_those_of_the_definition_in_any_cut():
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(90, E, generator=generator) * 0.7
    table_E = torch.linspace(1.0, -1.0, E)
    expected = definition(scores_TE, table_E, TARGET)
    starts = (torch.arange(90) == 0)[None]
    for sizes in ([90], [1] * 90, [30, 1, 59]):
        found, counts = [], {}
        for part, first in zip(scores_TE.split(sizes), starts.split(sizes, dim=1), strict=True):
            call = Sequences(starts_BT=first, counted_BT=~first, before=counts)
            found.append(call.thresholds(0, part, table_E, TARGET))
            counts = call.after
        torch.testing.assert_close(torch.cat(found), expected)


def test_a_sequence_comes_near_the_budget_whatever_its_text():
    # This text gives 6 of 8 experts where the text of the table gave 4.
    generator = torch.Generator().manual_seed(1)
    table_E = torch.linspace(0.9, 0.2, E)
    scores_TE = torch.rand(2000, E, generator=generator)
    starts = (torch.arange(2000) == 0)[None]
    call = Sequences(starts_BT=starts, counted_BT=~starts)
    thresholds_T1 = call.thresholds(0, scores_TE, table_E, TARGET)
    fixed = (scores_TE > table_E[3]).sum(-1).float()
    followed = (scores_TE > thresholds_T1).sum(-1).float()
    assert abs(fixed.mean() / TARGET - 1) > 0.1
    assert abs(followed.mean() / TARGET - 1) < 0.02
    assert isinstance(call.after[0], Counts)


@pytest.mark.parametrize("scale", [1.0, 1.05])
def test_decoding_token_by_token_equals_reading_at_once(student, scale):
    student.config.sequence_scale = scale
    student.routing_controller = "sequence"
    ids = make_ids(2, 40, seed=3)
    whole, output = activity(student, lambda: student(ids, use_cache=False))
    cache, parts, logits = None, [], []
    for some in ids.split([7, 1, 1, 20, 1, 10], dim=1):
        part, out = activity(
            student, lambda s=some, c=cache: student(s, past_key_values=c, use_cache=True)
        )
        cache = out.past_key_values
        parts.append(part.view(len(part), 2, -1, E))
        logits.append(out.logits)
    assert torch.equal(torch.cat(parts, dim=2), whole.view(len(whole), 2, 40, E))
    torch.testing.assert_close(torch.cat(logits, dim=1), output.logits, rtol=1e-4, atol=1e-4)


def test_later_tokens_change_no_earlier_one_and_thresholds_do_adapt(student):
    ids, other = make_ids(1, 60, seed=4), make_ids(1, 60, seed=5)
    other[:, :30] = ids[:, :30]
    fixed = activity(student, lambda: student(ids))[0]
    student.routing_controller = "sequence"
    first, second = (activity(student, lambda x=x: student(x))[0] for x in (ids, other))
    assert torch.equal(first[:, :30], second[:, :30])
    assert not torch.equal(first, fixed)
    student.routing_controller = "none"
    assert torch.equal(activity(student, lambda: student(ids))[0], fixed)


def test_documents_of_a_packed_row_are_sequences_of_their_own(student):
    student.backbone.set_attn_implementation(DOCUMENT_ATTENTION)
    student.routing_controller = "sequence"
    row = make_rows((20, 25, 19), 64)[0]
    packed = activity(
        student, lambda: last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    )[0]
    alone = [
        activity(student, lambda s=s, e=e: student(row.input_ids[:, s:e], use_cache=False))[0]
        for s, e in pairwise(row.cu_seqlens.tolist())
    ]
    assert torch.equal(packed, torch.cat(alone, dim=1))


def test_generation_runs_and_left_padding_does_not_count(student):
    student.routing_controller = "sequence"
    ids = make_ids(1, 12, seed=6)
    plain = student.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    again = student.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert torch.equal(plain[0, 12:], again[0, 17:])


def test_left_padding_does_not_count_where_only_the_mask_tells_it(student):
    student.routing_controller = "sequence"
    ids, padding = make_ids(1, 40, seed=8), torch.zeros(1, 7, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    padded = student(torch.cat([padding, ids], dim=1), attention_mask=mask).logits[:, 7:]
    torch.testing.assert_close(padded, student(ids).logits)


def test_beams_keep_their_own_counts(student):
    student.routing_controller = "sequence"
    options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    options |= {"pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}
    found = [
        [
            student.generate(make_ids(1, 24, seed=seed), use_cache=use_cache, **options)
            for seed in range(6)
        ]
        for use_cache in (True, False)
    ]
    for cached, again in zip(*found, strict=True):
        assert torch.equal(cached.sequences, again.sequences)
        torch.testing.assert_close(cached.sequences_scores, again.sequences_scores)


def test_a_scale_changes_the_target_within_its_bounds(student):
    ids = make_ids(2, 60, seed=7)
    student.routing_controller = "sequence"

    def followed(budget, scale):
        set_budget(student, budget)
        student.config.sequence_scale = scale
        return activity(student, lambda: student(ids))[0]

    assert torch.equal(followed(4.0, 1.125), followed(4.5, 1.0))
    assert torch.equal(followed(7.5, 1.25), followed(8.0, 1.0))
    assert torch.equal(followed(1.2, 0.8), followed(1.0, 1.0))
    # One expert and all experts are exact.
    assert torch.equal(followed(8.0, 0.8), followed(8.0, 1.0))
    assert torch.equal(followed(1.0, 1.25), followed(1.0, 1.0))


def test_a_cache_that_others_changed_is_refused(student):
    student.routing_controller = "sequence"
    cache = student(make_ids(1, 12), use_cache=True).past_key_values
    cache.crop(-4)
    with pytest.raises(UserError, match=r"routing_controller: .* a cache of 8 tokens"):
        student(make_ids(1, 1), past_key_values=cache)
    # The error leaves nothing behind.
    student(make_ids(1, 12))


def test_the_choice_is_saved_with_the_student(student, tmp_path):
    student.routing_controller = "sequence"
    ids = make_ids(1, 30)
    expected = activity(student, lambda: student(ids))[0]
    student.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path).eval()
    assert again.routing_controller == "sequence"
    assert torch.equal(activity(again, lambda: again(ids))[0], expected)


def test_training_and_all_experts_on_are_as_without_it(student):
    ids = make_ids(1, 30)
    with torch.no_grad(), all_experts_on(student.banks()):
        before = student(ids).logits
    student.routing_controller = "sequence"
    with torch.no_grad(), all_experts_on(student.banks()):
        torch.testing.assert_close(student(ids).logits, before)
    student.train()
    trained = activity(student, lambda: student(ids))[0]
    student.routing_controller = "none"
    assert torch.equal(activity(student, lambda: student(ids))[0], trained)


def test_a_student_without_a_table_and_unknown_controllers_are_refused():
    student = make_student(make_dense())
    assert student.routing_controller == "none"
    with pytest.raises(UserError, match=r"routing_controller: .*without measured thresholds"):
        student.routing_controller = "sequence"
    with pytest.raises(UserError, match="routing_controller: got 'x', expected one of none, seq"):
        student.routing_controller = "x"
