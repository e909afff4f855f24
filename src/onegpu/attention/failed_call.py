"""Which arguments a failed `scaled_dot_product_attention` had, read off the traceback.

The function is not Python's, so the innermost frame is its caller: the call stands on the line where it failed, and
its arguments are the caller's variables. Nothing costs anything before it fails.
"""

from __future__ import annotations

import ast
import builtins
import linecache
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["failed_call"]

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# To evaluate one of these again could change something.
ACTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda, ast.comprehension, ast.JoinedStr)


class NotReadableError(Exception):
    """An expression that can't be evaluated again, or not without acting."""


def failed_call(traceback: TracebackType | None) -> dict[str, Any] | None:
    """The arguments by name, those that were given; None where they can't be read."""
    if traceback is None:
        return None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame, line = traceback.tb_frame, traceback.tb_lineno
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_attention(node, line, frame)]
    if len(calls) != 1:
        return None
    try:
        arguments = dict(zip(PARAMETERS, (evaluate(argument, frame) for argument in calls[0].args), strict=False))
        for keyword in calls[0].keywords:
            value = evaluate(keyword.value, frame)
            arguments.update(value if keyword.arg is None else {keyword.arg: value})
    except NotReadableError:
        return None
    return arguments if all(isinstance(arguments.get(name), Tensor) for name in PARAMETERS[:3]) else None


def is_attention(node: ast.Call, line: int, frame: FrameType) -> bool:
    """Whether a call on this line is one of torch's function, under whatever name."""
    if not node.lineno <= line <= (node.end_lineno or node.lineno):
        return False
    try:
        return evaluate(node.func, frame) is scaled_dot_product_attention
    except NotReadableError:
        return False


def evaluate(node: ast.expr, frame: FrameType) -> Any:
    """The value of an expression of names, attributes, items and operators.

    Raises:
        NotReadableError: it calls something, or has no value any more.
    """
    if any(isinstance(part, (*ACTS, ast.Starred)) for part in ast.walk(node)):
        raise NotReadableError
    scope = {**vars(builtins), **frame.f_globals, **frame.f_locals}
    try:
        return eval(compile(ast.Expression(node), "<argument>", "eval"), {"__builtins__": {}}, scope)
    except Exception as error:
        raise NotReadableError from error
