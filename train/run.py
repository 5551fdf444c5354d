"""The one entry of training, for all stages:

    deepspeed train/run.py RECIPE [key=value ...]        one node, one process per GPU (or --num_gpus 2 on
                                                         CPU)
    torchrun --nproc-per-node 8 train/run.py RECIPE      the same by torchrun
    srun python train/run.py RECIPE                      one task per GPU, any number of nodes (slurm/)
    python -m train.run RECIPE                           one process

Exit codes: 0 done, 1 failure, 2 wrong recipe or input (starting again does not help), 85 stopped early and
saved (start again), 98 MASTER_PORT is taken.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# `python train/run.py` puts train/ first on the path, where `import data` or `import config` would find our
# modules.
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "train")]

from core.command_line import CommandParser  # noqa: E402
from core.distributed import (  # noqa: E402
    PortTaken,
    check_master_port,
    connect,
    disconnect,
    fill_environment,
    hard_exit,
    lost_contact,
)
from recipe.config import RecipeError, load_recipe  # noqa: E402
from train.preemption import FAILED, PORT_TAKEN, WRONG_INPUT  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        "train/run.py", "Train one stage of Soundwave.", example="train/recipes/stage1.yaml optim.steps=100"
    )
    parser.add_argument("recipe", help="YAML file, e.g. train/recipes/stage1.yaml")
    # With a default it is not listed as required.
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. optim.steps=100")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would happen; needs no weights and no data, and "
        "only the config.json of models that are not in model/presets/",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry-run: plan for N GPUs")
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: their kind, e.g. a100-80, h100, rtx4090, mi300x"
    )
    parser.add_argument(
        "--data-hours",
        type=float,
        metavar="H",
        help="with --dry-run: hours of data that is not packed yet, for the number of epochs",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and end")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="record N steps with torch.profiler into <output>/<stage>/profile/, then continue",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # given by the deepspeed launcher
    return parser.parse_intermixed_args(argv)


def is_main() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if not args.dry_run and (args.gpus is not None or args.gpu or args.data_hours is not None):
            raise RecipeError("--gpus, --gpu and --data-hours plan a run: add --dry-run")
        recipe = load_recipe(args.recipe, args.overrides)
        if args.print_config:
            from omegaconf import OmegaConf

            if is_main():
                print(OmegaConf.to_yaml(OmegaConf.structured(recipe)), end="")
            return 0
        fill_environment()
        if args.dry_run:
            from train.dry_run import dry_run
            from train.planner import check_options

            check_options(args.gpus, args.gpu, args.data_hours)
            return dry_run(recipe, args.gpus, args.gpu, args.data_hours) if is_main() else 0
        check_master_port()
        from recipe.stages import has_model, initial_folder, stage_folder
        from stream.epochs import resolve_steps
        from train.checks import check
        from train.telemetry import start_logging, stop_logging

        check(recipe)
        resolve_steps(recipe)
        if not has_model(recipe):  # else it may be finished, and then it needs no start
            initial_folder(recipe)
    except (RecipeError, PortTaken) as error:
        if is_main():
            print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, RecipeError) else PORT_TAKEN
    from data_tools.shards import ShardError
    from model.artifact import FolderError
    from model.config import OptionError
    from model.pretrained import SourceError
    from train.checkpoint.errors import CheckpointError
    from train.checkpoint.universal import ConversionError
    from train.outcome import RunStatus
    from train.stage_run import run_stage

    try:
        ranks = connect(recipe.health.timeout_minutes)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        print(
            f"error: port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is taken by another "
            f"program: set another "
            "MASTER_PORT",
            file=sys.stderr,
        )
        return PORT_TAKEN
    start_logging(stage_folder(recipe), ranks)
    logger = logging.getLogger("soundwave")
    status = RunStatus(recipe, ranks)
    try:
        code = run_stage(recipe, ranks, status, profile_steps=args.profile)
    except Exception as error:
        wrong_input = isinstance(error, (RecipeError, SourceError, FolderError, OptionError, ShardError))
        code = WRONG_INPUT if wrong_input else FAILED
        lost = lost_contact(error, recipe.health.timeout_minutes)
        if lost:
            logger.error("rank %d: %s (%s)", ranks.rank, lost, str(error).splitlines()[0])
        elif wrong_input or isinstance(error, (CheckpointError, ConversionError)):
            logger.error("%s", error)
        else:
            logger.exception("rank %d failed", ranks.rank)
        status.write("failed", reason=lost or str(error) or type(error).__name__, exit_code=code)
        stop_logging()
        hard_exit(code)  # at once: the other ranks may wait in a collective and would not answer a farewell
    disconnect()
    stop_logging()
    return code


if __name__ == "__main__":
    hard_exit(main())
