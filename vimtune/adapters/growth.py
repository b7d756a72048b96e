"""Rules that let parameters grow: whether a model can compute with what they make."""

from __future__ import annotations

from torch import nn

from vimtune.adapters.composition import single_rules
from vimtune.adapters.declarations import declaration_of
from vimtune.adapters.slots import (
    base_value,
    iter_slots,
    iter_weight_slots,
    join,
    own_modules,
    point_path,
)


def check_growth(model: nn.Module) -> None:
    """Refuse rules in force that give parameters sizes which do not fit together.

    Modules are looked at that name rows of their parameters, which follow from the sizes of other ones, and
    those whose sizes are fixed. Others say too little about themselves. Rules may say it of themselves
    (`Rule.outgrown`).

    Raises:
        ValueError: naming the parameter and the reason.
    """
    for path, module in own_modules(model):
        declared = declaration_of(module)
        rows_by_name = declared.rows(module)
        if not (declared.has_fixed_sizes or rows_by_name):
            continue
        shapes = {
            name: (tuple(base_value(owner, leaf).shape), tuple(slot.evaluated(base_value(owner, leaf)).shape))
            for name, owner, leaf, slot in iter_weight_slots(module)
            if slot.rule is not None
        }
        grown = [name for name, (before, after) in shapes.items() if before != after]
        if not grown:
            continue
        kind = type(module).__name__
        if declared.has_fixed_sizes:
            before, after = shapes[grown[0]]
            raise ValueError(
                f"{join(path, grown[0])} would grow from shape {before} to {after}, but the sizes of {kind} "
                "are fixed by its configuration: no rule may change them"
            )
        plain = dict(module.named_parameters(remove_duplicate=False))
        for name, rows in rows_by_name.items():
            if name not in plain:  # A layer may do without its bias.
                continue
            found = shapes[name][1][0] if name in shapes else plain[name].shape[0]
            expected = max(own.stop for own in rows.values())
            if found != expected:
                raise ValueError(
                    f"{join(path, name)} would have {found} rows, but [{'|'.join(rows)}] are {expected} with "
                    f"the other parameters of {kind} as they would be: parameters and rows that share a size "
                    "have to grow together"
                )
    for place, _, name, slot in iter_slots(model):
        for rule in () if slot.rule is None else single_rules(slot.rule):
            if (reason := rule.outgrown()) is not None:
                raise ValueError(
                    f"the {type(rule).__name__} at {point_path(place, name)} does not fit: {reason}"
                )
