"""Benchmarks over endpoints: ``rayswift eval``.

In: arguments with benchmarks and models, checkpoints, adapters or an endpoint. Out: a run folder with every question's
answer, scores as a table, as JSON and as a page, and a line in ``eval_result.jsonl``.

- ``evaluate``: the flow. ``contenders`` says what is served and asked, ``run_folder`` which run goes on.
- ``benchmarks`` (names, ``benchmarks.json``), ``local_data`` and ``question_sets``: what is asked, from which files.
- backends (``backends`` chooses): ``native`` (EvalScope), ``harness`` (lm-evaluation-harness), ``toolkits``
  (OpenCompass and VLMEvalKit through EvalScope). Prompts and scorers are theirs.
- ``results`` and ``report``: what came out, and how it is shown.
"""
