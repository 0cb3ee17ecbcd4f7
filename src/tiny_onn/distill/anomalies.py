"""What a run does about updates that are not finite and losses that jump: skip, count, tell where.

A loss or gradient that is not finite leaves weights, optimizer state and controllers as they were
(`step.py`); the batch is spent, its documents are recorded, and too many in a row end the run. A
finite loss far above the last ones is applied like any other, and recorded with its documents.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.runs.metrics import METRICS_NAME

# A spike lies above the median of the last `WINDOW` finite losses by `SPIKE_MADS` of their median
# absolute deviations, which is taken to be 1 % of the median or more. 1.5 MAD are about one
# standard deviation, so that ten are seven.
WINDOW = 100
MIN_WINDOW = 20
SPIKE_MADS = 10.0
MIN_MAD_SHARE = 0.01


class Guard:
    """Counts what was skipped and remembers the last losses; its state belongs to a checkpoint.

    Attributes:
        skipped: updates skipped in the run.
        skipped_in_row: updates skipped since the last one that was done.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.skipped_in_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def skip(self) -> None:
        """Count a skipped update."""
        self.skipped += 1
        self.skipped_in_row += 1

    def spike(self, loss: float) -> dict[str, float] | None:
        """Take note of a finite update's loss; the median and the limit if it is a spike.

        A spike is among the losses that the next ones are held against, so that a lasting rise
        stops being one.
        """
        self.skipped_in_row = 0
        found = None
        if len(self._losses) >= MIN_WINDOW:
            middle = median(self._losses)
            mad = median(abs(value - middle) for value in self._losses)
            limit = middle + SPIKE_MADS * max(mad, MIN_MAD_SHARE * abs(middle))
            if loss > limit:
                found = {"median": middle, "limit": limit}
        self._losses.append(loss)
        return found

    def refusal(self, step: int, numbers: str, checkpoint: str | None) -> UserError:
        """What to say when too many updates in a row were skipped.

        Args:
            step: the last one.
            numbers: what it measured.
            checkpoint: name of the newest whole one, if there is one.
        """
        remedy = (
            f"go on from {checkpoint} with --resume --set optim.expert_lr=RATE"
            " --allow-change optim.expert_lr"
            if checkpoint
            else "start a new run with another --out"
        )
        return UserError(
            f"step {step}: got {self.skipped_in_row} updates in a row that are not finite (the"
            f" last: {numbers}), expected fewer than train.max_skipped_steps; lower"
            f" optim.expert_lr or optim.gate_lr, look at the documents in {METRICS_NAME} (kind"
            f" skipped), and {remedy}"
        )

    def forget(self) -> None:
        """Hold the next losses against none of the last ones: they are of another loss."""
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Counts and losses, as JSON values."""
        return {
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)


def provenance(
    rows: Sequence[PackedRow], token_losses: Sequence[Tensor]
) -> list[list[dict[str, Any]]]:
    """Per row and fragment: source, document, first token, tokens, and mean loss of the labelled.

    Reads from a GPU, so only for batches that are recorded.

    Args:
        rows: the batch.
        token_losses: per row its tokens' losses, each of length T; 0 where there is no label.
    """
    batch = []
    for row, losses_T in zip(rows, token_losses, strict=True):
        bounds, losses = row.cu_seqlens.tolist(), losses_T.float().cpu()
        fragments = []
        for origin, start, end in zip(row.origins, bounds, bounds[1:], strict=False):
            labelled = max(1, int(row.loss_mask[0, start:end].sum()))
            fragments.append(
                {
                    **origin._asdict(),
                    "tokens": end - start,
                    "loss": float(losses[start:end].sum()) / labelled,
                }
            )
        batch.append(fragments)
    return batch
