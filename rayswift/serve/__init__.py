"""Generation: engines, and the commands that use them.

In: arguments with a model, a checkpoint folder or an endpoint. Out: a served endpoint, a page, answers in a terminal or
in a result file. What every engine speaks is in ``generation``.

- ``infer``: ``chat`` is its conversation in the terminal; ``batch`` answers a dataset (``result_rows`` in and out,
  ``result_file``, ``scores``) from a source: one engine, or an ``engine_pool`` on the cluster (``vllm_pool``).
- engines (``engines`` chooses): ``transformers_engine`` in this process (SWIFT's ``pt``), ``endpoint`` over HTTP.
- ``app``: the chat page over an endpoint.
- ``deploy``: ``plan`` says what is served, ``application`` and ``replica`` serve it; ``running`` lends a deployment to
  the other commands.
"""
