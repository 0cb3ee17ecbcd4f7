"""The verb `demo`."""

from dataclasses import dataclass

from tiny_onn.cli.arguments import Out, Overrides, default_out, starting


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Convert the embedded teacher, distill it on embedded text and compare with two controls.

    Example: tiny-onn demo
    """

    out: Out = None
    """Run folder."""
    overrides: Overrides = ()
    """One setting, over the preset demo."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config

        # A mistake in the settings is told before torch is imported.
        load_config(None, "demo", self.overrides)
        with starting():
            from tiny_onn.studies.demo import run_demo

        run_demo(default_out("demo") if self.out is None else self.out, self.overrides)
