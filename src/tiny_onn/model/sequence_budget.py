"""A budget that follows each sequence: thresholds that adapt to the sequence's own past tokens.

One threshold for all text gives one document more experts than another. Here a layer compares the
tokens of a sequence so far with the text that its table of thresholds was measured on. With
threshold tau_j, which gives j experts on average on that text, the sequence's t counted tokens had
n_j active experts in all. The next token's threshold is the one at which

    (PRIOR_TOKENS * j + n_j) / (PRIOR_TOKENS + t)

interpolated between the j, is the target. Only past tokens' scores enter, and neither the
thresholds that were used nor the order of calls, so that a prompt read at once and the same tokens
decoded one by one get the same thresholds.

Tokens activate fewer experts the more text they have before them, so that thresholds of past tokens
give about 1 % less than the target. A student's `sequence_scale`, which is measured at the end of
its training (`budgets.fit_sequence_scale`), multiplies the target to make up for it.

Legend: B sequences, T tokens, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tiny_onn.errors import UserError

Controller = Literal["none", "sequence"]
# The weight of the text that the table was measured on, in tokens. The variance of a token's k by
# that of a document's mean is about 30, and neighbouring tokens are alike.
PRIOR_TOKENS = 64.0
# The scores of so many tokens are compared with all thresholds at once.
CHUNK_TOKENS = 2048
UNMEASURED = (
    'routing_controller: got "sequence" for a student without measured thresholds (from the middle'
    " of its run, or of a selection without any), expected a finished one with a budget; finish its"
    " run with `tiny-onn distill --resume --out RUN`, which measures them"
)
# The name under which a cache carries the sequences' counts.
ON_CACHE = "_tiny_onn_sequences"


@dataclass(kw_only=True, slots=True)
class Counts:
    """The counts of one layer after the tokens so far."""

    tokens_B: Int[Tensor, " sequences"]
    active_BE: Int[Tensor, "sequences experts"]
    """Experts that passed each threshold of the table, over all counted tokens."""


@dataclass(kw_only=True, slots=True)
class Sequences:
    """The sequences of one call of the model, and each layer's counts before and after it."""

    starts_BT: Bool[Tensor, "sequences tokens"]
    """True at the first token of a sequence; a packed row holds several."""
    counted_BT: Bool[Tensor, "sequences tokens"]
    """True at tokens that count: all but padding and the first of a sequence."""
    length: int = 0
    """Number of tokens in the cache after the call."""
    scale: float = 1.0
    """The factor of a target between one expert and all, see `scaled`."""
    before: dict[int, Counts] = field(default_factory=dict)
    after: dict[int, Counts] = field(default_factory=dict)

    def scaled(self, target_k: float, least: int, most: int) -> float:
        """Return the target to follow: the scaled one within its bounds; a bound stays as it is."""
        between = least < target_k < most
        return min(max(target_k * self.scale, float(least)), float(most)) if between else target_k

    @torch.no_grad()
    def thresholds(
        self,
        layer: int,
        scores_TE: Float[Tensor, "tokens experts"],
        table_E: Float[Tensor, " experts"],
        target_k: float,
    ) -> Float[Tensor, "tokens 1"]:
        """Return every token's threshold, and count the tokens.

        Args:
            layer: A number for the layer, the same in all calls.
            scores_TE: The scores of all tokens, sequence after sequence.
            table_E: The thresholds for a mean k of 1 ... E.
            target_k: The mean k that the sequence shall have.

        """
        (B, T), E = self.starts_BT.shape, len(table_E)
        # Passes of the measurement may cross by a rounding.
        table_E = table_E.cummin(0).values
        parts = scores_TE.split(CHUNK_TOKENS)
        active_TE = torch.cat([(part[:, :, None] > table_E).sum(1) for part in parts])
        active_BTE = active_TE.view(B, T, E) * self.counted_BT[..., None]
        counts_BTE = torch.cat([self.counted_BT[..., None].long(), active_BTE], dim=-1)
        before = self.before.get(layer)
        if before is None:
            carried_BE = counts_BTE.new_zeros(B, E + 1)
        else:
            carried_BE = torch.cat([before.tokens_B[:, None], before.active_BE], dim=-1)
        upto_BTE = counts_BTE.cumsum(1) + carried_BE[:, None]
        past_BTE = upto_BTE - counts_BTE
        place_T = torch.arange(T, device=scores_TE.device)
        start_BT = torch.where(self.starts_BT, place_T, -1).cummax(1).values
        at_start_BTE = past_BTE.gather(1, start_BT.clamp_min(0)[..., None].expand_as(past_BTE))
        at_start_BTE = torch.where(start_BT[..., None] < 0, 0, at_start_BTE)
        last_BE = upto_BTE[:, -1] - at_start_BTE[:, -1]
        self.after[layer] = Counts(tokens_B=last_BE[:, 0], active_BE=last_BE[:, 1:])
        own_BTE = (past_BTE - at_start_BTE).double()
        usual_E = PRIOR_TOKENS * torch.arange(1, E + 1, device=table_E.device).double()
        mean_BTE = (usual_E + own_BTE[..., 1:]) / (PRIOR_TOKENS + own_BTE[..., :1])
        return _interpolated(mean_BTE.view(-1, E), table_E.double(), target_k)[:, None].float()


def _interpolated(
    mean_TE: Float[Tensor, "tokens experts"], table_E: Float[Tensor, " experts"], target: float
) -> Float[Tensor, " tokens"]:
    """Return the threshold between the table's at which the rising means reach the target."""
    E = len(table_E)
    above_T1 = (mean_TE < target).sum(-1, keepdim=True).clamp(1, E - 1)
    low_T, high_T = (mean_TE.gather(-1, index)[:, 0] for index in (above_T1 - 1, above_T1))
    share_T = ((target - low_T) / (high_T - low_T).clamp_min(1e-12)).clamp(0, 1)
    above_T = above_T1[:, 0]
    return table_E[above_T - 1].lerp(table_E[above_T], share_T)


def sequences_of(arguments: dict[str, Any]) -> Sequences:
    """Return the sequences of a call of a decoder with these keyword arguments.

    Raises:
        UserError: The cache is not the one that the last call returned.
    """
    ids = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if ids is None else ids
    assert tokens is not None
    B, T = tokens.shape[:2]
    cache = arguments.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    known: Sequences | None = getattr(cache, ON_CACHE, None)
    if past and (known is None or known.length != past or len(known.starts_BT) != B):
        raise UserError(
            f'routing_controller: got "sequence" and a cache of {past} tokens whose counts are not'
            " those of the last call, expected a cache that this student filled and nobody cropped"
            ' or copied; use routing_controller = "none" with assisted decoding'
        )
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        mask = torch.ones(B, past + T, dtype=torch.long, device=tokens.device)
    mask = mask.to(tokens.device)
    if positions is None:
        # Padding on the left comes before the first token; a mask may leave out past tokens.
        positions = (mask.cumsum(-1) - 1)[:, -T:] + past + T - mask.shape[1]
    starts_BT = positions.expand(B, T) == 0
    real_BT = mask[:, -T:].bool()
    return Sequences(
        starts_BT=starts_BT,
        counted_BT=real_BT & ~starts_BT,
        length=past + T,
        before=known.after if past and known is not None else {},
    )


def reorder_counts(cache: object, order_B: Int[Tensor, " sequences"]) -> None:
    """Give each sequence of a cache the counts of the one whose place in the batch it names."""
    known: Sequences | None = getattr(cache, ON_CACHE, None)
    for counts in () if known is None else known.after.values():
        order = order_B.to(counts.tokens_B.device)
        counts.tokens_B, counts.active_BE = counts.tokens_B[order], counts.active_BE[order]


def follow(
    decoder: nn.Module, assign: Callable[[Sequences | None], None]
) -> tuple[RemovableHandle, ...]:
    """Hand a decoder's sequences to its routers in each call, until the handles are removed.

    Args:
        decoder: The decoder whose calls hold the sequences.
        assign: A function that gives the routers the sequences of a call, or None after it.
    """
    calls: list[Sequences] = []

    def begin(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = {**({"input_ids": args[0]} if args else {}), **kwargs}
        calls[:] = [sequences_of(found)]
        assign(calls[0])

    def end(_: object, __: object, output: object) -> None:
        assign(None)
        cache = getattr(output, "past_key_values", None)
        if cache is not None and calls:
            setattr(cache, ON_CACHE, calls.pop())

    return (
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        # An error in the call must not leave its sequences behind.
        decoder.register_forward_hook(end, always_call=True),
    )
