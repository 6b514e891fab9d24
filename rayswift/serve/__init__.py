"""Generation: engines, and the commands that use them.

In: arguments with a model or a checkpoint folder. Out: answers, in a terminal or a result file.
``infer`` is the command, ``chat`` its conversation in the terminal, ``transformers_engine`` the engine that runs in
this process (SWIFT's ``pt`` backend).
"""
