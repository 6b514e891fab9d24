"""Models and adapters on local disk: load, adapt, count, merge.

In: a folder with ``config.json`` and safetensors weights (what ``rayswift.hub.resolve_model`` returns) and, for
adapters, the tuner arguments. Out: Transformers and PEFT objects, or a merged model folder.
Import from the modules ``loading``, ``adapters``, ``merging``; torch and Transformers are imported inside functions.
"""
