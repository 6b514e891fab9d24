"""A model behind an OpenAI endpoint: ``rayswift deploy``, and a deployment for the time of another command.

In: the arguments of a command with a model. Out: a port that answers. ``deploy`` checks and starts, ``application`` is
what Ray Serve builds, ``running`` lends a deployment to ``infer``, ``app`` and ``eval``. ``gateway`` is the one process
with the port, ``replica`` an engine with its OpenAI app; what passes between them is in ``lease``.
"""
