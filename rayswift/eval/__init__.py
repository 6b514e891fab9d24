"""Benchmarks over endpoints: ``rayswift eval``.

In: arguments with benchmarks and models, checkpoints, adapters or an endpoint. Out: a run folder with every question's
answer, scores as a table, as JSON and as a page, and a line in ``eval_result.jsonl``.

- ``evaluate``: the flow. ``models`` says what is served and asked, ``rayswift.journal`` which run goes on.
- ``benchmarks`` (names, ``benchmarks.json``), ``local_data`` and ``question_sets``: what is asked, from which files.
- ``backends`` (``choose_backend``): ``evalscope``, ``lm_eval`` (lm-evaluation-harness), ``opencompass_vlmeval`` (both
  through EvalScope). Prompts and scorers are theirs.
- ``results`` and ``report``: what came out, and how it is shown.
"""
