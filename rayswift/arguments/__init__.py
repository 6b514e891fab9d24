"""The settings of every command: declared once, parsed, checked, saved, read back.

In: a command line, a YAML or JSON file, Python keywords. Out: one arguments object per command (`SftArguments`, ...)
with SWIFT's flag names as attributes, or a `UserError` with one line per problem. One class per topic in `groups`,
`training`, `rlhf` and `serving`; `commands` puts them together. Imports no torch, ray, transformers or numpy.
"""

from rayswift.arguments.base import Arguments, deciding_settings, read_saved_arguments
from rayswift.arguments.commands import (
    COMMANDS,
    AppArguments,
    DeployArguments,
    EvalArguments,
    ExportArguments,
    InferArguments,
    PretrainArguments,
    PreviewArguments,
    RlhfArguments,
    SampleArguments,
    SftArguments,
)
from rayswift.arguments.help import format_help
from rayswift.arguments.parsing import make_arguments, parse_arguments, take_over
from rayswift.redaction import redact, redact_argv, redact_text

__all__ = [
    "COMMANDS",
    "AppArguments",
    "Arguments",
    "DeployArguments",
    "EvalArguments",
    "ExportArguments",
    "InferArguments",
    "PretrainArguments",
    "PreviewArguments",
    "RlhfArguments",
    "SampleArguments",
    "SftArguments",
    "deciding_settings",
    "format_help",
    "make_arguments",
    "parse_arguments",
    "read_saved_arguments",
    "redact",
    "redact_argv",
    "redact_text",
    "take_over",
]
