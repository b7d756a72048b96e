"""The command `export`: a model for onnxruntime and other programs."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.cli.parser import CommandParser, add_common, add_import, import_packages, path

EXAMPLES = """\
examples:
  {prog} runs/my-run -o flowers.onnx
  {prog} merged.safetensors -o flowers.pt2
  {prog} vim_t_midclstok_76p1acc.pth --model vim_tiny_patch16_224 -o vim.onnx"""
"""What stands below the options in the help; `{prog}` is the command."""


def build_parser(prog: str) -> CommandParser:
    """The parser of the command, which users type as `prog`."""
    parser = CommandParser(
        prog=prog,
        description="Write a model of images for programs that do without vimtune, merged, with class names "
        "and\npreprocessing inside. The file is run and compared with the model before it is kept.",
        epilog=EXAMPLES.format(prog=prog),
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=path,
        help="run folder, adapter file, merged file or plain checkpoint",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        type=path,
        required=True,
        help="what is written: .onnx (for onnxruntime and others), .pt2 (torch.export)",
    )
    parser.add_argument("--model", metavar="X", help="the model of a plain checkpoint")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=path,
        help="base weights of an adapter; default: those it was trained on",
    )
    parser.add_argument(
        "--force", action="store_true", help="use the adapter although its base weights are others"
    )
    add_import(parser)
    add_common(parser)
    return parser


def run(prog: str, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    import_packages(prog, arguments)
    options = build_parser(prog).parse_strictly(arguments)

    from vimtune.commands.export import run_export

    return run_export(**options)
