"""The command `predict`: classify images with an adapter file."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import CommandParser, add_common, add_import, add_model_options, import_packages, path


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    parser = CommandParser(prog=prog, description="Classify images with a trained adapter file.")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", type=path, help="images, or folders of images")
    parser.add_argument(
        "--adapter", metavar="FILE", type=path, required=True, help="adapter file, run folder or merged file"
    )
    add_model_options(parser)
    parser.add_argument("--top-k", metavar="N", type=int, default=3, help="classes per image [3]")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at a time [32]")
    parser.add_argument(
        "--on-corrupt",
        metavar="X",
        default="report",
        help="unreadable images: report (the others are classified, exit code 1), skip (exit code 0), "
        "error (stop at the first) [report]",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=path,
        action="append",
        default=[],
        help="also write .csv or .json",
    )
    add_import(parser)
    add_common(parser)
    options = parser.parse_strictly(arguments)

    from vimtune.predict import run_predict

    return run_predict(
        inputs=options.inputs,
        adapter=options.adapter,
        checkpoint=options.checkpoint,
        outputs=options.output,
        top_k=options.top_k,
        batch_size=options.batch_size,
        on_corrupt=options.on_corrupt,
        device=options.device,
        backend=options.backend,
        force=options.force,
    )
