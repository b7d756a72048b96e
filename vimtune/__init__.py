"""vimtune: transfer learning for Vision Mamba.

    import timm, vimtune
    model = timm.create_model("vim_tiny_patch16_224", num_classes=102)
    vimtune.inject(model, "lora", targets=["in_proj[x]", "out_proj"], rank=16)
    vimtune.save_adapter(model, "flowers.safetensors")

    report = vimtune.train(vimtune.Recipe(dataset="flowers", peft="prodial", lr=1e-3))

Importing the package makes `timm.create_model("vim_tiny_patch16_224", ...)` work. It imports neither
torch nor timm by itself: the models are registered with timm as soon as timm is imported, before or
after, and the names below are loaded on first use, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune._registration import register_with_timm
from vimtune.late_names import late_names

if TYPE_CHECKING:
    from vimtune.adapters import (
        AdapterFileError,
        AdapterInfo,
        AdapterSummary,
        CallRule,
        Rule,
        Site,
        WeightRule,
        combine,
        delete_adapter,
        disabled,
        forward_mixed,
        inject,
        list_adapters,
        load_adapter,
        merge,
        read_adapter_info,
        save_adapter,
        set_adapter,
        summary,
        unmerge,
        using,
    )
    from vimtune.analysis.command import analyze
    from vimtune.analysis.report import AnalysisReport
    from vimtune.commands.combine import combine_files
    from vimtune.commands.evaluate import evaluate
    from vimtune.commands.export import export_to_file
    from vimtune.commands.merge import merge_to_file
    from vimtune.commands.predict import load_predictor
    from vimtune.commands.scored import Scored
    from vimtune.data import ImageDataset, create_dataset, list_datasets, register_dataset
    from vimtune.exchange.hub import convert, pull, push
    from vimtune.exchange.peft.files import load_peft, save_peft
    from vimtune.fields import option
    from vimtune.loggers import Logger, register_logger
    from vimtune.methods import Method, list_methods, register_method
    from vimtune.models import list_models, load_checkpoint, register_model
    from vimtune.pages.photos import draw_dataset, draw_images
    from vimtune.recipe import Recipe, RecipeError, load_recipe
    from vimtune.tasks import Predictor, Task, register_task
    from vimtune.training import Callback, Report, train

__version__ = "0.2.0"

_HOMES = {
    "vimtune.adapters": (
        "AdapterFileError", "AdapterInfo", "AdapterSummary", "CallRule", "Rule", "Site", "WeightRule",
        "combine", "delete_adapter", "disabled", "forward_mixed", "inject", "list_adapters", "load_adapter",
        "merge", "read_adapter_info", "save_adapter", "set_adapter", "summary", "unmerge", "using",
    ),
    "vimtune.data": ("ImageDataset", "create_dataset", "list_datasets", "register_dataset"),
    "vimtune.analysis.command": ("analyze",),
    "vimtune.analysis.report": ("AnalysisReport",),
    "vimtune.commands.combine": ("combine_files",),
    "vimtune.commands.evaluate": ("evaluate",),
    "vimtune.exchange.hub": ("convert", "pull", "push"),
    "vimtune.exchange.peft.files": ("load_peft", "save_peft"),
    "vimtune.commands.export": ("export_to_file",),
    "vimtune.fields": ("option",),
    "vimtune.loggers": ("Logger", "register_logger"),
    "vimtune.commands.merge": ("merge_to_file",),
    "vimtune.methods": ("Method", "list_methods", "register_method"),
    "vimtune.models": ("list_models", "load_checkpoint", "register_model"),
    "vimtune.pages.photos": ("draw_dataset", "draw_images"),
    "vimtune.commands.predict": ("load_predictor",),
    "vimtune.recipe": ("Recipe", "RecipeError", "load_recipe"),
    "vimtune.commands.scored": ("Scored",),
    "vimtune.tasks": ("Predictor", "Task", "register_task"),
    "vimtune.training": ("Callback", "Report", "train"),
}  # fmt: skip
"""Modules that define the names of this package."""

__all__ = [
    "AdapterFileError",
    "AdapterInfo",
    "AdapterSummary",
    "AnalysisReport",
    "CallRule",
    "Callback",
    "ImageDataset",
    "Logger",
    "Method",
    "Predictor",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "Scored",
    "Site",
    "Task",
    "WeightRule",
    "analyze",
    "combine",
    "combine_files",
    "convert",
    "create_dataset",
    "delete_adapter",
    "disabled",
    "draw_dataset",
    "draw_images",
    "evaluate",
    "export_to_file",
    "forward_mixed",
    "inject",
    "list_adapters",
    "list_datasets",
    "list_methods",
    "list_models",
    "load_adapter",
    "load_checkpoint",
    "load_peft",
    "load_predictor",
    "load_recipe",
    "merge",
    "merge_to_file",
    "option",
    "pull",
    "push",
    "read_adapter_info",
    "register_dataset",
    "register_logger",
    "register_method",
    "register_model",
    "register_task",
    "save_adapter",
    "save_peft",
    "set_adapter",
    "summary",
    "train",
    "unmerge",
    "using",
]

__getattr__, __dir__ = late_names(__name__, _HOMES)

register_with_timm()
