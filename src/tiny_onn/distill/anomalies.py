"""Anomalies of a run: updates that are not finite are skipped, and losses that jump are recorded.

A loss or gradient that is not finite leaves weights, optimizer state and routers as they were
(`step.py`). The batch is not tried again, its documents are recorded, and too many skipped updates
in a row end the run. A finite loss far above the last ones is applied like any other, and recorded
with its documents.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.runs.metrics import METRICS_NAME

# A spike lies above the median of the last WINDOW finite losses by SPIKE_MADS times their median
# absolute deviation (MAD), which counts as MIN_MAD_SHARE of the median at least. 1.5 MAD are about
# one standard deviation, so that 10 MAD are about seven.
WINDOW = 100
MIN_WINDOW = 20
SPIKE_MADS = 10.0
MIN_MAD_SHARE = 0.01


class Guard:
    """A count of skipped updates and a memory of the last losses; checkpoints hold its state.

    Attributes:
        skipped: Number of updates skipped in the run.
        skipped_in_row: Number of updates skipped since the last one that was applied.
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
        """Record the loss of an applied update.

        A spike counts among the last losses too, so that after a lasting rise the next losses are
        no spikes.

        Returns:
            The median and the limit if the loss is a spike, else None.
        """
        self.skipped_in_row = 0
        spike = None
        if len(self._losses) >= MIN_WINDOW:
            middle = median(self._losses)
            mad = median(abs(value - middle) for value in self._losses)
            limit = middle + SPIKE_MADS * max(mad, MIN_MAD_SHARE * abs(middle))
            if loss > limit:
                spike = {"median": middle, "limit": limit}
        self._losses.append(loss)
        return spike

    def error(self, step: int, measured: str, checkpoint: str | None) -> UserError:
        """Return the error that ends a run after too many skipped updates in a row.

        Args:
            step: The number of the last step.
            measured: Its loss and gradient norms, in words.
            checkpoint: The name of the newest intact checkpoint, if there is one.
        """
        remedy = (
            f"go on from {checkpoint} with --resume --set optim.expert_lr=RATE"
            " --allow-change optim.expert_lr"
            if checkpoint
            else "start a new run with another --out"
        )
        return UserError(
            f"step {step}: got {self.skipped_in_row} updates in a row that are not finite (the"
            f" last: {measured}), expected fewer than train.max_skipped_steps; lower"
            f" optim.expert_lr or optim.gate_lr, look at the documents in {METRICS_NAME} (kind"
            f" skipped), and {remedy}"
        )

    def forget(self) -> None:
        """Forget the last losses, because the next ones are of another kind."""
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return counts and losses as JSON values."""
        return {
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts and losses of a `state_dict`."""
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)


def provenance(
    rows: Sequence[PackedRow], token_losses: Sequence[Tensor]
) -> list[list[dict[str, Any]]]:
    """Return the origin of each fragment of a batch, its length, and its mean loss.

    The function waits for a GPU, and is meant for batches that are recorded.

    Args:
        rows: The batch.
        token_losses: The losses of each row's tokens, of length T; 0 at tokens without a label.

    Returns:
        A list of fragments per row: source, document, first token, number of tokens, and the mean
        loss of the tokens with a label.
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
