"""The verbs: one public function per op. This room imports nothing of the others."""

# transformers looks for a distribution called `kernels` and reads this when loci-lm is run without being installed; a version
# this small never passes for the distribution that it wants.
__version__ = "0.1.0"
