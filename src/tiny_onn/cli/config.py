"""The verb `config`."""

from dataclasses import dataclass

from tiny_onn.cli.arguments import Overrides, Preset, RunToml


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print every setting with its meaning, as a TOML file that `distill` reads.

    Example: tiny-onn config --preset model-card > RUN.toml
    """

    run: RunToml = None
    """Settings to complete and check."""
    preset: Preset = None
    """Settings to start from; with RUN.toml, the file's win."""
    overrides: Overrides = ()
    """One setting, over preset and file."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config
        from tiny_onn.config.template import config_template

        print(config_template(load_config(self.run, self.preset, self.overrides)), end="")
