"""The config's keys as the command line tells them."""

import ast
import inspect
import itertools

import kdlib.config


def told():
    """Every config key with its default and what it means, from `Config` itself."""
    body = ast.parse(inspect.getsource(kdlib.config.Config)).body[0].body
    meanings = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            meanings[field.target.id] = " ".join(text.value.value.split())
    presets = (
        f"  --preset NAME\n      Several values under one name ({', '.join(kdlib.config.PRESETS)}); keys beside it win."
    )
    return "\n".join(
        [presets, *(f"  --{name} {field.default!r}\n      {meanings[name]}" for name, field in kdlib.config.flags())]
    )
