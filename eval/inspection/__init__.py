"""Instruments of `eval.inspect`: for each kind of part that has one, what is measured, how it looks, what can be taken away."""
