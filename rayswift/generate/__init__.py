"""All that answers: the Transformers generator, pools of engines, endpoints; for infer, deploy, sample and eval."""
