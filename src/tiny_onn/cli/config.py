"""The verb `config`."""

from dataclasses import dataclass

from tiny_onn.cli.arguments import Overrides, Preset, RunToml


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print all settings with their meanings, as a TOML file that `distill` can read.

    Example: tiny-onn config --preset model-card > RUN.toml
    """

    run: RunToml = None
    preset: Preset = None
    overrides: Overrides = ()

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config
        from tiny_onn.config.template import config_template

        print(config_template(load_config(self.run, self.preset, self.overrides)), end="")
