"""The page of a plan: memory and time by part, in the style of the report."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tiny_onn.report.page import FOLDER, environment, library, script_json
from tiny_onn.report.stacks import Stacks
from tiny_onn.report.theme import THEMES, vega_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A section of the page.

    Attributes:
        key: the name of the section, and of its chart.
        heading: the question that it answers.
        answer: the answer in a sentence.
        stacks: the bars.
        caption: the text on how to read them.
    """

    key: str
    heading: str
    answer: str
    stacks: Stacks
    caption: str


def plan_page(title: str, sections: Sequence[Section]) -> str:
    """Return a self-contained page as HTML.

    Args:
        title: the title.
        sections: the sections in order.
    """
    return (
        environment()
        .get_template("plan.html")
        .render(
            title=title,
            sections=sections,
            style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
            script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
            library=Markup(library()),
            data=script_json(
                {
                    "charts": {section.key: section.stacks.spec() for section in sections},
                    "passages": {},
                    "themes": {theme: vega_config(theme) for theme in THEMES},
                }
            ),
        )
    )
