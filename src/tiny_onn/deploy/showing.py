"""Answers on a terminal: tokens coloured by their number of active experts, columns, speeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tiny_onn.console import say
from tiny_onn.deploy.answers import Answer, Speaker, Token

# Backgrounds from few experts to many: blue, pale, orange, which colour-blind readers tell apart.
STYLES = (
    "black on #5e9bd6",
    "black on #a8cbee",
    "black on #e8e8e8",
    "black on #f5c08a",
    "black on #e8892b",
)
# Bounds between the colours, as shares of the number of experts that the student takes on average.
BOUNDS = (0.85, 0.95, 1.05, 1.15)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingColours:
    """The way to show a token's number of active experts: by colour, or in brackets after it."""

    target_k: float
    """Number of experts to which the colours relate: the student's budget, or half of the experts
    if it has none."""
    coloured: bool
    """False where there is no terminal or no colour: the number then stands in brackets."""

    @classmethod
    def of(cls, speaker: Speaker, console: Console) -> "RoutingColours":
        """Return the way that suits the student and the console."""
        router = speaker.banks()[0].router
        free = router.rule.selection == "top_any"
        shows_colour = console.is_terminal and console.color_system is not None
        return cls(
            target_k=len(router.weight) / 2 if free else router.rule.target_k,
            coloured=shows_colour and not console.no_color,
        )

    def style(self, num_experts: float) -> Style:
        """Return the colour of a number of experts."""
        share = num_experts / self.target_k
        return Style.parse(STYLES[sum(share >= bound for bound in BOUNDS)])

    def text(self, token: Token) -> Text:
        """Return a token's text with its number of experts."""
        shown = _harmless(token.text)
        if token.num_experts is None or not shown:
            return Text(shown)
        if self.coloured:
            return Text(shown, style=self.style(token.num_experts))
        # A number after a line break would begin the next line.
        stem = shown.rstrip("\n")
        return Text(f"{stem}[{token.num_experts:.1f}]{shown[len(stem) :]}")

    def explain(self, console: Console) -> None:
        """Print what the colours mean, or on standard error what the numbers mean."""
        if not self.coloured:
            say("[k] after a token: its number of active experts, as a mean over the layers")
            return
        bounds = [f"{share * self.target_k:.1f}" for share in BOUNDS]
        ranges = [f" < {bounds[0]} ", *(f" {low}- " for low in bounds)]
        legend = Text("active experts, mean over the layers: ")
        for words, style in zip(ranges, STYLES, strict=True):
            legend.append(words, style=style)
        console.print(legend)


def print_token(console: Console, token: Token, colours: RoutingColours | None) -> None:
    """Print a token at once, without a line break after it."""
    text = Text(_harmless(token.text)) if colours is None else colours.text(token)
    if text:
        console.print(text, end="")
        console.file.flush()


def columns(
    names: Sequence[str], tokens: Sequence[Sequence[Token]], colours: RoutingColours | None
) -> Table:
    """Return a table with a column for the tokens of each model.

    Args:
        names: the models' names.
        tokens: the tokens that each of them wrote.
        colours: the way to show numbers of experts; None: they are not shown.
    """
    table = Table(expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    cells = [
        Text().join(Text(_harmless(t.text)) if colours is None else colours.text(t) for t in some)
        for some in tokens
    ]
    table.add_row(*cells)
    return table


def summary_line(answer: Answer) -> str:
    """Return a line on the length, the speed and the experts of an answer."""
    written = len(answer.written)
    parts = [f"{written} token{'' if written == 1 else 's'}"]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    parts.append(f"the first after {answer.first_token_s:.2f} s")
    if answer.mean_k is not None:
        parts.append(f"{answer.mean_k:.1f} experts per token")
    if answer.finish == "length":
        parts.append("cut at the maximum length")
    return ", ".join(parts)


def _harmless(text: str) -> str:
    """Return the text without the control characters that a terminal would obey."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
