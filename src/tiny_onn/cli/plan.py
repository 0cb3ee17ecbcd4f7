"""The verb `plan`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from tiny_onn.cli.arguments import Json, Overrides, Preset, RunToml, require_place, starting


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Calculate the parameters, FLOPs, memory and time of a run before it starts.

    Example: tiny-onn plan --preset model-card --device "RTX 3060"

    The time is that of the training steps: conversion and evaluations are not in it. The setting
    teacher.path names the teacher. Only the config.json of a hub id is downloaded; the
    sizes of Qwen3-0.6B, 1.7B and 8B, SmolLM2-135M and Llama-3.2-1B come with the package.
    """

    run: RunToml = None
    preset: Preset = None
    overrides: Overrides = ()
    device: Annotated[
        str,
        arg(
            metavar="NAME",
            help="Device of the run: auto (this machine's), cpu, RTX 3060, RTX 4060 Ti, RTX 4090,"
            " RTX 5090, A100, H100, H200, or the numbers MEMORY_GIB,TFLOPS,GB_PER_S of another"
            " GPU.",
        ),
    ] = "auto"
    tokens: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: train.tokens)")
    ] = None
    """Number of training tokens to calculate the time for."""
    efficiency: Annotated[
        float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.3)")
    ] = None
    """Share of the device's peak rate that a step reaches."""
    document_tokens: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="Length of the text's documents in tokens; attention takes longer in longer ones."
            " If lengths differ, give the mean over tokens, in which longer documents count more.",
            help_behavior_hint="(default: 2048)",
        ),
    ] = None
    gpus: Annotated[int, arg(metavar="INT")] = 1
    """Number of GPUs that divide the rows of a step."""
    gpus_per_node: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 8)")] = (
        None
    )
    """Number of GPUs of a node."""
    network_gbps: Annotated[
        float | None, arg(metavar="GBIT_PER_S", help_behavior_hint="(default: 3200)")
    ] = None
    """Rate of a node's network in one direction, in Gbit/s."""
    shard: Annotated[
        Literal["none", "optimizer", "full"] | None,
        arg(metavar="none|optimizer|full", help_behavior_hint="(default: train.shard)"),
    ] = None
    """Division of memory between GPUs, in the place of train.shard."""
    html: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: no page)")] = (
        None
    )
    """File for a page with the plan's memory and time in pictures."""
    json: Json = False

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config

        given = {"train.tokens": self.tokens, "train.shard": self.shard}
        own = (f"{name}={value}" for name, value in given.items() if value is not None)
        config = load_config(self.run, self.preset, (*self.overrides, *own))
        from tiny_onn.planning.device_names import check_device_name

        check_device_name(self.device)
        if self.html is not None:
            require_place(self.html.parent, "--html")
        from rich.console import Console

        with starting():
            from tiny_onn.planning.cluster import GPUS_PER_NODE, NETWORK_GBPS, Cluster
            from tiny_onn.planning.plan import DOCUMENT_TOKENS, EFFICIENCY, plan
            from tiny_onn.planning.render import render

        planned = plan(
            config,
            config.teacher.path,
            self.device,
            efficiency=EFFICIENCY if self.efficiency is None else self.efficiency,
            document_tokens=(
                DOCUMENT_TOKENS if self.document_tokens is None else self.document_tokens
            ),
            cluster=Cluster(
                gpus=self.gpus,
                gpus_per_node=(GPUS_PER_NODE if self.gpus_per_node is None else self.gpus_per_node),
                network_gbps=NETWORK_GBPS if self.network_gbps is None else self.network_gbps,
                shard=config.train.shard,
            ),
        )
        if self.html is not None:
            from tiny_onn.planning.pictures import write_plan_page

            write_plan_page(planned, self.html)
        if self.json:
            print(json.dumps(planned.as_dict(), indent=2))
        else:
            Console().print(render(planned))
