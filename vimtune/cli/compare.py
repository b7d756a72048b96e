"""The command `compare`: methods by data sets by seeds, or tables of runs that are finished."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import (
    CommandParser,
    add_common,
    add_import,
    add_output_dir,
    build_key_parser,
    import_packages,
    path,
)
from vimtune.cli.train import add_recipe_flags, recipe_groups
from vimtune.compare.plan import PlanError, load_plan
from vimtune.compare.plan_keys import RESERVED, PlanOptions
from vimtune.fields import options_of

DESCRIPTION = """\
Train several methods on several data sets with several seeds, and put the results side by side. The learning
rate of each method is chosen on the validation split. What is finished is not repeated when the command is
given again. With run folders, nothing is trained: tables of their reports are made."""
"""What `--help` says above the options."""

EXAMPLES = """\
examples:
  {prog} --methods lora,prodial,full --data flowers,cars --seeds 0,1,2 --lrs 3e-4,1e-3,3e-3
  {prog} --methods lora,full --shots 16 --seeds 0,1 --data-seeds 0,1,2
  {prog} --methods lora,dora --budget 300k --jobs 4 --devices cuda:0,cuda:1 -o runs/equal
  {prog} --methods '{{lora: {{rank: 8}}, full: {{lrs: [1e-4, 3e-4]}}}}' --epochs 20
  {prog} --config my-plan.yaml
  {prog} --resume runs/equal
  {prog} runs/*"""
"""What `--help` says below the options; `{prog}` is the command."""


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser, general = build_key_parser(
        prog,
        usage=f"{prog} [RUN ...] [--config FILE] [--methods ...] [--data ...] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    general.add_argument("runs", metavar="RUN", type=path, nargs="*", help="folders of finished runs")
    general.add_argument("--config", metavar="FILE", help="plan in YAML: the keys below; a flag wins over it")
    add_output_dir(general, "folder of the comparison (default: in runs/)")
    general.add_argument(
        "--resume", metavar="DIR", type=path, help="go on with the comparison in this folder"
    )
    add_import(general)
    add_common(general)
    reserved = {"peft": "the key methods", **RESERVED}
    add_recipe_flags(
        parser,
        {"comparison": options_of(PlanOptions), **recipe_groups()},
        {name: f"set by {owner}" for name, owner in reserved.items()},
    )
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    given, unknown = build_parser(prog).parse_leniently(arguments)
    own = {name: given.pop(name, None) for name in ("runs", "config", "output_dir", "resume")}

    # The value of an unknown flag is taken for a run.
    if own["resume"] is None and (not own["runs"] or (unknown and given)):
        try:  # A mistake is answered at once, before torch is imported.
            load_plan(own["config"], given)
        except PlanError as error:
            raise PlanError([*unknown, *error.problems]) from error
    if unknown:
        raise PlanError(unknown)
    from vimtune.compare.command import run_compare

    return run_compare(
        runs=own["runs"] or [],
        values=given,
        config=own["config"],
        output_dir=own["output_dir"],
        resume=own["resume"],
    )
