"""The verb `cache`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from tyro.conf import arg

from tiny_onn.cli.arguments import Overrides, Preset, RunToml, starting
from tiny_onn.config.schema import StatesFormat

FORMATS: tuple[StatesFormat, ...] = get_args(StatesFormat)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Store the teacher's last hidden states on a run's training text, for many students.

    Example: tiny-onn cache RUN.toml --out caches/mine

    Runs with the same text and teacher read them with --set teacher.cache=caches/mine, and their
    training steps then need no forward pass of the teacher. A cache that was interrupted goes on at
    its first missing shard when the same command runs again.
    """

    run: RunToml = None
    preset: Preset = None
    overrides: Overrides = ()
    out: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Folder of the cache.",
            help_behavior_hint="(default: the setting teacher.cache)",
        ),
    ] = None
    format: Annotated[
        str,
        arg(
            metavar="|".join(FORMATS),
            help="Number format of the stored states: bfloat16 (exact for a teacher in bfloat16),"
            " int8 (half the size, with a scale for every 32 numbers) or float32.",
        ),
    ] = "bfloat16"

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_cacheable
        from tiny_onn.config.read import load_config
        from tiny_onn.errors import UserError, printable

        if self.format not in FORMATS:
            raise UserError(
                f"--format: got {printable(self.format)}, expected one of {', '.join(FORMATS)};"
                " choose one"
            )
        if self.run is None and self.preset is None:
            raise UserError(
                "cache: got neither RUN.toml nor --preset, expected one; try --preset demo, or"
                " write a file with `tiny-onn config > RUN.toml`"
            )
        config = load_config(self.run, self.preset, self.overrides)
        out = self.out
        if out is None:
            if config.teacher.cache == "none":
                raise UserError(
                    "--out: got none, expected the folder of the cache; name it with --out FOLDER"
                    " or by the setting teacher.cache"
                )
            out = Path(config.teacher.cache)
        check_cacheable(config)
        with starting():
            from tiny_onn.distill.cache_writer import write_cache

        manifest = write_cache(config, out=out, states_format=self.format)
        tokens = manifest.rows_written * manifest.row_tokens
        print(f"{out}: {tokens:,} tokens; read them with --set teacher.cache={out}")
