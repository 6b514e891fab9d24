"""What scores answers: EvalScope, lm-eval, OpenCompass and VLMEvalKit behind one protocol."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from rayswift.errors import UserError

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments
    from rayswift.eval.backends.base import Backend


def choose_backend(args: EvalArguments) -> Backend:
    """The backend of ``--eval_backend``. Raises UserError when its library is not installed."""
    kind = args.eval_backend
    library = {"Native": "evalscope", "lm-eval": "lm_eval"}.get(kind)
    if library and importlib.util.find_spec(library) is None:
        name = library.replace("_", "-")
        raise UserError(f"--eval_backend {kind} needs the library {name}: install the extra `eval` in an environment "
                        "of its own: make install SET=eval VENV=.venv-eval")  # fmt: skip
    if kind == "lm-eval":
        from rayswift.eval.backends.lm_eval import Harness

        return Harness(args)
    if kind == "Native":
        from rayswift.eval.backends.evalscope import Native

        return Native(args)
    from rayswift.eval.backends.opencompass_vlmeval import Toolkit

    return Toolkit(args)
