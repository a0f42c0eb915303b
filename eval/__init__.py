"""Judgement: lm-eval on our own model and state, generation, inspection, baselines, tables and plots."""
