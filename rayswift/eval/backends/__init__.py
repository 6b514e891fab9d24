"""What scores answers: EvalScope, lm-eval, OpenCompass and VLMEvalKit behind one protocol."""
